"""What ComfyUI offers a node: folders, the graph that runs, words and pictures on the node, IMAGEs.

How it samples is known by `watching.py`, how it loads by `loading.py`, how long work goes by `computing.py`, and nowhere else.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy.cli_args import args as host_options
from comfy_api.latest import io, ui
from matplotlib.figure import Figure
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..analysis.decoding import Decode
from ..analysis.report import darkened, figure_pixels
from ..errors import UserError
from ..flux.autoencoder import to_picture
from ..recording.recording import INTERNALS, STATES
from ..recording.store import MANIFEST

log = logging.getLogger("flux-poke")

FOLDER = "flux_poke"
#: Bytes of a file's name, which leaves room for what is added to it, and of a name with folders.
LONGEST_NAME, LONGEST_PATH = 200, 1000


def output_folder() -> Path:
    """`<ComfyUI output>/flux_poke`, which every node writes to."""
    return (Path(folder_paths.get_output_directory()) / FOLDER).resolve()


def output_path(name: str, suffix: str = "") -> Path:
    """As `inside`, of `output_folder()`."""
    return inside(output_folder(), name, suffix)


def input_path(name: str) -> Path:
    """As `inside`, of ComfyUI's input folder."""
    return inside(Path(folder_paths.get_input_directory()), name)


def inside(root: Path, name: str, suffix: str = "") -> Path:
    """The file or folder called `name` in `root`; `suffix` is added where it lacks one.

    Raises `UserError` where the name would leave `root` (`..`, absolute, through a symlink), or is not one for a file: empty,
    hidden, too long, or with characters that cannot be printed.
    """
    root, text = root.resolve(), name.strip()
    parts = PurePath(text).parts
    plain = bool(parts) and text.isprintable() and not PurePath(text).is_absolute() and len(text.encode()) <= LONGEST_PATH
    if plain and not any(part.startswith(".") or len(part.encode()) > LONGEST_NAME for part in parts):
        path = root / text
        if suffix and path.suffix != suffix:
            path = path.with_name(path.name + suffix)
        if not path.is_symlink() and root in path.resolve().parents:
            return path
    shown = text if len(text) < 60 else f"{text[:50]}... ({len(text)} characters)"
    raise UserError(
        f"{shown!r} is not a name inside {root}: expected a plain file name of at most {LONGEST_NAME} bytes that does not "
        "begin with a dot."
    )


def name_of(path: Path) -> str:
    """What a file or folder is called on nodes: its name in output/flux_poke with its folders, or else where it is."""
    root = output_folder()
    return path.relative_to(root).as_posix() if root in path.parents else str(path)


def recording_names() -> list[str]:
    """Names of the recordings in output/flux_poke, also of those one folder deeper."""
    root, names = output_folder(), set()
    for found in (INTERNALS, f"{STATES}/{MANIFEST}"):
        for depth in ("*", "*/*"):
            names |= {path.parents[found.count("/")].relative_to(root).as_posix() for path in root.glob(f"{depth}/{found}")}
    return sorted(names)


def input_files(suffix: str) -> list[str]:
    """Names of the files of one kind in ComfyUI's input folder."""
    root = Path(folder_paths.get_input_directory())
    return sorted(path.name for path in root.glob(f"*{suffix}")) if root.is_dir() else []


def say(node_id: str | None, text: str) -> None:
    """Shows a line of text on the node, and in the log."""
    log.info(text)
    show(node_id, text)


def show(node_id: str | None, text: str) -> None:
    """Shows some text on the node."""
    if node_id is not None:
        PromptServer.instance.send_progress_text(_columns(text), node_id)


def _columns(text: str) -> str:
    """What stands between columns becomes a dot: `web/words.js` makes a table of it, and elsewhere letters differ in width."""
    return re.sub(r"(?<=\S) {2,}(?=\S)", " · ", text)


def metadata_enabled() -> bool:
    """Whether files may say how they came about (--disable-metadata)."""
    return not host_options.disable_metadata


