"""Block previews as a GIF, WebP or MP4.

    frames = choose_frames(find_previews(folder), order="step", kind="double", max_blocks=5)
    write_animation("blocks.mp4", captioned_frames(frames), fps=2)

Frames are read, captioned and written one at a time.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

from PIL import Image

from ..errors import UserError
from ..files import check_beginning, check_writable, replacing
from ..flux.blocks import BlockKind
from ..progress import Progress, silent
from .decoding import read_picture
from .graphs import graph_exif
from .sheets import captioned
from .taps import Tap

#: "step" shows every block of a step before the next step; "block" follows one block through all steps, then the next.
Order = Literal["step", "block"]

FORMATS = ("gif", "mp4", "webp")
#: Frames per second that all of them can hold.
SLOWEST, FASTEST = 0.01, 100.0


def choose_frames(
    previews: Sequence[tuple[Tap, Path]], order: Order = "step", kind: BlockKind | None = None, max_blocks: int | None = None
) -> list[tuple[Tap, Path]]:
    """The previews to show, in the order to show them.

    Args:
        kind: only double or only single blocks; None = both.
        max_blocks: at most this many blocks of each kind, the first ones.

    Raises `UserError` where nothing is left.
    """
    first: dict[BlockKind, list[int]] = {
        name: sorted({tap.block.index for tap, _ in previews if tap.block.kind == name})[:max_blocks]
        for name in ("double", "single")
        if kind in (None, name)
    }
    chosen = [(tap, path) for tap, path in previews if tap.block.index in first.get(tap.block.kind, [])]
    if not chosen:
        there = ", ".join(sorted({tap.block.kind for tap, _ in previews})) or "no"
        raise UserError(f"There is nothing to animate: asked for {kind or 'all'} blocks, found {there} blocks.")
    if order == "block":
        return sorted(chosen, key=lambda preview: (preview[0].block, preview[0].step))
    return sorted(chosen)


def captioned_frames(
    previews: Sequence[tuple[Tap, Path]], font_size: int = 24, progress: Progress = silent
) -> Iterator[Image.Image]:
    """Each preview read and captioned "Step 3 · double block 7"; `font_size` 0 leaves captions out."""
    widest = max((tap.title for tap, _ in previews), key=len, default="")
    for done, (tap, path) in enumerate(previews, start=1):
        frame = read_picture(path)
        frame = captioned(frame, tap.title, font_size, widest) if font_size else frame
        progress(f"frame {done} of {len(previews)}", done, len(previews))
        yield frame


def check_animation(path: str | os.PathLike[str], fps: float) -> None:
    """Raises `UserError` where no animation can be written to `path`, or not at `fps` frames per second."""
    path = Path(path)
    if path.suffix.lower()[1:] not in FORMATS:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}: an animation is a .gif, .webp or .mp4 file.")
    if not SLOWEST <= fps <= FASTEST:
        raise UserError(f"Frames per second are a number from {SLOWEST} to {FASTEST}; found {fps}.")
    check_writable(path)
    check_beginning(path)


def write_animation(
    path: str | os.PathLike[str], frames: Iterable[Image.Image], fps: float = 2.0, graph: Mapping[str, str] | None = None
) -> None:
    """Writes frames of one size as what the name's ending says (.gif, .webp, .mp4), replacing the file as a whole.

    `graph` is ComfyUI's `workflow` and `prompt`, which bring the graph back when an MP4 or WebP is dragged onto its page.

    Raises `UserError` as `check_animation` does, and where there are no frames, or MP4 has no PyAV to write it.
    """
    check_animation(path, fps)
    format = Path(path).suffix.lower()[1:]
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise UserError("There are no frames to animate.")
    size = first.size
    alike = (frame if frame.size == size else frame.resize(size, Image.Resampling.LANCZOS) for frame in frames)
    with replacing(path) as new:
        if format == "mp4":
            _write_mp4(new, itertools.chain((first,), alike), size, fps, graph or {})
        else:
            options = {"quality": 90, "exif": graph_exif(graph)} if format == "webp" else {}
            duration = round(1000 / fps)
            first.save(new, format.upper(), save_all=True, append_images=alike, duration=duration, loop=0, **options)


def _write_mp4(
    path: Path, frames: Iterable[Image.Image], size: tuple[int, int], fps: float, metadata: Mapping[str, str]
) -> None:
    try:
        import av
    except ImportError as error:
        raise UserError("MP4 needs PyAV, which is not installed: `pip install av`, or choose gif or webp.") from error
    # The first that this build of PyAV has; H.264 plays everywhere.
    codec = next(name for name in ("libx264", "libopenh264", "mpeg4") if name in av.codecs_available)
    width, height = size[0] + size[0] % 2, size[1] + size[1] % 2  # yuv420p halves both
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart+use_metadata_tags"}) as file:
        file.metadata.update(metadata)
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "18"}
        for frame in frames:
            even = Image.new("RGB", (width, height))
            even.paste(frame)
            file.mux(stream.encode(av.VideoFrame.from_image(even)))
        file.mux(stream.encode(None))
