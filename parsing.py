"""JSON, YAML, pictures and numbers that anybody may have given: what they say, or a `ValueError` that says why not.

    found = from_json(header["plan"])
    found = from_yaml(read_text(path))
    picture = read_image(path, "RGB")
    steps = number(given, least=1, most=1000, whole=True)

No text is taken that holds numbers that are not finite, half characters, or what is nested too deep to walk through.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Iterator
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

#: Most pixels of a picture, which take four bytes each, and what it may be: Pillow has others read by programs of their own.
MOST_PIXELS, PICTURES = 100_000_000, ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
#: Most bytes of a text, and most brackets within brackets. A graph of ComfyUI's is nested less than 20 deep.
MOST_BYTES, DEEPEST = 256_000_000, 100


def read_text(path: str | os.PathLike[str]) -> str:
    """The file as UTF-8, with or without a mark at its beginning; raises `OSError`, or `ValueError` where it is none."""
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES // 10**6} MB")
    return data.decode("utf-8-sig")


def from_json(text: str | bytes, halves: bool = False) -> Any:
    """What JSON says; raises `ValueError` where it is none, or says what no program should go on with.

    With `halves`, texts may hold half characters, which UTF-8 cannot write.
    """
    try:
        found = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from None
    if max(_depths(found)) > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    if not halves and (b"\\u" in text if isinstance(text, bytes) else "\\u" in text) and _halves(found):
        raise ValueError("it holds half a character")
    return found


def from_yaml(text: str) -> Any:
    """What YAML says; raises `ValueError` as `from_json`, and where parts of it stand for others."""
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} deep")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it uses aliases (*): write out what they stand for")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def finite(value: object, name: str, least: float = 0.0) -> float:
    """A number that JSON said; raises `ValueError` where it is none, not finite, or less than `least`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= sys.float_info.max:
        raise ValueError(f"it says {value!r:.100} of {name}, expected a finite number from {least:g} on")
    return float(value)


def read_image(source: str | os.PathLike[str] | bytes, mode: str = "RGB") -> Image:
    """A picture, read whole; raises `OSError`, or `ValueError` where it is none, damaged or too large."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=PICTURES) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise ValueError(f"it has {picture.width} x {picture.height} pixels, more than {MOST_PIXELS:,}")
            return picture.convert(mode)
    except (OSError, ValueError):
        raise
    except Exception as error:  # what decoders raise on damaged files is of any kind
        raise ValueError(f"{type(error).__name__}: {error}") from error


def number(given: object, least: float = -math.inf, most: float = math.inf, whole: bool = False) -> float:
    """A finite number from `least` to `most`, and where it is to be `whole`, an int; raises `ValueError` where it is none."""
    # NaN is within every range: it is neither below the least nor above the most
    finite = isinstance(given, Integral) or (isinstance(given, Real) and math.isfinite(given))
    if not finite or (whole and given != int(given)) or not least <= given <= most:  # type: ignore[call-overload, operator]
        kind = "a whole number" if whole else "a finite number"
        raise ValueError(f"expected {kind} from {least} to {most}, found {_short(given)}")
    return int(given) if whole else given  # type: ignore[call-overload, return-value]


def _short(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:  # of more digits than Python writes
        return "one of more than 4,300 digits"
    return shown if len(shown) <= 40 else f"{shown[:30]}... ({len(shown)} characters)"


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {number[:20]}, which is not finite")
    return value


def _depths(value: Any) -> Iterator[int]:
    """How deep the values in parsed JSON stand, the whole being at 0."""
    waiting = [(value, 0)]
    while waiting:
        found, depth = waiting.pop()
        yield depth
        inner = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
        waiting += ((part, depth + 1) for part in inner)


def _halves(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
