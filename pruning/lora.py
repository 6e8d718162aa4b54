"""LoRAs that were made for the dense model, made to fit a pruned one.

    lora = load_file("style.safetensors")
    converted = convert_lora(lora, pruned.layout, pruned.plan, pruned.folds, pruned.report, pruned.vectors, pruned.tensors)
    converted.tensors                                # to load as any LoRA
    print(converted.table())                         # every module: applied, converted, skipped and why

A LoRA adds s U D to a weight. Of an up projection, the rows of U for cut neurons go. Of a down projection, the columns D_P
of cut neurons P do; but what they would read is predicted from what is kept, h_P = B h_K + c: so D_P B is added to the kept
columns, and s U D_P c to the bias, exactly as repair did with the dense weights. c is stored with every repair and pruned
checkpoint; B, which takes [cut, kept] numbers per MLP, on request (`fold`).

A modulation layer of low rank sees no more of the vector s than z = down s. By least squares over what these layers read,
s ~ P z + c (`modulation.regression`): so U (D P) is added to the layer's `up`, and s U D c to its bias. What of D s is no
linear function of z is lost; how much that is, as a share of the variance of U D s, is told of every module.

Modules may be named as ComfyUI, kohya, black-forest-labs, diffusers/PEFT, OneTrainer or SimpleTuner name them. What changes is
named as ComfyUI does; the rest is passed on as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ..flux.diffusers import CLASSES, modules
from ..flux.layout import Layout, Site
from ..flux.weights import full_precision
from ..progress import Progress, silent
from .low_rank import Vectors, regression
from .plan import PruningPlan
from .refit import Fold, RepairReport
from .surgery import down_columns, len_up, up_rows

Outcome = Literal["applied", "converted", "skipped"]
#: Of a site: the projections of its MLP, and the modulation layer of its stream of the block.
Part = Literal["up", "down", "modulation"]

#: The two factors of a LoRA, (U, D), as trainers call them after the module's name.
_FACTORS = (
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B", ".lora_A"),
)
#: What trainers put before a module's name, as it is and with _ for every dot.
_PREFIXES = ("", "diffusion_model.", "transformer.", "unet.", "base_model.model.")
_FLAT_PREFIXES = ("lora_unet_", "lycoris_", "lora_transformer_")
_BIAS = (".diff_b", ".lora_B.bias")
#: Of a module's tensors, those whose columns belong to its inputs.
_READING = frozenset((".diff", ".lora_down.weight"))
#: What else may follow a module's name. Of these only `.alpha` and `.diff` can follow a cut.
_OTHERS = re.compile(
    r"\.(alpha|diff|dora_scale|set_weight|reshape_weight|lora_mid\.weight|hada_\w+|lokr_\w+|oft_\w+|[abw]\d?\.weight|w_norm|b_norm)$"
)
_REASONS = {
    "dora_scale": "DoRA scales by the norm of the dense weight",
    "hada": "a LoHa is no product of two factors",
    "lokr": "a LoKr is a Kronecker product, whose rows and columns do not belong to single neurons",
    "set_weight": "it replaces the weight as a whole",
}  # fmt: skip

#: By what the cut neurons were made up for, why a LoRA cannot follow that where there is no fold.
_LOST = {
    "affine": "the repair was stored without its fold",
    "retrained": "training does not tell what now stands in for the cut ones",
}


@dataclass(frozen=True)
class LoraModule:
    """What became of one module of a LoRA: its name in the file, and why."""

    name: str
    outcome: Outcome
    why: str


@dataclass(frozen=True)
class ConvertedLora:
    """A LoRA for the pruned model, and what became of every module of the one it was made from."""

    tensors: Mapping[str, Tensor]
    modules: tuple[LoraModule, ...]

    def table(self) -> str:
        """Text: how many of each, then every module that was not simply applied."""
        outcomes = [module.outcome for module in self.modules]
        counts = {outcome: outcomes.count(outcome) for outcome in get_args(Outcome)}
        lines = [", ".join(f"{count} {outcome}" for outcome, count in counts.items())]
        lines += [f"{module.outcome:<10} {module.name}: {module.why}" for module in self.modules if module.outcome != "applied"]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Target:
    """A module that was cut; `mlp_rows` where the LoRA's module is the MLP's part of linear1 alone."""

    site: Site
    part: Part
    mlp_rows: bool = False

    @property
    def dense(self) -> str:
        """What it is in the dense model."""
        return {"up": self.site.up, "down": self.site.down, "modulation": self.site.modulation}[self.part]

    @property
    def pruned(self) -> str:
        """What follows the LoRA in the pruned one."""
        return f"{self.dense}.up" if self.part == "modulation" else self.dense


def convert_lora(
    lora: Mapping[str, Tensor],
    layout: Layout,
    plan: PruningPlan,
    folds: Mapping[str, Fold],
    report: Mapping[str, RepairReport],
    vectors: Vectors | None,
    tensors: Mapping[str, Tensor],
    progress: Progress = silent,
) -> ConvertedLora:
    """Makes `lora` fit the model that `plan` cut, repaired as `report` and `folds` tell; `layout` may be dense or pruned.

    `vectors` is what its modulation layers read, where any is of low rank; of its `tensors` (canonical keys), those are read
    that a module needs. `progress` is told before every module; an exception from it stops the work.
    """
    targets = _targets(layout, plan)
    found: dict[str, Tensor] = {}
    modules: list[LoraModule] = []
    named = _modules(lora)
    for done, (name, parts) in enumerate(named.items()):
        progress(f"converting {name}", done, len(named))
        target = targets.get(name)
        if target is None:
            found |= {name + suffix: tensor for suffix, tensor in parts.items()}
            modules.append(LoraModule(name, "applied", "its weight was not cut"))
            continue
        site = target.site
        try:
            new = _known(parts)
            if target.part == "modulation":
                changed, why = _truncated(new, site, vectors, tensors)
            elif site.name in plan.unknown:
                raise _Unfit("which of the MLP's neurons were kept is not known")
            elif target.part == "up":
                changed, why = _rows(new, target, plan.kept[site.name])
            else:
                changed, why = _columns(new, site, plan, folds[site.name], report[site.name])
        except _Unfit as reason:
            modules.append(LoraModule(name, "skipped", f"{reason}; merge it into the dense model before pruning"))
            continue
        found |= {f"diffusion_model.{target.pruned}{suffix}": tensor.contiguous() for suffix, tensor in changed.items()}
        modules.append(LoraModule(name, "converted", why))
    return ConvertedLora(found, tuple(modules))


class _Unfit(Exception):
    """This module cannot follow the cut, because ..."""


def _known(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module by ComfyUI's suffixes."""
    factors = next((pair for pair in _FACTORS if parts.keys() >= set(pair)), ())
    names = {".alpha": ".alpha", ".diff": ".diff", **dict.fromkeys(_BIAS, ".diff_b")}
    names |= zip(factors, (".lora_up.weight", ".lora_down.weight"), strict=False)
    for suffix in parts.keys() - names.keys():
        kind = next((kind for kind in _REASONS if kind in suffix), "")
        raise _Unfit(_REASONS.get(kind, f"{suffix.lstrip('.')} is not known to follow a cut"))
    return {own: parts[suffix] for suffix, own in names.items() if suffix in parts}


