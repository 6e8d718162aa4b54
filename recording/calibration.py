"""What a calibration takes: which images of some prompts are not recorded yet, and how many rows of each a plan needs.

    images = asked_images(prompts, 60, seed=0, settings="1024x1024, 20 steps, guidance 3.5")
    missing = missing_images(recording, images)
    effort = choose_effort(layout, len(images), len(missing), steps=20, tokens={...}, have={...}, room=64e9)
    print(effort)                                    # what it will take, before anything is drawn

A regression on all that an MLP reads takes at least one row for each value that it reads (`Site.regressors`); `BEST` of them do
best. Rows are spread over all steps of all images: that needs the fewest rows of each, and every noise level gives some. What
an error in each layer does to the picture is measured at `LEVELS` noise levels, each at another image.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..files import size_text
from ..flux.layout import Layout, Site
from .amplification import probed_steps
from .recording import Recording
from .rows import KNOWN, row_bytes

#: Noise levels at which amplifications are measured; the last step is among them.
LEVELS = 5
#: Rows for each value that an MLP reads with which repairs do best.
BEST = 5
#: More of them are taken where all together take no more bytes than this.
CHEAP = 5e7
#: What the rows of one image may take in memory until it is done.
LARGEST_IMAGE = 4e9


@dataclass(frozen=True)
class AskedImage:
    """An image to be drawn; its `name` tells it from those of other prompts, seeds or settings, also in a later run."""

    prompt: str
    seed: int
    settings: str

    @property
    def name(self) -> str:
        return hashlib.sha256(json.dumps([self.prompt, self.seed, self.settings]).encode()).hexdigest()[:32]


def asked_images(prompts: Sequence[str], count: int, seed: int, settings: str) -> list[AskedImage]:
    """The first `count` prompts, over and over where there are fewer; image n is drawn from `seed` + n.

    More of them begin with the same ones. Raises `UserError` where there are fewer than two different prompts.
    """
    asked = [AskedImage(prompts[number % len(prompts)], seed + number, settings) for number in range(count)]
    if len({image.prompt for image in asked}) < 2:
        raise UserError(
            f"A model is calibrated with at least 2 different prompts, and best with 60 or more; asked for {count} of "
            f"{len({*prompts})}. A model that is cut by what one prompt needs is good at that prompt alone."
        )
    return asked


def drawn_name(images: Sequence[AskedImage]) -> str:
    """What images that are drawn at once are known by in a recording; a single one by its own name."""
    names = [image.name for image in images]
    return names[0] if len(names) == 1 else hashlib.sha256(json.dumps(names).encode()).hexdigest()[:32]


def missing_images(recording: Recording, asked: Sequence[AskedImage]) -> list[AskedImage]:
    """Those of `asked` whose rows are not in the recording, whether they were drawn alone or several at once."""
    if "rows" not in recording.kinds:
        return list(asked)
    there = {(known.name, known.images) for known in recording.states().manifest.drawings if known.times.get("rows")}
    sizes, missing, first = sorted({images for _, images in there}, reverse=True), [], 0
    while first < len(asked):
        found = (size for size in sizes if (drawn_name(asked[first : first + size]), size) in there)
        if not (drawn := next(found, 0)):
            missing.append(asked[first])
        first += drawn or 1
    return missing


def batches(images: Sequence[AskedImage], size: int) -> Iterator[Sequence[AskedImage]]:
    """Images of consecutive seeds, at most `size` together."""
    start = 0
    for end, image in enumerate(images, 1):
        if end - start == size or end == len(images) or images[end].seed != image.seed + 1:
            yield images[start:end]
            start = end


@dataclass
class LevelsToProbe:
    """At which steps of which of the next `images` amplifications are measured: each noise level at another image.

    `known` are levels at which they are measured already; images are of so many `steps`.
    """

    images: int
    steps: int
    known: set[float]

    @property
    def all(self) -> int:
        return len(probed_steps(self.steps, LEVELS - 1))

    @property
    def needed(self) -> int:
        return max(self.all - len(self.known), 0)

    def next(self, sigmas: Sequence[float]) -> set[int]:
        """Steps of the next image, whose noise levels are then known; as few as the number of images allows."""
        share = math.ceil(self.needed / max(self.images, 1))
        steps = [step for step in sorted(probed_steps(self.steps, LEVELS - 1)) if sigmas[step] not in self.known][:share]
        self.known |= {sigmas[step] for step in steps}
        self.images -= 1
        return set(steps)


@dataclass(frozen=True)
class Effort:
    """What drawing `images` of `steps` each takes and leaves.

    `rows` are kept of every MLP at every step, or all where a step has fewer; `counts` is what each site then has, `bytes` what
    that adds on disk; `scarcest` is the site with the fewest for what it needs.
    """

    images: int
    steps: int
    rows: int
    counts: Mapping[str, int]
    bytes: int
    scarcest: Site

    @property
    def calls(self) -> int:
        return self.images * self.steps

    def __str__(self) -> str:
        site, count = self.scarcest, self.counts[self.scarcest.name]
        return (
            f"{self.images} images of {self.steps} steps: {self.calls:,} model calls; {self.rows} rows a step, "
            f"{size_text(self.bytes)}; then {count:,} rows of {site.name}, which has the fewest "
            f"({site.regressors:,} are needed, {BEST * site.regressors:,} are best)"
        )


def choose_effort(
    layout: Layout,
    asked: int,
    missing: int,
    steps: int,
    tokens: Mapping[str, int],
    have: Mapping[str, int],
    room: float,
) -> Effort:
    """Rows a step for the `missing` of `asked` images so that all of them give every site `BEST` rows for each regressor.

    Args:
        tokens: by stream, tokens of one model call that count.
        have: rows by site that are there already.
        room: bytes that may be added on disk; fewer rows are chosen where they do not fit.

    Raises `UserError` where no number of rows gives every site as many as it has regressors.
    """

    def wanted(rows: int, site: Site) -> int:
        return min(rows, tokens[site.stream])

    def size(rows: int) -> int:
        texts = 2 * (layout.vector or 0) + KNOWN
        return missing * steps * (texts + sum(wanted(rows, site) * row_bytes(layout, site) for site in layout.sites))

    def most(bytes: float, rows: int) -> int:
        """How many of at most `rows` may be taken."""
        return bisect_right(range(rows + 1), bytes, key=size) - 1

    def each(site: Site, total: float, images: int) -> int:
        return math.ceil(max(total, 0) / (images * steps))

    least = max(each(site, site.regressors - have.get(site.name, 0), missing) for site in layout.sites)
    best = max(wanted(each(site, BEST * site.regressors, asked), site) for site in layout.sites)
    best = max(best, least, most(CHEAP * missing / asked, max(tokens.values())))  # as many, in however many runs
    in_memory, on_disk = max(1, most(LARGEST_IMAGE * missing, best)), most(room, best)
    few = {
        site.name: site.regressors - have.get(site.name, 0)
        for site in layout.sites
        if have.get(site.name, 0) + missing * steps * wanted(in_memory, site) < site.regressors
    }
    if few:
        name = max(few, key=lambda name: few[name] / wanted(in_memory, layout.site(name)))
        site = layout.site(name)
        more = math.ceil(few[name] / (steps * wanted(in_memory, site))) - missing
        raise UserError(
            f"{missing} images of {steps} steps give {missing * steps * wanted(in_memory, site):,} rows of {name}, and a plan "
            f"needs {site.regressors:,}: ask for at least {asked + more} prompts, or for more steps."
        )
    if on_disk < least:
        raise UserError(
            f"The rows that a plan needs take {size_text(size(least))} on disk, and {size_text(int(max(room, 0)))} are left "
            "for them: raise the limit, or make room."
        )
    rows = min(best, in_memory, on_disk)
    counts = {site.name: have.get(site.name, 0) + missing * steps * wanted(rows, site) for site in layout.sites}
    scarcest = min(layout.sites, key=lambda site: counts[site.name] / site.regressors)
    return Effort(missing, steps, rows, counts, size(rows), scarcest)


def effort_of(
    recording: Recording,
    layout: Layout,
    asked: int,
    missing: int,
    steps: int,
    tokens: Mapping[str, int],
    limit: float = math.inf,
    share: float = 1.0,
) -> Effort:
    """As `choose_effort`, with the rows that `recording` holds and `share` of the space that is left for more: on its disk, and
    below `limit` bytes of rows. Nothing is written for it."""
    store = recording.states() if "rows" in recording.kinds else None
    have = {site.name: store.count(site.name) for site in layout.sites} if store else {}
    folder = Path(os.path.abspath(recording.folder))
    there = next(path for path in (folder, *folder.parents) if path.exists())
    room = min(limit - (store.bytes("rows") if store else 0), shutil.disk_usage(there).free)
    return choose_effort(layout, asked, missing, steps, tokens, have, share * room)
