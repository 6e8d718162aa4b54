"""Pictures and what they are called: what a training draws its batches from.

    examples = load_examples(config.data, seed)
    examples.images                                  # [pictures, 3, side, side] in 0..1
    examples.captions[7]                             # every caption that may stand for picture 7

Digits of scikit-learn, images and labels in MNIST's idx files or an .npz, or a folder of pictures with captions: `name.txt`
beside `name.png` (one caption a line), or a `metadata.jsonl` or `metadata.csv` with `file_name` and `text`, as Hugging Face's
ImageFolder has them.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from ..parsing import MOST_BYTES, from_json, read_image, read_text
from ..tiny.data import digit_images
from ..tiny.words import DIGIT_WORDS, TEMPLATES
from .config import Data

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
#: numpy's types by the third byte of an idx file (yann.lecun.com/exdb/mnist).
_IDX = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


@dataclass(frozen=True)
class Examples:
    """Pictures [pictures, 3, side, side] in 0..1, and for each the captions of which a batch takes one."""

    images: Tensor
    captions: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.images)


def load_examples(data: Data, seed: int = 0) -> Examples:
    """The pictures that a configuration names; `seed` says which come together where a picture shows several.

    Raises `UserError` where they are not there, or are something else.
    """
    if data.kind == "folder":
        images, captions = _folder(Path(data.path or ""), data)
        return Examples(_in_channels(images, data.channels), captions)
    if data.kind == "digits":
        images, labels = digit_images()
    else:
        images, labels = _arrays(Path(data.path or ""), Path(data.labels) if data.labels else None)
    names = _names(data, labels)
    if data.per_picture == 1:
        images, shown = _sized(images, data.side), labels[:, None]
    else:
        images, shown = _composed(images, labels, data, seed)
    templates = data.templates or TEMPLATES
    return Examples(_in_channels(images, data.channels), [_captions(row, names, templates) for row in shown.tolist()])


def _captions(labels: Sequence[int], names: Sequence[Sequence[str]], templates: Sequence[str]) -> list[str]:
    """What a picture of these labels may be called: every template, with each way of naming them."""
    ways = range(max(len(names[label]) for label in labels))
    called = [" ".join(names[label][way % len(names[label])] for label in labels) for way in ways]
    if len(labels) > 1 and len(ways) > 1:  # "3 five 7", "three 5 seven"
        for first in ways:
            mixed = (names[label][(first + place) % len(names[label])] for place, label in enumerate(labels))
            called.append(" ".join(mixed))
    return [template.format(name) for template in templates for name in called]


def _names(data: Data, labels: Tensor) -> list[list[str]]:
    """Each label's names: those of the configuration, or the digit as a word and as a numeral."""
    found = [[name] for name in data.names] if data.names else [[word, str(n)] for n, word in enumerate(DIGIT_WORDS)]
    least, most = labels.min().item(), labels.max().item()
    if least < 0 or most >= len(found):
        raise UserError(
            f"The labels of {data.path} go from {least} to {most}, and there are names for 0 to {len(found) - 1}: give `names` "
            "in section data, one for each label."
        )
    return found


def _composed(images: Tensor, labels: Tensor, data: Data, seed: int) -> tuple[Tensor, Tensor]:
    """As many pictures as there are images, of `per_picture` random ones each in reading order, and their labels."""
    each = data.per_picture
    across = math.ceil(math.sqrt(each))
    rows = math.ceil(each / across)
    cell = data.side // across
    small, top = _sized(images, cell), (data.side - rows * cell) // 2
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (len(images), each), generator=generator)
    canvas = torch.zeros(len(images), images.shape[1], data.side, data.side)
    for place in range(each):
        row, column = divmod(place, across)
        y, x = top + row * cell, column * cell
        canvas[:, :, y : y + cell, x : x + cell] = small[chosen[:, place]]
    return canvas, labels[chosen]


def _sized(images: Tensor, side: int) -> Tensor:
    if images.shape[-2:] == (side, side):
        return images
    smaller = side < images.shape[-1]
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=smaller).clamp(0, 1)


def _in_channels(images: Tensor, channels: int) -> Tensor:
    grey = images.mean(1, keepdim=True) if channels == 1 and images.shape[1] == 3 else images
    return grey.expand(-1, 3, -1, -1).contiguous()


