"""The change to ComfyUI in docs/upstream.md: with it, the stock loader loads FLUXes whose MLPs have any width."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flux_poke.pruning.checkpoint import save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.surgery import Cut

ROOT = Path(__file__).parents[2]

#: Loads each file with the function behind Load Diffusion Model and with ours, and prints how far their outputs are apart.
COMPARE = """
import json, sys
host, *files = sys.argv[1:]
sys.argv, sys.path[0] = sys.argv[:1], host
import utils.install_util  # before anything else is called utils, as in ComfyUI's main.py
import comfy.cli_args
comfy.cli_args.args.cpu = True
import comfy.sd, torch
from flux_poke.nodes.loading import load_pruned
from flux_poke.pruning.checkpoint import Pruned

assert comfy.sd.__file__.startswith(host)
found = []
for file in files:
    pruned = Pruned.open(file)
    generator = torch.Generator().manual_seed(0)
    channels, size = (16, 8) if pruned.layout.family == "flux1" else (128, 4)
    x, text = torch.randn(1, channels, size, size, generator=generator), torch.randn(1, 8, 64, generator=generator)
    given = {"y": torch.randn(1, pruned.layout.vector, generator=generator)} if pruned.layout.vector else {}
    stock, ours = comfy.sd.load_diffusion_model(file), load_pruned(pruned, "default")
    with torch.inference_mode():
        outputs = [model.model.apply_model(x, torch.tensor([0.7]), c_crossattn=text, **given) for model in (stock, ours)]
    sizes = [model.model_size() for model in (stock, ours)]
    found.append({"equal": torch.equal(*outputs), "finite": outputs[0].isfinite().all().item(), "sizes": sizes})
print(json.dumps(found))
"""


@pytest.fixture
def patched(host, tmp_path) -> Path:
    """The ComfyUI of the host tests with the change in it."""
    version = (host.comfyui / "comfyui_version.py").read_text().split('"')[1]
    if not version.startswith("0.29."):
        pytest.skip(f"the change in docs/upstream.md is for ComfyUI 0.29, and this one is {version}")
    for path in host.comfyui.iterdir():
        if path.name not in (".git", "comfy", "custom_nodes"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(host.comfyui / "comfy", tmp_path / "comfy")
    guide = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
    (change,) = re.findall(r"^```diff\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    applied = ["git", "apply", "--unidiff-zero", "-"]
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}  # tmp_path may be inside another checkout
    subprocess.run(applied, cwd=tmp_path, input=change, text=True, check=True, env=outside)
    return tmp_path


def test_with_the_change_the_stock_loader_gives_what_ours_gives_bit_for_bit(patched):
    files = []
    for name in ("tiny/flux.safetensors", "tiny/flux2/flux.safetensors"):
        dense = Dense.open(ROOT / name)
        sites = {site.name: site.width for site in dense.layout.sites}
        kept = {site: torch.arange(width)[:: 2 + place % 3] for place, (site, width) in enumerate(sites.items())}
        plan = PruningPlan(dense.layout.family, dense.fingerprint, kept, sites, "none", "every second, third or fourth")
        files.append(patched / f"pruned-{dense.layout.family}.safetensors")
        save_pruned(files[-1], Cut(dense, plan))
    command = [sys.executable, "-c", COMPARE, str(patched), *map(str, files)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=patched, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    for found in json.loads(ended.stdout.splitlines()[-1]):
        assert found["equal"]
        assert found["finite"]
        assert found["sizes"][0] == found["sizes"][1]
