"""Training the tiny FLUX (tiny/training.py): its configuration, and what an interrupted training leaves (flux/resume.py)."""

import re
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from flux_poke.errors import UserError
from flux_poke.flux import resume
from flux_poke.flux.resume import load_training, save_training
from flux_poke.tiny import training
from flux_poke.tiny.data import digit_images
from flux_poke.tiny.model import TinyFlux
from flux_poke.tiny.training import read_config, train_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG = {
    "seed": 0,
    "autoencoder": {"steps": 2, "batch": 2, "learning_rate": 8e-4, "latent_noise": 0.05, "moment_weight": 0.02},
    "flux": {
        "hidden": 128, "depth": 1, "depth_single": 1, "mlp_ratio": 1, "text_width": 16, "steps": 6, "batch": 2,
        "learning_rate": 1e-3,
    },
}  # fmt: skip


def config(**changed) -> dict:
    """`CONFIG` with other values in it: `flux={"steps": 20}`; None takes a key out."""
    found: dict = deepcopy(CONFIG)
    for name, value in changed.items():
        if isinstance(value, dict):
            found[name] = {key: new for key, new in {**found[name], **value}.items() if new is not None}
        elif value is None:
            del found[name]
        else:
            found[name] = value
    return found


@pytest.fixture(scope="module", autouse=True)
def _few_images():
    """Encoding all of them would take longest."""
    images, digits = digit_images()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "digit_images", lambda: (images[:20], digits[:20]))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train_tiny(out, config())
    return out


def test_what_is_trained_is_a_tiny_flux_and_its_files_are_as_readable_as_others(whole):
    assert TinyFlux.load(whole / "flux.safetensors").draw(["three"]).shape == (1, 3, 64, 64)
    (whole / "other").touch()
    for name in ("flux", "words", "autoencoder"):
        assert (whole / f"{name}.safetensors").stat().st_mode == (whole / "other").stat().st_mode


class Stopped(Exception):
    pass


def stopped_at(out: Path, steps: int, given: dict) -> None:
    """Trains in `out`, saving after every step, until `steps` of the transformer's are done."""

    def stop(what: str, done: float, total: float) -> None:
        if what.startswith("flux") and round(done) >= given["autoencoder"]["steps"] + steps:
            raise Stopped

    with pytest.raises(Stopped):
        train_tiny(out, given, stop)


def test_a_training_that_was_cut_off_within_its_first_steps_goes_on_bit_for_bit(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    stopped_at(tmp_path, 3, config())
    steps: list[float] = []
    train_tiny(tmp_path, config(), lambda what, done, total: steps.append(done))
    assert [round(done) for done in steps] == [6, 7, 8]
    for name in ("flux", "words"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (whole, tmp_path))
        assert all(torch.equal(other[key], tensor) for key, tensor in one.items())
    assert not list(tmp_path.glob("*.training.safetensors"))


def test_a_training_may_go_on_for_more_steps_than_it_was_begun_with_but_not_for_fewer_than_are_done(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    stopped_at(tmp_path, 5, config())
    with pytest.raises(UserError, match="5 steps are done, more than the 3 asked for"):
        train_tiny(tmp_path, config(flux={"steps": 3}))
    train_tiny(tmp_path, config(flux={"steps": 9}))
    assert (tmp_path / "flux.safetensors").exists()


STOPPED = """
import sys
import torch
torch.set_num_threads(1)
from flux_poke.cli import main
from flux_poke.tiny import training
images, digits = training.digit_images()
training.digit_images = lambda: (images[:20], digits[:20])
training.SAVE_SECONDS = 0.0
sys.argv[1:] = ["train", "tiny", "--out", sys.argv[1], "--config", sys.argv[2]]
main()
"""


def test_ctrl_c_saves_the_training_and_says_so(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(flux={"steps": 500_000})))
    command = [sys.executable, "-c", STOPPED, str(tmp_path), str(tmp_path / "config.yaml")]
    saved = tmp_path / "flux.training.safetensors"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not saved.exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said
    stopped = re.search(r"Stopped after ([\d,]+) of 500,000 steps of flux, which are saved", " ".join(said.split()))
    with safe_open(saved, "pt") as file:
        assert stopped
        assert int(file.metadata()["step"]) == int(stopped[1].replace(",", ""))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"flux": None}, "lacks flux"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"flux": {"hidden": 100}}, "hidden in section 'flux' must be a multiple of 128"),
        ({"flux": {"depth": None}}, "section 'flux', lacks depth"),
        ({"flux": {"widht": 3}}, "has the unknown widht"),
        ({"flux": {"steps": 0}}, "steps in section 'flux' must be a whole number above 0; found 0"),
        ({"flux": {"mlp_ratio": 2.5}}, "mlp_ratio in section 'flux' must be a whole number"),
        ({"flux": {"batch": True}}, "batch in section 'flux' must be a whole number"),
        ({"flux": {"batch": 21}}, "there are 20 images"),
        ({"autoencoder": {"learning_rate": "1e-3"}}, "learning_rate in section 'autoencoder' must be a number such as 1.0e-3"),
        ({"autoencoder": {"learning_rate": float("nan")}}, "found nan"),
        ({"autoencoder": 7}, "section 'autoencoder', is expected to hold steps"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_before_anything_is_written(wrong, said, tmp_path):
    with pytest.raises(UserError, match=said):
        train_tiny(tmp_path / "out", config(**wrong))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"- a list", b"flux: [", b"\xff\xfe\x00", b"[" * 5000, b""])
def test_a_configuration_that_is_none_is_refused_in_a_sentence(content, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_config(path)


def linear_training() -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
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
    other = nn.Linear(4, 2)
    with pytest.raises(UserError, match="another model"):
        load_training(path, other, torch.optim.AdamW(other.parameters()), 10)
    model, _ = linear_training()
    with pytest.raises(UserError, match="its optimizer is AdamW, not SGD"):
        load_training(path, model, torch.optim.SGD(model.parameters()), 10)
    save_file({"a": torch.zeros(1)}, path, {"format": resume.FORMAT.replace("2", "1")})
    with pytest.raises(UserError, match="saved training"):
        load_training(path, *linear_training(), 10)
