"""A recording: one folder with everything that was recorded of one model.

    recording = Recording.open("output/flux_poke/portraits")
    recording.internals()                            # Internals: how often every neuron fired
    recording.states()                               # HiddenStates: rows, lens rows, block states, trajectories, amplification
    recording.kinds                                  # {"internals", "rows", ...}: what is there

    NAME/internals.safetensors
    NAME/hidden_states/manifest.json, rows-00000.safetensors, ...
    NAME/atlas.safetensors, NAME/atlas/              # where every neuron was strongest, and the pictures of these images
    NAME/.cache/                                     # rankings and repairs: made again whenever they are missing

A recording is a value that flows from what records it to plans, repair, retraining, lens and reports. It holds nothing in
memory: everything is read when it is asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..files import write_picture
from ..flux.autoencoder import to_picture
from ..flux.fingerprint import Fingerprint
from .atlas import Atlas, AtlasImage, atlas_model
from .internals import Internals, check_file
from .manifest import MANIFEST, Manifest, nothing_recorded, require_model
from .store import HiddenStates

INTERNALS, STATES, CACHE = "internals.safetensors", "hidden_states", ".cache"
ATLAS, PICTURES = "atlas.safetensors", "atlas"
#: What the cache's folder was called before it was hidden, and the folders in it.
EARLIER_CACHE, CACHED = "cache", ("rankings", "repairs")


@dataclass(frozen=True)
class Recording:
    """A folder, which need not exist yet; or, with `file`, an internals file alone, whatever else is in its folder."""

    folder: Path
    file: Path | None = None

    @classmethod
    def at(cls, folder: str | os.PathLike[str]) -> Recording:
        """The recording in `folder`, which may be a new one."""
        return cls(Path(folder))

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Recording:
        """The recording in `folder`, or beside an internals.safetensors, or in an internals file of another name alone.

        Raises `UserError` where there is none.
        """
        path = Path(folder)
        alone = path.is_file() and path.name != INTERNALS
        found = cls(path.parent if path.is_file() else path, path if alone else None)
        if not found.kinds:
            raise UserError(
                f"{folder} holds no recording: expected {INTERNALS} or {STATES}/{MANIFEST} in it. Record first (Record, or "
                "`uv run flux-poke record`), or choose another folder."
            )
        return found

    @property
    def name(self) -> str:
        return self.file.name if self.file else self.folder.name

    @property
    def internals_file(self) -> Path:
        return self.file or self.folder / INTERNALS

    @property
    def atlas_file(self) -> Path:
        return self.folder / ATLAS

    def atlas_picture(self, key: str) -> Path:
        """Of the atlas's image with this key."""
        return self.folder / PICTURES / f"{key}.png"

    def write_atlas_pictures(self, images: Sequence[AtlasImage], decoded: Tensor) -> None:
        """What was drawn, `decoded` [images, 3, height, width] in 0..1."""
        for image, pixels in zip(images, decoded, strict=True):
            write_picture(self.atlas_picture(image.key), to_picture(pixels))

    @property
    def states_folder(self) -> Path:
        return self.folder / STATES

    @property
    def cache(self) -> Path:
        """For what takes long to work out, and can be worked out again; that of an earlier version is moved here."""
        hidden, earlier = self.folder / CACHE, self.folder / EARLIER_CACHE
        if earlier.is_dir() and not hidden.exists() and {path.name for path in earlier.iterdir()} <= {*CACHED}:
            with suppress(OSError):
                earlier.rename(hidden)
        return hidden

    def atlas(self) -> Atlas:
        """Raises `UserError` where there is none."""
        self.require_atlas()
        return Atlas.load(self.atlas_file)

    def require_atlas(self) -> None:
        """Raises `UserError` where there is none."""
        if not self.atlas_file.is_file():
            raise nothing_recorded(self.folder, "atlas")

    @property
    def _has_states(self) -> bool:
        return self.file is None and (self.states_folder / MANIFEST).is_file()

    @property
    def kinds(self) -> frozenset[str]:
        """What there is: "internals", and of the states "rows", "lens", "blocks", "trajectories", "amplification"."""
        found = {"internals"} if self.internals_file.is_file() else set()
        if self.file is None and self.atlas_file.is_file():
            found.add("atlas")
        if self._has_states:
            manifest = Manifest.load(self.states_folder)
            found |= {shard.kind for shard in manifest.shards}
            if manifest.amplification:
                found.add("amplification")
        return frozenset(found)

    def internals(self) -> Internals:
        """Raises `UserError` where there are none."""
        self.require_internals()
        return Internals.load(self.internals_file)

    def require_internals(self) -> None:
        """Raises `UserError` where there are none."""
        if not self.internals_file.is_file():
            raise nothing_recorded(self.folder, "internals")

    def states(self) -> HiddenStates:
        """Raises `UserError` where there are none."""
        if self.file is not None:
            raise UserError(f"{self.file} holds internals alone: name the folder of a recording, which holds the rest too.")
        return HiddenStates.open(self.states_folder)

    def digest(self, *kinds: str) -> str:
        """Hexadecimal; another one whenever something of these `kinds` is recorded: caches are known by it.

        Raises `UserError` where the file or the manifest that tells is missing.
        """
        found = []
        if "internals" in kinds:
            self.require_internals()
            found.append(hashlib.sha256(self.internals_file.read_bytes()).hexdigest())
        if states := [kind for kind in kinds if kind != "internals"]:
            found.append(self.states().digest(*states))
        return found[0] if len(found) == 1 else hashlib.sha256(f"{found}".encode()).hexdigest()

    def require(self, fingerprint: Fingerprint, what: str) -> None:
        """Raises `UserError` where something was recorded of another model than the one with `fingerprint`, called `what`."""
        found = self.fingerprint() if self.kinds else None
        if found is not None:
            require_model(found, fingerprint, self.folder, what)

    def check_writable(self, fingerprint: Fingerprint, what: str, internals: bool) -> None:
        """Raises `UserError` where nothing of this model, called `what`, can be added, or no `internals` if they are to be."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file: expected a folder to record to. Choose another name.")
        if internals:
            check_file(self.internals_file, fingerprint)
        self.require(fingerprint, what)

    def fingerprint(self) -> Fingerprint | None:
        """Of the model that was recorded; None where only the original's counts are there, which do not tell.

        Reads the internals whole, so that a damaged file is found before anything is drawn. Raises `UserError` where nothing
        was recorded, or what was is of two models.
        """
        found: list[Fingerprint | None] = []
        if self.internals_file.is_file():
            found.append(self.internals().fingerprint)
        if self._has_states:
            found.append(self.states().manifest.fingerprint)
        if self.file is None and self.atlas_file.is_file():
            found.append(atlas_model(self.atlas_file))
        if not found:
            raise UserError(f"{self.folder} holds no recording: record first.")
        known = [fingerprint for fingerprint in found if fingerprint is not None]
        if other := next((one for one in known if not one.matches(known[0])), None):
            raise UserError(
                f"{self.folder} holds recordings of two models: {known[0].difference(other)}. Record into another folder."
            )
        return known[-1] if known else None
