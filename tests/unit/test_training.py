"""Making FLUXes (training/): configurations, data, and what an interrupted training leaves (flux/resume.py)."""

import gzip
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flux_poke.errors import UserError
from flux_poke.flux import resume
from flux_poke.flux.checkpoint import Checkpoint
from flux_poke.flux.resume import load_training, save_training
from flux_poke.tiny.model import TinyFlux
from flux_poke.tiny.words import VOCABULARY
from flux_poke.training import loop, objectives
from flux_poke.training.config import CONFIGS, Config, Data, Transformer, read_config
from flux_poke.training.data import load_examples
from flux_poke.training.trainer import train
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import Linear

#: Pictures of 32 pixels, and none for an autoencoder: training it would take longest.
CONFIG = {
    "seed": 0,
    "data": {"side": 16, "channels": 1},
    "pixels": {"patch": 4},
    "flux": {
        "hidden": 64, "heads": 2, "axes": [8, 12, 12], "depth": 1, "depth_single": 1, "mlp_ratio": 1, "text_width": 16,
        "steps": 6, "batch": 2, "learning_rate": 1e-3,
    },
}  # fmt: skip
FILES = ("flux", "words", "autoencoder")


def config(**changed) -> dict:
    """`CONFIG` with other values in it: `flux={"steps": 20}`; None takes a key out."""
    found: dict = deepcopy(CONFIG)
    for name, value in changed.items():
        if isinstance(value, dict):
            found[name] = {key: new for key, new in {**found.get(name, {}), **value}.items() if new is not None}
        elif value is None:
            del found[name]
        else:
            found[name] = value
    return found


def trained(out: Path, progress=None, **changed) -> Path:
    train(Config.of(config(**changed)), out, *([progress] if progress else []))
    return out


def same_weights(one: Path, other: Path) -> bool:
    pairs = [(load_file(one / f"{name}.safetensors"), load_file(other / f"{name}.safetensors")) for name in FILES]
    return all(a.keys() == b.keys() and all(torch.equal(b[key], tensor) for key, tensor in a.items()) for a, b in pairs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("whole"))


def test_what_is_trained_is_of_the_tiny_kind_and_its_files_are_as_readable_as_others(whole):
    tiny = TinyFlux.load(whole / "flux.safetensors")
    assert tiny.draw(["three"]).shape == (1, 3, 16, 16)
    (whole / "other").touch()
    for name in FILES:
        assert (whole / f"{name}.safetensors").stat().st_mode == (whole / "other").stat().st_mode


def test_axes_of_its_own_are_read_from_the_checkpoint_and_told_in_its_header(whole):
    checkpoint = Checkpoint(whole / "flux.safetensors")
    assert (checkpoint.layout.axes, checkpoint.layout.head_dim, checkpoint.layout.heads) == ((8, 12, 12), 32, 2)
    assert checkpoint.metadata["axes"] == "8,12,12"
    assert json.loads(checkpoint.metadata["training"])["flux"]["steps"] == 6


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_what_is_trained_is_recorded_planned_cut_and_drawn_as_what_ships(family, whole, run, tmp_path):
    axes = [8, 12, 12] if family == "flux1" else [8, 8, 8, 8]
    out = trained(tmp_path / "model", flux={"family": family, "axes": axes, "steps": 2})
    (tmp_path / "prompts.txt").write_text("\n".join(["three", "a 7", "zero", "the digit 4"] * 3))
    what = ("--what", "internals,rows", "--rows-per-step", 16, "--keep-steps", 4, "--steps", 4)
    run("record", out / "flux.safetensors", tmp_path / "recording", "--prompts", tmp_path / "prompts.txt", *what)
    plan = ("--checkpoint", out / "flux.safetensors", "--neurons", 0.5, "--multiple", 8, "-o", tmp_path / "plan.safetensors")
    run("plan", tmp_path / "recording", *plan)
    run("prune", tmp_path / "plan.safetensors", "-o", out / "pruned.safetensors")
    dense, pruned = (TinyFlux.load(out / f"{name}.safetensors") for name in ("flux", "pruned"))
    assert pruned.flux.layout.axes == tuple(axes)
    assert pruned.flux.layout.neurons < dense.flux.layout.neurons
    assert pruned.draw(["three"]).shape == (1, 3, 16, 16)


