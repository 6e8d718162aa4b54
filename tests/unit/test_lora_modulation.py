"""LoRAs on modulation layers of low rank: the fold against least squares on the vectors themselves, and what it does to a
fitted tiny FLUX against what the same LoRA does to the dense one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from flux_poke.demo import digit_prompt
from flux_poke.flux.model import Flux
from flux_poke.flux.sampling import FluxTimer
from flux_poke.flux.vectors import modulation_inputs
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.lora import ConvertedLora, convert_lora
from flux_poke.pruning.low_rank import Vectors
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.planning import ByBudget, make_plan
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.recording.trajectories import Point, trajectory
from flux_poke.tiny.model import FOLDER, STEPS, TinyFlux
from torch import Tensor

RANK = 4


@dataclass(frozen=True)
class Fitted:
    """The tiny FLUX at half of its parameters, and points of drawings whose prompts were not recorded."""

    tiny: TinyFlux
    dense: Dense
    recording: Recording
    plan: PruningPlan
    points: Sequence[Point]

    def cut(self, plan: PruningPlan) -> tuple[Cut, Repairs]:
        repairs = Repairs(self.dense, plan, "affine", self.recording)
        repairs.compute(fold=True)
        return Cut(self.dense, plan, repairs), repairs

    def convert(self, lora: Mapping[str, Tensor], plan: PruningPlan, vectors: bool = True) -> ConvertedLora:
        cut, repairs = self.cut(plan)
        folds, known = {name: repairs.fold(name) for name in repairs}, cut.vectors if vectors else None
        return convert_lora(lora, self.dense.layout, plan, folds, repairs.reports(), known, cut)

    def effect_error(self, lora: Mapping[str, Tensor], plan: PruningPlan, vectors: bool = True) -> float:
        """Squared difference between what the LoRA adds to the velocity of the cut and of the dense model, relative to the
        latter."""
        cut, _ = self.cut(plan)
        fits = self.convert(lora, plan, vectors).tensors
        models = [Flux.load(merged(*pair)) for pair in ((self.dense.tensors, lora), (cut, {}), (cut, fits))]
        lost = total = 0.0
        for point in self.points:
            styled, plain, found = (point.run(model) for model in models)
            wanted = styled - point.velocity
            lost += (found - plain - wanted).square().sum().item()
            total += wanted.square().sum().item()
        return lost / total


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Fitted:
    recording, checkpoint = Recording.at(tmp_path_factory.mktemp("recorded") / "tiny"), FOLDER / "flux.safetensors"
    prompts = [digit_prompt(number, 0) for number in range(40)]
    record(checkpoint, prompts, recording, Wanted(rows=RowChoice(rows=24, steps=8)), 10_000, STEPS, 40)
    dense = Dense.open(checkpoint)
    plan = make_plan(dense, recording, ByBudget(share=0.5, multiple=32)).plan
    assert plan.ranks
    assert plan.kept
    tiny = TinyFlux.load()
    texts = tiny.words([digit_prompt(number, 1) for number in range(10)])
    points, _ = trajectory(tiny.flux, tiny.noise(10, 777), FluxTimer(STEPS).sigmas(), *texts)
    return Fitted(tiny, dense, recording, plan, points[::2])


def style(dense: Dense, strength: float = 0.3) -> dict[str, Tensor]:
    """A LoRA on every modulation layer and every projection of an MLP (of single blocks the MLP's part alone), each of
    `strength` times the weight's own norm, by ComfyUI's names."""
    generator, lora = torch.Generator().manual_seed(0), {}
    for site in dense.layout.sites:
        for module in (site.modulation, site.up, site.down):
            weight = dense.tensors[f"{module}.weight"].float()
            up = torch.randn(len(weight), RANK, generator=generator)
            down = torch.randn(RANK, weight.shape[1], generator=generator)
            if module == site.up:
                up[: site.up_row] = 0
            name = f"diffusion_model.{module}"
            lora[f"{name}.lora_up.weight"] = up * strength * weight.norm() / (up @ down).norm()
            lora[f"{name}.lora_down.weight"] = down
    return lora


def merged(tensors: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a host makes of a model and a LoRA."""
    found = {key: tensors[key].float() for key in tensors}
    for key, tensor in lora.items():
        name, _, what = key.removeprefix("diffusion_model.").partition(".lora_")
        if what == "up.weight":
            found[f"{name}.weight"] = found[f"{name}.weight"] + tensor @ lora[key.replace("lora_up", "lora_down")]
        elif key.endswith(".diff_b"):
            name = name.removesuffix(".diff_b").replace(".lin.up", ".lin")
            found[f"{name}.bias"] = found[f"{name}.bias"] + tensor
    return found


def kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def diffusers(name: str) -> str:
    """By the names of its FluxTransformer2DModel."""
    kind, index, module = name.split(".", 2)
    double = {
        "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2", "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
    }  # fmt: skip
    single = {"modulation.lin": "norm.linear", "linear1": "proj_mlp", "linear2": "proj_out"}
    if kind == "double_blocks":
        return f"transformer.transformer_blocks.{index}.{double[module]}"
    return f"transformer.single_transformer_blocks.{index}.{single[module]}"


def test_a_lora_does_to_the_fitted_model_what_it_does_to_the_dense_one(fitted):
    lora = style(fitted.dense)
    modulation = {key: tensor for key, tensor in lora.items() if ".lin." in key}
    ranks_alone, neurons_alone = replace(fitted.plan, kept={}), replace(fitted.plan, ranks={})
    assert fitted.effect_error(modulation, ranks_alone) < 0.005
    assert fitted.effect_error(lora, ranks_alone) < 0.005
    # of what a LoRA does next to nothing more is lost with the modulation than is with the neurons
    error, of_neurons = (fitted.effect_error(lora, plan) for plan in (fitted.plan, neurons_alone))
    assert error < 1.1 * of_neurons < 0.2
    assert fitted.effect_error(lora, fitted.plan, vectors=False) > 3 * error


@pytest.mark.parametrize(("named", "suffixes"), [(kohya, ("lora_up", "lora_down")), (diffusers, ("lora_B", "lora_A"))])
def test_all_names_of_a_lora_give_the_same(fitted, named, suffixes):
    lora = style(fitted.dense)
    renamed = {}
    for key, tensor in lora.items():
        name, _, what = key.removeprefix("diffusion_model.").partition(".lora_")
        if named is diffusers and name.endswith("linear1") and what == "up.weight":
            tensor = tensor[3 * fitted.dense.layout.hidden :]
        renamed[f"{named(name)}.{suffixes[what.startswith('down')]}.weight"] = tensor
    expected, found = (fitted.convert(each, fitted.plan) for each in (lora, renamed))
    assert {module.outcome for module in found.modules} == {"converted"}
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[key], expected.tensors[key]) for key in found.tensors)
    assert len(re.findall(r"with a loss of [\d.e-]+ %", found.table())) == len(fitted.plan.ranks)


