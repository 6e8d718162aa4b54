"""convert/: into diffusers' layout and back, against the classes of the diffusers package."""
# mypy: disable-error-code="union-attr, index"

import json
import shutil
from dataclasses import replace

import pytest
import torch
from einops import rearrange
from flux_poke.convert import diffusers as layout_of_diffusers
from flux_poke.convert.convert import convert, describe, open_source
from flux_poke.errors import UserError
from flux_poke.flux.checkpoint import Checkpoint
from flux_poke.flux.fingerprint import Fingerprint
from flux_poke.flux.layout import read_layout
from flux_poke.flux.model import Flux
from flux_poke.flux.weights import full_precision
from flux_poke.pruning.checkpoint import Pruned, save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.surgery import Cut
from flux_poke.tiny.model import SHIPPED, TinyFlux
from safetensors.torch import load_file, save_file

CLASSES = {"flux1": "FluxTransformer2DModel", "flux2": "Flux2Transformer2DModel"}
KINDS = [(family, guidance) for family in CLASSES for guidance in (False, True)]


def theirs(family: str):
    """diffusers' own class of a family."""
    return getattr(pytest.importorskip("diffusers"), CLASSES[family])


def loaded(family: str, folder):
    """diffusers' model from a folder, in which nothing may be missing, unexpected or of another shape."""
    model, told = theirs(family).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


@torch.no_grad()
def velocity(model, own: Flux, x, sigma, context, vector=None, guidance=None):
    """What diffusers' `model` gives for a call of the reference transformer `own`."""
    patch, axes = own.layout.patch, len(own.layout.axes)
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    image, words = torch.zeros(rows, columns, axes), torch.zeros(context.shape[1], axes)
    image[..., 1], image[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    if own.layout.family == "flux2":
        words[:, 3] = torch.arange(len(words))
    given = {} if vector is None else {"pooled_projections": vector}
    out = model(
        hidden_states=rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch), encoder_hidden_states=context,
        timestep=sigma, img_ids=image.flatten(0, 1), txt_ids=words, guidance=guidance, **given,
    ).sample  # fmt: skip
    return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=patch, q=patch)


@torch.no_grad()
def difference(model, own: Flux, given) -> float:
    expected = own(**given)
    return ((velocity(model, own, **given) - expected).norm() / expected.norm()).item()


@pytest.fixture
def saved(tensors, tmp_path):
    """A random model in ComfyUI's layout."""

    def save(family="flux1", **sizes):
        save_file(tensors(family, **sizes), tmp_path / "dense.safetensors", {"format": "pt"})
        return tmp_path / "dense.safetensors"

    return save


def half(dense: Dense) -> PruningPlan:
    """Every other neuron of every MLP."""
    widths = {site.name: site.width for site in dense.layout.sites}
    kept = {name: torch.arange(0, width, 2) for name, width in widths.items()}
    return PruningPlan(dense.layout.family, dense.fingerprint, kept, widths, "magnitude", "every other neuron")


@pytest.mark.parametrize(("family", "guidance"), KINDS)
def test_diffusers_gives_the_same_velocity_and_the_way_back_the_bits(same, family, guidance, tensors, saved, inputs, tmp_path):
    state = tensors(family, guidance=guidance, hidden=256)
    path = saved(family, guidance=guidance, hidden=256)
    done = convert(path, tmp_path / "theirs")
    own = Flux.load(state)
    assert difference(loaded(family, tmp_path / "theirs"), own, inputs(own)) < 1e-5
    assert done.written.fingerprint() == Fingerprint.of_checkpoint(Checkpoint(path))
    convert(tmp_path / "theirs", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), state)


@pytest.mark.parametrize(("family", "guidance"), KINDS)
def test_a_model_of_diffusers_in_several_files_comes_over_and_goes_back(same, family, guidance, inputs, tmp_path):
    sizes = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 32}
    pooled = {"pooled_projection_dim": 24} if family == "flux1" else {}
    torch.manual_seed(0)
    model = theirs(family)(**sizes, **pooled, guidance_embeds=guidance).eval()
    for parameter in model.parameters():  # norms of one and biases of zero would hide a mistake
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="4MB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    done = convert(tmp_path / "theirs", tmp_path / "own.safetensors")
    own = Flux.load(load_file(tmp_path / "own.safetensors"))
    assert difference(model, own, inputs(own)) < 1e-5
    assert done.source.fingerprint() == Fingerprint.of_checkpoint(Checkpoint(tmp_path / "own.safetensors"))
    convert(tmp_path / "own.safetensors", tmp_path / "again")
    assert same(loaded(family, tmp_path / "again").state_dict(), model.state_dict())
    written, wanted = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", "theirs"))
    others = {"_diffusers_version", "out_channels"}
    assert {key: wanted[key] for key in wanted.keys() - others} == {key: written[key] for key in written.keys() - others}


