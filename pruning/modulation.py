"""Low-rank modulation (FLUX.1): two thin factors in the place of every layer that makes shift, scale and gate from the vector.

    vectors = Vectors.sample(dense, pooled)          # mean and covariance of what all these layers read
    errors = rank_errors(weight, vectors, held_out)  # squared error at every rank, on prompts that were not fitted to
    layer = low_rank(weight, bias, vectors, rank=16)
    layer.up @ (layer.down @ s) + layer.bias

For one layer y = W s + b, with mean mu and covariance C of s, the best map of rank r is found by reduced-rank regression
(Izenman 1975): with U S V^T = SVD(W C^(1/2)), W_r = U_r U_r^T W and b_r = b + (W - W_r) mu. Its error is the sum of S_i^2
beyond r. It costs r (out + hidden) parameters in place of out * hidden, and almost nothing in quality: a vector that is a
function of noise level, guidance and pooled text spans few dimensions. A plain SVD of W is a hundred times worse.

s is sampled from the embedders alone (`flux/vectors.py`), over all noise levels and guidances for every recorded text. Noise
levels weigh what an error at them does to the velocity (`HiddenStates.importance`). What that gives for a whole model is kept
in the recording's cache:

    errors = modulation_errors(dense, recording)     # by site and rank, on texts held out
    layers = LowRanks(dense, plan, recording)        # by site, of the rank that the plan says
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.layout import Layout, Site
from ..flux.vectors import BETWEEN, SIGMAS, VECTOR, Embedders, modulation_inputs
from ..flux.weights import full_precision
from ..progress import Progress, silent
from ..recording.amplification import MODULATION
from ..recording.recording import Recording
from ..recording.split import held_out
from .cache import Shapes, cache_key, cached_header, read_cached, recorded_rows, write_cached
from .dense import Dense
from .plan import PruningPlan

#: Its number changes with what goes into the errors or the layers.
FORMAT = "flux-poke modulation 1"

#: Directions of s that vary less than this, relative to the one that varies most, are left out.
NEGLIGIBLE = 1e-10
#: Prompts that s is sampled for at once.
BATCH = 16


@dataclass(frozen=True)
class Vectors:
    """What the modulation layers of a model read: s = silu(vec), over noise levels, guidances and texts.

    Attributes:
        mean: float64 [hidden].
        spread: float64 [hidden, k] with spread spread^T their covariance; directions of negligible variance are left out.
    """

    mean: Tensor
    spread: Tensor

    @classmethod
    def sample(
        cls,
        tensors: Mapping[str, Tensor],
        layout: Layout,
        pooled: Tensor,
        importance: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str = "cpu",
        sigmas: Sequence[float] = SIGMAS,
    ) -> Vectors:
        """From the embedders among `tensors` (canonical keys) and pooled texts [prompts, vector width].

        `importance` gives the weights of noise levels [n]; without it, all weigh 1.
        """
        embedders = Embedders.load(tensors, layout, device)
        weights = torch.ones(len(sigmas)) if importance is None else importance(torch.tensor(sigmas))
        count, total = 0.0, torch.zeros(layout.hidden, dtype=torch.float64, device=device)
        second = torch.zeros(layout.hidden, layout.hidden, dtype=torch.float64, device=device)
        for texts in pooled.to(device).float().split(BATCH):
            inputs = modulation_inputs(embedders, layout, texts, sigmas)
            for weight, (_, s) in zip(weights.tolist(), inputs, strict=True):
                s = s.double()
                count += weight * len(s)
                total += weight * s.sum(0)
                second.addmm_(s.T, s, alpha=weight)
        mean = total / count
        variance, directions = torch.linalg.eigh(second.div_(count).addr_(mean, mean, alpha=-1.0))
        kept = variance > NEGLIGIBLE * variance[-1]
        return cls(mean, directions[:, kept] * variance[kept].sqrt())

    def to(self, device: torch.device | str) -> Vectors:
        return Vectors(self.mean.to(device), self.spread.to(device))


@dataclass(frozen=True)
class LowRank:
    """A layer of rank r: up [out, r], down [r, hidden], bias [out], all float32."""

    up: Tensor
    down: Tensor
    bias: Tensor


def low_rank(weight: Tensor, bias: Tensor, vectors: Vectors, rank: int, stored: torch.dtype = torch.float32) -> LowRank:
    """The layer of `rank` that is nearest to y = W s + b over `vectors`; `weight` [out, hidden], `bias` [out].

    The factors are rounded to what they will be `stored` as before the bias makes up for the mean of what they lose, which is
    most of what rounding does.
    """
    wide = weight.double()
    up = _directions(wide, vectors)[:, :rank]
    up, down = up.to(stored).double(), (up.T @ wide).to(stored).double()
    lost = wide @ vectors.mean - up @ (down @ vectors.mean)
    return LowRank(up.float().contiguous(), down.float().contiguous(), (bias.double() + lost).float())


def rank_errors(weight: Tensor, vectors: Vectors, held_out: Vectors) -> Tensor:
    """E|y - y_r|^2 of layers that are fitted to `vectors`, over `held_out`, for r from 0 to the rank where no error is left on
    those fitted to; float64 [ranks + 1]."""
    wide = weight.double()
    seen = _directions(wide, vectors).T @ wide
    apart = (held_out.mean - vectors.mean)[:, None]
    away = torch.cat((held_out.spread, apart), dim=1)
    total = (wide @ away).square().sum()
    left = total - torch.cat((total.new_zeros(1), (seen @ away).square().sum(1).cumsum(0)))
    return left.clamp(min=0).cpu()


def regression(down: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor]:
    """The best guess of s from what a truncated layer is left with of it, s ~ P z + c with z = down s; `down` [r, hidden].

    P = C down^T (down C down^T)^-1 [hidden, r] and c = mu - P down mu [hidden], float64.
    """
    seen = down.double() @ vectors.spread
    weights = vectors.spread @ torch.linalg.pinv(seen, rtol=NEGLIGIBLE**0.5)
    return weights, vectors.mean - weights @ (down.double() @ vectors.mean)


def _directions(weight: Tensor, vectors: Vectors) -> Tensor:
    """U of W C^(1/2), by falling S [out, k]; from the k x k Gram matrix, since there are far more channels than k."""
    outputs = weight @ vectors.spread
    strength, turned = torch.linalg.eigh(outputs.T @ outputs)
    kept = strength > NEGLIGIBLE * strength[-1]
    return ((outputs @ turned[:, kept]) / strength[kept].sqrt()).flip(1)


def modulation_errors(
    dense: Dense, recording: Recording, device: torch.device | str = "cpu", progress: Progress = silent
) -> dict[str, Tensor]:
    """By site, what truncating its modulation layer costs at every rank (`rank_errors`), on texts of held-out images and
    between the noise levels that it is fitted to.

    Raises `UserError` where the model's blocks have no modulation layers of their own, or the recording no texts.
    """
    sites = require_modulated(dense, recording)
    path = _errors_file(dense, recording)
    known = read_cached(path, FORMAT, {site.name: None for site in sites})
    if known is not None:
        return known
    fit, others = held_out(recording.states().images(VECTOR))
    vectors, judges = _sampled(dense, recording, fit, device), _sampled(dense, recording, others, device, BETWEEN)
    found = {}
    for done, site in enumerate(sites):
        progress(f"truncating the modulation of {site.name}", done, len(sites))
        found[site.name] = rank_errors(full_precision(dense.tensors, f"{site.modulation}.weight", device), vectors, judges)
        dense.release()
    for other in path.parent.glob("modulation.*.safetensors"):
        other.unlink(missing_ok=True)
    write_cached(path, FORMAT, found)
    return found


def lacks_modulation_errors(dense: Dense, recording: Recording) -> bool:
    """Whether `modulation_errors` are still to be worked out."""
    return cached_header(_errors_file(dense, recording), FORMAT, {site.name: None for site in dense.layout.modulated}) is None


def _errors_file(dense: Dense, recording: Recording) -> Path:
    return recording.cache / "rankings" / f"modulation.{_key(dense, recording)}.safetensors"


class LowRanks(Mapping[str, LowRank]):
    """The modulation layers of a plan, by site, of the ranks it says: worked out from all recorded texts when they are asked
    for, on `device`, and kept in the recording's cache.

    Raises `UserError` as `modulation_errors`, where the plan truncates any.
    """

    def __init__(self, dense: Dense, plan: PruningPlan, recording: Recording | None, device: torch.device | str = "cpu"):
        self.dense, self.ranks, self.device = dense, plan.ranks, device
        #: Changes with what the layers are worked out from.
        self.digest = ""
        if not self.ranks:
            return
        if recording is None:
            raise UserError(
                "Modulation layers are truncated by what was recorded of the dense model, and no recording is given."
            )
        require_modulated(dense, recording)
        self.recording, self.digest = recording, _key(dense, recording)
        self.folder = recording.cache / "modulation" / self.digest
        self.sites = {site.name: site for site in dense.layout.sites}

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    @cached_property
    def vectors(self) -> Vectors:
        """What all layers read."""
        return recorded_vectors(self.dense, self.recording, self.device)

    def lacks(self, name: str) -> bool:
        """Whether the layer of a site is still to be worked out."""
        return self._known(name) is None

    def __getitem__(self, name: str) -> LowRank:
        if (known := self._known(name)) is not None:
            return known
        site = self.sites[name]
        weight = full_precision(self.dense.tensors, f"{site.modulation}.weight", self.device)
        bias = self.dense.tensors[f"{site.modulation}.bias"].to(self.device)
        layer = low_rank(weight, bias, self.vectors.to(self.device), self.ranks[name], thin_dtype(self.dense.tensors, site))
        write_cached(self._path(name), FORMAT, {"up": layer.up, "down": layer.down, "bias": layer.bias})
        self.dense.release()
        return LowRank(layer.up.cpu(), layer.down.cpu(), layer.bias.cpu())

    def _known(self, name: str) -> LowRank | None:
        rank, (outputs, hidden) = self.ranks[name], self.shape(name)
        shapes = {"up": (outputs, rank), "down": (rank, hidden), "bias": (outputs,)}
        found = read_cached(self._path(name), FORMAT, shapes)
        return None if found is None else LowRank(**found)

    def shape(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a site's modulation layer."""
        hidden = self.dense.layout.hidden
        return (3 if self.sites[name].stream == "single" else 6) * hidden, hidden

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.{self.ranks[name]}.safetensors"