class Stopped(Exception):
    pass


def stop_at(steps: int, autoencoder: int = 0):
    """A progress that stops once `steps` of the transformer's are done."""

    def stop(what: str, done: float, total: float) -> None:
        if what.startswith("flux") and round(done) >= autoencoder + steps:
            raise Stopped

    return stop


@pytest.mark.parametrize(
    "options", [{}, {"ema": 0.9, "guidance_dropout": 0.5, "schedule": "constant", "warmup": 2, "times": "shifted"}]
)
def test_a_training_that_was_cut_off_within_its_first_steps_goes_on_bit_for_bit(options, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 1e9)
    uncut = trained(tmp_path / "uncut", flux=options)
    with pytest.raises(Stopped):
        trained(tmp_path / "cut", stop_at(3), flux=options)
    steps: list[float] = []
    trained(tmp_path / "cut", lambda what, done, total: steps.append(round(done)), flux=options)
    assert steps[:-1] == [4, 5, 6]
    assert same_weights(uncut, tmp_path / "cut")


def test_more_steps_than_first_asked_for_follow_as_if_they_had_been_asked_for(tmp_path):
    options = {"schedule": "constant", "ema": 0.9}
    long = trained(tmp_path / "long", flux={**options, "steps": 9})
    short = trained(tmp_path / "short", flux=options)
    assert not same_weights(long, short)
    trained(short, flux={**options, "steps": 9})
    assert same_weights(long, short)


def test_a_training_may_not_go_on_for_fewer_steps_than_are_done_or_as_another(tmp_path):
    trained(tmp_path)
    with pytest.raises(UserError, match="6 steps are done, more than the 3 asked for"):
        trained(tmp_path, flux={"steps": 3})
    with pytest.raises(UserError, match=r"is a training with flux\.batch: 2; the configuration has 4"):
        trained(tmp_path, flux={"batch": 4, "steps": 9})


@pytest.mark.parametrize("name", ["flux", "words"])
def test_a_file_that_no_training_has_written_is_not_replaced_nor_taken_for_one(name, tmp_path):
    path = tmp_path / f"{name}.safetensors"
    save_file({"my.lora": torch.ones(3)}, path)
    with pytest.raises(UserError, match=rf"{name}\.safetensors is something else and is not replaced"):
        trained(tmp_path)
    assert load_file(path).keys() == {"my.lora"}
    assert [*tmp_path.iterdir()] == [path]


