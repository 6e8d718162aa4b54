"""Repairing a whole plan from recordings of a small FLUX: what is stored, what is asked for, and that it helps."""
# mypy: disable-error-code="union-attr, operator, misc, arg-type"

import os
import shutil
from dataclasses import replace

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.layout import Layout
from flux_poke.flux.model import Flux
from flux_poke.flux.weights import SiteWeights
from flux_poke.pruning.checkpoint import Pruned, save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.lora import convert_lora
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.planning import ByBudget, ByCount, make_plan
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.scores import rank
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.amplification import AmplificationProbe, probed_steps
from flux_poke.recording.call import Call
from flux_poke.recording.internals import Internals
from flux_poke.recording.neurons import InternalsRecorder
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice, RowRecorder
from flux_poke.recording.store import HiddenStates
from flux_poke.recording.trajectories import trajectory, velocity_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import Linear

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
        self.recording = Recording.at(folder)
        store = HiddenStates.for_model(self.recording.states_folder, family, self.dense.fingerprint)
        rows = RowRecorder(layout.sites, store, RowChoice(rows=60, steps=5))
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
        Internals.new(family, self.dense.fingerprint, counts.results(), steps=5).save(self.recording.internals_file)
        self.points, _ = trajectory(self.flux, noise(2), SIGMAS, *conditioning(2))

    def copy(self, folder) -> Recording:
        """The same recording in another folder, with an empty cache."""
        shutil.copytree(self.recording.folder, folder, ignore=shutil.ignore_patterns(".cache"))
        return Recording.open(folder)

    def error(self, plan, method):
        repairs = Repairs(self.dense, plan, method, self.recording)
        return velocity_error(Flux.load(Cut(self.dense, plan, repairs)), self.points)


@pytest.fixture(scope="module", params=["flux1", "flux2"])
def recorded(request, tensors, tmp_path_factory):
    return Recorded(tensors, tmp_path_factory.mktemp("hidden"), request.param)


@pytest.fixture
def recording(recorded, tmp_path) -> Recording:
    return recorded.copy(tmp_path / "recording")


