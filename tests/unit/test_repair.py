"""Repairing a whole plan from recordings of a small FLUX: what is stored, what is asked for, and that it helps."""
# mypy: disable-error-code="union-attr, operator, misc, arg-type"

import os
import shutil
from dataclasses import replace

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux
from flux_poke.flux.weights import SiteWeights
from flux_poke.pruning.budget import BudgetCurve, by_budget
from flux_poke.pruning.checkpoint import Pruned, save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.lora import convert_lora
from flux_poke.pruning.plan import by_count
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.scores import rank, ranked_before
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.amplification import AmplificationProbe, probed_steps
from flux_poke.recording.call import Call
from flux_poke.recording.internals import Internals
from flux_poke.recording.neurons import InternalsRecorder
from flux_poke.recording.rows import RowChoice, RowRecorder
from flux_poke.recording.store import HiddenStates
from flux_poke.recording.trajectories import trajectory, velocity_error
from safetensors.torch import load_file
from torch import nn

SIGMAS = torch.linspace(1, 0, 6)


class Recorded:
    """A small FLUX, and internals and rows of ten images of it."""

    def __init__(self, tensors, folder, family):
        torch.manual_seed(0)
        state = tensors(family, depth=1, depth_single=1)
        for site in Dense.of(state).layout.sites:  # neurons of 12 features, which so can stand in for each other
            up = state[f"{site.up}.weight"]
            up[site.up_row :] = 0.3 * torch.randn(len(up) - site.up_row, 12) @ torch.randn(12, 128) / 3.5
        self.dense = Dense.of(state)
        self.flux = Flux.load(self.dense.tensors)
        layout = self.dense.layout
        self.store = HiddenStates.for_model(folder, family, self.dense.fingerprint)
        rows = RowRecorder(layout.sites, self.store, RowChoice(rows=60, steps=5))
        counts = InternalsRecorder(layout.sites)
        generator = torch.Generator().manual_seed(0)

        def conditioning(count):
            vector = torch.randn(count, layout.vector, generator=generator) if layout.vector else None
            return torch.randn(count, 60, layout.context, generator=generator), vector

        def noise(count):
            side, channels = 8 * layout.patch, layout.in_channels // layout.patch**2
            return torch.randn(count, channels, side, side, generator=generator)

        context, vector = conditioning(10)
        with rows.run() as run:
            points, _ = trajectory(self.flux, noise(10), SIGMAS, context, vector)
            for step, point in enumerate(points):
                call = Call.at(point.x, point.sigma, SIGMAS, step)
                with run.watching(self.flux, call), counts.watching(self.flux, call), torch.no_grad():
                    point.run(self.flux)
        self.internals = Internals.new(family, self.dense.fingerprint, counts.results(), steps=5)
        self.points, _ = trajectory(self.flux, noise(2), SIGMAS, *conditioning(2))

    def error(self, plan, method, folder=None):
        repairs = Repairs(self.dense, plan, method, self.internals, self.store, folder)
        return velocity_error(Flux.load(Cut(self.dense, plan, repairs)), self.points)


@pytest.fixture(scope="module", params=["flux1", "flux2"])
def recorded(request, tensors, tmp_path_factory):
    return Recorded(tensors, tmp_path_factory.mktemp("hidden"), request.param)