def has_texts(recording: Recording) -> bool:
    """Whether `recording` holds the pooled texts that modulation layers are truncated by."""
    return "rows" in recording.kinds and recording.states().count(VECTOR) > 0


def thin_dtype(tensors: Mapping[str, Tensor], site: Site) -> torch.dtype:
    """What the thin tensors of a modulation layer are stored as: what its bias is in the dense file, from 16 bits on."""
    dtype = tensors[f"{site.modulation}.bias"].dtype
    return dtype if dtype.itemsize > 1 else torch.bfloat16


def require_modulated(dense: Dense, recording: Recording | None = None) -> tuple[Site, ...]:
    """The sites of `dense` whose modulation can be truncated; raises `UserError` where there are none, or `recording` does not
    hold what that takes."""
    layout = dense.layout
    if not layout.modulated:
        raise UserError(
            f"{dense.source} has no modulation layers to truncate: FLUX.2 shares three among all its blocks, and Chroma has "
            "none, so there is nothing to gain. Cut neurons alone."
        )
    if recording is not None and not has_texts(recording):
        raise UserError(
            f"{recording.folder} holds no pooled texts, which modulation layers are truncated by: record rows again (Record, "
            "Calibrate, or `uv run flux-poke record`), or cut neurons alone."
        )
    return layout.modulated


