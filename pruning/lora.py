"""LoRAs that were made for the dense model, made to fit a pruned one.

    converted = convert_lora(load_file("style.safetensors"), pruned.layout, pruned.plan, pruned.folds, pruned.report)
    converted.tensors                                # to load as any LoRA
    print(converted.table())                         # every module: applied, converted, skipped and why

A LoRA adds s U D to a weight. Of an up projection, the rows of U for cut neurons go. Of a down projection, the columns D_P
of cut neurons P do; but what they would read is predicted from what is kept, h_P = B h_K + c: so D_P B is added to the kept
columns, and s U D_P c to the bias, exactly as repair did with the dense weights. c is stored with every repair and pruned
checkpoint; B, which takes [cut, kept] numbers per MLP, on request (`fold`).

Modules may be named as ComfyUI, kohya, black-forest-labs, diffusers/PEFT, OneTrainer or SimpleTuner name them. What changes is
named as ComfyUI does; the rest is passed on as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ..flux.layout import Layout, Site
from ..progress import Progress, silent
from .plan import PruningPlan
from .refit import Fold, RepairReport
from .surgery import down_columns, len_up, up_rows

Outcome = Literal["applied", "converted", "skipped"]

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
_BIAS = (".diff_b", ".lora_B.bias")
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
    """A module of a cut site; `mlp_rows` where the LoRA's module is the MLP's part of linear1 alone."""

    site: Site
    down: bool
    mlp_rows: bool = False

    @property
    def module(self) -> str:
        return self.site.down if self.down else self.site.up


def convert_lora(
    lora: Mapping[str, Tensor],
    layout: Layout,
    plan: PruningPlan,
    folds: Mapping[str, Fold],
    report: Mapping[str, RepairReport],
    progress: Progress = silent,
) -> ConvertedLora:
    """Makes `lora` fit the model that `plan` cut, repaired as `report` and `folds` tell; `layout` may be dense or pruned.

    `progress` is told before every module; an exception from it stops the work.
    """
    targets = _targets(layout, plan)
    tensors: dict[str, Tensor] = {}
    modules: list[LoraModule] = []
    named = _modules(lora)
    for done, (name, parts) in enumerate(named.items()):
        progress(f"converting {name}", done, len(named))
        target = targets.get(name)
        if target is None:
            tensors |= {name + suffix: tensor for suffix, tensor in parts.items()}
            modules.append(LoraModule(name, "applied", "its weight was not cut"))
            continue
        try:
            if target.site.name in plan.unknown:
                raise _Unfit("which of the MLP's neurons were kept is not known")
            # only what reads the neurons has to follow their repair
            fold = folds[target.site.name] if target.down else Fold(None, None)
            changed, why = _converted(parts, target, plan, fold, report[target.site.name])
        except _Unfit as reason:
            modules.append(LoraModule(name, "skipped", f"{reason}; merge it into the dense model before pruning"))
            continue
        tensors |= {f"diffusion_model.{target.module}{suffix}": tensor.contiguous() for suffix, tensor in changed.items()}
        modules.append(LoraModule(name, "converted", why))
    return ConvertedLora(tensors, tuple(modules))


class _Unfit(Exception):
    """This module cannot follow the cut, because ..."""


def _converted(
    parts: Mapping[str, Tensor], target: _Target, plan: PruningPlan, fold: Fold, report: RepairReport
) -> tuple[dict[str, Tensor], str]:
    """New tensors by suffix, and what was done in words."""
    site, name = target.site, target.site.name
    factors = next(((up, down) for up, down in _FACTORS if up in parts and down in parts), None)
    bias = next((parts[suffix] for suffix in _BIAS if suffix in parts), None)
    known = {*(factors or ()), ".diff", ".alpha", *_BIAS}
    for suffix in parts.keys() - known:
        kind = next((kind for kind in _REASONS if kind in suffix), "")
        raise _Unfit(_REASONS.get(kind, f"{suffix.lstrip('.')} is not known to follow a cut"))
    rows, columns = up_rows(site, plan.kept[name]), down_columns(site, plan.kept[name])
    new: dict[str, Tensor] = {key: parts[key] for key in (".alpha",) if key in parts}
    expected = site.down_column + site.width if target.down else len_up(site) - (site.up_row if target.mlp_rows else 0)

    def widened(tensor: Tensor) -> Tensor:
        """Rows of the MLP alone, with rows of zeros for q, k and v before them."""
        return torch.cat((tensor.new_zeros(site.up_row, *tensor.shape[1:]), tensor)) if target.mlp_rows else tensor

    if not target.down:
        for suffix, tensor in (
            (".diff", parts.get(".diff")),
            (".lora_up.weight", parts[factors[0]] if factors else None),
            (".diff_b", bias),
        ):
            if tensor is not None:
                _require(tensor.shape[0], expected, "rows")
                new[suffix] = widened(tensor)[rows]
        if factors:
            new[".lora_down.weight"] = parts[factors[1]]
        return new, f"rows of the {len(plan.kept[name]):,} kept neurons of {name}"

    cut = plan.removed(name) + site.down_column
    moved = None if bias is None else bias.float()
    for suffix, tensor in ((".diff", parts.get(".diff")), (".lora_down.weight", parts[factors[1]] if factors else None)):
        if tensor is None:
            continue
        _require(tensor.shape[1], expected, "columns")
        wide = tensor.float()
        kept = wide[:, columns]
        if fold.matrix is not None:
            kept = kept + wide[:, cut] @ fold.matrix.float()
        new[suffix] = kept.to(tensor.dtype)
        if fold.offset is not None:
            shift = wide[:, cut] @ fold.offset.float()
            if factors and suffix == ".lora_down.weight":
                up = parts[factors[0]].float()
                scale = parts[".alpha"].item() / up.shape[1] if ".alpha" in parts else 1.0
                shift = scale * (up @ shift)
            moved = shift if moved is None else moved + shift
    if factors:
        new[".lora_up.weight"] = parts[factors[0]]
    if moved is not None:
        new[".diff_b"] = moved
    why = f"columns of the kept neurons of {name}"
    if report.method in _LOST and fold.matrix is None:
        return new, f"{why} only: {_LOST[report.method]}, so what the cut ones would have added is lost"
    return new, why if report.method == "none" else f"{why}, with the cut ones' folded in"


def _targets(layout: Layout, plan: PruningPlan) -> dict[str, _Target]:
    """Every name that a module of a cut site goes by in LoRA files."""
    found: dict[str, _Target] = {}
    for own in layout.sites:
        if own.name not in plan.cut:
            continue
        site = replace(own, width=plan.widths[own.name])
        for target in (_Target(site, down=False), _Target(site, down=True)):
            module = target.module
            flat = module.replace(".", "_")
            for name in (
                module,
                f"diffusion_model.{module}",
                f"transformer.{module}",
                f"base_model.model.{module}",
                f"lora_unet_{flat}",
            ):
                found[name] = target
            for alias in _diffusers_names(target):
                flat = alias.replace(".", "_")
                names = (alias, f"transformer.{alias}", f"unet.{alias}", f"base_model.model.{alias}")
                for name in (*names, f"lora_unet_{flat}", f"lycoris_{flat}", f"lora_transformer_{flat}"):
                    found[name] = replace(target, mlp_rows=alias.endswith(".proj_mlp"))
    return found


def _diffusers_names(target: _Target) -> Iterator[str]:
    """What diffusers calls a module (`FluxTransformer2DModel` and `Flux2Transformer2DModel`)."""
    site = target.site
    if site.stream == "single":
        block = f"single_transformer_blocks.{site.index}"
        yield from (
            (f"{block}.proj_out", f"{block}.attn.to_out")
            if target.down
            else (f"{block}.proj_mlp", f"{block}.attn.to_qkv_mlp_proj")
        )
    else:
        mlp = f"transformer_blocks.{site.index}.{'ff' if site.stream == 'img' else 'ff_context'}"
        yield from (f"{mlp}.net.2", f"{mlp}.linear_out") if target.down else (f"{mlp}.net.0.proj", f"{mlp}.linear_in")


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
