"""A FLUX as an orbax checkpoint: a folder with `config.json` and `transformer/state`.

    source = read("flux-orbax")
    write(folder, source, progress)

`transformer/state` is what `orbax.checkpoint.PyTreeCheckpointer` saves of a flat dictionary: the checkpoint's names and
arrays, bf16 and 8-bit floats as ml_dtypes has them. `config.json` holds `format`, `family`, and the header of the ComfyUI file.
Needs the orbax-checkpoint package (the extra "orbax").
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import kind_of, torch_type, write_text
from ..flux.layout import FAMILY_NAMES, read_layout
from ..parsing import from_json, read_text
from ..progress import Progress, silent
from .source import Change, Kind, Source

CONFIG, STATE = "config.json", Path("transformer", "state")
FORMAT = "flux-poke orbax 1"


def read(path: Path) -> Source:
    """A folder that `write` filled; raises `UserError` where it is damaged or something else."""
    config, ocp = _config(path), _package()
    state = (path / STATE).resolve()
    with _reading(path), ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(state).item_metadata.tree
        kinds: dict[str, Kind] = {
            str(key): (_word(str(array.dtype)), tuple(map(int, array.shape))) for key, array in tree.items()
        }
    layout = read_layout({key: shape for key, (_, shape) in kinds.items()}, str(path))

    def tensor(key: str) -> Tensor:
        wanted = ocp.args.PyTreeRestore(
            item={key: 0}, restore_args={key: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True
        )
        with _reading(path), ocp.PyTreeCheckpointer() as checkpointer:
            array = np.ascontiguousarray(checkpointer.restore(state, args=wanted)[key])
        return torch.from_numpy(array.reshape(-1).view(np.uint8).copy()).view(torch_type(kinds[key][0])).reshape(kinds[key][1])

    files = [file for file in path.rglob("*") if file.is_file()]
    return Source(
        path, "orbax", layout, kinds, tensor, lambda key, index: tensor(key)[index], config["header"], (), len(kinds),
        sum(file.stat().st_size for file in files), len(files),
    )  # fmt: skip


def write(folder: Path, source: Source, progress: Progress = silent) -> tuple[Change, ...]:
    """Writes `source` into the empty `folder`. orbax writes all arrays together; what is read of a file are its own pages."""
    import ml_dtypes

    ocp = _package()
    state: dict[str, np.ndarray] = {}
    for number, (key, (_, shape)) in enumerate(source.kinds.items()):
        progress(f"reading {key}", number, 2 * len(source.kinds))
        tensor = source.tensor(key).contiguous()
        name = str(tensor.dtype).removeprefix("torch.")
        dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
        state[key] = tensor.reshape(-1).view(torch.uint8).numpy().view(dtype).reshape(shape)
    progress("writing with orbax", 1, 2)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((folder / STATE).resolve(), state)
    config = {"format": FORMAT, "family": FAMILY_NAMES[source.layout.family], "header": dict(source.metadata)}
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return ()


def is_one(path: Path) -> bool:
    """Whether a folder is laid out so."""
    return (path / STATE).is_dir()


def replaceable(folder: Path) -> str | None:
    """What in a folder is not of such a checkpoint; None where all of it is."""
    found = sorted(entry.name for entry in folder.iterdir())
    foreign = next((name for name in found if name not in (CONFIG, STATE.parts[0])), None)
    if foreign is None and found:
        try:
            _config(folder)
        except UserError:
            return found[0]
        inner = sorted(entry.name for entry in (folder / STATE.parts[0]).iterdir())
        foreign = next((f"{STATE.parts[0]}/{name}" for name in inner if name != STATE.parts[1]), None)
    return foreign


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = from_json(read_text(folder / CONFIG))
        if found["format"] == FORMAT:
            return {**found, "header": {str(key): str(value) for key, value in found["header"].items()}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{folder} has no {CONFIG} of '{FORMAT}', which tells whose state it is: expected what `convert` writes.")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What orbax has to say about a damaged folder as a sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path / STATE} cannot be read by orbax ({said}): it is damaged. Copy it again.") from error


def _package() -> Any:
    try:
        import orbax.checkpoint
    except ImportError:
        raise UserError('orbax needs the orbax-checkpoint package: pip install "flux-poke[orbax]".') from None
    return orbax.checkpoint


def _word(name: str) -> str:
    """numpy's name of a type in the words of the safetensors format."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"An array of this checkpoint is {name}, which torch has no type for.")
    return kind_of(torch.empty(0, dtype=dtype))[0]
