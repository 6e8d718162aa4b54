"""A FLUX of full width with narrow MLPs and low-rank modulation, on this host and on the oldest supported one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Loads one, one block of each kind and random weights, and prints what that took and how far its velocity is from the
#: reference's.
LOAD = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
import utils.install_util  # before anything else is called utils, as in ComfyUI's main.py
import comfy.cli_args
comfy.cli_args.args.cpu = True
import torch
from dataclasses import replace
from torch.utils._python_dispatch import TorchDispatchMode
from flux_poke.flux.layout import Layout
from flux_poke.flux.model import Flux
from flux_poke.nodes import loading

dense = Layout.of("flux1", 3072, 1, 1)
sites = tuple(replace(site, width=512) for site in dense.sites)
with torch.device("meta"):
    shapes = Flux(replace(dense, sites=sites, ranks={site.name: 16 for site in sites})).state_dict()
tensors = {key: torch.randn(value.shape, dtype=torch.bfloat16) * 0.02 for key, value in shapes.items()}

class Largest(TorchDispatchMode):
    '''Elements of the largest tensor that was made.'''
    elements = 0
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result

with Largest() as largest:
    model = loading.load_flux(tensors, "default")
generator = torch.Generator().manual_seed(0)
x, sigma = torch.randn(1, 16, 8, 8, generator=generator), torch.tensor([0.7])
text, pooled = torch.randn(1, 5, 4096, generator=generator), torch.randn(1, 768, generator=generator)


def error(model, tensors):
    with torch.inference_mode():
        found = model.model.apply_model(x, sigma, c_crossattn=text, y=pooled)
        velocity = Flux.load(tensors, torch.float32)(x, sigma, text, pooled)
    return ((x - 0.7 * velocity - found).square().sum() / (0.7 * velocity).square().sum()).item()

whole = error(model, tensors)
itemsize = next(model.model.diffusion_model.parameters()).itemsize
quantised, rounded = dict(tensors), dict(tensors)
for key in tensors:
    if "_blocks." in key and key.endswith(".weight"):
        scale, layer = tensors[key].float().abs().max() / 448, key.removesuffix(".weight")
        quantised[key] = (tensors[key].float() / scale).to(torch.float8_e4m3fn)
        quantised[f"{layer}.weight_scale"] = scale
        quantised[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        rounded[key] = quantised[key].float() * scale
eighth = loading.load_flux(quantised, "default")
down = eighth.model.diffusion_model.double_blocks[0].img_mod.lin.down.weight
print(json.dumps({
    "error": whole, "error_in_8_bits": error(eighth, rounded), "8_bits": str(down._qdata.dtype),
    "largest": largest.elements, "largest_of_file": max(tensor.numel() for tensor in tensors.values()),
    "size": model.model_size() - model.model.model_sampling.sigmas.nbytes,
    "size_of_tensors": itemsize * sum(tensor.numel() for tensor in tensors.values()),
    "from": list(__import__("comfy").__path__),
}))
"""


@pytest.fixture(params=["this host", "oldest host"])
def comfyui(request, host) -> Path:
    if request.param == "this host":
        return host.comfyui
    path = os.environ.get("COMFYUI_PATH_OLD")
    if not path:
        pytest.skip("no older ComfyUI (set COMFYUI_PATH_OLD)")
    return Path(path).expanduser()


def test_nothing_is_made_at_the_dense_sizes_and_the_velocity_is_the_references(comfyui, tmp_path):
    command = [sys.executable, "-c", LOAD, str(comfyui)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert str(comfyui) in found["from"][0]
    assert found["size"] == found["size_of_tensors"]
    assert found["largest"] <= found["largest_of_file"] < 6 * 3072 * 3072
    assert found["error"] < 1e-4
    assert found["8_bits"] == "torch.float8_e4m3fn"
    assert found["error_in_8_bits"] < 1e-4
