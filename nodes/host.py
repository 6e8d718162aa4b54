"""What ComfyUI offers a node: folders, the graph that runs, words and pictures on the node, IMAGEs.

How it samples is known by `watching.py`, how it loads by `loading.py`, how long work goes by `computing.py`, and nowhere else.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy.cli_args import args as host_options
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..analysis.decoding import Decode, to_picture
from ..errors import UserError

log = logging.getLogger("flux-poke")

CATEGORY = "flux-poke"
FOLDER = "flux_poke"
#: Inputs of text encoders that say what is drawn.
TEXTS = ("text", "t5xxl", "prompt")


def output_folder() -> Path:
    """`<ComfyUI output>/flux_poke`, which every node writes to."""
    return (Path(folder_paths.get_output_directory()) / FOLDER).resolve()


def output_path(name: str, suffix: str = "") -> Path:
    """The file or folder called `name` in `<ComfyUI output>/flux_poke`; `suffix` is added where it lacks one.

    Raises `UserError` where the name would leave that folder (`..`, absolute, through a symlink).
    """
    return inside(output_folder(), name, suffix)


def input_path(name: str) -> Path:
    """The file called `name` in ComfyUI's input folder; raises `UserError` where the name would leave it."""
    return inside(Path(folder_paths.get_input_directory()), name)


def inside(root: Path, name: str, suffix: str = "") -> Path:
    """The file or folder called `name` in `root`; `suffix` is added where it lacks one.

    Raises `UserError` where the name would leave `root` (`..`, absolute, through a symlink).
    """
    root = root.resolve()
    path = root / name.strip()
    if suffix and path.suffix != suffix:
        path = path.with_name(path.name + suffix)
    if not name.strip() or path.is_symlink() or root not in path.resolve().parents:
        raise UserError(f"'{name}' is no name inside {root}: expected a plain file name.")
    return path


def input_files(suffix: str) -> list[str]:
    """Names of the files of one kind in ComfyUI's input folder."""
    root = Path(folder_paths.get_input_directory())
    return sorted(path.name for path in root.glob(f"*{suffix}")) if root.is_dir() else []


def say(node_id: str | None, text: str) -> None:
    """Shows a line of text on the node, and in the log."""
    log.info(text)
    show(node_id, text)


def show(node_id: str | None, text: str) -> None:
    """Shows some text on the node, whose letters differ in width: what stands between columns becomes a dot."""
    if node_id is not None:
        PromptServer.instance.send_progress_text(re.sub(r"(?<=\S) {2,}(?=\S)", " · ", text), node_id)


def metadata_enabled() -> bool:
    """Whether files may say how they came about (--disable-metadata)."""
    return not host_options.disable_metadata


def graph_metadata(hidden: Any) -> dict[str, str]:
    """The graph that is running, as the host would put it into a picture; empty with --disable-metadata."""
    if not metadata_enabled():
        return {}
    found = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {key: json.dumps(found[key]) for key in ("prompt", "workflow") if found.get(key) is not None}


def graph_value(hidden: Any, names: Collection[str], default: str = "") -> str:
    """The text of the nearest input upstream of this node that is called one of `names`; negative prompts are left out.

    What is only known while the graph runs (a text that comes out of another node) is not found.
    """
    return _value_above(hidden.prompt or {}, hidden.unique_id, names, default)


def running_graph() -> Mapping[str, Any]:
    """The graph that runs now; a node that is not run anew, since nothing above it changed, knows an earlier one."""
    running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    return running[0][2] if running else {}


def prompt_below(graph: Mapping[str, Any], number: str) -> str:
    """What is drawn with the MODEL that a node of the graph gives: the text above the positive input of the nearest node below
    that has one (a sampler or a guider); empty where it comes out of another node."""
    below = [number]
    for number in below:  # grows on the way
        sources = _sources(graph, number)
        for name in ("positive", "conditioning"):
            if name in sources:
                return _value_above(graph, sources[name], TEXTS)
        below += [other for other in graph if other not in below and number in _sources(graph, other).values()]
    return ""


def _value_above(graph: Mapping[str, Any], number: str, names: Collection[str], default: str = "") -> str:
    waiting = [number]
    for number in waiting:  # grows on the way
        inputs = graph.get(number, {}).get("inputs", {})
        for name in names:
            if isinstance(inputs.get(name), str):
                return inputs[name]
        sources = [source for name, source in _sources(graph, number).items() if name != "negative"]
        waiting += [source for source in dict.fromkeys(sources) if source not in waiting]
    return default


def _sources(graph: Mapping[str, Any], number: str) -> dict[str, str]:
    """By input of a node, the node that is linked to it."""
    inputs = graph.get(number, {}).get("inputs", {})
    return {name: value[0] for name, value in inputs.items() if isinstance(value, list)}


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


def count_progress() -> Callable[[int, int, Image.Image], None]:
    """As `PictureProgress`, without the pictures."""
    bar = comfy.utils.ProgressBar(1)
    return lambda done, total, picture: bar.update_absolute(done, total)


def decoder(vae: Any) -> Decode:
    """The VAE as a function of latents; it decodes as many at a time as memory allows."""
    return lambda latents: vae.decode(latents).movedim(-1, 1)


def batch_of(value: Any) -> Tensor:
    """An IMAGE or a LATENT as [batch, channels, height, width]."""
    return value["samples"] if isinstance(value, Mapping) else value[..., :3].movedim(-1, 1)


def to_pictures(image: Tensor) -> list[Image.Image]:
    """An IMAGE [batch, height, width, channels] as pictures."""
    return [to_picture(one[..., :3].movedim(-1, 0)) for one in image]


def to_images(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as the host's IMAGE [batch, height, width, 3] float."""
    images = torch.empty(len(pictures), pictures[0].height, pictures[0].width, 3)
    for image, picture in zip(images, pictures, strict=True):
        image.copy_(torch.from_numpy(np.array(picture.convert("RGB"))))
    return images.div_(255)


def to_image(pixels: np.ndarray) -> Tensor:
    """Pixels [height, width, 3] uint8 as the host's IMAGE [1, height, width, 3] float."""
    return torch.from_numpy(pixels).float().div(255)[None]