def recorded_vectors(dense: Dense, recording: Recording, device: torch.device | str = "cpu") -> Vectors:
    """What all modulation layers read, over all recorded texts; worked out once, on `device`, and kept in the recording's
    cache; on the CPU."""
    path, shapes = _vectors_file(dense, recording)
    known = read_cached(path, FORMAT, shapes)
    if known is not None:
        return Vectors(**known)
    found = _sampled(dense, recording, None, device).to("cpu")
    write_cached(path, FORMAT, {"mean": found.mean, "spread": found.spread})
    return found


def lacks_vectors(dense: Dense, recording: Recording) -> bool:
    """Whether `recorded_vectors` are still to be worked out."""
    path, shapes = _vectors_file(dense, recording)
    return cached_header(path, FORMAT, shapes) is None


def _vectors_file(dense: Dense, recording: Recording) -> tuple[Path, Shapes]:
    shapes = {"mean": (dense.layout.hidden,), "spread": None}
    return recording.cache / "modulation" / _key(dense, recording) / "vectors.safetensors", shapes


def _sampled(
    dense: Dense,
    recording: Recording,
    images: Set[int] | None,
    device: torch.device | str,
    sigmas: Sequence[float] = SIGMAS,
) -> Vectors:
    """From the recorded texts, of `images` alone where given; noise levels weigh what errors there do to the velocity."""
    store = recording.states()
    texts = torch.cat([rows.x.float() for rows in store.rows(VECTOR, images)]).unique(dim=0)
    names = [f"{site.name}{MODULATION}" for site in dense.layout.modulated]

    def importance(sigma: Tensor) -> Tensor:
        return torch.stack([store.importance(name, sigma) for name in names]).mean(0)

    return Vectors.sample(dense.tensors, dense.layout, texts, importance, device, sigmas)


def _key(dense: Dense, recording: Recording) -> str:
    return cache_key(FORMAT, recorded_rows(recording), dense.fingerprint.digest)
