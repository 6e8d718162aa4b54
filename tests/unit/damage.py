"""What can be wrong with a file, as hypothesis strategies: bits, headers, numbers, words."""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

Draw = Callable[[st.SearchStrategy], Any]

#: Damage is told by what it was, not by the least of its kind: nothing is shrunk.
ALIKE: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [*HealthCheck],
    "phases": [Phase.generate],
}

#: What a program that wrote the file never puts there.
ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "nan", "1e999", "-1", "../x",
    "/", "\x00", "\ud800", "a" * 5000, [], [[]], [0], {}, {"": None}, [None] * 3,
]  # fmt: skip


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where in parsed JSON something stands."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def changed(draw: Draw, value: Any) -> Any:
    """Parsed JSON with one place changed, lost, or there twice."""
    path = draw(st.sampled_from(places(value)))
    odd = draw(st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=8)))
    if not path:
        return odd
    whole = copy.deepcopy(value)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    how = draw(st.sampled_from(["other", "lost", "twice"]))
    if how == "other":
        inner[path[-1]] = odd
    elif how == "lost":
        del inner[path[-1]]
    elif isinstance(inner, list):
        inner.insert(path[-1], inner[path[-1]])
    else:
        inner[f"{path[-1]}x"] = inner[path[-1]]
    return whole


def damaged_bytes(draw: Draw, data: bytes) -> bytes:
    """Cut short, with a few bytes changed, put in or lost, or something else altogether."""
    at = draw(st.integers(0, max(0, min(len(data) - 1, 4000) if draw(st.booleans()) else len(data) - 1)))
    other = draw(st.binary(min_size=1, max_size=9))
    how = draw(st.sampled_from(["short", "changed", "longer", "lost", "other"]))
    return {
        "short": data[:at],
        "changed": data[:at] + other + data[at + len(other) :],
        "longer": data[:at] + other + data[at:],
        "lost": data[:at] + data[at + len(other) :],
        "other": other,
    }[how]


def damaged_json(draw: Draw, data: bytes) -> bytes:
    how = draw(st.sampled_from(["changed", "changed", "changed", "bytes", "deep"]))
    if how == "bytes":
        return damaged_bytes(draw, data)
    if how == "deep":
        return nested(draw(st.sampled_from([10, 900, 100_000]))).encode()
    return json.dumps(changed(draw, json.loads(data))).encode()


def damaged_lines(draw: Draw, data: bytes) -> bytes:
    """Of a text that is neither JSON nor meant for machines alone: YAML, prompts."""
    how = draw(st.sampled_from(["bytes", "line", "deep"]))
    if how == "bytes":
        return damaged_bytes(draw, data)
    if how == "deep":
        return f"a: {nested(draw(st.sampled_from([10, 900, 100_000])))}".encode()
    lines = data.decode().splitlines() or [""]
    number = draw(st.integers(0, len(lines) - 1))
    odd = draw(st.one_of(st.sampled_from([str(value) for value in ODD if value != "\ud800"]), st.text(max_size=8)))
    key, colon, _ = lines[number].partition(":")
    lines[number] = f"{key}{colon} {odd}" if colon else odd
    return "\n".join(lines).encode("utf-8", "replace")


def damaged_safetensors(draw: Draw, data: bytes) -> bytes:
    """One that lies about itself, or a sound one that holds what it should not."""
    how = draw(st.sampled_from(["bytes", "header", "word", "word", "tensor", "tensor"]))
    if how == "bytes":
        return damaged_bytes(draw, data)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if how == "header":
        text = json.dumps(changed(draw, header)).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]
    tensors, metadata = load(data), header.get("__metadata__") or {}
    if how == "word" and metadata:
        key = draw(st.sampled_from(sorted(metadata)))
        try:
            parsed = json.loads(metadata[key])
        except ValueError:
            parsed = metadata[key]
        new = changed(draw, parsed)
        metadata[key] = new if isinstance(new, str) and not isinstance(parsed, list | dict) else json.dumps(new)
        metadata[key] = metadata[key].encode("utf-8", "replace").decode()
    elif tensors:
        key = draw(st.sampled_from(sorted(tensors)))
        new = other_tensor(draw, tensors.pop(key))
        if new is not None:
            tensors[draw(st.sampled_from([key, key, key, f"{key}x", "x", "double-img-7"]))] = new
    return save(tensors, metadata)


def other_tensor(draw: Draw, tensor: Tensor) -> Tensor | None:
    """Another type or shape, numbers that are none, or nothing."""
    how = draw(st.sampled_from(["nan", "inf", "negative", "huge", "zero", "type", "flat", "more", "less", "scalar", "none"]))
    if how in ("nan", "inf", "huge", "negative"):
        value = {"nan": float("nan"), "inf": float("inf"), "huge": 3e38, "negative": -1.0}[how]
        new = tensor.clone()
        if new.numel() and new.dtype not in (torch.bool, torch.uint8):
            place = draw(st.integers(0, new.numel() - 1))
            if new.is_floating_point():
                new.view(-1)[place] = value
            else:
                new.view(-1)[place] = -1 if how == "negative" else torch.iinfo(new.dtype).max
        return new
    return {
        "zero": torch.zeros_like(tensor),
        "type": tensor.to(draw(st.sampled_from([torch.float16, torch.int64, torch.uint8, torch.float64, torch.bool]))),
        "flat": tensor.reshape(-1).clone(),
        "more": torch.cat([tensor, tensor]) if tensor.ndim else tensor.expand(2).clone(),
        "less": tensor[: len(tensor) // 2].clone() if tensor.ndim else tensor,
        "scalar": torch.tensor(1.0),
        "none": None,
    }[how]


def register_profiles() -> None:
    """`HYPOTHESIS_PROFILE=hours` gives every reader as many as a night takes, and others each time."""
    settings.register_profile("few", max_examples=60, derandomize=True, **ALIKE)
    settings.register_profile("hours", max_examples=20_000, **ALIKE)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))
