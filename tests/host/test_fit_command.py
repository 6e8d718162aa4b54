"""`flux-poke fit` on a real server, with the tiny FLUX: the whole graph, filled in and followed."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
from flux_poke.cli import app
from flux_poke.errors import UserError
from flux_poke.headless.client import ComfyClient
from flux_poke.headless.fit import FitRequest, fit_there
from flux_poke.pruning.checkpoint import Pruned
from flux_poke.pruning.planning import ByBudget
from flux_poke.recording.recording import Recording
from flux_poke.tiny.words import digit_prompts
from typer.testing import CliRunner

TEXTS = [text for digit in range(10) for text in digit_prompts(digit)[:3]]


def fit(*options: object) -> str:
    """What the command prints; raises its `UserError`."""
    result = CliRunner().invoke(app, ["fit", *map(str, options)])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    return tmp_path / "prompts.txt"


def request(name: str, **given) -> FitRequest:
    """A fit to a recording and a file of this name."""
    given = {"what": ByBudget(size=0.0025), "count": 10, "steps": 8, **given}
    return FitRequest("tiny", TEXTS, save_as=f"{name}.safetensors", recording=name, **given)


def test_one_command_leaves_a_checkpoint_of_the_size_asked_for_on_the_server(host, server, prompts):
    command = ("tiny", "--prompts", prompts, "--size", 0.0025, "-o", "told.safetensors")
    output = fit(*command, "--count", 10, "--steps", 8, "--recording", "told-there", "--server", server.address)
    file = host.base / "models" / "diffusion_models" / "told.safetensors"
    assert file.stat().st_size == pytest.approx(2.5e6, rel=0.01)
    assert "10 images of 8 steps" in output
    assert "by budget, a file of 2.5 MB" in output
    assert re.search(r"PSNR dB +SSIM\nfitted +0\.0\d", output)
    assert output.splitlines()[-1].startswith("told.safetensors in ComfyUI's models/diffusion_models")
    assert Recording.at(host.output / "flux_poke" / "told-there").states().image_count("rows") == 10
    assert Pruned.open(file).plan.table() in output


def test_another_size_draws_nothing_to_record_and_the_same_again_gives_the_table_again(host, client):
    first = fit_there(client, request("again"))
    states = Recording.at(host.output / "flux_poke" / "again").states().digest("rows")
    said: list[str] = []
    second = fit_there(client, request("again", what=ByBudget(size=0.003)), say=said.append)
    assert "a file of 3 MB" in second.table
    assert Recording.at(host.output / "flux_poke" / "again").states().digest("rows") == states
    assert not any("model calls" in text for text in said)
    assert fit_there(client, request("again", what=ByBudget(size=0.003))).table == second.table != first.table


def test_ctrl_c_stops_the_run_on_the_server_and_keeps_its_images(host, server, prompts):
    command = [sys.executable, "-m", "flux_poke.cli", "fit", "tiny", "--prompts", str(prompts), "--size", "0.0025", "-o"]
    command += ["stopped.safetensors", "--recording", "stopped", "--server", server.address, "--count", "24"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        internals, end = host.recorded("stopped"), time.monotonic() + 120
        while not internals.exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "Stopped. Images that were recorded are kept" in " ".join(said.split())
    assert "Traceback" not in said
    assert 1 <= Recording.at(internals.parent).states().image_count("rows") < 24
    with ComfyClient(server.address) as client:
        end = time.monotonic() + 30
        while (
            running := requests.get(f"http://{client.address}/queue", timeout=30).json()["queue_running"]
        ) and time.monotonic() < end:
            time.sleep(0.1)
    assert not running
    assert not (host.base / "models" / "diffusion_models" / "stopped.safetensors").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"what": ByBudget(size=0.0001)}, "Plan.*no more than .* may go"),
        ({"save_as": "model.safetensors", "model": "no-such-flux"}, "has no model 'no-such-flux'"),
        ({"recording": "../elsewhere"}, r"elsewhere"),
    ],
)
def test_what_cannot_be_done_there_ends_in_a_sentence(client, given, said):
    asked = {"model": "tiny", "prompts": TEXTS, "what": ByBudget(size=0.0025), "save_as": "refused.safetensors", "count": 10}
    with pytest.raises(UserError, match=said) as error:
        fit_there(client, FitRequest(**{**asked, "steps": 8, "recording": "again", **given}))
    assert len(str(error.value).splitlines()) == 1


def test_a_comfyui_that_is_started_needs_the_pack_and_keeps_what_was_made(host, prompts, tmp_path):
    folder = tmp_path / "ComfyUI"
    left_out = shutil.ignore_patterns(".git", "custom_nodes", "output", "user", "temp")
    shutil.copytree(host.comfyui, folder, ignore=left_out)
    (folder / "custom_nodes").mkdir()
    command = ("tiny", "--prompts", prompts, "--saved", 0.001, "-o", "started.safetensors", "--count", 8, "--steps", 8)
    with pytest.raises(UserError, match="has no node FluxPokeCalibrate: put this pack into its custom_nodes"):
        fit(*command, "--comfyui", folder)
    (folder / "custom_nodes" / "flux-poke").symlink_to(Path(__file__).parents[2])
    assert "by budget, 1 MB less" in fit(*command, "--comfyui", folder)
    made = Pruned.open(folder / "models" / "diffusion_models" / "started.safetensors")
    assert made.plan.settings["saved"] == 0.001
    assert Recording.at(folder / "output" / "flux_poke" / "tiny_recording").states().image_count("rows") == 8


def test_an_interrupt_in_comfyui_is_said_to_be_one(client, server):
    def interrupt() -> None:
        with ComfyClient(server.address) as other:
            other.interrupt()

    threads: list[threading.Thread] = []

    def on_progress(what: str, done: float, total: float) -> None:
        if what.startswith("Calibrate: ") and not threads:
            threads.append(threading.Thread(target=interrupt))
            threads[0].start()

    with pytest.raises(UserError, match="The fit was stopped in ComfyUI"):
        fit_there(client, request("interrupted", count=24), on_progress)
    threads[0].join()