def _rows(new: dict[str, Tensor], target: _Target, kept: Tensor) -> tuple[dict[str, Tensor], str]:
    """What of an up projection's new tensors is left, and what was done in words."""
    site = target.site
    expected, rows = len_up(site) - (site.up_row if target.mlp_rows else 0), up_rows(site, kept)
    for suffix, tensor in new.items():
        if suffix in (".alpha", ".lora_down.weight"):
            continue
        _require(tensor.shape[0], expected, "rows")
        if target.mlp_rows:  # q, k and v come before them
            tensor = torch.cat((tensor.new_zeros(site.up_row, *tensor.shape[1:]), tensor))
        new[suffix] = tensor[rows]
    return new, f"rows of the {len(kept):,} kept neurons of {site.name}"


def _columns(
    new: dict[str, Tensor], site: Site, plan: PruningPlan, fold: Fold, report: RepairReport
) -> tuple[dict[str, Tensor], str]:
    """As `_rows`, of a down projection."""
    name = site.name
    columns, cut = down_columns(site, plan.kept[name]), site.down_column + plan.removed(name)
    for suffix in _READING & new.keys():
        _require(new[suffix].shape[1], site.down_column + site.width, "columns")
        wide = new[suffix].float()
        kept = wide[:, columns]
        if fold.matrix is not None:
            kept = kept + wide[:, cut] @ fold.matrix.float()
        new[suffix] = kept.to(new[suffix].dtype)
        if fold.offset is not None:
            _move(new, suffix, wide[:, cut] @ fold.offset.float())
    why = f"columns of the kept neurons of {name}"
    if report.method in _LOST and fold.matrix is None:
        return new, f"{why} only: {_LOST[report.method]}, so what the cut ones would have added is lost"
    return new, why if report.method == "none" else f"{why}, with the cut ones' folded in"


