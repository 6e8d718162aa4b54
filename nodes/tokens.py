"""The words of a text as its encoder takes it apart.

token_texts(clip, "three cats", context)          # ("three", "cat", "s", "</s>"), and padding
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def token_texts(clip: Any, prompt: str, context: Tensor) -> tuple[str, ...]:
    """The tokens of `prompt` in the order of the words of `context` [words, width] that a model reads, "" for padding, of which
    none is at the end.

    Empty where the text encoder does not tell them, or they are not as many: then the model read another text, or more.
    """
    try:
        tokens = clip.tokenize(prompt)
        name = "t5xxl" if "t5xxl" in tokens else "".join(tokens)  # of several, FLUX.1 reads this one
        (batch,) = tokens[name]
        part = getattr(clip.tokenizer, name, None) or getattr(clip.tokenizer, f"clip_{name}", None) or clip.tokenizer
        found = [_text(part, token) for token in batch]
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError):  # an encoder of another kind
        return ()
    before = int((context == 0).all(-1).long().cumprod(0).sum())  # ComfyUI sets zeros before FLUX.2's texts
    if before + len(found) != len(context):
        return ()
    found = [""] * before + found
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def _text(tokenizer: Any, token: tuple) -> str:
    number = token[0]
    if not isinstance(number, int):
        return "(embedding)"
    if number == getattr(tokenizer, "pad_token", None):
        return ""
    decode = getattr(getattr(tokenizer, "tokenizer", None), "decode", None)
    spoken = decode([number]) if decode else ""
    return spoken.strip() or repr(spoken or tokenizer.untokenize([token])[0][1])[1:-1]  # a line's end as \\n