@pytest.mark.parametrize("family", CLASSES)
def test_large_models_are_written_in_several_files(same, family, tensors, saved, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    layout_of_diffusers.write(folder, open_source(saved(family)), shard=1_000_000)
    assert len(list(folder.glob("diffusion_pytorch_model-0000?-of-0000?.safetensors"))) > 3
    loaded(family, folder)
    convert(folder, tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), tensors(family))
    assert convert(folder / "config.json", tmp_path / "back.safetensors").source.path == folder  # its files stand for it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_bits_stay_in_every_precision(same, dtype, tensors, tmp_path):
    state = {key: tensor.to(dtype) for key, tensor in tensors("flux1").items()}
    save_file(state, tmp_path / "dense.safetensors")
    convert(tmp_path / "dense.safetensors", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), state)


@pytest.mark.parametrize("family", CLASSES)
def test_a_tiny_flux_draws_the_same_after_the_way_there_and_back(family, tmp_path):
    convert(SHIPPED[family] / "flux.safetensors", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "flux.safetensors")
    tiny, prompts = TinyFlux.load(family=family), ["a 7", "three"]
    assert torch.equal(TinyFlux.load(tmp_path / "flux.safetensors").draw(prompts), tiny.draw(prompts))
    context, vector = tiny.words(prompts)
    noise = tiny.noise(2, 0)
    given = {"x": noise, "sigma": torch.tensor([0.3, 0.9]), "context": context}
    given |= {"vector": vector} if family == "flux1" else {}
    assert difference(loaded(family, tmp_path / "theirs"), tiny.flux, given) < 1e-5


def test_a_pruned_flux2_of_one_width_goes_over_with_its_plan(same, saved, inputs, tmp_path):
    dense = Dense.open(saved("flux2"))
    save_pruned(tmp_path / "pruned.safetensors", Cut(dense, half(dense)))
    convert(tmp_path / "pruned.safetensors", tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["mlp_ratio"] == 1.5
    own = Flux.load(Pruned.open(tmp_path / "pruned.safetensors").tensors)
    assert difference(loaded("flux2", tmp_path / "theirs"), own, inputs(own)) < 1e-5
    assert "pruned, in diffusers layout" in describe(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), load_file(tmp_path / "pruned.safetensors"))
    found, expected = (Pruned.open(tmp_path / f"{name}.safetensors") for name in ("back", "pruned"))
    assert found.metadata == expected.metadata
    assert found.plan.digest == expected.plan.digest


@pytest.mark.parametrize("width", [1, 3, 127, 385, 1000, 9_999])
def test_every_width_is_what_diffusers_makes_of_the_ratio_written_for_it(width, shapes):
    for hidden in (128, 384, 3072, 6144):
        layout = read_layout(shapes("flux2", hidden=hidden))
        layout = replace(layout, sites=tuple(replace(site, width=width) for site in layout.sites))
        assert int(hidden * layout_of_diffusers.config(layout)["mlp_ratio"]) == width


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (
            "flux1",
            "double_blocks.0.img_mlp.0.weight, double_blocks.0.txt_mlp.0.weight, double_blocks.1.img_mlp.0.weight and 3 more",
        ),
        ("flux2", "double_blocks.0.txt_mlp.0.weight of other widths"),
    ],
)
def test_widths_that_diffusers_has_no_place_for_are_refused_by_name(family, names, saved, tmp_path):
    dense = Dense.open(saved(family))
    plan = half(dense)
    plan.kept["double-txt-0"] = plan.kept["double-txt-0"][:100]
    save_pruned(tmp_path / "pruned.safetensors", Cut(dense, plan))
    with pytest.raises(UserError, match="cannot be written for diffusers") as said:
        convert(tmp_path / "pruned.safetensors", tmp_path / "theirs")
    assert names in str(said.value)
    assert not (tmp_path / "theirs").exists()


def test_low_rank_modulation_is_refused_by_name(tensors, tmp_path):
    state = tensors("flux1")
    name = "double_blocks.1.txt_mod.lin"
    state.pop(f"{name}.weight")
    state |= {f"{name}.down.weight": torch.randn(4, 128), f"{name}.up.weight": torch.randn(768, 4)}
    save_file(state, tmp_path / "thin.safetensors")
    with pytest.raises(UserError, match=rf"{name}\.down\.weight of low-rank modulation"):
        convert(tmp_path / "thin.safetensors", tmp_path / "theirs")


