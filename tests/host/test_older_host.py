"""The oldest supported ComfyUI runs the pack too; $COMFYUI_PATH_OLD says where one is.

Before it read FLUX's width from the file, ComfyUI loaded FLUX at 3,072 channels alone: the tiny one does not fit there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from flux_poke.errors import UserError
from flux_poke.headless.client import ComfyClient

#: Before each of the scripts below: ComfyUI on a CPU, and random `weights` of a FLUX of full width, one block of each kind.
FULL_WIDTH = """
import sys
sys.path.insert(0, sys.argv.pop(1))
folder = sys.argv.pop(1)
import utils.install_util  # before anything else is called utils, as in ComfyUI's main.py
import comfy.cli_args
comfy.cli_args.args.cpu = True
import torch, comfy.ldm.flux.model, comfy.ops

with torch.device("meta"):
    shapes = comfy.ldm.flux.model.Flux(
        dtype=torch.bfloat16, operations=comfy.ops.manual_cast, in_channels=16, out_channels=16, vec_in_dim=768,
        context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=1, depth_single_blocks=1,
        axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=False, txt_ids_dims=[],
    ).state_dict()
weights = {key: torch.randn(value.shape, dtype=torch.bfloat16) * 0.02 for key, value in shapes.items()}
"""

#: Samples a FLUX of full width, one block of each kind and random weights, with a recording node's watcher on it.
RECORD = """
import comfy.sample, comfy.sd
from pathlib import Path
from flux_poke.recording.recording import Recording
from flux_poke.nodes.models import flux_layout, model_fingerprint
from flux_poke.nodes.recorders import InternalsRun, Recorded
from flux_poke.nodes.watching import Watch, sampling_clone

model = comfy.sd.load_diffusion_model_state_dict(weights)
where = Recorded(Recording.at(Path(folder) / "recording"), flux_layout(model), model_fingerprint(model))
watched = sampling_clone(model, Watch(None, lambda: [InternalsRun(where, {})]))

def sample(model):
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    text = [[torch.ones(1, 5, 4096), {"pooled_output": torch.ones(1, 768)}]]
    return comfy.sample.sample(model, noise, 2, 1.0, "euler", "simple", text, text, torch.zeros_like(noise), seed=0)

assert torch.equal(sample(model), sample(watched))
sites = where.recording.internals().sites
assert {name: site.tokens for name, site in sites.items()} == {"double-img-0": 32, "double-txt-0": 10, "single-0": 42}
assert all(site.fires.any() for site in sites.values())
assert not any(module._forward_pre_hooks for module in model.model.modules())
print("recorded", comfy.__path__)
"""

#: Cuts a FLUX of full width, one block of each kind and random weights, saves it in fp8, and loads it.
QUANTISED = """
from pathlib import Path
from comfy.quant_ops import QuantizedTensor
from flux_poke.flux.model import Flux
from flux_poke.flux.weights import Plain
from flux_poke.nodes import loading
from flux_poke.pruning.checkpoint import Pruned, save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.surgery import Cut

dense = Dense.of(weights)
widths = {site.name: site.width for site in dense.layout.sites}
kept = {name: torch.arange(0, width, 4) for name, width in widths.items()}
path = Path(folder) / "fp8.safetensors"
save_pruned(path, Cut(dense, PruningPlan("flux1", dense.fingerprint, kept, widths, "none", "every fourth")), precision="fp8")
del dense, weights
pruned = Pruned.open(path)
model = loading.load_pruned(pruned, "default")
layers = dict(model.model.diffusion_model.named_modules())
names = [key.removesuffix(".comfy_quant") for key in pruned.tensors if key.endswith(".comfy_quant")]
assert len(names) == 13
for name in names:
    weight = layers[name].weight
    assert isinstance(weight, QuantizedTensor) and weight._qdata.dtype == torch.float8_e4m3fn, name
generator = torch.Generator().manual_seed(0)
x, sigma = torch.randn(1, 16, 8, 8, generator=generator), torch.tensor([0.7])
text = torch.randn(1, 5, 4096, generator=generator)
with torch.inference_mode():
    found = model.model.apply_model(x, sigma, c_crossattn=text, y=torch.ones(1, 768))
    expected = Flux.load(dict(Plain(pruned.tensors)), torch.float32)(x, sigma, text, torch.ones(1, 768))
error = (found - (x - 0.7 * expected)).square().sum() / (0.7 * expected).square().sum()
assert error < 1e-3, error
print("quantised", comfy.__path__)
"""


@pytest.fixture(scope="module")
def older_path() -> Path:
    path = os.environ.get("COMFYUI_PATH_OLD")
    if not path:
        pytest.skip("no older ComfyUI (set COMFYUI_PATH_OLD)")
    return Path(path).expanduser()


@pytest.fixture(scope="module")
def older(host, older_path, tmp_path_factory):
    with type(host)(older_path, tmp_path_factory.mktemp("older") / "base").start() as running:
        yield running


def test_an_older_host_has_every_node_and_says_what_it_cannot_load(older, server):
    here, there = (requests.get(f"http://{one.address}/object_info", timeout=60).json() for one in (server, older))
    ours = {name for name in here if name.startswith("FluxPoke")}
    assert ours
    assert ours <= there.keys()
    counter = {"class_type": "FluxPokeCounter", "inputs": {"name": "older", "max": 0, "restart": False}}
    show = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    with ComfyClient(older.address) as client:
        counts = [client.run({"1": counter, "2": show}).outputs["2"]["text"] for _ in range(2)]
        assert counts == [["0"], ["1"]]
        with pytest.raises(UserError, match="Update ComfyUI"):
            client.run({"1": {"class_type": "FluxPokeLoadTinyFlux", "inputs": {}}, "2": show})


@pytest.mark.parametrize(("use", "sentence"), [("pruned", "Update ComfyUI"), ("normal", "Nothing is connected to 'normal'")])
def test_an_older_host_runs_the_chosen_model_alone(older, use, sentence):
    """The tiny FLUX, which it cannot load, stands where one may choose it or not."""
    choose = {"class_type": "FluxPokeChooseModel", "inputs": {"use": use, "pruned": ["1", 0]}}
    show = {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}}
    with ComfyClient(older.address) as client, pytest.raises(UserError, match=sentence):
        client.run({"1": {"class_type": "FluxPokeLoadTinyFlux", "inputs": {}}, "2": choose, "3": show})


def test_an_older_host_leaves_out_what_is_off(older):
    nodes = {
        "1": {"class_type": "FluxPokeLoadTinyFlux", "inputs": {}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    }
    with ComfyClient(older.address) as client:

        def run(on: bool) -> tuple[str, ...]:
            return client.run(nodes | {"2": {"class_type": "FluxPokeOnOff", "inputs": {"value": ["1", 0], "on": on}}}).executed

        assert "1" not in run(on=False)
        with pytest.raises(UserError, match="Update ComfyUI"):
            run(on=True)


def run_there(script: str, comfyui: Path, folder: Path) -> None:
    """Runs a script in a process of its own, with this ComfyUI."""
    command = [sys.executable, "-c", FULL_WIDTH + script, str(comfyui), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(comfyui) in done.stdout


def test_an_older_host_records_flux_at_full_width(older_path, tmp_path):
    run_there(RECORD, older_path, tmp_path)


def test_an_older_host_runs_a_pruned_file_in_fp8_through_its_quantised_layers(older_path, tmp_path):
    run_there(QUANTISED, older_path, tmp_path)
