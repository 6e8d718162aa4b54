"""What nodes are called with: numbers within their range and texts that can be written down, wherever they come from.

ComfyUI compares what a graph says with the range that an input declares, which NaN passes, and never what a link brings. What
`fingerprint_inputs` raises it writes to its log, and its queue stands still for good where half a character is in that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..errors import UserError
from ..parsing import number

#: Most characters of a text of one line, and of several.
LONGEST, LONGEST_LINES = 100_000, 10_000_000


def checking(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, whose `execute` raises `UserError` before it does anything where an input is not as its schema says.

    Its `fingerprint_inputs` raises nothing: `execute`, which is called then, says what is wrong.
    """
    execute, title = vars(node)["execute"].__func__, node.define_schema().display_name
    declared = {entry.id: entry for entry in node.define_schema().inputs}

    @functools.wraps(execute)
    def checked(cls: type[io.ComfyNode], **given: Any) -> io.NodeOutput:
        return execute(cls, **{name: _checked(title, declared.get(name), value) for name, value in given.items()})

    node.execute = classmethod(checked)  # type: ignore[method-assign, assignment]
    told = node.fingerprint_inputs.__func__  # type: ignore[attr-defined]
    if told is not io.ComfyNode.fingerprint_inputs.__func__:  # type: ignore[attr-defined]

        @functools.wraps(told)
        def fingerprint(cls: type[io.ComfyNode], **given: Any) -> Any:
            try:
                return told(cls, **given)
            except Exception:
                return math.nan

        node.fingerprint_inputs = classmethod(fingerprint)  # type: ignore[method-assign, assignment]
    return node


def _checked(title: str | None, entry: io.Input | None, value: Any) -> Any:
    if entry is None or (entry.optional and value is None):
        return value
    try:
        if isinstance(entry, io.Int.Input | io.Float.Input):
            return number(value, **_range(entry), whole=isinstance(entry, io.Int.Input))
        if isinstance(entry, io.String.Input | io.Combo.Input):
            return _text(value, LONGEST_LINES if isinstance(entry, io.String.Input) and entry.multiline else LONGEST)
    except ValueError as error:
        raise UserError(f"{title}: {entry.id} cannot be used: {error}. Change it, or what is linked to it.") from error
    return value


def _range(entry: io.Input) -> Mapping[str, float]:
    """Any number is a seed: that the page draws it from a range of its own is no reason to refuse what a link brings."""
    if getattr(entry, "control_after_generate", None):
        return {}
    ends = {"least": getattr(entry, "min", None), "most": getattr(entry, "max", None)}
    return {end: value for end, value in ends.items() if value is not None}


def _text(value: object, longest: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, found {type(value).__name__}")
    if len(value) > longest:
        raise ValueError(f"expected a text of at most {longest:,} characters, found {len(value):,}")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("expected a text, found NUL or half a character in it")
    return value
