"""The one exception that carries a sentence for the person at the keyboard.

Raise `UserError` where the cause lies in what was given (a file, a number, a name) and not in this
program: say what it is about, what was expected, what was found and what to do. The terminal prints it
without a traceback, ComfyUI shows it on the node.
"""


class UserError(ValueError):
    """What was given cannot be used; the message says why and what to do."""

    #: What the terminal's exit status is then.
    status = 1

    # ComfyUI shows it in front of the sentence, and calls modules in custom_nodes by their path.
    __module__ = "flux_poke.errors"


class WrongArguments(UserError):
    """The command was called in a way that it does not take."""

    status = 2
    __module__ = "flux_poke.errors"