@pytest.mark.parametrize("kind", ["factors", "difference"])
def test_the_fold_is_least_squares_on_the_vectors_and_its_loss_is_theirs(fitted, kind):
    layout = fitted.dense.layout
    pooled = fitted.tiny.words([digit_prompt(number, 0) for number in range(20)])[1]
    vectors = Vectors.sample(fitted.dense.tensors, layout, pooled)
    s = torch.cat([s for _, s in modulation_inputs(fitted.tiny.flux, layout, pooled)]).double()
    site, plan = layout.site("double-img-1"), replace(fitted.plan, kept={}, ranks={"double-img-1": 5})
    down = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    generator, name = torch.Generator().manual_seed(1), f"diffusion_model.{site.modulation}"
    b, a = torch.randn(768, RANK, generator=generator), torch.randn(RANK, 128, generator=generator)
    lora = {f"{name}.lora_B.weight": b, f"{name}.lora_A.weight": a, f"{name}.alpha": torch.tensor(6.0)}
    if kind == "difference":
        lora = {f"{name}.diff": 1.5 * b @ a}
    found = convert_lora(lora, layout, plan, {}, {}, vectors, {f"{site.modulation}.down.weight": down})

    wanted = 1.5 * s @ (b @ a).double().T
    z = torch.cat((s @ down.double().T, torch.ones(len(s), 1)), dim=1)
    solved = torch.linalg.lstsq(z, wanted).solution
    up = found.tensors.get(f"{name}.up.diff")
    if up is None:
        up = 1.5 * found.tensors[f"{name}.up.lora_up.weight"] @ found.tensors[f"{name}.up.lora_down.weight"]
    torch.testing.assert_close(up, solved[:5].T.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.tensors[f"{name}.up.diff_b"], solved[5].float(), rtol=1e-3, atol=1e-3)
    loss = (wanted - z @ solved).square().sum() / (wanted - wanted.mean(0)).square().sum()
    (module,) = found.modules
    assert re.search(r"to rank 5 of the modulation of double-img-1 with a loss of (\S+) %", module.why)
    assert float(module.why.split()[-2]) == pytest.approx(100 * loss.item(), rel=0.06)


def test_without_what_the_layers_read_a_lora_on_modulation_is_skipped_and_said(fitted):
    found = fitted.convert(style(fitted.dense), fitted.plan, vectors=False)
    skipped = [module for module in found.modules if module.outcome == "skipped"]
    assert len(skipped) == len(fitted.plan.ranks)
    assert all("what it reads was not stored with the model; merge it into the dense model" in module.why for module in skipped)


def test_a_lora_of_another_width_on_modulation_is_skipped(fitted):
    name = f"diffusion_model.{fitted.dense.layout.sites[0].modulation}"
    for up, down, sentence in (((768, 2), (2, 64), "64 columns"), ((384, 2), (2, 128), "384 rows")):
        lora = {f"{name}.lora_up.weight": torch.ones(up), f"{name}.lora_down.weight": torch.ones(down)}
        (module,) = fitted.convert(lora, fitted.plan).modules
        assert sentence in module.why