@pytest.mark.parametrize("naming", ["scale_weight", "weight_scale"])
def test_scales_are_undone_for_diffusers_and_kept_where_they_can_be(same, naming, tensors, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    state = tensors("flux1")
    for key in [key for key in state if "blocks" in key and key.endswith("weight") and state[key].ndim == 2]:
        scale = state[key].abs().max() / 448
        state[key] = (state[key] / scale).to(torch.float8_e4m3fn)
        state[f"{key.removesuffix('weight')}{naming}"] = scale
        if naming == "weight_scale":
            quant = json.dumps({"format": "float8_e4m3fn"}).encode()
            state[f"{key.removesuffix('weight')}comfy_quant"] = torch.tensor(list(quant), dtype=torch.uint8)
    save_file(state, tmp_path / "scaled.safetensors")
    done = convert(tmp_path / "scaled.safetensors", tmp_path / "theirs")
    assert ("scales undone, in bf16", 26) in [row[:2] for row in done.rows]
    key, opened = "single_blocks.1.linear1.weight", Checkpoint(tmp_path / "scaled.safetensors")
    assert done.written.fingerprint().matches(Fingerprint.of_checkpoint(opened))
    convert(tmp_path / "theirs", tmp_path / "back.safetensors")
    assert torch.equal(Checkpoint(tmp_path / "back.safetensors")[key], full_precision(opened, key).bfloat16())
    convert(tmp_path / "scaled.safetensors", tmp_path / "state", "orbax")
    convert(tmp_path / "state", tmp_path / "kept.safetensors")
    assert same(load_file(tmp_path / "kept.safetensors"), state)


def test_the_command_tells_what_was_done_and_inspect_what_it_is(run, saved, tmp_path):
    said = run("convert", saved("flux2"), "-o", tmp_path / "theirs")
    for word in ("read", "renamed", "split", "halves swapped", "written", "FLUX.2, in diffusers layout"):
        assert word in said
    assert run("inspect", tmp_path / "theirs").strip() in said


def test_parts_that_are_not_of_the_transformer_are_named(tensors, tmp_path):
    state = {f"model.diffusion_model.{key}": tensor for key, tensor in tensors("flux1").items()}
    save_file({**state, "vae.decoder.conv_in.weight": torch.zeros(2, 2)}, tmp_path / "all.safetensors")
    done = convert(tmp_path / "all.safetensors", tmp_path / "theirs")
    assert ("left out, not of the transformer", 1, "vae.decoder.conv_in.weight") in done.rows
    loaded("flux1", tmp_path / "theirs")


def test_diffusers_files_are_told_which_command_makes_the_other_layout(saved, tmp_path):
    convert(saved(), tmp_path / "theirs")
    with pytest.raises(UserError, match="`flux-poke convert`"):
        Checkpoint(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")


def test_a_pipelines_folder_stands_for_its_transformer(same, tensors, saved, tmp_path):
    convert(saved(), tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    convert(tmp_path / "pipeline", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), tensors("flux1"))


class TestRefusals:
    """Each in one sentence, and nothing is left at the target."""

    @pytest.fixture
    def folder(self, saved, tmp_path):
        """A model in diffusers' layout, in several files."""
        (tmp_path / "theirs").mkdir()
        layout_of_diffusers.write(tmp_path / "theirs", open_source(saved()), shard=1_000_000)
        return tmp_path / "theirs"

    def refused(self, path, out, match):
        before = sorted(out.parent.iterdir())
        with pytest.raises(UserError, match=match) as said:
            convert(path, out)
        assert "\n" not in str(said.value)
        assert sorted(out.parent.iterdir()) == before

    def test_a_folder_that_is_none(self, tmp_path):
        (tmp_path / "empty").mkdir()
        self.refused(tmp_path / "empty", tmp_path / "x.safetensors", "has no config.json")
        self.refused(tmp_path / "nowhere", tmp_path / "x.safetensors", "is not there")

    def test_a_missing_file(self, folder, tmp_path):
        sorted(folder.glob("*.safetensors"))[1].unlink()
        self.refused(folder, tmp_path / "x.safetensors", r"1 of the \d+ files in its index are missing, first .*00002")

    def test_a_file_that_is_cut_short(self, folder, tmp_path):
        file = sorted(folder.glob("*.safetensors"))[0]
        file.write_bytes(file.read_bytes()[:-100])
        self.refused(folder, tmp_path / "x.safetensors", "is damaged, cut short")

    @pytest.mark.parametrize(
        "text", ["", "[]", "[" * 100_000, '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}']
    )
    def test_a_damaged_index(self, folder, tmp_path, text):
        next(folder.glob("*.index.json")).write_text(text)
        self.refused(folder, tmp_path / "x.safetensors", "index.json (is not an index|names)")

    def test_an_index_of_another_model(self, folder, tmp_path):
        index = next(folder.glob("*.index.json"))
        found = json.loads(index.read_text())
        found["weight_map"].pop("proj_out.weight")
        index.write_text(json.dumps(found))
        self.refused(folder, tmp_path / "x.safetensors", "disagree on 1 tensors, first proj_out.weight")

    def test_no_index(self, folder, tmp_path):
        next(folder.glob("*.index.json")).unlink()
        self.refused(folder, tmp_path / "x.safetensors", "or several and one index; found diffusion_pytorch_model-00001")

    def test_one_of_several_files(self, folder, tmp_path):
        self.refused(sorted(folder.glob("*.safetensors"))[0], tmp_path / "x.safetensors", "(name their folder|incomplete)")

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"_class_name": "SD3Transformer2DModel"}, "holds a SD3Transformer2DModel"),
            ({"axes_dims_rope": [32, 48, 48]}, "asks for axes_dims_rope"),
            (None, "is not the configuration"),
        ],
    )
    def test_another_configuration(self, folder, tmp_path, changed, said):
        file = folder / "config.json"
        file.write_text("{" if changed is None else json.dumps(json.loads(file.read_text()) | changed))
        self.refused(folder, tmp_path / "x.safetensors", said)

    def test_tensors_missing_unknown_or_of_another_shape(self, tensors, tmp_path):
        for change, said in (
            (
                lambda s: s.pop("double_blocks.1.img_attn.proj.bias"),
                "lacks 1 tensors .*, first double_blocks.1.img_attn.proj.bias",
            ),
            (lambda s: s.update({"double_blocks.0.extra": torch.zeros(1)}), "does not have, first double_blocks.0.extra"),
            (lambda s: s.update({"img_in.bias": torch.zeros(3)}), r"img_in.bias of the shape \(3,\), expected \(128,\)"),
        ):
            state = tensors("flux1")
            change(state)
            save_file(state, tmp_path / "wrong.safetensors")
            self.refused(tmp_path / "wrong.safetensors", tmp_path / "theirs", said)

    def test_numbers_that_are_not_finite(self, tensors, tmp_path):
        state = tensors("flux1")
        state["single_blocks.1.linear2.weight"][3, 5] = torch.nan
        save_file(state, tmp_path / "nan.safetensors")
        for out in ("theirs", "x.gguf"):
            self.refused(
                tmp_path / "nan.safetensors", tmp_path / out, "single_blocks.1.linear2.weight holds numbers that are not"
            )

    def test_chroma_for_diffusers(self, saved, tmp_path):
        self.refused(saved("chroma"), tmp_path / "theirs", "is a Chroma; FLUX.1 and FLUX.2 are converted")

    def test_the_layout_that_it_has(self, saved, folder, tmp_path):
        self.refused(saved(), tmp_path / "x.safetensors", "is in ComfyUI layout already")
        self.refused(folder, tmp_path / "again", "is in diffusers layout already")

    def test_a_target_in_the_folder_that_is_read_or_of_a_name_that_says_otherwise(self, folder, saved, tmp_path):
        self.refused(folder, folder / "x.safetensors", "which is what is read")
        self.refused(saved(), tmp_path / "x.ckpt", "is no name for what is written")
        with pytest.raises(UserError, match="or a folder for orbax"):
            convert(folder, tmp_path / "x.gguf", "orbax")

    def test_a_target_with_something_else_in_it(self, folder, saved, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("mine")
        self.refused(saved(), tmp_path / "mine", "holds notes.txt, which is something else")
        (folder / "notes.txt").write_text("mine")
        self.refused(saved(), folder, "holds notes.txt, which is something else")
        (tmp_path / "file").write_text("mine")
        self.refused(saved(), tmp_path / "file", "is a file")
        save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", {"format": "pt"})
        (folder / "notes.txt").unlink()
        self.refused(folder, tmp_path / "other.safetensors", "is something else than a FLUX")
        assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"

    def test_a_target_that_cannot_be_replaced(self, saved, tmp_path, monkeypatch):
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        self.refused(saved(), tmp_path / "loop", "is a link that leads to itself")
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        self.refused(saved(), tmp_path / "empty", "is the folder that you are in")

    def test_a_cancelled_run_leaves_what_was_there(self, folder, tensors, saved, tmp_path):
        def cancel(what, done, total):
            if done > total / 2:
                raise KeyboardInterrupt

        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        for out in (folder, tmp_path / "new"):
            with pytest.raises(KeyboardInterrupt):
                convert(saved(seed=3), out, progress=cancel)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense.safetensors", "theirs"]
        convert(saved(seed=3), folder)  # a folder of its own kind is replaced, as a whole
        assert sorted(entry.name for entry in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]

    def test_what_a_killed_run_left_is_removed_by_the_next(self, saved, tmp_path):
        convert(saved(), tmp_path / "theirs")
        left = tmp_path / ".flux-poke-abcd1234.unfinished"
        shutil.copytree(tmp_path / "theirs", left / "theirs.new")
        convert(saved(), tmp_path / "theirs")
        assert not left.exists()
