"""The atlas as a folder of static files that any browser opens from the disk: `index.html`.

    write_atlas_page(Recording.open("digits"), Path("digits/page"), Checkpoint("flux.safetensors"))

A neuron is shown by the parts of the pictures around the tokens where it was strongest, and where they were recorded by how
strong it was all over them; by how often it fires, where internals are recorded; with its model, by the neurons that write
alike, and where rows are recorded too, by a histogram of its activations; and with an autoencoder as well, by what it writes.
An MLP's numbers are read when it is looked at, so that the page opens at once whatever the size of the model.
"""

from __future__ import annotations

import base64
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..files import check_folder, replacing_folder
from ..flux.autoencoder import to_picture
from ..flux.checkpoint import Checkpoint
from ..flux.fingerprint import Fingerprint
from ..flux.layout import FAMILY_NAMES
from ..flux.weights import SiteWeights
from ..progress import Progress, silent
from ..recording.atlas import Atlas
from ..recording.recording import Recording
from ..recording.store import HiddenStates
from .decoding import Decode
from .lens import Lens
from .written import Writer, decoded

INDEX, DATA, SITES, PICTURES = "index.html", "atlas.js", "sites", "pictures"
#: Neurons that write alike, of each; bins of a histogram, and rows that it is made of at most.
NEAR, BINS, ROWS = 5, 40, 8192
#: Neurons that are compared with all others at once.
TOGETHER = 1024


def write_atlas_page(
    recording: Recording,
    out: Path,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
    decode: Decode | None = None,
    lens: Lens | None = None,
) -> Atlas:
    """Writes the page to the folder `out`, in the place of one that is there; the atlas that it shows.

    With `decode`, the autoencoder of the checkpoint, also what neurons write, through the `lens` if there is one. Raises
    `UserError` where there is no atlas, `out` holds something else, or `checkpoint` or `lens` are not of the model it is of.
    """
    check_page(out)
    atlas = recording.atlas()
    if checkpoint is not None:
        recording.require(Fingerprint.of_checkpoint(checkpoint), str(checkpoint.path))
    internals = recording.internals().sites if "internals" in recording.kinds else {}
    rows = recording.states() if "rows" in recording.kinds and checkpoint is not None else None
    writer = Writer.of(checkpoint, checkpoint.layout, lens) if checkpoint is not None and decode is not None else None
    drawn = {image.key for image in atlas.images if recording.atlas_picture(image.key).is_file()}
    with replacing_folder(out, _foreign) as folder:
        (folder / SITES).mkdir()
        (folder / PICTURES).mkdir()
        for key in sorted(drawn):
            shutil.copyfile(recording.atlas_picture(key), folder / PICTURES / f"{key}.png")
        for done, (name, places) in enumerate(atlas.sites.items()):
            progress(f"writing the page of {name}", done, len(atlas.sites))
            found, side = dict(places.tensors), 0
            if name in internals and len(internals[name].fires) == len(places.value):
                found["rate"] = internals[name].rate.float()
            if checkpoint is not None:
                weights = SiteWeights.read(checkpoint, checkpoint.layout.site(name))
                found |= _alike(weights.down)
                if rows is not None:
                    found |= _histogram(weights, rows)
                if writer is not None and decode is not None:
                    latents = writer.latents(weights.site, weights.down, places.value[:, 0])
                    side = 0 if latents is None else _write_together(folder / SITES / f"{name}.jpg", latents, decode)
                checkpoint.release()
            about = {"name": name, "stream": _stream(name), "width": len(places.value), "places": places.value.shape[1]}
            about["written"] = side
            _write_script(folder / SITES / f"{name}.js", "takeSite", about | {key: _coded(part) for key, part in found.items()})
        sites = [{"name": name, "width": len(places.value)} for name, places in atlas.sites.items()]
        images = [asdict(image) | {"picture": image.key in drawn} for image in atlas.images]
        told = {"model": FAMILY_NAMES[atlas.family], "sites": sites, "images": images}
        _write_script(folder / DATA, "takeAtlas", told)
        shutil.copyfile(Path(__file__).with_name("atlas.html"), folder / INDEX)
    progress("written", 1, 1)
    return atlas


def check_page(out: Path) -> None:
    """Raises `UserError` where something else than such a page stands at `out`."""
    check_folder(out, _foreign)


def _foreign(folder: Path) -> str | None:
    return next((path.name for path in folder.iterdir() if path.name not in (INDEX, DATA, SITES, PICTURES)), None)


def _stream(name: str) -> str:
    return "single" if name.startswith("single") else name.split("-")[1]


def _alike(down: Tensor) -> dict[str, Tensor]:
    """The neurons whose columns of `down` [hidden, width] point most alike: `near` and `cosine` [width, 5]."""
    unit = F.normalize(down.T, dim=1)
    near, cosine = [], []
    for start in range(0, len(unit), TOGETHER):
        alike = unit[start : start + TOGETHER] @ unit.T
        alike.diagonal(start).fill_(-2)  # itself
        found = alike.topk(min(NEAR, len(unit) - 1), dim=1)
        near.append(found.indices.int())
        cosine.append(found.values)
    return {"near": torch.cat(near), "cosine": torch.cat(cosine)}


def _histogram(weights: SiteWeights, store: HiddenStates) -> dict[str, Tensor]:
    """How often each neuron had which activation over recorded rows: `counts` [width, bins] from `low` to `high` [width]."""
    rows = next(store.rows(weights.site.name, size=ROWS), None)
    if rows is None:
        return {}
    h = weights.activations(rows.x.float())
    low, high = h.amin(0), h.amax(0)
    step = ((high - low) / BINS).clamp(min=torch.finfo(torch.float32).tiny)
    bins = ((h - low) / step).long().clamp(0, BINS - 1)
    counts = torch.zeros(h.shape[1], BINS, dtype=torch.int32).scatter_add_(
        1, bins.T, torch.ones_like(bins.T, dtype=torch.int32)
    )
    return {"counts": counts, "low": low, "high": high}


def _write_together(path: Path, latents: Tensor, decode: Decode) -> int:
    """What neurons write, as one picture of rows of as many; how many these are."""
    side = math.ceil(math.sqrt(len(latents)))
    whole = None
    for number, pixels in enumerate(decoded(latents, decode)):
        picture = to_picture(pixels)
        whole = whole or Image.new("RGB", (side * picture.width, side * picture.height))
        whole.paste(picture, (number % side * picture.width, number // side * picture.height))
    if whole is not None:
        whole.save(path, quality=90)
    return side


def _coded(numbers: Tensor) -> str:
    return base64.b64encode(numbers.contiguous().numpy().tobytes()).decode()


def _write_script(path: Path, function: str, told: Mapping) -> None:
    path.write_text(f"{function}({json.dumps(told)})\n", encoding="utf-8")