def test_a_training_of_an_older_version_goes_on_where_keys_are_new(tmp_path):
    trained(tmp_path)
    path = tmp_path / "flux.training.safetensors"
    with safe_open(path, "pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    then = json.loads(header["training"])
    del then["flux"]["padded_every"], then["computing"]
    header["training"] = json.dumps(then)
    header["checksum"] = resume._checksum(tensors, {key: value for key, value in header.items() if key != "checksum"})
    save_file(tensors, path, header)
    trained(tmp_path, flux={"steps": 7})
    assert step_of(tmp_path) == 7


def test_the_autoencoder_is_trained_first_and_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    """Of 20 pictures, since encoding all of them would take longest."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 1e9)
    path = few_digits(tmp_path / "digits.npz")
    options = {
        "data": {"kind": "arrays", "path": str(path), "channels": 3}, "pixels": None,
        "autoencoder": {"steps": 3, "batch": 2}, "flux": {"steps": 2},
    }  # fmt: skip

    def stop(what: str, done: float, total: float) -> None:
        if what.startswith("autoencoder") and round(done) == 2:
            raise Stopped

    uncut = trained(tmp_path / "uncut", **options)
    with pytest.raises(Stopped):
        trained(tmp_path / "cut", stop, **options)
    assert same_weights(uncut, trained(tmp_path / "cut", **options))
    assert not (tmp_path / "cut/autoencoder.training.safetensors").exists()
    (uncut / "flux.training.safetensors").unlink()
    with pytest.raises(UserError, match="is for flux1 and pictures of 16 pixels; the configuration is for pixels"):
        trained(uncut, data={"kind": "arrays", "path": str(path)})


COMMAND = """
import sys
import torch
torch.set_num_threads(1)
from flux_poke.cli import main
from flux_poke.training import loop
loop.SAVE_SECONDS, loop.SAVE_SHARE = 0.0, 1e9
sys.argv[1:] = ["train", sys.argv[1], "--out", sys.argv[2]]
main()
"""


def command(path: Path, out: Path, **changed) -> list[str]:
    path.write_text(yaml.safe_dump(config(**changed)))
    return [sys.executable, "-c", COMMAND, str(path), str(out)]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while process.poll() is None and not path.exists():
        time.sleep(0.05)


def test_a_training_killed_at_random_three_times_equals_an_uninterrupted_one_weight_for_weight(tmp_path):
    """The processes are begun by one that has imported everything, where the platform has such."""
    options = {
        "flux": {"steps": 60, "ema": 0.95, "guidance_dropout": 0.1},
        "samples": {"every": 20, "prompts": ["three"], "steps": 2},
        "saving": {"every": 1, "keep": 2},
    }
    uncut = trained(tmp_path / "uncut", **options)
    kinds = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
    context.set_forkserver_preload(["flux_poke.training.trainer", "accelerate"])
    out, killed, random = tmp_path / "killed", [0], torch.Generator().manual_seed(time.time_ns())
    for _ in range(3):
        process = context.Process(target=train, args=(Config.of(config(**options)), out))
        process.start()
        while process.is_alive() and step_of(out) == killed[-1]:
            time.sleep(0.02)
        time.sleep(0.1 * torch.rand(1, generator=random).item())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        killed.append(step_of(out))
    assert 0 < killed[1] < killed[2] < killed[3] < 60, killed
    trained(out, **options)
    assert same_weights(uncut, out)
    for path in sorted(uncut.rglob("*.png")):
        assert path.read_bytes() == (out / path.relative_to(uncut)).read_bytes()
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["0000059", "0000060"]
    assert same_weights(uncut / "checkpoints/0000059", out / "checkpoints/0000059")
    assert not list(out.rglob(".flux-poke-*"))


def step_of(out: Path) -> int:
    """How many steps are done in the saved state."""
    path = out / "flux.training.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def test_ctrl_c_saves_the_training_and_says_how_to_go_on(tmp_path):
    options = command(tmp_path / "config.yaml", tmp_path, flux={"steps": 500_000})
    with subprocess.Popen(options, stderr=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "flux.training.safetensors", process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said
    stopped = re.search(r"Stopped after ([\d,]+) of 500,000 steps of flux, which are saved .* goes on", " ".join(said.split()))
    assert stopped
    assert step_of(tmp_path) == int(stopped[1].replace(",", ""))


def test_two_processes_make_what_one_makes_but_for_rounding(whole, tmp_path):
    path, saved = tmp_path / "config.yaml", tmp_path / "out/flux.training.safetensors"
    path.write_text(yaml.safe_dump(config(computing={"device": "cpu"})))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "flux_poke.cli"]
    ended = subprocess.run(
        [*launch, "train", str(path), "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    with safe_open(saved, "pt") as file, safe_open(whole / saved.name, "pt") as alone:
        assert (file.metadata()["processes"], alone.metadata()["processes"]) == ("2", "1")
        for key in (key for key in file.keys() if key.startswith("model.")):
            torch.testing.assert_close(file.get_tensor(key), alone.get_tensor(key), rtol=1e-3, atol=1e-4)


def test_samples_are_drawn_by_the_average_and_kept_checkpoints_run(tmp_path):
    samples = {"every": 2, "prompts": ["three", "a 7"], "steps": 2, "guidance": 2.0}
    out = trained(tmp_path, flux={"ema": 0.9}, samples=samples, saving={"every": 2, "keep": 2, "tensorboard": True})
    assert [path.name for path in sorted((out / "samples").iterdir())] == ["0000002.png", "0000004.png", "0000006.png"]
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["0000004", "0000006"]
    last, kept = (TinyFlux.load(folder / "flux.safetensors") for folder in (out, out / "checkpoints/0000006"))
    torch.testing.assert_close(kept.draw(["three"]), last.draw(["three"]), rtol=0, atol=0)
    with safe_open(out / "flux.training.safetensors", "pt") as file:
        average, now = (file.get_tensor(f"{where}.flux.img_in.weight") for where in ("model.average.module", "model.model"))
    assert torch.equal(load_file(out / "flux.safetensors")["img_in.weight"], average.bfloat16())
    assert not torch.equal(average, now)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 6]
    assert [event.step for event in events.Images("samples")] == [2, 4, 6]


def test_guidance_moves_a_picture_away_from_what_is_drawn_without_a_prompt(whole):
    tiny = TinyFlux.load(whole / "flux.safetensors")
    noise = tiny.noise(1, 0)
    plain, none, doubled = (
        tiny.sample(prompts, noise, torch.tensor([1.0, 0.0]), guidance=guidance)
        for prompts, guidance in ((["three"], 1.0), ([""], 1.0), (["three"], 2.0))
    )
    torch.testing.assert_close(doubled, 2 * plain - none)


def test_60_million_parameters_of_32_pixels_and_six_heads_train_some_steps(tmp_path):
    values = yaml.safe_load((CONFIGS / "pixels-60m.yaml").read_text())
    values["flux"] |= {"steps": 2, "batch": 2}
    del values["samples"]
    seen: list[str] = []
    train(Config.of(values), tmp_path, lambda what, done, total: seen.append(what))
    tensors, layout = load_file(tmp_path / "flux.safetensors"), Checkpoint(tmp_path / "flux.safetensors").layout
    assert (layout.hidden, layout.heads, layout.depth, layout.depth_single) == (384, 6, 6, 12)
    assert 55e6 < sum(tensor.numel() for tensor in tensors.values()) < 65e6
    assert TinyFlux.load(tmp_path / "flux.safetensors").latent_shape == (3 * 16, 8, 8)
    assert len(seen) == 3


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_axes_turn_queries_and_keys_as_the_layout_says(family, whole, tmp_path):
    axes = [8, 12, 12] if family == "flux1" else [8, 8, 8, 8]
    out = trained(tmp_path, flux={"family": family, "axes": axes, "steps": 2})
    tiny = TinyFlux.load(out / "flux.safetensors")
    assert tiny.flux.layout.axes == tuple(axes)
    pe = tiny.flux.positions(0, [(2, 3)], torch.device("cpu"))
    angle = 1.0 / tiny.flux.layout.theta ** (2 / axes[1])  # second frequency of the row's axis, one row down
    torch.testing.assert_close(pe[3, axes[0] // 2 + 1, 1, 0], torch.tensor(np.sin(angle), dtype=torch.float32))


def test_a_flux2_learns_from_reference_pictures_too(tmp_path):
    options = {
        "flux": {"family": "flux2", "axes": [8, 8, 8, 8], "reference_every": 2, "padded_every": 3, "padded_batch": 1},
    }  # fmt: skip
    tiny = TinyFlux.load(trained(tmp_path, **options) / "flux.safetensors")
    images = load_examples(Data(side=16, channels=1)).images[:1]
    assert not torch.equal(
        tiny.draw(["the negative"], references=[images]), tiny.draw(["the negative"], references=[1 - images])
    )


def test_what_a_batch_beside_references_asks_for_is_the_reference_or_its_negative():
    examples = load_examples(Data(side=16, channels=1))
    options = Transformer(
        family="flux2", hidden=128, depth=1, depth_single=1, steps=9, batch=64, learning_rate=1e-3, reference_every=3
    )
    from flux_poke.tiny.words import FLUX2_VOCABULARY, WordEncoder

    words, clean = WordEncoder(8, FLUX2_VOCABULARY, pooled=False), 2 * examples.images[:, :1] - 1
    latents = objectives.Latents.of(examples, clean, words, -clean)
    assert objectives.draw_batch(latents, options, 1).references == ()
    batch = objectives.draw_batch(latents, options, 2)
    turned = torch.tensor([FLUX2_VOCABULARY.index("negative") in row for row in batch.ids.tolist()])
    signs = torch.where(turned, -1.0, 1.0)[:, None, None, None]
    torch.testing.assert_close(batch.clean, signs * batch.references[0])
    assert 10 < turned.sum() < 54
    assert 10 < (batch.references[0].mean((1, 2, 3)) > 0).sum() < 54


@pytest.mark.parametrize(("times", "mean"), [("uniform", 0.5), ("logit-normal", 0.5), ("shifted", 0.676)])
def test_noise_levels_are_spread_as_asked_for(times, mean):
    """Of the shift 3, the mean of 3 t / (1 + 2 t) over 0 to 1 is 3 / 2 - 3 ln 3 / 4."""
    options = Transformer(hidden=128, depth=1, depth_single=1, steps=1, batch=1, learning_rate=1e-3, times=times)
    torch.manual_seed(0)
    drawn = objectives.draw_times(options, 100_000)
    assert abs(drawn.mean().item() - mean) < 0.005
    deciles = drawn.quantile(torch.tensor([0.1, 0.9])).tolist()
    expected = {"uniform": (0.1, 0.9), "logit-normal": (0.217, 0.783), "shifted": (0.25, 0.964)}[times]
    assert np.allclose(deciles, expected, atol=0.01)


def test_a_prompt_is_left_out_as_often_as_guidance_dropout_says():
    examples = load_examples(Data(side=16, channels=1))
    from flux_poke.tiny.words import WordEncoder

    latents = objectives.Latents.of(examples, examples.images[:, :1], WordEncoder(8))
    options = Transformer(hidden=128, depth=1, depth_single=1, steps=1, batch=1000, learning_rate=1e-3, guidance_dropout=0.3)
    torch.manual_seed(0)
    empty = (objectives.draw_batch(latents, options, 0).ids == 0).all(1)
    assert 250 < empty.sum() < 350


def few_digits(path: Path, count: int = 20) -> Path:
    images = load_examples(Data(side=16, channels=1)).images[:count, 0]
    from sklearn.datasets import load_digits

    np.savez(path, images=(images * 255).byte().numpy(), labels=load_digits().target[:count])
    return path


def test_digits_come_with_every_way_to_name_them():
    examples = load_examples(Data())
    assert examples.images.shape == (1797, 3, 64, 64)
    assert {"three", "a 3", "the numeral three written by hand"} <= set(examples.captions[3])


@pytest.mark.parametrize("packed", [False, True])
def test_images_and_labels_are_read_from_idx_files_as_mnists_are(packed, tmp_path):
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4) * 8
    contents = {
        "images": b"\0\0\x08\x03" + np.array(images.shape, ">i4").tobytes() + images.tobytes(),
        "labels": b"\0\0\x08\x01" + np.array([2], ">i4").tobytes() + bytes([7, 0]),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    data = Data(kind="arrays", path=str(tmp_path / "images"), labels=str(tmp_path / "labels"), side=8, channels=1)
    examples = load_examples(data)
    assert examples.images.shape == (2, 3, 8, 8)
    assert examples.captions[0][:2] == ["seven", "7"]
    exact = load_examples(Data(kind="arrays", path=str(tmp_path / "images"), labels=str(tmp_path / "labels"), side=8))
    assert abs(exact.images[1].mean().item() - images[1].mean() / 255) < 1e-3


def test_names_and_colours_of_an_npz_are_kept(tmp_path):
    colours = np.zeros((3, 8, 8, 3), np.uint8)
    for number in range(3):
        colours[number, ..., number] = 255
    np.savez(tmp_path / "colours.npz", images=colours, labels=np.array([0, 1, 2]))
    data = Data(
        kind="arrays",
        path=str(tmp_path / "colours.npz"),
        names=["red", "green", "deep blue"],
        templates=["a {} square"],
        side=8,
    )
    examples = load_examples(data)
    assert examples.captions == [["a red square"], ["a green square"], ["a deep blue square"]]
    assert torch.equal(examples.images.mean((2, 3)), torch.eye(3))


def test_several_digits_stand_in_one_picture_in_the_order_they_are_named(tmp_path):
    bars = np.stack([np.full((8, 8), 25 * number, np.uint8) for number in range(10)])
    np.savez(tmp_path / "grey.npz", images=bars, labels=np.arange(10))
    data = Data(kind="arrays", path=str(tmp_path / "grey.npz"), side=16, per_picture=3, templates=["{}"])
    examples = load_examples(data, seed=1)
    for image, captions in zip(examples.images, examples.captions, strict=True):
        shown = [round(image[0, y, x].item() * 255 / 25) for y, x in ((4, 4), (4, 12), (12, 4))]
        assert " ".join(map(str, shown)) in captions
        assert image[0, 12, 12] == 0


@pytest.mark.parametrize("told", ["txt", "jsonl", "csv"])
def test_a_folder_of_pictures_comes_with_its_captions(told, tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (12, 6), colour).save(tmp_path / f"{name}.png")
    captions = {"a": ["a red field", "red"], "b": ["a blue field"]}
    if told == "txt":
        for name, some in captions.items():
            (tmp_path / f"{name}.txt").write_text("\n".join(some) + "\n")
    elif told == "jsonl":
        rows = [json.dumps({"file_name": f"{name}.png", "text": some}) for name, some in captions.items()]
        (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    else:
        rows = [f"{name}.png,{text}" for name, some in captions.items() for text in some]
        (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    examples = load_examples(Data(kind="folder", path=str(tmp_path), side=16))
    assert examples.captions == [["a red field", "red"], ["a blue field"]]
    assert examples.images.shape == (2, 3, 16, 16)
    assert torch.equal(examples.images[0, :, 8, 8], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(examples.images[0, :, 0, 0], torch.ones(3))  # white above and below what is not square


def test_words_that_ship_are_kept_and_others_grow_from_the_captions(tmp_path):
    digits = TinyFlux.load(trained(tmp_path / "digits", flux={"steps": 1}) / "flux.safetensors")
    assert digits.words.vocabulary == VOCABULARY
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("Un caf\u00e9 rouge et un deux trois quatre cinq six 7")
    data = {"kind": "folder", "path": str(tmp_path)}
    grown = TinyFlux.load(trained(tmp_path / "grown", data=data, flux={"steps": 1, "batch": 1}) / "flux.safetensors").words
    assert grown.vocabulary[:3] == ("", "?", "un")
    assert {"caf\u00e9", "rouge", "7"} <= set(grown.vocabulary)
    assert grown.ids(["un caf\u00e9 noir"]).shape == (1, 11)
    assert grown.ids(["un caf\u00e9 noir"])[0, :3].tolist() == [2, grown.vocabulary.index("caf\u00e9"), 1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"flux": None}, "flux is missing"),
        ({"seed": -1}, "seed is wrong: it must be greater than or equal to 0; found -1"),
        ({"seed": "x"}, "seed is wrong: it must be a valid integer; found 'x'"),
        ({"flux": {"hidden": 100, "heads": None}}, "hidden must be a multiple of 32"),
        ({"flux": {"heads": 3}}, "heads must be hidden / 32 = 2 with these axes; found 3"),
        ({"flux": {"axes": None}}, "axes must be given where a head is not 128 wide"),
        ({"flux": {"axes": [16, 16]}}, "axes must be 3 numbers for flux1"),
        ({"flux": {"axes": [9, 9, 14]}}, r"flux\.axes\.0 is wrong: it must be a multiple of 2; found 9"),
        ({"flux": {"depth": None}}, r"flux\.depth is missing"),
        ({"flux": {"widht": 3}}, r"flux\.widht is not known"),
        ({"flux": {"steps": 0}}, r"flux\.steps is wrong: it must be greater than 0; found 0"),
        ({"flux": {"mlp_ratio": 2.5}}, r"flux\.mlp_ratio is wrong"),
        ({"flux": {"batch": True}}, r"flux\.batch is wrong: it must be a valid integer; found True"),
        ({"flux": {"batch": 1798}}, "there are 1797 images"),
        ({"flux": {"learning_rate": "1e-3"}}, r"flux\.learning_rate is wrong: it must be a valid number; found '1e-3'"),
        ({"flux": {"learning_rate": float("nan")}}, "found nan"),
        ({"flux": {"reference_every": 2}}, "are for family: flux2"),
        ({"flux": 7}, "flux is wrong"),
        ({"flux": {"family": "flux3"}}, "'flux1' or 'flux2'; found 'flux3'"),
        ({"pixels": None}, "one of the sections autoencoder and pixels"),
        ({"autoencoder": {}}, "one of the sections autoencoder and pixels"),
        ({"pixels": {"patch": 3}}, "patch in section pixels must be an even divisor of side in section data, 16; found 3"),
        ({"data": {"kind": "folder"}}, "path must be given"),
        ({"data": {"kind": "arrays", "path": "no.npz"}}, r"no\.npz cannot be read"),
        ({"data": {"kind": "folder", "path": "none"}}, "none is no folder"),
        ({"computing": {"device": "gpu"}}, r"computing\.device is wrong"),
        ({"computing": {"device": "cuda:99"}}, "computing cannot be had on this machine"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_before_anything_is_written(wrong, said, tmp_path):
    with pytest.raises(UserError, match=said) as raised:
        trained(tmp_path / "out", **wrong)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_ship_are_read_by_their_names(recipe):
    assert read_config(recipe.stem) == read_config(recipe)


@pytest.mark.parametrize("content", [b"- a list", b"flux: [", b"\xff\xfe\x00", b"[" * 5000, b""])
def test_a_configuration_that_is_none_is_refused_in_a_sentence(content, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_config(path)


def linear_training() -> tuple[Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def changed(path: Path, tensors: dict | None = None, header: dict | None = None) -> None:
    """Writes the training state at `path` again with other tensors and header entries; None takes one out."""
    with safe_open(path, "pt") as file:
        all_tensors = {key: file.get_tensor(key) for key in file.keys()} | (tensors or {})
        all_headers = file.metadata() | (header or {})
    save_file(
        {key: tensor for key, tensor in all_tensors.items() if tensor is not None},
        path,
        {key: value for key, value in all_headers.items() if value is not None},
    )


@pytest.mark.parametrize(
    "damage",
    [
        {"header": {"step": None}},
        {"header": {"step": "many"}},
        {"header": {"step": "-1"}},
        {"header": {"step": "9" * 400}},
        {"header": {"checksum": None}},
        {"header": {"checksum": "[1]"}},
        {"header": {"optimizer": None}},
        {"tensors": {"rng": None}},
        {"tensors": {"rng": torch.zeros(3, dtype=torch.uint8)}},
        {"tensors": {"rng": torch.zeros(5056)}},
        {"tensors": {"model.weight": None}},
        {"tensors": {"model.weight": torch.zeros(2, 3)}},
        {"tensors": {"model.weight": torch.full((2, 3), torch.nan)}},
        {"tensors": {"optimizer.0.exp_avg": None}},
        {"tensors": {"optimizer.0.exp_avg": torch.zeros(7)}},
        {"tensors": {"optimizer.0.exp_avg": torch.full((2, 3), torch.inf)}},
        {"tensors": {"optimizer.x.exp_avg": torch.zeros(7)}},
        {"tensors": {"optimizer.0.0.exp_avg": torch.zeros(7)}},
        {"tensors": {"optimizer.9.exp_avg": torch.zeros(7)}},
        {"tensors": {"optimizer": torch.zeros(7)}},
    ],
)
def test_a_damaged_training_state_is_refused_in_a_sentence(damage, tmp_path):
    path = tmp_path / "state.safetensors"
    save_training(path, *linear_training(), 5)
    changed(path, **damage)
    with pytest.raises(UserError, match=r"state\.safetensors"):
        load_training(path, *linear_training(), 10)


def test_numbers_that_are_not_finite_are_not_trained_on_even_where_the_file_is_as_it_was_written(tmp_path):
    path = tmp_path / "state.safetensors"
    model, optimizer = linear_training()
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    save_training(path, model, optimizer, 5)
    with pytest.raises(UserError, match=r"model\.weight that are not finite"):
        load_training(path, *linear_training(), 10)


def test_the_training_of_another_model_or_optimizer_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    save_training(path, *linear_training(), 5)
    other = Linear(4, 2)
    with pytest.raises(UserError, match="another model"):
        load_training(path, other, torch.optim.AdamW(other.parameters()), 10)
    model, _ = linear_training()
    with pytest.raises(UserError, match="its optimizer is AdamW, not SGD"):
        load_training(path, model, torch.optim.SGD(model.parameters()), 10)
    save_file({"a": torch.zeros(1)}, path, {"format": resume.FORMAT.replace("2", "1")})
    with pytest.raises(UserError, match="saved training"):
        load_training(path, *linear_training(), 10)
