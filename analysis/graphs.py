"""ComfyUI's graph inside of pictures and films, so that they bring it back when they are dragged onto the page.

    picture.save("a.webp", exif=graph_exif({"workflow": ..., "prompt": ...}))

EXIF holds it as ComfyUI's WebP do: ASCII tags "workflow:{...}" and "prompt:{...}". `web/jpeg.js` reads that of a JPEG, which
the page itself does not look into.
"""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image
from PIL.ExifTags import Base

#: Bytes of EXIF that a JPEG has room for.
MOST_EXIF = 65_000

_TAGS = {"workflow": Base.Make, "prompt": Base.HostComputer}


def graph_exif(graph: Mapping[str, str] | None) -> Image.Exif:
    """EXIF with `workflow` and `prompt`, JSON each, where they are given."""
    exif = Image.Exif()
    for key, tag in _TAGS.items():
        if graph and key in graph:
            exif[tag] = f"{key}:{graph[key]}"
    return exif


def fit_jpeg(exif: Image.Exif) -> None:
    """Leaves out what a JPEG has no room for: the prompt, which the workflow tells too, then the workflow."""
    for key in ("prompt", "workflow"):
        if len(exif.tobytes()) > MOST_EXIF:
            exif.pop(_TAGS[key], None)
