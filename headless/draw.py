"""`flux-poke draw` on ComfyUI: one run for each picture, so that each has its own seed whatever is drawn beside it.

with ComfyClient("127.0.0.1:8188") as client:
    setup = Setup.find(client, "flux1-dev")
    drawn = draw_there(client, setup, DrawRequest(["a fox"]))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from ..draw import Asked, DrawRequest
from ..errors import UserError
from ..progress import Progress, part, silent
from .client import ComfyClient
from .families import Setup
from .workflow import follow

#: What errors for want of memory have in them, of CUDA, of ComfyUI and of a CPU.
WORDS = ("out of memory", "allocation on device", "not enough memory", "can't allocate memory")


def draw_there(
    client: ComfyClient, setup: Setup, request: DrawRequest, progress: Progress = silent
) -> Iterator[tuple[Asked, Image.Image]]:
    """The pictures of a request, as they are done; with the graph of each in its `info`.

    Raises `UserError` where the run fails or is stopped there, and says what to try where memory was not enough.
    """
    images = request.images
    references = [client.upload(path, "flux_poke") for path in request.input_images]
    for one in images:
        graph = setup.graph(one, request, references)
        graph["picture"] = {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}, "_meta": {"title": "Picture"}}
        within = part(progress, one.number, len(images))
        with memory_explained_there():
            result = follow(client, graph, within, f"The drawing of {one.prompt!r}", {"SamplerCustomAdvanced": 20.0})
        (file,) = result.files("images", "picture")
        yield one, client.picture(file)


@contextmanager
def memory_explained_there() -> Iterator[None]:
    """A run that ended for want of memory as a sentence that says what to try."""
    try:
        yield
    except UserError as error:
        if not any(words in str(error).lower() for words in WORDS):
            raise
        raise UserError(
            f"ComfyUI ran out of memory ({str(error)[:200]}): draw a smaller picture (--width, --height), use a smaller "
            "model (an fp8 file, or one that `flux-poke fit` made), or start ComfyUI with --lowvram."
        ) from error