def _arrays(path: Path, labels: Path | None) -> tuple[Tensor, Tensor]:
    """Images [n, 1 or 3, height, width] in 0..1 and labels [n] of an .npz or of two idx files."""
    if path.suffix == ".npz":
        images, found = _npz(path)
    elif labels is None:
        raise UserError(f"{path} is taken for an idx file: name the file of its labels as `labels` in section data.")
    else:
        images, found = _idx(path), _idx(labels)
    if images.ndim == 4 and images.shape[-1] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    images = images[:, None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1] not in (1, 3) or found.shape != images.shape[:1] or not len(images):
        raise UserError(
            f"{path} holds images of the shape {images.shape} and labels of the shape {found.shape}; expected [n, height, "
            "width], with 1 or 3 channels before or after the sides if any, and [n]."
        )
    whole = np.issubdtype(images.dtype, np.integer)
    scaled = images.astype(np.float32) / (255 if whole else 1)
    if not np.isfinite(scaled).all() or scaled.min() < 0 or scaled.max() > 1:
        raise UserError(f"{path} holds images that are not in 0 to {255 if whole else 1}: scale them, or save them as uint8.")
    return torch.from_numpy(scaled), torch.from_numpy(found.astype(np.int64))


def _npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`images` and `labels`, or Keras' `x_train` and `y_train`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            for images, labels in (("images", "labels"), ("x_train", "y_train")):
                if images in file and labels in file:
                    return file[images], file[labels]
            found = ", ".join(file) or "nothing"
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read as an .npz ({error}).") from error
    raise UserError(f"{path} holds {found}; expected images and labels, or x_train and y_train.")


def _idx(path: Path) -> np.ndarray:
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            with gzip.open(path) as file:
                content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES // 10**6} MB")
        kind, dims = _IDX[content[2]], content[3]
        if content[:2] != b"\0\0":
            raise ValueError("it does not begin with two zeros")
        shape = np.frombuffer(content, ">i4", dims, 4)
        return np.frombuffer(content, kind, int(np.prod(shape, dtype=np.int64)), 4 + 4 * dims).reshape(shape)
    except (OSError, ValueError, KeyError, IndexError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read as an idx file, as MNIST's are ({error}).") from error


def _folder(path: Path, data: Data) -> tuple[Tensor, list[list[str]]]:
    from PIL import Image, ImageOps

    if not path.is_dir():
        raise UserError(f"{path} is no folder: expected pictures with captions.")
    named = _captions_file(path)
    files = [path / name for name in named] or sorted(f for f in path.iterdir() if f.suffix.lower() in PICTURES)
    captions = list(named.values()) or [_caption_beside(file) for file in files]
    if not files:
        raise UserError(f"{path} holds no pictures ({', '.join(PICTURES)}).")
    images = []
    for file in files:
        try:
            rgba = read_image(file, "RGBA")
            on_white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            sized = ImageOps.pad(on_white, (data.side, data.side), Image.Resampling.LANCZOS, "white")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as a picture ({error}).") from error
        images.append(torch.from_numpy(np.array(sized)).permute(2, 0, 1))
    templates = data.templates or ("{}",)
    said = [[template.format(caption) for template in templates for caption in some] for some in captions]
    return torch.stack(images).float() / 255, said


def _caption_beside(file: Path) -> list[str]:
    try:
        lines = file.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} has no caption that can be read ({error}): expected {file.stem}.txt beside it, or metadata.jsonl or "
            "metadata.csv for the whole folder."
        ) from error
    if captions := [line.strip() for line in lines if line.strip()]:
        return captions
    raise UserError(f"{file.with_suffix('.txt')} is empty: expected captions, one a line.")


def _captions_file(folder: Path) -> dict[str, list[str]]:
    """Captions by the picture's name, from the folder's metadata file; empty where it has none."""
    found: dict[str, list[str]] = {}
    for path in (folder / "metadata.jsonl", folder / "metadata.csv"):
        if not path.is_file():
            continue
        try:
            text = read_text(path)
            table = path.suffix == ".csv"
            rows: list[Mapping] = [
                *(csv.DictReader(io.StringIO(text)) if table else map(from_json, filter(str.strip, text.splitlines())))
            ]
            for row in rows:
                captions = row["text"] if isinstance(row["text"], list) else [row["text"]]
                found.setdefault(str(row["file_name"]), []).extend(map(str, captions))
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            said = " ".join(str(error).split())
            raise UserError(f"{path} cannot be read ({said}): expected file_name and text for each picture.") from error
        return found
    return found
