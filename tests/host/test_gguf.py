"""What the loader of ComfyUI-GGUF makes of the GGUF files that convert/ writes; its folder is $COMFYUI_GGUF_PATH."""

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_poke.convert.convert import convert
from flux_poke.convert.gguf import unfit_for_comfyui_gguf
from flux_poke.flux.layout import Family, Layout
from flux_poke.flux.model import Flux
from flux_poke.pruning.checkpoint import Pruned, save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.surgery import Cut
from safetensors.torch import load_file, save_file

COMFYUI_GGUF = Path(os.environ.get("COMFYUI_GGUF_PATH", "~/comfy/ComfyUI/custom_nodes/ComfyUI-GGUF")).expanduser()
SIZES: dict[Family, dict[str, Any]] = {"flux1": {"context": 4096, "vector": 768}, "flux2": {"context": 7680}}


@pytest.fixture
def velocity(in_process, tmp_path, monkeypatch):
    """What ComfyUI-GGUF's own loader makes of a file, for a call of the reference transformer."""
    if not (COMFYUI_GGUF / "loader.py").is_file():
        pytest.skip(f"no ComfyUI-GGUF at {COMFYUI_GGUF} (set COMFYUI_GGUF_PATH)")
    import folder_paths

    shutil.copytree(COMFYUI_GGUF, tmp_path / "packs" / "comfyui_gguf", ignore=shutil.ignore_patterns(".git"))
    monkeypatch.syspath_prepend(tmp_path / "packs")
    nodes = importlib.import_module("comfyui_gguf.nodes")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".gguf"}))

    def run(path, x, sigma, context, vector=None):
        (model,) = nodes.UnetLoaderGGUF().load_unet(path.name)
        with torch.no_grad():
            return model.model.diffusion_model(x, sigma, context, vector, transformer_options={})

    yield run
    for name in [name for name in sys.modules if name.startswith("comfyui_gguf")]:
        sys.modules.pop(name)


@pytest.fixture
def dense(tmp_path):
    def save(family) -> Path:
        torch.manual_seed(0)
        own = Flux(Layout.of(family, 256, 1, 1, **SIZES[family]))
        save_file({key: tensor.bfloat16() for key, tensor in own.state_dict().items()}, tmp_path / "dense.safetensors")
        return tmp_path / "dense.safetensors"

    return save


def given(own: Flux) -> dict[str, torch.Tensor]:
    layout = own.layout
    side, channels = 4 * layout.patch, layout.in_channels // layout.patch**2
    inputs = {"x": torch.randn(1, channels, side, side), "sigma": torch.rand(1), "context": torch.randn(1, 5, layout.context)}
    return {**inputs, "vector": torch.randn(1, layout.vector)} if layout.vector else inputs


def difference(found: torch.Tensor, own: Flux, inputs) -> float:
    with torch.no_grad():
        expected = own(**inputs)
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("family", SIZES)
def test_dense_files_run_and_their_error_is_that_of_rounding(family, dense, velocity, tmp_path):
    own = Flux.load(load_file(dense(family)), torch.float32)
    inputs = given(own)
    for type, least, most in (("stored", 0.0, 1e-5), ("Q8_0", 1e-5, 0.05)):
        convert(tmp_path / "dense.safetensors", tmp_path / "x.gguf", type=type)
        assert least <= difference(velocity(tmp_path / "x.gguf", **inputs), own, inputs) < most


@pytest.mark.parametrize("streams", [("img", "txt"), ("img", "txt", "single")])
@pytest.mark.parametrize("family", SIZES)
def test_of_pruned_files_those_with_whole_single_blocks_run(family, streams, dense, velocity, tmp_path):
    whole = Dense.open(dense(family))
    widths = {site.name: site.width for site in whole.layout.sites}
    step = {site.name: 2 if site.stream in streams else 1 for site in whole.layout.sites}
    kept = {name: torch.arange(0, width, step[name]) for name, width in widths.items()}
    plan = PruningPlan(family, whole.fingerprint, kept, widths, "magnitude", "every other neuron")
    save_pruned(tmp_path / "pruned.safetensors", Cut(whole, plan))
    pruned = Pruned.open(tmp_path / "pruned.safetensors")
    own = Flux.load(pruned.tensors, torch.float32)
    inputs = given(own)
    convert(tmp_path / "pruned.safetensors", tmp_path / "x.gguf", type="stored")
    if "single" not in streams:
        assert not unfit_for_comfyui_gguf(pruned.layout)
        assert difference(velocity(tmp_path / "x.gguf", **inputs), own, inputs) < 1e-5
    else:
        assert unfit_for_comfyui_gguf(pruned.layout) == ["single_blocks.0.linear1.weight"]
        with pytest.raises(RuntimeError, match="split_with_sizes"):
            velocity(tmp_path / "x.gguf", **inputs)
