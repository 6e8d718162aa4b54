"""A FLUX from one layout into another.

    done = convert("flux1-dev.safetensors", "flux1-dev-diffusers", progress=progress)
    for row in done.rows: ...                        # what was read and written, renamed, split, quantised
    describe("flux1-dev-Q8_0.gguf")                  # what a file or folder is, in any layout

The name of what is written tells the layout: `.safetensors` is ComfyUI's, `.gguf` GGUF, and a folder diffusers'; orbax is
asked for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..files import check_not_read, check_replaces, check_writable, replacing_folder, size_text, stream_safetensors
from ..flux.checkpoint import open_safetensors
from ..flux.layout import FAMILY_NAMES
from ..progress import Progress, silent
from ..pruning import checkpoint
from ..pruning.certificate import certificate_text, read_certificate
from ..pruning.dense import KEPT, PRUNED_FORMAT
from ..pruning.plan import PruningPlan
from . import diffusers, gguf, orbax
from .source import Change, Form, Source, of_checkpoint, plain, require_whole


@dataclass(frozen=True)
class Converted:
    """What was read and what was written, and what was done to tensors between."""

    source: Source
    written: Source
    changes: tuple[Change, ...]

    @property
    def rows(self) -> list[Change]:
        """What, of how many tensors, and which or where."""
        return [("read", *_told(self.source)), *self.source.changes, *self.changes, ("written", *_told(self.written))]


def _told(source: Source) -> tuple[int, str]:
    files = f" in {source.files} files" if source.files > 1 else ""
    return source.stored, f"{source.path}: {source.form} layout{files}, {size_text(source.size)}"


def form_found(path: Path) -> Form:
    """The layout that a file or folder is in; raises `UserError` where it is not there, or no safetensors file."""
    if path.is_dir():
        return "orbax" if orbax.is_one(path) else "diffusers"
    if path.is_file():
        with open(path, "rb") as file:
            if path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF":
                return "GGUF"
    with open_safetensors(path) as opened:
        named = any(key.startswith(("transformer_blocks.", "single_transformer_blocks.")) for key in opened.keys())
    return "diffusers" if named else "ComfyUI"


def form_named(out: Path, folder: Form = "diffusers") -> Form:
    """The layout that the name of what is written asks for, `folder` where it is that of one; `UserError` for other files."""
    named: dict[str, Form] = {".safetensors": "ComfyUI", ".sft": "ComfyUI", ".gguf": "GGUF"}
    suffix = out.suffix.lower()
    if suffix in (".ckpt", ".pt", ".pth", ".bin", ".json") or (suffix in named and folder != "diffusers"):
        raise UserError(
            f"{out} is no name for what is written: expected NAME.safetensors, NAME.gguf, or a folder for {folder}."
        )
    return named.get(suffix, folder)


def open_source(path: str | os.PathLike[str]) -> Source:
    """A FLUX in any layout; raises `UserError` where it is none, damaged or incomplete."""
    path = Path(path)
    if path.suffix.lower() == ".json" and path.is_file():  # an index or a configuration stands for its folder
        path = path.parent
    read = {"ComfyUI": of_checkpoint, "diffusers": diffusers.read, "GGUF": gguf.read, "orbax": orbax.read}
    source = read[form_found(path)](path)
    require_whole(source)
    return source


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    folder: Form = "diffusers",
    type: str = gguf.TYPES[0],
    progress: Progress = silent,
) -> Converted:
    """Writes the FLUX at `path` to `out` in the layout that its name asks for; a folder's is `folder`, diffusers or orbax.

    `type` is what GGUF quantises to. One tensor is in memory at a time; orbax alone writes all together. Raises `UserError`,
    leaving `out` as it was, where the source is no whole FLUX, is in that layout already, or does not fit into it, and where
    something else stands at `out`.
    """
    out = Path(out)
    form = form_named(out, folder)
    source = open_source(path)
    if source.form == form:
        raise UserError(
            f"{path} is in {form} layout already: nothing to convert. Layouts go by the name of what is written: "
            "NAME.safetensors is ComfyUI's, NAME.gguf GGUF, and a folder diffusers'."
        )
    check_not_read(out, [path, source.path])
    if source.path.is_dir() and Path(os.path.realpath(source.path)) in Path(os.path.realpath(out)).parents:
        raise UserError(f"{out} is in {source.path}, which is what is read: choose a place beside it.")
    if form in ("diffusers", "GGUF"):  # which have no place for scales
        source = plain(source)
    if form == "ComfyUI":
        changes = _write_checkpoint(out, source, progress)
    elif form == "GGUF":
        _require_ours(out, form)
        changes = gguf.write(out, source, type, progress)
    elif form == "diffusers":
        diffusers.require_expressible(source.layout, source.path)
        with replacing_folder(out, diffusers.replaceable) as new:
            changes = diffusers.write(new, source, progress)
    else:
        with replacing_folder(out, orbax.replaceable) as new:
            changes = orbax.write(new, source, progress)
    written = open_source(out)
    if written.rounding is None and not written.fingerprint().matches(source.fingerprint()):
        raise UserError(f"{out} does not hold the numbers of {path}, which may be the disk's fault: write it again.")
    return Converted(source, written, changes)


def _require_ours(out: Path, form: Form) -> None:
    """Raises `UserError` where a file stands at `out` that is not a FLUX in layout `form`."""
    check_writable(out)
    if not out.exists():
        return
    try:
        found = form_found(out)
        if found == form:
            open_source(out)
            return
    except UserError as error:
        raise UserError(f"{out} is something else than a FLUX, and is not replaced: choose another name. ({error})") from error
    raise UserError(f"{out} is a FLUX in {found} layout, and is not replaced by one in {form} layout: choose another name.")


def _write_checkpoint(out: Path, source: Source, progress: Progress) -> tuple[Change, ...]:
    _require_ours(out, "ComfyUI")
    check_replaces(out, source.metadata.get("format"))
    done = iter(range(1, len(source.kinds) + 1))

    def tensor(key: str) -> Tensor:
        progress(f"writing {key}", next(done), len(source.kinds))
        return source.tensor(key)

    stream_safetensors(out, source.kinds, tensor, source.metadata)
    return ()


def describe(path: str | os.PathLike[str]) -> str:
    """What a FLUX in any layout is, as text; raises `UserError` where it is none."""
    if form_found(Path(path)) == "ComfyUI":
        return checkpoint.inspect(path)
    source = open_source(path)
    layout, pruned = source.layout, source.metadata.get("format") == PRUNED_FORMAT
    said = [
        f"{FAMILY_NAMES[layout.family]}{', pruned' if pruned else ''}, in {source.form} layout: {layout.depth} double and "
        f"{layout.depth_single} single blocks, hidden {layout.hidden}, {layout.neurons:,} MLP neurons, {source.parameters:,} "
        "parameters"
    ]
    if pruned:
        kept = {key.removeprefix(KEPT): source.read(key) for key in source.kinds if key.startswith(KEPT)}
        try:
            said += [certificate_text(read_certificate(found)) for found in [source.metadata.get("certificate")] if found]
            said.append(PruningPlan.from_header(source.metadata, kept).table())
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} has a damaged plan ({error}): convert it again.") from error
    if source.rounding is not None:
        said.append(f"relative squared error of the quantised weights: {source.rounding:.3g}")
    return "\n".join(said)