def _truncated(
    new: dict[str, Tensor], site: Site, vectors: Vectors | None, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """As `_rows`, of a modulation layer of low rank."""
    if vectors is None:
        raise _Unfit("its layer is of low rank, and what it reads was not stored with the model")
    down = full_precision(tensors, f"{site.modulation}.down.weight").double()
    hidden, spread = down.shape[1], vectors.spread
    weights, constant = regression(down, vectors)
    missed = spread - weights @ (down @ spread)
    varies = lost = 0.0
    for suffix in _READING & new.keys():
        wide, up = new[suffix].double(), new[".lora_up.weight"].double() if suffix == ".lora_down.weight" else None
        _require(wide.shape[1], hidden, "columns")
        _require(len(wide if up is None else up), hidden * (3 if site.stream == "single" else 6), "rows")
        varies, lost = varies + _energy(up, wide @ spread), lost + _energy(up, wide @ missed)
        new[suffix] = (wide @ weights).float()
        _move(new, suffix, (wide @ constant).float())
    loss = 100 * lost / varies if varies else 0.0
    return new, f"fitted to rank {len(down)} of the modulation of {site.name} with a loss of {loss:.2g} %"


def _energy(up: Tensor | None, read: Tensor) -> float:
    """Sum of squares of `up @ read`, without making it; or of `read`."""
    return (read.square() if up is None else (up.T @ up @ read) * read).sum().item()


def _move(new: dict[str, Tensor], suffix: str, shift: Tensor) -> None:
    """Adds to the bias's difference what the tensor `suffix` makes of a constant input: itself, or through the other factor."""
    if suffix == ".lora_down.weight":
        up = new[".lora_up.weight"].float()
        scale = new[".alpha"].item() / up.shape[1] if ".alpha" in new else 1.0
        shift = scale * (up @ shift)
    new[".diff_b"] = shift + new[".diff_b"].float() if ".diff_b" in new else shift


def _targets(layout: Layout, plan: PruningPlan) -> dict[str, _Target]:
    """Every name that a module of a cut site goes by in LoRA files."""
    found: dict[str, _Target] = {}
    for own in layout.sites:
        parts: list[Part] = ["up", "down"] if own.name in plan.cut else []
        parts += ["modulation"] if own.name in plan.ranks else []
        for part in parts:
            target = _Target(replace(own, width=plan.widths[own.name]), part)
            # of linear1, diffusers has the rows of q, k and v elsewhere: the MLP's are the last
            theirs = [names[-1] for family in CLASSES if (names := modules(family, target.dense))]
            for name in (target.dense, *theirs):
                known = replace(target, mlp_rows=name.endswith(".proj_mlp"))
                found |= {f"{prefix}{name}": known for prefix in _PREFIXES}
                found |= {f"{prefix}{name.replace('.', '_')}": known for prefix in _FLAT_PREFIXES}
    return found


def _modules(lora: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by module and suffix; a key of unknown ending stands alone, with an empty suffix."""
    suffixes = sorted({suffix for pair in _FACTORS for suffix in pair} | set(_BIAS), key=len, reverse=True)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in lora.items():
        suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
        if suffix is None:
            other = _OTHERS.search(key)
            suffix = other[0] if other else ""
        found.setdefault(key.removesuffix(suffix), {})[suffix] = tensor
    return found


def _require(found: int, expected: int, what: str) -> None:
    if found != expected:
        raise _Unfit(f"it has {found:,} {what} where the dense model has {expected:,}")
