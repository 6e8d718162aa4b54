"""convert/gguf.py, against the gguf package alone; and convert/orbax.py."""

import json
import sys

import numpy as np
import pytest
import torch
from flux_poke.convert.convert import convert, describe
from flux_poke.errors import UserError
from flux_poke.pruning.checkpoint import Pruned, save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.surgery import Cut
from flux_poke.tiny.model import FOLDER, TinyFlux
from safetensors.torch import load_file, save_file

gguf = pytest.importorskip("gguf")


@pytest.fixture(params=["flux1", "flux2", "chroma"])
def stored(request, tensors, tmp_path):
    """A random model with a type of its own for every third tensor."""
    types = (torch.float32, torch.float16, torch.bfloat16)
    state = {key: tensor.to(types[index % 3]) for index, (key, tensor) in enumerate(tensors(request.param).items())}
    save_file(state, tmp_path / "dense.safetensors", {"modelspec.title": "kept"})
    return state


def pruned(tensors, tmp_path, family="flux1"):
    save_file({key: tensor.bfloat16() for key, tensor in tensors(family).items()}, tmp_path / "dense.safetensors")
    dense = Dense.open(tmp_path / "dense.safetensors")
    widths = {site.name: site.width for site in dense.layout.sites}
    kept = {name: torch.arange(0, width, 2)[: -8 * index or None] for index, (name, width) in enumerate(widths.items())}
    plan = PruningPlan(family, dense.fingerprint, kept, widths, "magnitude", "fewer in every MLP")
    save_pruned(tmp_path / "pruned.safetensors", Cut(dense, plan))
    return tmp_path / "pruned.safetensors"


def test_stored_types_and_the_header_come_back_bit_for_bit(same, stored, tmp_path):
    done = convert(tmp_path / "dense.safetensors", tmp_path / "x.gguf", type="stored")
    assert done.written.fingerprint() == done.source.fingerprint()
    back = convert(tmp_path / "x.gguf", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), stored)
    assert back.written.metadata == {"modelspec.title": "kept"}


def test_the_file_is_what_comfyui_ggufs_loader_looks_for(stored, tmp_path):
    convert(tmp_path / "dense.safetensors", tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.get_field("general.architecture").contents() == "flux"
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == stored.keys()
    for name, tensor in found.items():
        assert tuple(reversed(tensor.shape)) == tuple(stored[name].shape)
        in_block = name.startswith(("double_blocks", "single_blocks", "double_stream", "single_stream"))
        assert (tensor.tensor_type.name == "Q8_0") == (in_block and stored[name].ndim == 2)


@pytest.mark.parametrize(("type", "bits"), [("Q8_0", 8), ("Q5_1", 5), ("Q4_0", 4)])
def test_the_rounding_error_is_told(type, bits, tensors, tmp_path):
    state = tensors("flux2")
    save_file(state, tmp_path / "dense.safetensors")
    done = convert(tmp_path / "dense.safetensors", tmp_path / "x.gguf", type=type)
    error = energy = 0.0
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        if tensor.tensor_type.name == type:
            numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            error += np.square(numbers - state[tensor.name].numpy()).sum()
            energy += np.square(state[tensor.name].numpy()).sum()
    assert done.written.rounding == pytest.approx(error / energy, rel=1e-4)
    assert f"quantised weights: {done.written.rounding:.3g}" in describe(tmp_path / "x.gguf")
    assert 4.0**-bits / 10 < done.written.rounding < 4.0**-bits * 10
    assert (f"quantised to {type}", 23) in [row[:2] for row in done.rows]


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_a_pruned_model_keeps_its_plan_and_its_kept_neurons(same, family, tensors, tmp_path):
    path = pruned(tensors, tmp_path, family)
    convert(path, tmp_path / "x.gguf", type="stored")
    convert(tmp_path / "x.gguf", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), load_file(path))
    assert Pruned.open(tmp_path / "back.safetensors").metadata == Pruned.open(path).metadata
    assert "pruned, in GGUF layout" in describe(tmp_path / "x.gguf")


def test_rows_that_fill_no_blocks_are_kept_and_named(tensors, tmp_path):
    done = convert(pruned(tensors, tmp_path), tmp_path / "x.gguf")
    kept = next(row for row in done.rows if row[0].startswith("kept"))
    assert ("ComfyUI-GGUF cannot run", 2) in [row[:2] for row in done.rows]  # two single blocks are narrower
    assert kept[1:] == (4, "double_blocks.0.txt_mlp.2.weight")  # 256 - 8 * index columns: one in four is a multiple of 32
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert found["double_blocks.0.txt_mlp.2.weight"] == "BF16"
    assert found["double_blocks.0.txt_mlp.0.weight"] == "Q8_0"