def half(recorded, score):
    width = recorded.dense.layout.sites[0].width
    return make_plan(recorded.dense, recorded.recording, ByCount(*(width // 2,) * 3, score=score)).plan


def add_a_row(recording, site="double-img-0"):
    more = {f"{site}.{part}": torch.zeros(1) for part in ("sigma", "image", "step")}
    recording.states().append("rows", {**more, f"{site}.x": torch.zeros(1, 128)})


def test_each_repair_leaves_less_error_than_the_one_before(recorded):
    none = recorded.error(half(recorded, "frequency"), "none")
    magnitude = recorded.error(half(recorded, "magnitude"), "none")
    affine = recorded.error(half(recorded, "obs"), "affine")
    assert affine < 0.7 * magnitude < none
    if recorded.dense.layout.family == "flux1":
        plan = half(recorded, "fluctuation")
        assert affine < recorded.error(plan, "bias") < recorded.error(plan, "none")


def test_a_repair_is_computed_once_and_read_after(recorded, recording):
    plan = half(recorded, "obs")
    repairs = Repairs(recorded.dense, plan, "affine", recording)
    told = []
    reports = repairs.compute(lambda *progress: told.append(progress))
    assert all(0 <= done <= total == len(plan.kept) for _, done, total in told)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert len(told) > 3 * len(plan.kept)
    files = list(repairs.folder.iterdir())
    assert recording.cache in repairs.folder.parents
    assert len(files) == len(plan.kept)
    times = {path: os.stat(path).st_mtime_ns for path in files}
    again = Repairs(recorded.dense, plan, "affine", recording)
    assert again.compute() == reports == again.reports()
    assert {path: os.stat(path).st_mtime_ns for path in files} == times
    for name in plan.kept:
        assert torch.equal(again[name].down, repairs[name].down)


def test_a_ranking_by_rows_is_kept_in_the_cache_until_rows_are_added(recorded, recording):
    first = rank("obs", recorded.dense, recording)
    files = {path: path.stat().st_mtime_ns for path in (recording.cache / "rankings").iterdir()}
    assert len(files) == len(first)
    again = rank("obs", recorded.dense, recording)
    assert {path: path.stat().st_mtime_ns for path in (recording.cache / "rankings").iterdir()} == files
    for name, ranking in first.items():
        assert torch.equal(again[name].order, ranking.order)
        assert torch.equal(again[name].error, ranking.error)
        assert again[name].energy == ranking.energy
    add_a_row(recording)
    rank("obs", recorded.dense, recording, recorded.dense.layout.sites[:1])
    assert len(files.keys() - set((recording.cache / "rankings").iterdir())) == 1


def test_a_cancelled_repair_goes_on_where_it_was(recorded, recording):
    plan = half(recorded, "obs")
    repairs = Repairs(recorded.dense, plan, "affine", recording)

    def cancel(what, done, total):
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repairs.compute(cancel)
    assert set(repairs.reports()) == set(list(plan.kept)[:2])
    assert len(list(repairs.folder.iterdir())) == 2
    repairs = Repairs(recorded.dense, plan, "affine", recording)
    assert set(repairs.compute()) == set(plan.kept)


def test_a_repair_is_of_one_model_in_one_precision_and_of_all_rows_that_are_there(recorded, recording):
    plan = half(recorded, "magnitude")
    repairs = Repairs(recorded.dense, plan, "affine", recording)
    repairs.compute()
    rounded = Dense.of({key: tensor.bfloat16() for key, tensor in recorded.dense.tensors.items()})
    other = Repairs(rounded, plan, "affine", recording)
    assert all(other.lacks(name) for name in plan.kept)

    add_a_row(recording)
    newer = Repairs(recorded.dense, plan, "affine", recording)
    newer.compute()
    with pytest.raises(UserError, match="More rows were recorded"):
        repairs.compute()
    assert not any(newer.lacks(name) for name in plan.kept)


def _cut_short(path, tensors, header):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without_report(path, tensors, header):
    save_file(tensors, path, {"format": header["format"]})


def _another_header(path, tensors, header):
    save_file(tensors, path, {**header, "report": '{"method": "affine", "rigde": 1}'})


def _of_another_format(path, tensors, header):
    save_file(tensors, path, {**header, "format": "something else"})


def _not_finite(path, tensors, header):
    key = "down" if "down" in tensors else "error"
    save_file({**tensors, key: tensors[key] * float("nan")}, path, header)


def _other_shapes(path, tensors, header):
    save_file({**tensors, "down": tensors["down"][:, :-1].contiguous()}, path, header)


DAMAGES = [_cut_short, _without_report, _another_header, _of_another_format, _not_finite, _other_shapes]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_cached_repair_that_is_not_sound_is_made_anew(recorded, recording, damage):
    plan = half(recorded, "magnitude").part(["single-0"])
    repairs = Repairs(recorded.dense, plan, "affine", recording)
    (report,) = repairs.compute().values()
    (path,) = repairs.folder.iterdir()
    whole = {key: tensor.clone() for key, tensor in load_file(path).items()}  # which are the file itself, mapped
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    damage(path, whole, header)
    found = Repairs(recorded.dense, plan, "affine", recording)["single-0"]
    assert found.report == report
    assert torch.equal(found.down, whole["down"].float())
    assert all(torch.equal(load_file(path)[key], tensor) for key, tensor in whole.items())


@pytest.mark.parametrize("damage", [_cut_short, _of_another_format, _not_finite])
def test_a_cached_ranking_that_is_not_sound_is_made_anew(recorded, recording, damage):
    site = recorded.dense.layout.sites[0]
    first = rank("obs", recorded.dense, recording, [site])[site.name]
    (path,) = (recording.cache / "rankings").iterdir()
    whole = {key: tensor.clone() for key, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    damage(path, whole, header)
    again = rank("obs", recorded.dense, recording, [site])[site.name]
    assert torch.equal(again.order, first.order)
    assert torch.equal(again.error, first.error)


def test_cancel_stops_within_a_site_and_leaves_nothing_of_it(recorded, recording):
    def cancel(what, done, total):
        if 0 < done < 1:
            raise KeyboardInterrupt

    plan = half(recorded, "magnitude")
    with pytest.raises(KeyboardInterrupt):
        rank("obs", recorded.dense, recording, progress=cancel)
    with pytest.raises(KeyboardInterrupt):
        Repairs(recorded.dense, plan, "affine", recording).compute(cancel)
    repairs = Repairs(recorded.dense, plan, "affine", recording)
    repairs.progress = cancel
    with pytest.raises(KeyboardInterrupt):
        repairs[next(iter(plan.kept))]
    assert not list(recording.cache.rglob("*.safetensors"))


def test_what_a_lora_needs_is_worked_out_later_and_belongs_to_the_repair_that_is_there(recorded, recording):
    """The new down projection is the kept columns and, through the matrix, those of the cut neurons."""
    plan = half(recorded, "obs")
    repairs = Repairs(recorded.dense, plan, "affine", recording)
    repairs.compute()
    times = {path: path.stat().st_mtime_ns for path in repairs.folder.iterdir()}
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
        recording = recorded.copy(tmp_path / device)
        rankings = rank("obs", recorded.dense, recording, device=device)
        repairs = Repairs(recorded.dense, half(recorded, "magnitude"), "affine", recording, device)
        found[device] = rankings, repairs
    for name, ranking in found["cpu"][0].items():
        torch.testing.assert_close(found["cuda"][0][name].error, ranking.error, rtol=1e-3, atol=1e-6 * ranking.energy)
        expected, site = found["cpu"][1][name], found["cuda"][1][name]
        assert site.report.after == pytest.approx(expected.report.after, rel=1e-3)
        torch.testing.assert_close(site.down, expected.down, rtol=0, atol=0.01 * expected.down.std().item())


def test_the_cache_of_an_earlier_version_is_found_and_a_recording_of_its_name_is_left_alone(tmp_path):
    (tmp_path / "one" / "cache" / "repairs").mkdir(parents=True)
    (tmp_path / "one" / "cache" / "repairs" / "file").touch()
    assert [path.name for path in (Recording.at(tmp_path / "one").cache / "repairs").iterdir()] == ["file"]
    assert [path.name for path in (tmp_path / "one").iterdir()] == [".cache"]
    (tmp_path / "two" / "cache" / "hidden_states").mkdir(parents=True)
    assert not Recording.at(tmp_path / "two").cache.exists()
    assert (tmp_path / "two" / "cache" / "hidden_states").is_dir()


def test_what_was_worked_out_from_fewer_rows_is_removed_and_nothing_else(recorded, recording):
    first, second = half(recorded, "obs"), half(recorded, "magnitude")
    for plan in (first, second):
        Repairs(recorded.dense, plan, "affine", recording).compute()
    folder = recording.cache / "repairs"
    assert len(list(folder.iterdir())) == 2
    name = recorded.dense.layout.sites[0].name
    some = next(recording.states().rows(name))
    recording.states().append("rows", {f"{name}.{part}": getattr(some, part) for part in ("x", "sigma", "image", "step")})
    new = Repairs(recorded.dense, second, "affine", recording)
    new.compute()
    assert list(folder.iterdir()) == [new.folder]


def test_repairing_a_bias_leaves_up_projections_alone(recorded):
    read: list[str] = []

    class Listed(dict):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

    plan = half(recorded, "fluctuation")
    dense = replace(recorded.dense, tensors=Listed(recorded.dense.tensors))
    repairs = Repairs(dense, plan, "bias", recorded.recording)
    expected = Repairs(recorded.dense, plan, "bias", recorded.recording)
    for name in plan.kept:
        assert torch.equal(repairs[name].down, expected[name].down)
        fold = repairs.fold(name)
        assert fold.offset is None or torch.equal(fold.offset, expected[name].fold.offset)
    up = {f"{site.up}.weight" for site in dense.layout.sites}
    assert read
    assert not up & set(read)


def test_another_plan_or_other_rows_are_another_repair(recorded):
    first = Repairs(recorded.dense, half(recorded, "obs"), "affine", recorded.recording)
    second = Repairs(recorded.dense, half(recorded, "magnitude"), "affine", recorded.recording)
    assert first.folder != second.folder


def test_the_repaired_checkpoint_reports_its_held_out_errors(recorded, tmp_path):
    plan = half(recorded, "obs")
    repairs = Repairs(recorded.dense, plan, "affine", recorded.recording)
    cut = Cut(recorded.dense, plan, repairs)
    save_pruned(tmp_path / "pruned.safetensors", cut)
    pruned = Pruned.open(tmp_path / "pruned.safetensors")
    for name, report in pruned.report.items():
        assert report == repairs.reports()[name]
        assert report.after < report.bias <= report.before * 1.001
        assert report.predicted == pytest.approx(report.after, rel=0.9)
    saved, made = Flux.load(pruned.tensors), Flux.load(cut)
    assert all(torch.equal(point.run(saved), point.run(made)) for point in recorded.points)


def test_a_pruned_file_with_folds_is_all_that_converting_a_lora_takes(recorded, tmp_path):
    plan = half(recorded, "obs")
    repairs = Repairs(recorded.dense, plan, "affine", recorded.recording)
    save_pruned(tmp_path / "pruned.safetensors", Cut(recorded.dense, plan, repairs), fold=True)
    pruned = Pruned.open(tmp_path / "pruned.safetensors")
    site = recorded.dense.layout.site("single-0")
    name, width = "diffusion_model.single_blocks.0.linear2", 128 + site.width
    lora = {f"{name}.lora_B.weight": torch.randn(128, 2), f"{name}.lora_A.weight": torch.randn(2, width)}
    found = convert_lora(lora, pruned.layout, pruned.plan, pruned.folds, pruned.report, pruned.vectors, pruned.tensors).tensors
    matrix = repairs.fold("single-0").matrix.float()
    a = lora[f"{name}.lora_A.weight"]
    kept = [*range(128), *(128 + j for j in plan.kept["single-0"].tolist())]
    expected = a[:, kept] + a[:, 128 + plan.removed("single-0")] @ matrix
    torch.testing.assert_close(found[f"{name}.lora_down.weight"], expected)


def test_nothing_is_changed_where_nothing_is_cut(recorded):
    plan = PruningPlan.keeping_all(recorded.dense)
    cut = Cut(recorded.dense, plan, Repairs(recorded.dense, plan, "affine", recorded.recording))
    assert all(torch.equal(cut[key], tensor) for key, tensor in recorded.dense.tensors.items())


def test_predicted_errors_are_near_what_is_measured(recorded, recording):
    """Of the output of each site on held-out images, and of the velocity."""
    probe = AmplificationProbe(recorded.dense.layout)
    for point in recorded.points:
        probe.measure(recorded.flux, point.sigma[0].item(), lambda point=point: point.run(recorded.flux))
    recording.states().add_amplification(probe.results())
    plan = make_plan(recorded.dense, recording, ByBudget(neurons=0.3)).plan
    repairs = Repairs(recorded.dense, plan, "affine", recording)
    measured = velocity_error(Flux.load(Cut(recorded.dense, plan, repairs)), recorded.points)
    assert 0.5 < plan.velocity_error / measured < 2
    for name, report in repairs.reports().items():
        assert report.after == pytest.approx(plan.predicted[name], rel=0.35)


def test_what_a_repair_lacks_is_said_in_a_sentence(recorded, recording, tmp_path):
    plan = half(recorded, "magnitude")
    for method in ("bias", "affine"):
        with pytest.raises(UserError, match=f"Repair = {method} works from what was recorded"):
            Repairs(recorded.dense, plan, method)
    shutil.rmtree(recording.states_folder)
    with pytest.raises(UserError, match="holds no"):
        Repairs(recorded.dense, plan, "affine", recording)
    with pytest.raises(UserError, match="no repair 'ridge'"):
        Repairs(recorded.dense, plan, "ridge")


def test_a_repair_that_the_files_precision_cannot_hold_is_refused(recorded, recording, tmp_path):
    """The mean of what is cut is 10^6, and the model is stored in float16, which ends at 65,504."""
    if recorded.dense.layout.family != "flux1":
        pytest.skip("it has no bias")
    dense = Dense.of({key: tensor.half() for key, tensor in recorded.dense.tensors.items()})
    found = recording.internals()
    sites = {name: replace(site, sum=torch.full_like(site.sum, 1e6 * site.tokens)) for name, site in found.sites.items()}
    replace(found, sites=sites).save(recording.internals_file)
    plan = half(recorded, "magnitude")
    cut = Cut(dense, plan, Repairs(dense, plan, "bias", recording))
    with pytest.raises(UserError, match=r"double_blocks.0.img_mlp.2.bias reaches .* float16"):
        cut["double_blocks.0.img_mlp.2.bias"]
    with pytest.raises(UserError, match="float16"):
        save_pruned(tmp_path / "pruned.safetensors", cut)
    assert not list(tmp_path.glob("*.safetensors"))


class Toy(nn.Module):
    """Its velocity is three times what its one site gives."""

    def __init__(self):
        super().__init__()
        self.down = Linear(4, 4)

    def forward(self, x):
        return 3 * self.down(x)


def toy_layout(layout: Layout) -> Layout:
    return replace(layout, family="flux2", sites=(replace(layout.sites[0], name="toy", down="down"),))


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_amplification_is_the_velocitys_error_over_the_energy_of_what_was_added(recorded, compiled: bool):
    """For v = 3y over n tokens: (9 sum |noise|^2 / 9 sum |y|^2) / (sum |noise|^2 / n) = n / sum |y|^2; by noise level."""
    toy, x = Toy(), torch.randn(2, 11, 4)
    run = torch.compile(toy, backend="eager") if compiled else toy
    with torch.no_grad():
        run(x)  # compiled here, before there is a hook
    probe = AmplificationProbe(toy_layout(recorded.dense.layout))
    for sigma in (0.9, 0.9, 0.2):
        probe.measure(toy, sigma, lambda: run(x))
    assert set(probe.results()) == {"toy", "toy.removed"}  # which differ where the model is not linear
    for measured in probe.results().values():
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
    probe = AmplificationProbe(toy_layout(recorded.dense.layout))
    probe.measure(toy, 0.9, lambda: velocity(toy, x))
    assert probe.results() == {}


def test_steps_to_probe_are_spread_from_the_first_to_the_last_but_one_and_the_last():
    assert probed_steps(20, 4) == {0, 6, 12, 18, 19}
    assert probed_steps(20, 1) == {0, 19}
    assert probed_steps(4, 8) == {0, 1, 2, 3}
    assert probed_steps(1, 4) == {0}
    assert probed_steps(20, 0) == set()
