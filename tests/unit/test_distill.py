"""Training a whole cut model against the dense velocity (retrain/distill.py, retrain/loop.py)."""

from dataclasses import replace

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux, SingleBlock
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.split import held_out
from flux_poke.recording.trajectories import Trajectories, trajectory, velocity_error
from flux_poke.retrain.distill import distill
from flux_poke.retrain.options import Options, TrainingStatus
from flux_poke.retrain.problem import batch
from safetensors.torch import load_file

SIGMAS = torch.linspace(1, 0, 4)
OPTIONS = Options(steps=40, learning_rate=1e-3, batch=4, eval_every=10, save_dtype="float32")


class Drawn:
    """A small FLUX, half of every MLP cut out of it, and trajectories of a few images."""

    def __init__(self, tensors, family="flux1", images=10, words=5):
        self.dense = Dense.of(tensors(family, depth=1, depth_single=1))
        self.flux, layout = Flux.load(self.dense.tensors), self.dense.layout
        widths = {site.name: site.width for site in layout.sites}
        kept = {name: torch.arange(0, width, 2) for name, width in widths.items()}
        self.plan = PruningPlan(family, self.dense.fingerprint, kept, widths, "magnitude", "every other neuron")
        cut = Cut(self.dense, self.plan)
        self.cut = {key: cut[key] for key in cut}
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(images, layout.in_channels // layout.patch**2, 4 * layout.patch, 4, generator=generator)
        context = torch.randn(images, words, layout.context, generator=generator)
        vector = torch.randn(images, layout.vector, generator=generator) if layout.vector else None
        self.points, _ = trajectory(self.flux, noise, SIGMAS, context, vector)
        self.samples = Trajectories.of(self.points)


@pytest.fixture(scope="module")
def drawn(tensors) -> Drawn:
    return Drawn(tensors)


def test_samples_are_the_points_and_their_velocities(drawn):
    point = drawn.samples.batch(torch.tensor([13, 2]))  # image 3 at the second step, image 2 at the first
    torch.testing.assert_close(point.x, torch.stack((drawn.points[1].x[3], drawn.points[0].x[2])))
    torch.testing.assert_close(point.velocity, point.run(drawn.flux), atol=1e-5, rtol=1e-4)
    assert drawn.samples.image[[13, 2]].tolist() == [3, 2]


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_distilled_model_is_nearer_to_the_dense_one_on_images_it_was_not_trained_on(tensors, family):
    drawn = Drawn(tensors, family)
    found = distill(drawn.cut, drawn.samples, OPTIONS)
    _, images = held_out(drawn.samples.image, OPTIONS.eval_share, OPTIONS.seed)
    assert len(images) == 2
    points = [point[sorted(images)] for point in drawn.points]
    before, after = (velocity_error(Flux.load(tensors), points) for tensors in (drawn.cut, {**drawn.cut, **found.tensors}))
    assert found.start.relative == pytest.approx(before, rel=1e-3)
    assert found.final.relative == pytest.approx(after, rel=1e-3)
    assert after < 0.97 * before


def test_the_tensors_that_were_given_are_not_touched(drawn):
    before = {key: tensor.clone() for key, tensor in drawn.cut.items()}
    distill(drawn.cut, drawn.samples, OPTIONS)
    assert all(torch.equal(drawn.cut[key], tensor) for key, tensor in before.items())


def test_a_scaled_8_bit_model_is_distilled_from_what_its_numbers_stand_for(drawn):
    cut = {}
    for key, tensor in drawn.cut.items():
        if "_blocks." in key and key.endswith(".weight"):
            layer = key.removesuffix(".weight")
            cut[f"{layer}.weight_scale"] = (scale := tensor.abs().max() / 448)
            cut[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
            tensor = (tensor / scale).to(torch.float8_e4m3fn)
        cut[key] = tensor
    options = replace(OPTIONS, just_evaluate=True)
    assert distill(cut, drawn.samples, options).start.relative == pytest.approx(
        distill(drawn.cut, drawn.samples, options).start.relative, rel=0.05
    )


def test_only_mlps_are_changed(drawn):
    found = distill(drawn.cut, drawn.samples, OPTIONS).tensors
    layers = ("img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2")
    double = {f"double_blocks.0.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    single = {f"single_blocks.0.{layer}.{part}" for layer in ("linear1", "linear2") for part in ("weight", "bias")}
    assert found.keys() == double | single
    for part in ("weight", "bias"):  # q, k and v stay as they were, bit for bit
        key = f"single_blocks.0.linear1.{part}"
        assert torch.equal(found[key][: 3 * 128], drawn.cut[key][: 3 * 128])
        assert not torch.equal(found[key][3 * 128 :], drawn.cut[key][3 * 128 :])


def test_recomputing_activations_gives_the_same_weights_and_runs_every_block_twice(drawn, monkeypatch):
    runs, forward = [], SingleBlock.forward

    def counted(block, *args, **kwargs):
        runs.append(torch.is_grad_enabled())
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(SingleBlock, "forward", counted)
    found = []
    for recompute in (False, True):
        runs.clear()
        options = Options(steps=3, batch=4, eval_every=3, save_dtype="float32", recompute=recompute)
        found.append(distill(drawn.cut, drawn.samples, options).tensors)
        assert sum(runs) == (2 if recompute else 1) * options.steps
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor)


def test_mixed_precision_trains_float32_weights_with_products_in_bfloat16(drawn, monkeypatch):
    products, multiply = set(), torch.nn.functional.linear

    def seen(*args):
        products.add((out := multiply(*args)).dtype)
        return out

    monkeypatch.setattr("torch.nn.functional.linear", seen)
    found = distill(drawn.cut, drawn.samples, replace(OPTIONS, mixed_precision=True))
    assert products == {torch.bfloat16}
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in found.tensors.values())
    whole = distill(drawn.cut, drawn.samples, OPTIONS)
    assert found.start.relative == pytest.approx(whole.start.relative, rel=0.05)
    assert found.start.relative != whole.start.relative
    assert found.final.relative == pytest.approx(whole.final.relative, rel=0.05)


def test_adafactor_trains_as_well_with_a_fraction_of_the_state(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr("flux_poke.retrain.loop.SAVE_EVERY", 0.0)
    sizes, found = {}, {}
    for optimizer in ("adamw", "adafactor"):
        saved = tmp_path / f"{optimizer}.safetensors"

        def look(progress, saved=saved, optimizer=optimizer):
            if saved.exists():
                tensors = load_file(saved)
                sizes[optimizer] = sum(tensor.numel() for key, tensor in tensors.items() if key.startswith("optimizer."))

        options = replace(OPTIONS, optimizer=optimizer, learning_rate=1e-2 if optimizer == "adafactor" else 1e-3)
        found[optimizer] = distill(drawn.cut, drawn.samples, options, saved, look)
    assert found["adafactor"].final.relative < 0.97 * found["adafactor"].start.relative
    assert sizes["adafactor"] < 0.05 * sizes["adamw"]


def test_event_files_hold_the_losses_that_were_told(drawn, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    told: list[TrainingStatus] = []
    distill(drawn.cut, drawn.samples, replace(OPTIONS, tensorboard=tmp_path), report=told.append)
    events = accumulators.EventAccumulator(str(tmp_path / "the whole model")).Reload()
    at_evaluations = [progress for progress in told if progress.step and progress.step % OPTIONS.eval_every == 0]
    for tag, name in (("loss/held out", "held_out_loss"), ("loss/train", "train_loss")):
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [10, 20, 30, 40]
        expected = {progress.step: getattr(progress, name) for progress in at_evaluations}
        assert [scalar.value for scalar in scalars] == pytest.approx([expected[scalar.step] for scalar in scalars], rel=1e-6)


def test_it_stops_when_the_held_out_loss_stands_still_in_the_second_half(drawn):
    options = replace(OPTIONS, steps=60, learning_rate=1e-9, eval_every=4, patience=2)
    assert distill(drawn.cut, drawn.samples, options).steps == 30


def test_a_training_that_only_does_harm_gives_back_what_it_began_with(drawn):
    found = distill(drawn.cut, drawn.samples, Options(steps=2, learning_rate=30.0, eval_every=1, save_dtype="float32"))
    assert found.final.relative == pytest.approx(found.start.relative)
    for key, tensor in found.tensors.items():
        assert torch.equal(tensor, drawn.cut[key])


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_training_that_was_cut_off_goes_on_bit_for_bit(drawn, optimizer, tmp_path, monkeypatch):
    options = replace(OPTIONS, optimizer=optimizer)
    monkeypatch.setattr("flux_poke.retrain.loop.SAVE_EVERY", 0.0)

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.step >= 20:
            raise Stop

    whole = distill(drawn.cut, drawn.samples, options).tensors
    saved = tmp_path / "state.safetensors"
    with pytest.raises(Stop):
        distill(drawn.cut, drawn.samples, options, saved, stop)
    assert saved.exists()
    steps = []
    rest = distill(drawn.cut, drawn.samples, options, saved, lambda progress: steps.append(progress.step)).tensors
    assert min(steps) > 0
    assert not saved.exists()
    assert all(torch.equal(rest[key], tensor) for key, tensor in whole.items())


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"method": "magic"},
        {"save_dtype": "int8"},
        {"eval_share": 0.9},
        {"optimizer": "sgd"},
        {"sequential": True, "thickness": 2},
        {"learning_rate": float("inf")},
        {"learning_rate": float("nan")},
        {"seed": -1},
        {"seed": 10**20},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError):
        Options(**wrong)


def test_one_image_is_too_few(drawn):
    alone = Trajectories.of([point[:1] for point in drawn.points])
    with pytest.raises(UserError, match="at least 2"):
        distill(drawn.cut, alone, OPTIONS)


def test_batches_are_the_same_on_every_machine_and_in_every_version_of_python():
    groups = [torch.arange(10), torch.arange(10, 14)]
    assert [batch(groups, 3, 7, step).tolist() for step in (0, 5)] == [[12, 13, 11], [2, 5, 3]]


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_edits_are_trained_on_with_their_reference_pictures(tensors, family):
    """Also those of one picture beside those of two, which stand in batches of their own."""
    drawn = Drawn(tensors, family)
    x = drawn.points[0].x
    pictures = [torch.randn(len(x), x.shape[1], 4, 6), torch.randn(len(x), x.shape[1], 2, 2)]
    points = []
    for count in (1, 2):
        start = drawn.points[0]
        points += trajectory(drawn.flux, x, SIGMAS, start.context, start.vector, pictures[:count])[0]
    samples = Trajectories.of(points)
    assert sorted(len(group) for group in samples.groups) == [3 * len(x), 3 * len(x)]
    one, two = (samples.batch(group[:4]) for group in samples.groups)
    assert (len(one.references), len(two.references)) == (1, 2)
    for point in (one, two):
        torch.testing.assert_close(point.velocity, point.run(drawn.flux), atol=1e-4, rtol=1e-3)
        assert not torch.allclose(point.velocity, replace(point, references=()).run(drawn.flux), atol=1e-2)
    found = distill(drawn.cut, samples, OPTIONS)
    assert found.final.relative < found.cut.relative