def test_eight_bit_floats_become_bf16_where_they_are_not_quantised(same, tensors, tmp_path):
    state = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors("flux1").items()}
    save_file(state, tmp_path / "dense.safetensors")
    done = convert(tmp_path / "dense.safetensors", tmp_path / "x.gguf", type="stored")
    assert ("widened to bf16", len(state)) in [row[:2] for row in done.rows]
    convert(tmp_path / "x.gguf", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), {key: tensor.bfloat16() for key, tensor in state.items()})


def test_the_tiny_flux_draws_almost_the_same_from_q8_0(tmp_path):
    convert(FOLDER / "flux.safetensors", tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "flux.safetensors")
    drawn, expected = (TinyFlux.load(path).draw(["a 7", "three"]) for path in (tmp_path / "flux.safetensors", None))
    assert (drawn - expected).square().mean() < 1e-3  # PSNR over 30 dB
    assert (tmp_path / "tiny.gguf").stat().st_size < 0.6 * (FOLDER / "flux.safetensors").stat().st_size


def test_files_of_others_with_types_that_are_only_undone_here_come_over(tensors, tmp_path):
    state = tensors("flux1", hidden=256)
    key, type = "double_blocks.1.img_mlp.0.weight", gguf.GGMLQuantizationType.Q6_K
    blocks = np.random.default_rng(0).integers(0, 256, (1024, 210), dtype=np.uint8)
    blocks[:, -2:] = np.array([0.01], np.float16).view(np.uint8)  # the scale of a block of 256 numbers
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "flux")
    for name, tensor in state.items():
        theirs = {"tensor": blocks, "raw_dtype": type} if name == key else {"tensor": tensor.numpy()}
        writer.add_tensor(f"model.diffusion_model.{name}", **theirs)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    done = convert(tmp_path / "theirs.gguf", tmp_path / "own.safetensors")
    assert ("Q6_K undone, in bf16", 1, key) in done.rows
    found = load_file(tmp_path / "own.safetensors")
    assert found.keys() == state.keys()
    assert torch.equal(found[key], torch.from_numpy(gguf.quants.dequantize(blocks, type)).bfloat16())
    assert torch.equal(found["single_blocks.0.linear1.weight"], state["single_blocks.0.linear1.weight"])


@pytest.mark.parametrize("stored", ["flux1"], indirect=True)
def test_damaged_and_foreign_files_are_refused(stored, tmp_path):
    path = tmp_path / "dense.safetensors"
    convert(path, tmp_path / "x.gguf")
    whole = (tmp_path / "x.gguf").read_bytes()
    for name, content in (("short", whole[: len(whole) // 2]), ("header", whole[:100]), ("empty", b""), ("text", b"mine" * 99)):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as GGUF"):
            convert(tmp_path / f"{name}.gguf", tmp_path / "y.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(UserError, match="is not a FLUX checkpoint"):
        convert(tmp_path / "llama.gguf", tmp_path / "y.safetensors")
    for name in ("text", "llama"):
        before = (tmp_path / f"{name}.gguf").read_bytes()
        with pytest.raises(UserError, match="something else than a FLUX, and is not replaced"):
            convert(path, tmp_path / f"{name}.gguf")
        assert (tmp_path / f"{name}.gguf").read_bytes() == before
    assert not (tmp_path / "y.safetensors").exists()


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    for name, out in (("gguf", "x.gguf"), ("orbax.checkpoint", "state")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"flux-poke\[{name.split('.')[0]}\]"):
            convert(FOLDER / "flux.safetensors", tmp_path / out, "diffusers" if name == "gguf" else "orbax")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stored", ["flux1"], indirect=True)
def test_orbax_holds_all_that_a_checkpoint_does(same, stored, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    convert(tmp_path / "dense.safetensors", tmp_path / "state", "orbax")
    with ocp.PyTreeCheckpointer() as checkpointer:  # as documented: a flat dictionary of the checkpoint's names
        tree = checkpointer.restore(tmp_path / "state" / "transformer" / "state")
    assert tree.keys() == stored.keys()
    key = "double_blocks.0.img_mlp.0.weight"
    assert np.array_equal(np.asarray(tree[key]).astype(np.float32), stored[key].float().numpy())
    assert json.loads((tmp_path / "state" / "config.json").read_text())["header"] == {"modelspec.title": "kept"}
    convert(tmp_path / "state", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), stored)


def test_orbax_folders_that_are_damaged_or_hold_something_else_are_refused(same, tensors, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    path = pruned(tensors, tmp_path)
    convert(path, tmp_path / "state", "orbax")
    convert(tmp_path / "state", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), load_file(path))
    convert(path, tmp_path / "state", "orbax")  # its own kind is replaced
    (tmp_path / "state" / "transformer" / "notes").write_text("mine")
    with pytest.raises(UserError, match="holds transformer/notes"):
        convert(path, tmp_path / "state", "orbax")
    for file in (tmp_path / "state" / "transformer" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            file.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read by orbax"):
        convert(tmp_path / "state", tmp_path / "again.safetensors")
    (tmp_path / "state" / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json of 'flux-poke orbax 1'"):
        convert(tmp_path / "state", tmp_path / "again.safetensors")
