"""What is in an object store is copied once to a machine, and what is worked out there comes back to it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flux_poke.cluster.copies import cached_of, file_at_hand, folder_at_hand, recorded
from flux_poke.cluster.layers import Retrainer, layer_options
from flux_poke.cluster.shared import Shared
from flux_poke.cluster.sites import Ranker, Source
from flux_poke.cluster.tasks import Task
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.scores import rank
from flux_poke.tiny.model import FOLDER
from flux_poke.tiny.words import digit_prompts
from safetensors.torch import load_file

CHECKPOINT = FOLDER / "flux.safetensors"


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """An object store of its own, with a bucket in it."""
    server = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    settings |= {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("work")
        yield "s3://work"
        s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(name)`: from now on, this is the machine of that name, with a disk of its own."""

    def move_to(name: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
        return tmp_path / name

    return move_to


@pytest.fixture(scope="module")
def source(run, store, tmp_path_factory) -> tuple[Source, Path]:
    """A recording of the tiny FLUX and its checkpoint in the store, and the recording on a disk."""
    folder = tmp_path_factory.mktemp("to_store")
    (folder / "prompts.txt").write_text("\n".join(digit_prompts(number % 10)[0] for number in range(20)))
    given = ("record", CHECKPOINT, folder, "--prompts", folder / "prompts.txt", "--steps", 4)
    run(*given, "--what", "internals,rows", "--keep-steps", 4)
    shared = Shared(f"{store}/recording")
    for path in folder.rglob("*"):
        if path.is_file():
            shared.put(path, path.relative_to(folder).as_posix())
    Shared(f"{store}/models").put(CHECKPOINT, "flux.safetensors")
    return Source(f"{store}/models/flux.safetensors", f"{store}/recording"), folder


def test_a_file_is_copied_once_and_again_when_it_changes(store, machine, tmp_path, monkeypatch):
    machine("one")
    (tmp_path / "it").write_bytes(b"first")
    shared = Shared(f"{store}/changing")
    shared.put(tmp_path / "it", "it")
    fetched, fetch = list[str](), Shared.fetch

    def counted(self: Shared, name: str, to: Path) -> Path:
        fetched.append(name)
        return fetch(self, name, to)

    monkeypatch.setattr(Shared, "fetch", counted)
    copy = file_at_hand(f"{store}/changing/it")
    assert copy.read_bytes() == b"first"
    assert file_at_hand(f"{store}/changing/it") == copy
    assert fetched == ["it"]
    (tmp_path / "it").write_bytes(b"later")
    shared.put(tmp_path / "it", "it")
    assert file_at_hand(f"{store}/changing/it").read_bytes() == b"later"
    assert file_at_hand(f"{tmp_path}/it") == tmp_path / "it"


def test_a_ranking_comes_back_and_no_other_machine_works_it_out_again(source, machine, monkeypatch):
    there, here = source
    machine("one")
    Ranker(there, "cpu", 1).work(Task("double-txt-1"))
    machine("two")
    monkeypatch.setattr("flux_poke.pruning.scores.obs", None)
    Ranker(there, "cpu", 1).work(Task("double-txt-1"))
    (found,) = folder_at_hand(there.recording, cached_of("double-txt-1")).glob(".cache/rankings/obs.double-txt-1.*")
    monkeypatch.undo()
    own = Source(f"{CHECKPOINT}", f"{here}")
    ranking = rank("obs", own.dense(), own.recorded(), [own.dense().layout.site("double-txt-1")])["double-txt-1"]
    assert torch.equal(load_file(found)["order"], ranking.order)


def test_a_layer_goes_to_the_store_and_is_known_again(source, store, machine, monkeypatch):
    there, _ = source
    machine("one")
    dense = there.dense()
    kept = {site.name: torch.arange(site.width // 2) for site in dense.layout.sites if site.block == "single_blocks.0"}
    whole = PruningPlan.keeping_all(dense)
    plan = PruningPlan(whole.family, whole.fingerprint, kept, whole.widths, "magnitude", "the first half")

    def retrainer() -> Retrainer:
        return Retrainer(there, plan, layer_options("closed form"), f"{store}/layers", "2", "rows", 1)

    (stats,) = retrainer().work(Task("single-0", what=(2, 3)))
    assert stats.relative_final < stats.relative_cut
    assert Shared(f"{store}/layers").exists("2.safetensors")
    machine("two")
    monkeypatch.setattr("flux_poke.retrain.layers.train_rows", None)
    assert retrainer().work(Task("single-0", what=(2, 3))) == [stats]


def test_of_a_recording_what_a_task_needs_is_copied(source, machine):
    machine("one")
    folder = folder_at_hand(source[0].recording, recorded())
    assert {path.name for path in folder.rglob("*.safetensors")} == {"internals.safetensors"}
    assert (folder / "hidden_states" / "manifest.json").is_file()