def drop_queue() -> None:
    """Takes out of the queue all that waits in it."""
    PromptServer.instance.prompt_queue.wipe_queue()


def graph_metadata(hidden: Any) -> dict[str, str]:
    """The graph that is running, as the host would put it into a picture; empty with --disable-metadata."""
    if not metadata_enabled():
        return {}
    found = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {key: json.dumps(found[key]) for key in ("prompt", "workflow") if found.get(key) is not None}


def asked_generation(hidden: Any) -> dict[str, str]:
    """The id that whoever queued the graph chose for its generation, if any, and if nothing is called so yet."""
    asked = f"{(hidden.extra_pnginfo or {}).get('flux_poke_generation')}"
    free = re.fullmatch(r"[0-9a-f]{8}", asked) and not (output_folder() / asked).exists()
    return {"generation_id": asked} if free else {}


def output_file(path: Path) -> dict[str, str]:
    """A file in ComfyUI's output folder as its API names it: what a node's `ui` lists, and what /view serves."""
    folder = path.parent.relative_to(Path(folder_paths.get_output_directory()).resolve())
    return {"filename": path.name, "subfolder": folder.as_posix(), "type": "output"}


def temporary_folder() -> Path:
    """A folder that the host empties whenever it starts."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class PictureProgress:
    """Progress on the node that runs, with the newest picture; raises where the user has pressed Cancel."""

    def __init__(self) -> None:
        self._bar = comfy.utils.ProgressBar(1)

    def __call__(self, done: int, total: int, picture: Image.Image) -> None:
        self._bar.update_absolute(done, total, ("JPEG", picture, 512))

    def end(self, picture: Image.Image) -> None:
        """Shows `picture` in full: the page prefers the last one of these to the pictures that a node gives."""
        self._bar.update_absolute(self._bar.total, preview=("JPEG", picture, max(picture.size)))


def decoder(vae: Any) -> Decode:
    """The VAE as a function of latents; it decodes as many at a time as memory allows."""
    return lambda latents: vae.decode(latents).movedim(-1, 1)


def batch_of(value: Any) -> Tensor:
    """An IMAGE or a LATENT as [batch, channels, height, width]."""
    return value["samples"] if isinstance(value, Mapping) else value[..., :3].movedim(-1, 1)


def image_tokens(latent: Mapping[str, Any]) -> int:
    """How many patches of 16x16 pixels a LATENT is: one each of FLUX.2's 128 channels, four of any other."""
    channels, *size = latent["samples"].shape[1:]
    patch = 1 if channels == 128 else 2
    return math.prod(-(-side // patch) for side in size[-2:])


def to_pictures(image: Tensor) -> list[Image.Image]:
    """An IMAGE [batch, height, width, channels] as pictures."""
    return [to_picture(one[..., :3].movedim(-1, 0)) for one in image]


def open_picture(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def to_images(pictures: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """Pictures of one size, or their pixels, as the host's IMAGE [batch, height, width, 3] float."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float().div_(255)


def said(node: type[io.ComfyNode], text: str) -> dict[str, Any]:
    """Says `text`, and gives it as part of a node's `ui`: what a page gets that is opened later."""
    say(node.hidden.unique_id, text)
    return {"flux_poke_text": [_columns(text)]}


def shown(node: type[io.ComfyNode], text: str, image: Tensor, view: Mapping[str, Any]) -> dict[str, Any]:
    """What a node shows, its `ui`: `text`, and `image` or, where the page can, what `web/` draws of `view` (by its `kind`)."""
    return {**ui.PreviewImage(image, cls=node).as_dict(), **said(node, text), "flux_poke_view": [view]}


def temporary_pictures(pictures: Sequence[Image.Image], node: type[io.ComfyNode]) -> list[dict[str, str]]:
    """Pictures of one size as the page finds them (/view), until the host is started again."""
    return list(ui.PreviewImage(to_images(pictures), cls=node).values)


def figure_image(figure: Figure) -> Tensor:
    """A figure as an IMAGE, dark as nodes are."""
    return to_images([figure_pixels(darkened(figure))])
