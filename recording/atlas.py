"""`atlas.safetensors`: where every MLP neuron of one model was strongest, each place in another image.

    atlas = Atlas.new(layout.family, fingerprint, recorder.results(), recorder.images)
    total = add_to_atlas(path, atlas)                # locked, atomic; other processes may do the same
    places = Atlas.load(path).sites["double-img-0"]
    atlas.images[places.image[1207, 0]].prompt       # what was drawn where neuron 1207 was strongest of all

An image gives a neuron one place, its strongest token at its strongest step; `PLACES` images at most are kept of each. Strong
is far from zero: a gated neuron may be strongest below it. Equally strong places come in the order of the images' keys, and
an image that two atlases hold counts once: so adding up is exact, in any order.

Keys, per site S, [width, places] each: `S.value` float32, `S.image` and `S.token` int32, `S.step` int16, and, where maps were
recorded, `S.map` uint8 [width, places, 8, 8]. The images are in the header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import UserError
from ..files import check_sum, check_writable, locked, write_safetensors
from ..flux.checkpoint import open_safetensors, require_format, undamaged, unreplaced
from ..flux.fingerprint import Fingerprint
from ..flux.layout import FAMILY_NAMES, Family
from ..parsing import from_json
from .internals import site_order
from .manifest import at_least, require_model

FORMAT = "flux-poke atlas 1"
#: Images that are kept of each neuron.
PLACES = 16
#: Cells along a side of a map.
MAP = 8
#: What is kept of every place, and what that takes on disk without its map.
PARTS = {"value": torch.float32, "image": torch.int32, "token": torch.int32, "step": torch.int16}
BYTES = sum(dtype.itemsize for dtype in PARTS.values())


@dataclass(frozen=True)
class AtlasImage:
    """An image that an atlas knows.

    `key` tells it from all others: it is made of its noise, text and noise levels, so that the same image drawn again has the
    same. `tokens` of the image stand in `rows` and `columns`, after `words` of text in a single block; `texts` are these
    words, where they are known; "" is padding, as are those at the end that it leaves out.
    """

    key: str
    rows: int
    columns: int
    words: int
    prompt: str | None = None
    seed: int | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Places:
    """The strongest places of the neurons of one MLP, strongest first, all [width, places].

    Attributes:
        value: activations as they enter the down projection, float32; 0 where there is no place.
        image: which of the atlas's images, int32; -1 where there is no place.
        token: which token of the stream, int32. A single block has the text before the image.
        step: at which step of the sampler, from 0, int16.
        map: how strong the neuron was over the image there, uint8 [width, places, 8, 8]: the strongest token of each cell, 255
            = as strong as `value`. None where it was not recorded.
    """

    value: Tensor
    image: Tensor
    token: Tensor
    step: Tensor
    map: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @classmethod
    def strongest(cls, parts: Sequence[Places]) -> Places:
        """The strongest of several, which all have maps or none."""
        names = parts[0].tensors
        found = {name: torch.cat([part.tensors[name] for part in parts], dim=1) for name in names}
        order = found["image"].argsort(dim=1, stable=True)  # among equals, the first image stays first
        strength = found["value"].abs().masked_fill(found["image"] < 0, -1).gather(1, order)
        order = order.gather(1, strength.argsort(dim=1, descending=True, stable=True))[:, :PLACES]
        taken = {name: _taken(tensor, order) for name, tensor in found.items()}
        there = taken["image"] >= 0
        columns = max(int(there.sum(1).max()), 1)  # those of no neuron are left out
        return cls(**{name: _where(there, tensor, name)[:, :columns].contiguous() for name, tensor in taken.items()})

    def of_images(self, numbers: Tensor) -> Places:
        """With image n called `numbers[n]`; places in those that are called -1 are none."""
        image = torch.cat((numbers.int(), torch.tensor([-1], dtype=torch.int32)))[self.image.long()]
        gone = image < 0
        return replace(self, value=self.value.masked_fill(gone, 0), image=image)


def _taken(tensor: Tensor, order: Tensor) -> Tensor:
    if tensor.ndim > order.ndim:
        order = order[..., None, None].expand(-1, -1, *tensor.shape[2:])
    return tensor.gather(1, order)


def _where(there: Tensor, tensor: Tensor, name: str) -> Tensor:
    """0, or of images -1, in places that are none."""
    gone = ~there if tensor.ndim == there.ndim else ~there[..., None, None]
    return tensor.masked_fill(gone, -1 if name == "image" else 0)


@dataclass(frozen=True)
class Atlas:
    """The strongest places of the neurons of `sites`, in `images`, which stand in the order of their keys."""

    family: Family
    fingerprint: Fingerprint
    sites: Mapping[str, Places]
    images: tuple[AtlasImage, ...]

    @classmethod
    def new(cls, family: Family, fingerprint: Fingerprint, sites: Mapping[str, Places], images: Iterable[AtlasImage]) -> Atlas:
        """What was just recorded; places name `images` by their number, in any order."""
        given = list(images)
        known = _each_once(given)
        numbers = _numbers(given, known)
        return cls(
            family, fingerprint, {name: Places.strongest([site.of_images(numbers)]) for name, site in sites.items()}, known
        )

    @property
    def mapped(self) -> bool:
        """Whether maps were recorded."""
        return any(site.map is not None for site in self.sites.values())

    def merge(self, other: Atlas, name: str = "the other atlas") -> Atlas:
        """Both together; raises `UserError` (calling `other` by `name`) where they are not of the same neurons."""
        require_model(other.fingerprint, self.fingerprint, name, "what it is to be added to")
        if self._kind() != other._kind():
            raise UserError(
                f"{name} is of {len(other.sites)} MLPs {'with' if other.mapped else 'without'} maps, and this atlas of "
                f"{len(self.sites)} {'with' if self.mapped else 'without'} them: record the same ones, or into another folder."
            )
        images = _each_once((*other.images, *self.images))
        known = {image.key for image in self.images}
        ours, theirs = _numbers(self.images, images), _numbers(other.images, images)
        theirs[[image.key in known for image in other.images]] = -1
        sites = {
            name: Places.strongest([site.of_images(ours), other.sites[name].of_images(theirs)])
            for name, site in self.sites.items()
        }
        return replace(self, sites=sites, images=images)

    def _kind(self) -> list:
        return [(name, len(site.value), site.map is None) for name, site in sorted(self.sites.items())]

    def save(self, path: str | os.PathLike[str]) -> None:
        tensors = {f"{name}.{part}": tensor for name, site in self.sites.items() for part, tensor in site.tensors.items()}
        images = json.dumps([asdict(image) for image in self.images])
        metadata = {"format": FORMAT, "model": self.fingerprint.to_json(), "family": self.family, "images": images}
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Atlas:
        """Raises `UserError` where the file is missing, damaged, or holds something else."""
        return unreplaced(path, lambda: cls._read(path))

    @classmethod
    def _read(cls, path: str | os.PathLike[str]) -> Atlas:
        with _opened(path) as (file, metadata):
            images = tuple(_image(found) for found in from_json(metadata["images"]))
            names = sorted({key.rpartition(".")[0] for key in file.keys()}, key=site_order)
            return cls(
                family=next(known for known in FAMILY_NAMES if known == metadata["family"]),
                fingerprint=Fingerprint.from_json(metadata["model"]),
                sites={name: _places(file, name, images) for name in names},
                images=images,
            )


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[safe_open, dict[str, str]]]:
    """An atlas and its header; what is found missing or wrong while it is read makes it a damaged one."""
    with open_safetensors(path) as file:
        metadata = require_format(file.metadata(), path, FORMAT, "atlas")
        with undamaged(path, "atlas"):
            yield file, metadata


def atlas_model(path: str | os.PathLike[str]) -> Fingerprint:
    """The model that an atlas is of, by its header alone."""

    def read() -> Fingerprint:
        with _opened(path) as (_, metadata):
            return Fingerprint.from_json(metadata["model"])

    return unreplaced(path, read)


def check_atlas(path: str | os.PathLike[str], fingerprint: Fingerprint, sites: Collection[str], maps: bool) -> None:
    """Raises `UserError` where what is recorded of these `sites` could not be added to the file at `path`, by its header."""
    if not Path(path).exists():
        return
    check_writable(path)

    def read() -> set[str]:
        with _opened(path) as (file, metadata):
            require_model(Fingerprint.from_json(metadata["model"]), fingerprint, path, "this one")
            return {*file.keys()}

    parts = (*PARTS, *(["map"] if maps else []))
    if unreplaced(path, read) != {f"{name}.{part}" for name in sites for part in parts}:
        raise UserError(
            f"{path} is an atlas of other MLPs, or {'without' if maps else 'with'} maps: record the same ones, or choose "
            "another name."
        )


def add_to_atlas(path: str | os.PathLike[str], new: Atlas) -> Atlas:
    """Adds what was recorded to the file at `path`, or makes it; the total. Safe beside other processes and against kills."""
    with locked(path):
        total = Atlas.load(path).merge(new, "This run") if Path(path).exists() else new
        total.save(path)
    return total


def merge_atlases(out: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]]) -> Atlas:
    """All of `files` together, written to `out`, which is a new file or one of them; the total.

    Raises `UserError`, with `out` as it was, where another file stands there, or they are not of the same neurons.
    """
    out = Path(out)
    with locked(out):
        check_sum(out, files, "those")
        total, *others = (Atlas.load(file) for file in files)
        for name, other in zip(files[1:], others, strict=True):
            total = total.merge(other, str(name))
        total.save(out)
    return total


def _each_once(images: Iterable[AtlasImage]) -> tuple[AtlasImage, ...]:
    """In the order of their keys; of two with one key, the later one."""
    return tuple(sorted({image.key: image for image in images}.values(), key=lambda image: image.key))


def _numbers(images: Iterable[AtlasImage], among: Sequence[AtlasImage]) -> Tensor:
    """Where each of `images` stands among others [images], int32."""
    place = {image.key: number for number, image in enumerate(among)}
    return torch.tensor([place[image.key] for image in images], dtype=torch.int32)


def _image(found: Mapping) -> AtlasImage:
    """Raises `ValueError`, `KeyError` or `TypeError` where this is no image."""
    sizes = {name: at_least(0, int(found[name])) for name in ("rows", "columns", "words")}
    prompt, seed = found["prompt"], found["seed"]
    return AtlasImage(
        f"{found['key']}", **sizes, prompt=None if prompt is None else f"{prompt}", seed=None if seed is None else int(seed),
        texts=tuple(f"{text}" for text in found["texts"]),
    )  # fmt: skip


def _places(file: safe_open, name: str, images: Sequence[AtlasImage]) -> Places:
    """Raises `ValueError` where this cannot have been recorded."""
    found = {part: file.get_tensor(f"{name}.{part}") for part in PARTS}
    width, count = found["value"].shape
    wrong = [part for part, dtype in PARTS.items() if found[part].shape != (width, count) or found[part].dtype != dtype]
    if f"{name}.map" in file.keys():
        found["map"] = file.get_tensor(f"{name}.map")
        wrong += [] if (found["map"].shape, found["map"].dtype) == ((width, count, MAP, MAP), torch.uint8) else ["map"]
    if wrong:
        raise ValueError(f"{name}.{wrong[0]} is not [{width}, {count}] of its type")
    places = Places(**found)
    if not places.value.isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite")
    if not ((places.image >= -1) & (places.image < len(images)) & (places.token >= 0) & (places.step >= 0)).all():
        raise ValueError(f"{name} names images, tokens or steps that there are none of")
    return places