def half(recorded, score):
    rankings = rank(score, recorded.dense, recorded.internals, recorded.store)
    width = recorded.dense.layout.sites[0].width
    return by_count(recorded.dense, rankings, score, img_cut=width // 2, txt_cut=width // 2, single_cut=width // 2)


def test_each_repair_leaves_less_error_than_the_one_before(recorded, tmp_path):
    none = recorded.error(half(recorded, "frequency"), "none")
    magnitude = recorded.error(half(recorded, "magnitude"), "none")
    affine = recorded.error(half(recorded, "obs"), "affine", tmp_path)
    assert affine < 0.7 * magnitude < none
    if recorded.dense.layout.family == "flux1":
        plan = half(recorded, "fluctuation")
        assert affine < recorded.error(plan, "bias") < recorded.error(plan, "none")


def test_a_repair_is_computed_once_and_read_after(recorded, tmp_path):
    plan = half(recorded, "obs")
    repairs = Repairs(recorded.dense, plan, "affine", rows=recorded.store, folder=tmp_path)
    told = []
    repairs.compute(lambda *progress: told.append(progress))
    assert [name for name, _, _ in told] == list(plan.kept)
    times = {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(times) == len(plan.kept)
    again = Repairs(recorded.dense, plan, "affine", rows=recorded.store, folder=tmp_path)
    again.compute()
    assert {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == times
    for name in plan.kept:
        assert torch.equal(again[name].down, repairs[name].down)
        assert again.report[name] == repairs.report[name]


def test_a_ranking_by_rows_is_kept_beside_them_until_rows_are_added(recorded, tmp_path):
    store = HiddenStates.open(shutil.copytree(recorded.store.folder, tmp_path / "hidden"))
    first = rank("obs", recorded.dense, rows=store)
    files = {path: path.stat().st_mtime_ns for path in (store.folder / "rankings").iterdir()}
    again = rank("obs", recorded.dense, rows=store)
    assert {path: path.stat().st_mtime_ns for path in (store.folder / "rankings").iterdir()} == files
    for name, ranking in first.items():
        assert torch.equal(again[name].order, ranking.order)
        assert torch.equal(again[name].error, ranking.error)
        assert again[name].energy == ranking.energy
    before = store.digest("rows")
    store.append("rows", {"double-img-0.x": torch.zeros(1, 128), "double-img-0.image": torch.zeros(1)})
    assert store.digest("rows") != before


def test_a_cancelled_repair_goes_on_where_it_was(recorded, tmp_path):
    plan = half(recorded, "obs")
    repairs = Repairs(recorded.dense, plan, "affine", rows=recorded.store, folder=tmp_path)

    def cancel(name, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repairs.compute(cancel)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert set(repairs.report) == set(list(plan.kept)[:2])
    repairs.compute()
    assert set(repairs.report) == set(plan.kept)


def test_a_repair_is_of_one_model_in_one_precision_and_of_all_rows_that_are_there(recorded, tmp_path):
    plan, folder = half(recorded, "magnitude"), tmp_path / "repairs"
    store = HiddenStates.open(shutil.copytree(recorded.store.folder, tmp_path / "hidden"))
    repairs = Repairs(recorded.dense, plan, "affine", rows=store, folder=folder)
    repairs.compute()
    rounded = Dense.of({key: tensor.bfloat16() for key, tensor in recorded.dense.tensors.items()})
    other = Repairs(rounded, plan, "affine", rows=store, folder=folder)
    assert all(other.lacks(name) for name in plan.kept)

    more = {f"double-img-0.{part}": torch.zeros(1) for part in ("sigma", "image", "step")}
    HiddenStates.open(store.folder).append("rows", {**more, "double-img-0.x": torch.zeros(1, 128)})
    newer = Repairs(recorded.dense, plan, "affine", rows=HiddenStates.open(store.folder), folder=folder)
    newer.compute()
    with pytest.raises(UserError, match="More rows were recorded"):
        repairs.compute()
    assert not any(newer.lacks(name) for name in plan.kept)


def test_a_damaged_repair_is_made_anew(recorded, tmp_path):
    repairs = Repairs(recorded.dense, half(recorded, "magnitude"), "affine", rows=recorded.store, folder=tmp_path)
    repairs.compute()
    path = next(tmp_path.rglob("single-0.safetensors"))
    whole = {key: tensor.clone() for key, tensor in load_file(path).items()}  # which are the file itself, mapped
    report, size = repairs.report, path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    repairs.compute()
    assert path.stat().st_size == size  # the order of the header's entries alone is left to chance by safetensors
    again = load_file(path)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in whole.items())
    assert repairs.report == report


def test_cancel_stops_within_a_site_and_leaves_nothing_of_it(recorded, tmp_path):
    def cancel():
        raise KeyboardInterrupt

    plan, store = half(recorded, "magnitude"), HiddenStates.open(shutil.copytree(recorded.store.folder, tmp_path / "hidden"))
    shutil.rmtree(store.folder / "rankings", ignore_errors=True)
    with pytest.raises(KeyboardInterrupt):
        rank("obs", recorded.dense, rows=store, check=cancel)
    with pytest.raises(KeyboardInterrupt):
        Repairs(recorded.dense, plan, "affine", rows=store, folder=tmp_path / "repairs", check=cancel).compute()
    assert not ranked_before(store, recorded.dense.layout.sites[:1])
    assert not list((tmp_path / "repairs").rglob("*.safetensors"))


def test_what_a_lora_needs_is_worked_out_later_and_belongs_to_the_repair_that_is_there(recorded, tmp_path):
    """The new down projection is the kept columns and, through the matrix, those of the cut neurons."""
    plan = half(recorded, "obs")
    repairs = Repairs(recorded.dense, plan, "affine", rows=recorded.store, folder=tmp_path)
    repairs.compute()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    for name, kept in plan.kept.items():
        assert repairs.lacks(name, fold=True)
        weights = SiteWeights.read(recorded.dense.tensors, recorded.dense.layout.site(name))
        whole = weights.down[:, kept] if weights.attn is None else torch.cat((weights.attn, weights.down[:, kept]), dim=1)
        fold = repairs.fold(name)
        expected = whole + weights.down[:, plan.removed(name)] @ fold.matrix.float()
        torch.testing.assert_close(repairs[name].down, expected, rtol=0, atol=0.02 * expected.std().item())
        assert not repairs.lacks(name, fold=True)
        offset = repairs.fold(name, matrix=False).offset
        assert (offset is None) if weights.bias is None else torch.equal(offset, fold.offset)
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_ranks_and_repairs_as_the_cpu_does(recorded, tmp_path):
    found = {}
    for device in ("cpu", "cuda"):
        store = HiddenStates.open(shutil.copytree(recorded.store.folder, tmp_path / device))
        shutil.rmtree(store.folder / "rankings", ignore_errors=True)
        rankings = rank("obs", recorded.dense, rows=store, device=device)
        repairs = Repairs(
            recorded.dense, half(recorded, "magnitude"), "affine", rows=store, folder=tmp_path / "repairs", device=device
        )
        found[device] = rankings, repairs
    for name, ranking in found["cpu"][0].items():
        torch.testing.assert_close(found["cuda"][0][name].error, ranking.error, rtol=1e-3, atol=1e-6 * ranking.energy)
        expected, site = found["cpu"][1][name], found["cuda"][1][name]
        assert site.report.after == pytest.approx(expected.report.after, rel=1e-3)
        torch.testing.assert_close(site.down, expected.down, rtol=0, atol=0.01 * expected.down.std().item())


def test_what_was_worked_out_from_fewer_rows_is_removed_and_nothing_else(recorded, tmp_path):
    other = HiddenStates.open(shutil.copytree(recorded.store.folder, tmp_path / "other"))
    store = HiddenStates.open(shutil.copytree(recorded.store.folder, tmp_path / "hidden"))
    first, second, folder = half(recorded, "obs"), half(recorded, "magnitude"), tmp_path / "repairs"
    for plan, rows in ((first, other), (first, store), (second, store)):
        Repairs(recorded.dense, plan, "affine", rows=rows, folder=folder).compute()
    assert len(list(folder.iterdir())) == 3
    name = recorded.dense.layout.sites[0].name
    some = next(store.rows(name))
    store.append("rows", {f"{name}.{part}": getattr(some, part) for part in ("x", "sigma", "image", "step")})
    kept = Repairs(recorded.dense, first, "affine", rows=other, folder=folder)
    new = Repairs(recorded.dense, second, "affine", rows=store, folder=folder)
    new.compute()
    assert set(folder.iterdir()) == {kept.folder, new.folder}
    assert not any(kept.lacks(name) for name in kept)


def test_repairing_a_bias_leaves_up_projections_alone(recorded):
    read: list[str] = []

    class Listed(dict):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

    plan = half(recorded, "fluctuation")
    dense = replace(recorded.dense, tensors=Listed(recorded.dense.tensors))
    repairs = Repairs(dense, plan, "bias", recorded.internals)
    expected = Repairs(recorded.dense, plan, "bias", recorded.internals)
    for name in plan.kept:
        assert torch.equal(repairs[name].down, expected[name].down)
        fold = repairs.fold(name)
        assert fold.offset is None or torch.equal(fold.offset, expected[name].fold.offset)
    up = {f"{site.up}.weight" for site in dense.layout.sites}
    assert read
    assert not up & set(read)


def test_another_plan_or_other_rows_are_another_repair(recorded, tmp_path):
    first = Repairs(recorded.dense, half(recorded, "obs"), "affine", rows=recorded.store, folder=tmp_path)
    second = Repairs(recorded.dense, half(recorded, "magnitude"), "affine", rows=recorded.store, folder=tmp_path)
    assert first.folder != second.folder


def test_the_repaired_checkpoint_reports_its_held_out_errors(recorded, tmp_path):
    plan = half(recorded, "obs")
    repairs = Repairs(recorded.dense, plan, "affine", rows=recorded.store, folder=tmp_path)
    cut = Cut(recorded.dense, plan, repairs)
    save_pruned(tmp_path / "pruned.safetensors", cut)
    pruned = Pruned.open(tmp_path / "pruned.safetensors")
    for name, report in pruned.report.items():
        assert report == repairs.report[name]
        assert report.after < report.bias <= report.before * 1.001
        assert report.predicted == pytest.approx(report.after, rel=0.9)
    saved, made = Flux.load(pruned.tensors), Flux.load(cut)
    assert all(torch.equal(point.run(saved), point.run(made)) for point in recorded.points)


def test_a_pruned_file_with_folds_is_all_that_converting_a_lora_takes(recorded, tmp_path):
    plan = half(recorded, "obs")
    repairs = Repairs(recorded.dense, plan, "affine", rows=recorded.store, folder=tmp_path)
    save_pruned(tmp_path / "pruned.safetensors", Cut(recorded.dense, plan, repairs), fold=True)
    pruned = Pruned.open(tmp_path / "pruned.safetensors")
    site = recorded.dense.layout.site("single-0")
    name, width = "diffusion_model.single_blocks.0.linear2", 128 + site.width
    lora = {f"{name}.lora_B.weight": torch.randn(128, 2), f"{name}.lora_A.weight": torch.randn(2, width)}
    found = convert_lora(lora, pruned.layout, pruned.plan, pruned.folds, pruned.report).tensors
    matrix = repairs.fold("single-0").matrix.float()
    a = lora[f"{name}.lora_A.weight"]
    kept = [*range(128), *(128 + j for j in plan.kept["single-0"].tolist())]
    expected = a[:, kept] + a[:, 128 + plan.removed("single-0")] @ matrix
    torch.testing.assert_close(found[f"{name}.lora_down.weight"], expected)


def test_nothing_is_changed_where_nothing_is_cut(recorded, tmp_path):
    plan = by_count(recorded.dense, {}, "obs")
    cut = Cut(recorded.dense, plan, Repairs(recorded.dense, plan, "affine", rows=recorded.store, folder=tmp_path))
    assert all(torch.equal(cut[key], tensor) for key, tensor in recorded.dense.tensors.items())


def test_predicted_errors_are_near_what_is_measured(recorded, tmp_path):
    """Of the output of each site on held-out images, and of the velocity."""
    store = HiddenStates.open(shutil.copytree(recorded.store.folder, tmp_path / "hidden"))
    probe = AmplificationProbe(recorded.dense.layout.sites)
    for point in recorded.points:
        probe.measure(recorded.flux, point.sigma[0].item(), lambda point=point: point.run(recorded.flux))
    store.add_amplification(probe.results())
    rankings = rank("obs", recorded.dense, rows=store)
    curve = BudgetCurve.of(recorded.dense.layout, rankings, store.amplification)
    plan = by_budget(recorded.dense, rankings, curve, "obs", share=0.3)
    repairs = Repairs(recorded.dense, plan, "affine", rows=store, folder=tmp_path)
    measured = velocity_error(Flux.load(Cut(recorded.dense, plan, repairs)), recorded.points)
    assert plan.velocity_error == pytest.approx(measured, rel=0.5)
    for name, predicted in plan.predicted.items():
        assert repairs[name].report.after == pytest.approx(predicted, rel=0.35)


def test_what_a_repair_lacks_is_said_in_a_sentence(recorded, tmp_path):
    plan = half(recorded, "magnitude")
    with pytest.raises(UserError, match="Rows are missing, and repair = affine needs them"):
        Repairs(recorded.dense, plan, "affine", folder=tmp_path)
    with pytest.raises(UserError, match="Internals are missing, and repair = bias needs them"):
        Repairs(recorded.dense, plan, "bias")
    with pytest.raises(UserError, match="name a folder"):
        Repairs(recorded.dense, plan, "affine", rows=recorded.store)
    with pytest.raises(UserError, match="no repair 'ridge'"):
        Repairs(recorded.dense, plan, "ridge")


class Toy(nn.Module):
    """Its velocity is three times what its one site gives."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(4, 4)

    def forward(self, x):
        return 3 * self.down(x)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_amplification_is_the_velocitys_error_over_the_noises_energy(recorded, compiled: bool):
    """For v = 3y over n tokens: (9 sum |noise|^2 / 9 sum |y|^2) / (sum |noise|^2 / n) = n / sum |y|^2; by noise level."""
    toy, x = Toy(), torch.randn(2, 11, 4)
    run = torch.compile(toy, backend="eager") if compiled else toy
    with torch.no_grad():
        run(x)  # compiled here, before there is a hook
    probe = AmplificationProbe([replace(recorded.dense.layout.sites[0], name="toy", down="down")])
    for sigma in (0.9, 0.9, 0.2):
        probe.measure(toy, sigma, lambda: run(x))
    measured = probe.results()["toy"]
    assert {sigma: count for sigma, (_, count) in measured.items()} == {0.9: 2, 0.2: 1}
    for total, count in measured.values():
        assert total / count == pytest.approx(22 / toy.down(x).square().sum().item(), rel=1e-4)
    assert not toy.down._forward_hooks


@pytest.mark.parametrize(
    "velocity",
    [lambda toy, x: x, lambda toy, x: 0 * toy(x) + 1, lambda toy, x: (1e5 * toy(x)).half()],
    ids=["skipped", "unmoved", "overflown"],
)
def test_what_gives_no_amplification_is_left_out(recorded, velocity):
    toy, x = Toy(), torch.randn(2, 11, 4)
    probe = AmplificationProbe([replace(recorded.dense.layout.sites[0], name="toy", down="down")])
    probe.measure(toy, 0.9, lambda: velocity(toy, x))
    assert probe.results() == {}


def test_steps_to_probe_are_spread_from_the_first_to_the_last_but_one():
    assert probed_steps(20, 4) == {0, 6, 12, 18}
    assert probed_steps(20, 1) == {0}
    assert probed_steps(4, 8) == {0, 1, 2}
    assert probed_steps(1, 4) == {0}
    assert probed_steps(20, 0) == set()
