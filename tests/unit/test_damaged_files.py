"""Every reader on files that something happened to: what it gives is right, or a sentence says what is wrong.

How many each reader is given goes by the profile of hypothesis: `HYPOTHESIS_PROFILE=hours` for a long run.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import Draw, damaged_bytes, damaged_json, damaged_lines, damaged_safetensors, register_profiles
from flux_poke import training
from flux_poke.analysis.capturing import read_generation
from flux_poke.analysis.decoding import read_picture
from flux_poke.analysis.lens import Lens
from flux_poke.analysis.metrics import read_images
from flux_poke.analysis.raw import final_layer, read_raw
from flux_poke.convert.convert import open_source
from flux_poke.download_prompts import DATASETS, Downloaded, _resumed
from flux_poke.errors import UserError
from flux_poke.flux.blocks import blocks_of
from flux_poke.flux.model import Flux
from flux_poke.headless.journal import Journal
from flux_poke.headless.runs import read_graph
from flux_poke.poking.neurons import Measured, Neurons, SiteDirections
from flux_poke.prompts import read_prompts
from flux_poke.pruning.certificate import facts
from flux_poke.pruning.checkpoint import Pruned, inspect, save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.atlas import Atlas, AtlasImage, Places
from flux_poke.recording.block_states import BlockStates
from flux_poke.recording.internals import Internals, SiteInternals
from flux_poke.recording.recording import Recording
from flux_poke.recording.store import HiddenStates
from flux_poke.recording.trajectories import Trajectories
from flux_poke.retrain.files import read_stats
from flux_poke.retrain.layers import retrain_layers
from flux_poke.retrain.options import Options
from flux_poke.retrain.replaced import RetrainedLayers, open_dense_of
from flux_poke.tiny.model import SHIPPED, TinyFlux
from flux_poke.training.config import read_config
from flux_poke.training.data import Data, load_examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

WORKFLOWS = Path(__file__).parents[2] / "workflows"
#: Bytes that a reader may take beyond what the sound file took.
ROOM = 400_000_000

register_profiles()


@dataclass(frozen=True)
class Reader:
    """`read` gives the tensors that come of a folder in which one of `files` was damaged."""

    name: str
    files: str
    damage: Callable[[Draw, bytes], bytes]
    read: Callable[[Path], Iterator[torch.Tensor]]


def internals(folder: Path) -> Iterator[torch.Tensor]:
    found = Internals.load(folder / "internals.safetensors")
    assert found.runs >= 0
    for site in found.sites.values():
        assert 0 <= int(site.fires.min()) <= int(site.fires.max()) <= site.tokens
        yield from (site.sum, site.sum_sq)


def atlas(folder: Path) -> Iterator[torch.Tensor]:
    found = Atlas.load(folder / "atlas.safetensors")
    for site in found.sites.values():
        assert -1 <= int(site.image.min()) <= int(site.image.max()) < len(found.images)
        assert min(int(site.token.min()), int(site.step.min())) >= 0
        yield site.value
    merged = found.merge(found)
    assert merged.images == tuple(sorted(found.images, key=lambda image: image.key))


def plan(folder: Path) -> Iterator[torch.Tensor]:
    found = PruningPlan.load(folder / "plan.safetensors")
    assert found.table()
    for name, kept in found.kept.items():
        assert 0 <= int(kept[0]) <= int(kept[-1]) < found.widths[name]
    yield torch.tensor([*found.predicted.values(), found.velocity_error or 0.0])


def neurons(folder: Path) -> Iterator[torch.Tensor]:
    found = Neurons.load(folder / "neurons.safetensors")
    assert found.table()
    for name, site in found.sites.items():
        assert 0 <= int(site.indices[0]) <= int(site.indices[-1]) < found.widths[name]
        yield site.measured.mean
    for along in found.directions.values():
        yield along.vectors


def pruned(folder: Path) -> Iterator[torch.Tensor]:
    found = Pruned.open(folder / "pruned.safetensors")
    assert inspect(found.path)
    assert facts(found.plan, found.report, found.certificate)
    yield from Flux.load(found.tensors).parameters()


def dense(folder: Path) -> Iterator[torch.Tensor]:
    found = Dense.open(folder / "dense.safetensors")
    yield from Flux.load(found.tensors).parameters()


def rows(folder: Path) -> Iterator[torch.Tensor]:
    store = HiddenStates.open(folder / "hidden_states")
    for name in ("double-img-0", "single-1"):
        for some in store.rows(name):
            yield from (some.x, some.sigma)


def blocks(folder: Path) -> Iterator[torch.Tensor]:
    states = BlockStates.open(folder / "hidden_states")
    state = states.batch(states.groups[0][:2], states.indices[0])
    yield from (state.img, state.txt, state.vec)


def trajectories(folder: Path) -> Iterator[torch.Tensor]:
    samples = Trajectories.open(HiddenStates.open(folder / "hidden_states"))
    yield from samples.batch(samples.groups[0][:2]).tensors.values()


def lens(folder: Path) -> Iterator[torch.Tensor]:
    found = Lens.load(folder / "lens.safetensors")
    yield from (*found.weights.values(), *found.biases.values())


def layers(folder: Path) -> Iterator[torch.Tensor]:
    model = Dense.open(folder / "dense.safetensors")
    found = RetrainedLayers.open(folder / "layers", model)
    for layer in found.layers.values():
        yield from map(layer.read, layer.names)
    read_stats(folder / "layers")
    open_dense_of(folder / "layers", folder / "dense.safetensors")


def repairs(folder: Path) -> Iterator[torch.Tensor]:
    model, recording = Dense.open(folder / "dense.safetensors"), Recording.open(folder)
    found = Repairs(model, PruningPlan.load(folder / "plan.safetensors"), "affine", recording)
    yield found["double-img-0"].down


def tiny(folder: Path) -> Iterator[torch.Tensor]:
    found = TinyFlux.load(folder / "tiny" / "flux.safetensors")
    yield from (part for part in found.words(["a 3"]) if part is not None)
    yield found.autoencoder.decode(torch.zeros(1, *found.latent_shape))


def source(name: str) -> Callable[[Path], Iterator[torch.Tensor]]:
    def read(folder: Path) -> Iterator[torch.Tensor]:
        found = open_source(folder / name)
        yield from map(found.tensor, found.kinds)

    return read


def generation(folder: Path) -> Iterator[torch.Tensor]:
    (found,) = (folder / "captured").iterdir()
    read_generation(found)
    taps = read_raw(found, *final_layer(folder / "tiny" / "flux.safetensors"))
    yield from (taps.latent(tap) for tap in taps)


def only(read: Callable[[Path], object], pattern: str) -> Callable[[Path], Iterator[torch.Tensor]]:
    """Of a file that holds no tensors."""

    def called(folder: Path) -> Iterator[torch.Tensor]:
        read(next(folder.glob(pattern)))
        return iter(())

    return called


def download(saved: Path) -> None:
    state = _resumed(saved, saved.with_suffix(".partial"), tuple(DATASETS), "")
    assert state.next() in (None, *DATASETS)
    assert 0 <= state.size <= 6


def arrays(path: Path) -> object:
    return load_examples(Data(kind="arrays", path=str(path)))


def captions(path: Path) -> object:
    return load_examples(Data(kind="folder", path=str(path.parent)))


READERS = [
    Reader("internals", "internals.safetensors", damaged_safetensors, internals),
    Reader("atlas", "atlas.safetensors", damaged_safetensors, atlas),
    Reader("plan", "plan.safetensors", damaged_safetensors, plan),
    Reader("neurons", "neurons.safetensors", damaged_safetensors, neurons),
    Reader("pruned", "pruned.safetensors", damaged_safetensors, pruned),
    Reader("dense", "dense.safetensors", damaged_safetensors, dense),
    Reader("manifest of rows", "hidden_states/manifest.json", damaged_json, rows),
    Reader("manifest of blocks", "hidden_states/manifest.json", damaged_json, blocks),
    Reader("rows", "hidden_states/rows-*.safetensors", damaged_safetensors, rows),
    Reader("blocks", "hidden_states/blocks-*.safetensors", damaged_safetensors, blocks),
    Reader("trajectories", "hidden_states/trajectories-*.safetensors", damaged_safetensors, trajectories),
    Reader("lens", "lens.safetensors", damaged_safetensors, lens),
    Reader("layer", "layers/*.safetensors", damaged_safetensors, layers),
    Reader("layer_stats", "layers/*.yaml", damaged_lines, layers),
    Reader("repair", ".cache/repairs/*/*.safetensors", damaged_safetensors, repairs),
    Reader("tiny", "tiny/flux.safetensors", damaged_safetensors, tiny),
    Reader("words", "tiny/words.safetensors", damaged_safetensors, tiny),
    Reader("autoencoder", "tiny/autoencoder.safetensors", damaged_safetensors, tiny),
    Reader("diffusers", "diffusers/config.json", damaged_json, source("diffusers")),
    Reader("gguf", "dense.gguf", damaged_bytes, source("dense.gguf")),
    Reader("generation", "captured/*/metadata.json", damaged_json, generation),
    Reader("raw states", "captured/*/raw/*/*.safetensors", damaged_safetensors, generation),
    Reader("picture", "captured/*/img_0.jpg", damaged_bytes, only(read_picture, "captured/*/img_0.jpg")),
    Reader("workflow", "graph.json", damaged_json, only(read_graph, "graph.json")),
    Reader("journal", "queue.json", damaged_json, only(lambda path: Journal.at(path.parent, resume=True), "queue.json")),
    Reader("config", "config.yaml", damaged_lines, only(read_config, "config.yaml")),
    Reader("prompts", "prompts.txt", damaged_lines, only(read_prompts, "prompts.txt")),
    Reader("download", "prompts.txt.progress", damaged_json, only(download, "prompts.txt.progress")),
    Reader("arrays", "arrays.npz", damaged_bytes, only(arrays, "arrays.npz")),
    Reader("captions", "pictures/metadata.jsonl", damaged_lines, only(captions, "pictures/metadata.jsonl")),
    Reader("images", "pictures/*.png", damaged_bytes, lambda folder: iter([read_images(folder / "pictures")])),
    Reader("scans", "scans/*.tif", damaged_bytes, lambda folder: iter([read_images(folder / "scans")])),
]


@pytest.fixture(scope="module")
def sound(recorded, run, tmp_path_factory) -> Path:
    """A folder with a sound file of every kind."""
    folder = tmp_path_factory.mktemp("sound")
    shutil.copy(recorded.path, folder / "dense.safetensors")
    shutil.copytree(recorded.folder, folder / "hidden_states")
    recorded.plan.save(folder / "plan.safetensors")
    layout, chosen = recorded.dense.layout, {"single-0": torch.tensor([3, 5])}
    along = {"single-1": SiteDirections(torch.eye(2, recorded.plan.widths["single-1"]), Measured.about(torch.ones(2)))}
    named = Neurons.of(layout, recorded.dense.fingerprint, chosen, "two")
    replace(named, directions=along, explained=0.5).save(folder / "neurons.safetensors")
    ones = {name: torch.ones(width, dtype=torch.float64) for name, width in recorded.plan.widths.items()}
    sites = {name: SiteInternals(one.long(), 3, one, one.clone()) for name, one in ones.items()}
    Internals("flux1", recorded.dense.fingerprint, sites, 1, 4, "", "", {"workflow": "{}"}).save(
        folder / "internals.safetensors"
    )
    one = torch.ones(6, 3)
    places = Places(one, torch.arange(3).int().expand(6, -1), one.int(), one.short(), torch.ones(6, 3, 8, 8).byte())
    images = [AtlasImage(f"{number:016x}", 4, 4, 8, "a 7", number, ("a", "7")) for number in range(3)]
    Atlas.new("flux1", recorded.dense.fingerprint, {"double-img-0": places}, images).save(folder / "atlas.safetensors")
    repairs = Repairs(recorded.dense, recorded.plan, "affine", Recording.open(folder))
    save_pruned(folder / "pruned.safetensors", Cut(recorded.dense, recorded.plan, repairs))
    options = Options(steps=1, eval_every=1)
    retrain_layers(recorded.dense, recorded.plan, recorded.states, "0,3", folder / "layers", options)
    known = blocks_of(recorded.dense.layout)[:-1]
    errors = dict.fromkeys(known, 0.5)
    maps, biases = {block: torch.eye(128) for block in known}, {block: torch.zeros(128) for block in known}
    Lens("flux1", maps, biases, errors, errors, 100, 4).save(folder / "lens.safetensors")
    for name in ("flux", "words", "autoencoder"):
        path = SHIPPED["flux1"] / f"{name}.safetensors"
        (folder / "tiny").mkdir(exist_ok=True)
        shutil.copy(path, folder / "tiny")
    run("convert", folder / "dense.safetensors", "-o", folder / "diffusers")
    run("convert", folder / "dense.safetensors", "-o", folder / "dense.gguf")
    few = ("--num-steps", 1, "--blocks", "single 0", "--raw")
    run(
        "capture", "--prompt", "a 7", "--model", folder / "tiny" / "flux.safetensors", *few, "--output-dir", folder / "captured"
    )
    shutil.copy(WORKFLOWS / "api" / "try_it_tiny.json", folder / "graph.json")
    journal = Journal.at(folder)
    journal.begin("127.0.0.1:8188", "a", "1")
    journal.end("127.0.0.1:8188", "a", ["0000_a.png"])
    journal.begin("127.0.0.1:8188", "b", "2")
    (folder / "config.yaml").write_text((Path(training.__file__).parent / "configs" / "tiny.yaml").read_text())
    (folder / "prompts.txt").write_text("a 3\nthe digit 4\n")
    (folder / "prompts.txt.partial").write_text("a fox\n")
    state = Downloaded("", dict.fromkeys(DATASETS, 100), dict.fromkeys(DATASETS, 200), 6)
    (folder / "prompts.txt.progress").write_text(json.dumps(asdict(state)))
    np.savez(folder / "arrays.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.arange(3))
    (folder / "pictures").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "pictures" / "a.png")
    (folder / "scans").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "scans" / "a.tif", compression="tiff_lzw")
    (folder / "pictures" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": ["black", "dark"]}))
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_what_something_happened_to_is_read_rightly_or_refused_in_a_sentence(reader, sound, tmp_path_factory):
    for tensor in reader.read(sound):
        assert tensor.isfinite().all()
    folder = tmp_path_factory.mktemp("damaged") / "it"
    shutil.copytree(sound, folder)
    files = sorted(folder.glob(reader.files))
    before, most = digests(folder, files), memory()

    @given(data=st.data())
    def damaged(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(files))
        whole = path.read_bytes()
        path.write_bytes(reader.damage(data.draw, whole))
        try:
            for tensor in reader.read(folder):
                assert tensor.isfinite().all()
        except UserError:
            pass
        finally:
            path.write_bytes(whole)

    damaged()
    assert digests(folder, files) == before
    assert memory() - most < ROOM


def digests(folder: Path, apart: list[Path]) -> dict[str, str]:
    """Of all files but those that were damaged, by name; hidden ones are locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path not in apart and not path.name.startswith("."))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def memory() -> int:
    """Most bytes that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
