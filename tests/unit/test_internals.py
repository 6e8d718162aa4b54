"""recording/internals.py: exact addition in any order, refusals, and files that survive other processes and kills."""

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flux_poke.analysis.report import internals_table, internals_title
from flux_poke.errors import UserError
from flux_poke.flux.fingerprint import Fingerprint
from flux_poke.recording.internals import FORMAT, Internals, add_to_file, check_file, site_order
from flux_poke.recording.queued import merge_files
from flux_poke.recording.recording import Recording
from flux_poke.recording.statistics import SiteInternals
from safetensors import safe_open
from safetensors.torch import load_file, save_file

WIDTHS = {"double-img-0": 40, "double-txt-0": 40, "double-img-10": 30, "double-img-2": 30, "single-0": 50, "single-11": 7}
MODEL = Fingerprint("shapes", (0.5, -0.25, 3.0), (2.0**-9, 2.0**-10, 2.0**-7))


def recording(seed: int = 0, workflow: Mapping[str, str] | None = None, model: Fingerprint = MODEL) -> Internals:
    generator = torch.Generator().manual_seed(seed)
    sites = {
        name: SiteInternals(
            fires=torch.randint(0, 4096, (width,), generator=generator),
            tokens=4096 + seed,
            sum=torch.randn(width, generator=generator, dtype=torch.float64) * 1000,
            sum_sq=torch.rand(width, generator=generator, dtype=torch.float64) * 100_000,
        )
        for name, width in WIDTHS.items()
    }
    return Internals.new("flux1", model, sites, steps=20 + seed, workflow=workflow)


def assert_same(a: Internals, b: Internals) -> None:
    """Equal to the last bit, header included."""
    header = ("family", "fingerprint", "runs", "steps", "created", "updated", "workflow", "padded")
    assert {key: getattr(a, key) for key in header} == {key: getattr(b, key) for key in header}
    assert a.sites.keys() == b.sites.keys()
    for name, site in a.sites.items():
        other = b.sites[name]
        assert site.tokens == other.tokens
        assert torch.equal(site.fires, other.fires)
        assert torch.equal(site.sum, other.sum)
        assert torch.equal(site.sum_sq, other.sum_sq)


@pytest.mark.parametrize("workflow", [{}, {"workflow": '{"nodes": []}', "prompt": '{"1": {}}'}])
def test_a_file_gives_back_what_was_saved(tmp_path, workflow):
    saved = recording(workflow=workflow)
    saved.save(tmp_path / "internals.safetensors")
    found = Internals.load(tmp_path / "internals.safetensors")
    assert_same(found, saved)
    assert list(found.sites) == ["double-img-0", "double-txt-0", "double-img-2", "double-img-10", "single-0", "single-11"]


def test_the_file_has_the_documented_keys_and_header(tmp_path):
    path = tmp_path / "internals.safetensors"
    saved = recording(workflow={"workflow": "{}", "prompt": "{}"})
    saved.save(path)
    tensors = load_file(path)
    assert tensors.keys() == {f"{name}{part}" for name in WIDTHS for part in ("", ".tokens", ".sum", ".sum_sq")}
    assert tensors["single-0"].dtype == tensors["single-0.tokens"].dtype == torch.int64
    assert tensors["single-0.sum"].dtype == tensors["single-0.sum_sq"].dtype == torch.float64
    assert tensors["single-0.tokens"].tolist() == [4096]
    assert torch.equal(tensors["single-0"], saved.sites["single-0"].fires)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {
        "format", "family", "model", "runs", "steps", "created", "updated", "workflow", "prompt",
    }  # fmt: skip
    assert (metadata["format"], metadata["family"], metadata["runs"], metadata["steps"]) == (FORMAT, "flux1", "1", "20")


def test_rounding_to_the_grid_moves_a_sum_by_less_than_a_millionth():
    exact = torch.tensor([1 / 3, -2 / 3, 1e6 + 1e-7], dtype=torch.float64)
    site = SiteInternals(torch.zeros(3, dtype=torch.int64), 1, exact, exact)
    rounded = Internals.new("flux1", MODEL, {"single-0": site}, steps=1).sites["single-0"]
    assert ((rounded.sum - exact).abs() <= 2.0**-21).all()
    assert torch.equal(rounded.sum * 2**20, (rounded.sum * 2**20).round())


@pytest.mark.parametrize("same_second", [False, True])
def test_files_merge_to_the_same_bits_in_any_order_and_grouping(same_second):
    parts = [recording(seed, {"workflow": f'{{"made by": {seed}}}'}) for seed in range(4)]
    if not same_second:
        parts = [
            replace(part, created=f"2026-01-0{n}T00:00:00Z", updated=f"2026-02-0{n}T00:00:00Z")
            for n, part in enumerate(parts, 1)
        ]
    totals = []
    for a, b, c, d in itertools.permutations(parts):
        totals += [a.merge(b).merge(c).merge(d), a.merge(b).merge(c.merge(d))]
    for total in totals[1:]:
        assert_same(total, totals[0])
    total = totals[0]
    assert (total.runs, total.steps) == (4, 20 + 21 + 22 + 23)
    for name, site in total.sites.items():
        assert site.tokens == 4 * 4096 + 6
        assert torch.equal(site.fires, torch.stack([part.sites[name].fires for part in parts]).sum(0))
        torch.testing.assert_close(site.sum, torch.stack([part.sites[name].sum for part in parts]).sum(0))
    if not same_second:
        assert (total.created, total.updated) == ("2026-01-01T00:00:00Z", "2026-02-04T00:00:00Z")
        assert total.workflow == parts[0].workflow, "that of the run that made the file"


def test_adding_to_a_file_that_is_not_there_makes_it_and_then_counts_add_up(tmp_path):
    path = tmp_path / "new" / "internals.safetensors"
    first, second = recording(1), recording(2)
    assert_same(add_to_file(path, first), first)
    total = add_to_file(path, second)
    assert_same(total, first.merge(second))
    assert_same(Internals.load(path), total)


def test_a_recording_of_another_model_is_refused_and_the_file_stays(tmp_path):
    path = tmp_path / "internals.safetensors"
    add_to_file(path, recording(1))
    before = path.read_bytes()
    tuned = replace(MODEL, values=(0.5, -0.25, 3.5))
    with pytest.raises(UserError, match=r"This run was recorded on another model than .*: its weights differ \(1 of 3 sampled"):
        add_to_file(path, recording(2, model=tuned))
    with pytest.raises(UserError, match="its layers have other shapes"):
        add_to_file(path, recording(2, model=replace(MODEL, shapes="others")))
    fewer = recording(2)
    fewer = replace(fewer, sites={name: fewer.sites[name] for name in ("single-0", "single-11")})
    with pytest.raises(UserError, match=r"other MLPs of the model \(2\) than this recording \(6\), first double-img-0"):
        add_to_file(path, fewer)
    narrow = {name: SiteInternals(s.fires[:5], s.tokens, s.sum[:5], s.sum_sq[:5]) for name, s in recording(2).sites.items()}
    with pytest.raises(UserError, match="first double-img-0"):
        add_to_file(path, replace(recording(2), sites=narrow))
    assert path.read_bytes() == before


def damaged(path: Path, name: str) -> None:
    """Makes of a good file one that is not."""
    good = path.read_bytes()
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if name == "empty":
        path.write_bytes(b"")
    elif name == "cut short":
        path.write_bytes(good[: len(good) // 2])
    elif name == "cut in its header":
        path.write_bytes(good[:20])
    elif name == "noise":
        path.write_bytes(bytes(range(256)) * 20)
    elif name == "text":
        path.write_text("no tensors here")
    elif name == "zip":
        path.write_bytes(b"PK\x03\x04" + good)
    elif name == "other tensors":
        save_file({"single_blocks.0.linear1.weight": torch.zeros(2, 2)}, path)
    elif name == "other format":
        save_file(tensors, path, metadata | {"format": "someone's internals 7"})
    elif name == "lacking sums":
        save_file({key: t for key, t in tensors.items() if key != "single-0.sum"}, path, metadata)
    elif name == "lacking header":
        save_file(tensors, path, {key: text for key, text in metadata.items() if key != "runs"})
    elif name == "unknown family":
        save_file(tensors, path, metadata | {"family": "sd15"})
    elif name == "bad fingerprint":
        save_file(tensors, path, metadata | {"model": "[1, 2]"})
    elif name == "unknown site":
        save_file(tensors | {"bogus": torch.zeros(1)}, path, metadata)
    elif name == "widths that differ":
        save_file(tensors | {"single-0.sum": torch.zeros(3, dtype=torch.float64)}, path, metadata)
    elif name == "floats for counts":
        save_file(tensors | {"single-0": tensors["single-0"].float()}, path, metadata)
    elif name == "sums that are not finite":
        save_file(tensors | {"single-0.sum": tensors["single-0.sum"] * float("nan")}, path, metadata)
    elif name == "sums of squares below 0":
        save_file(tensors | {"single-0.sum_sq": -1 - tensors["single-0.sum_sq"]}, path, metadata)
    elif name == "runs below 0":
        save_file(tensors, path, metadata | {"runs": "-1"})
    elif name == "more fires than tokens":
        save_file(tensors | {"single-0": tensors["single-0"] + 10_000}, path, metadata)
    else:
        raise AssertionError(name)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("empty", "cannot be read as safetensors"),
        ("cut short", "cannot be read as safetensors"),
        ("cut in its header", "cannot be read as safetensors"),
        ("noise", "cannot be read as safetensors"),
        ("text", "cannot be read as safetensors"),
        ("zip", "cannot be read as safetensors"),
        ("other tensors", f"is not an internals file: expected '{FORMAT}'"),
        ("other format", "found 'someone's internals 7'"),
        ("lacking sums", "is a damaged internals file"),
        ("lacking header", "is a damaged internals file"),
        ("unknown family", "is a damaged internals file"),
        ("bad fingerprint", "is a damaged internals file"),
        ("unknown site", "is a damaged internals file"),
        ("widths that differ", "is a damaged internals file"),
        ("floats for counts", "is a damaged internals file"),
        ("more fires than tokens", "is a damaged internals file"),
        ("sums that are not finite", "is a damaged internals file"),
        ("sums of squares below 0", "is a damaged internals file"),
        ("runs below 0", "is a damaged internals file"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_in_one_sentence_and_stays_as_it_is(tmp_path, damage, sentence):
    path = tmp_path / "internals.safetensors"
    recording().save(path)
    damaged(path, damage)
    before = path.read_bytes()
    for use in (Internals.load, lambda path: add_to_file(path, recording())):
        with pytest.raises(UserError, match=sentence) as raised:
            use(path)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
    assert path.read_bytes() == before


@pytest.fixture
def originals(tmp_path) -> Path:
    """A file as the original flux-poke writes it: counts alone, no header."""
    path = tmp_path / "counts.safetensors"
    save_file({name: site.fires for name, site in recording().sites.items()}, path)
    return path


def test_the_originals_counts_are_read_and_say_that_their_model_is_not_known(originals):
    found = Internals.load(originals)
    assert found.fingerprint is None
    assert {name: site.fires.tolist() for name, site in found.sites.items()} == {
        name: site.fires.tolist() for name, site in recording().sites.items()
    }
    busiest = max(int(site.fires.max()) for name, site in found.sites.items() if name.startswith("double-img"))
    assert found.sites["double-img-0"].tokens == busiest
    assert "model and tokens are not known" in internals_title(found)
    assert Recording.open(originals).internals().sites.keys() == found.sites.keys()
    assert Recording.open(originals).fingerprint() is None


def test_the_originals_counts_fit_a_model_by_their_widths_and_are_enough_for_counts_alone(originals):
    found = Internals.load(originals)
    found.require(MODEL, WIDTHS, "this one")
    with pytest.raises(UserError, match="single-0 has 50 neurons in them, 51 there"):
        found.require(MODEL, {**WIDTHS, "single-0": 51}, "this one")
    with pytest.raises(UserError, match="do not tell enough for the score fluctuation"):
        found.require_sums("the score fluctuation")


def test_nothing_is_added_to_the_originals_counts(originals, tmp_path):
    before = originals.read_bytes()
    recording().save(tmp_path / "ours.safetensors")
    for use in (
        lambda: check_file(originals, MODEL),
        lambda: add_to_file(originals, recording()),
        lambda: merge_files(originals, [tmp_path / "ours.safetensors", originals]),
        lambda: merge_files(tmp_path / "new.safetensors", [originals, tmp_path / "ours.safetensors"]),
    ):
        with pytest.raises(UserError, match="counts of the original flux-poke, which do not say of which model"):
            use()
    assert originals.read_bytes() == before
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize("wrong", [torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([-1])])
def test_what_only_looks_like_the_originals_counts_is_damaged(tmp_path, wrong):
    save_file({"double-img-0": wrong}, tmp_path / "counts.safetensors")
    with pytest.raises(UserError, match="is a damaged internals file"):
        Internals.load(tmp_path / "counts.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.safetensors is not there"):
        Internals.load(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="is not there"):
        Internals.load(tmp_path)


def test_a_read_only_file_is_not_touched_and_told_of_before_the_work(tmp_path):
    path = tmp_path / "internals.safetensors"
    recording().save(path)
    before = path.read_bytes()
    path.chmod(0o444)
    for use in (lambda: add_to_file(path, recording()), lambda: check_file(path, MODEL)):
        with pytest.raises(UserError, match=r"internals\.safetensors is read-only"):
            use()
    assert path.read_bytes() == before


def test_a_file_of_another_model_is_told_of_before_the_work(tmp_path):
    path = tmp_path / "internals.safetensors"
    check_file(path, MODEL)
    recording().save(path)
    check_file(path, MODEL)
    with pytest.raises(UserError, match=r"another model than this one: its weights differ \(1 of 3 sampled ones\)"):
        check_file(path, replace(MODEL, values=(0.5, -0.25, 3.5)))


def test_sites_are_ordered_as_the_model_runs_them():
    names = ["single-2", "double-txt-10", "double-img-2", "single-10", "double-txt-2", "double-img-10"]
    assert sorted(names, key=site_order) == [
        "double-img-2", "double-txt-2", "double-img-10", "double-txt-10", "single-2", "single-10",
    ]  # fmt: skip


def test_merging_files_never_replaces_a_recording_that_is_not_in_the_sum(tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "sum")]
    runs = [recording(seed) for seed in (1, 2)]
    for path, run in zip(paths, runs, strict=False):
        run.save(path)
    with pytest.raises(UserError, match=r"/a is there already and is none of the files to add up"):
        merge_files(paths[0], paths[1:2])
    assert Internals.load(paths[0]).steps == runs[0].steps
    assert merge_files(paths[2], paths[:2]).steps == Internals.load(paths[2]).steps == runs[0].steps + runs[1].steps
    merge_files(paths[0], paths[:2])
    assert Internals.load(paths[0]).steps == runs[0].steps + runs[1].steps


#: Forks workers that add one recording over and over to one file; torch is imported once, before.
WORKERS = """
import os, random, signal, sys, time
import torch
from flux_poke.recording.internals import Internals, add_to_file
from flux_poke.recording.statistics import SiteInternals
from flux_poke.flux.fingerprint import Fingerprint

torch.set_num_threads(1)
path, width = sys.argv[1], 3000

def site(number):
    ones = torch.ones(width, dtype=torch.float64)
    return SiteInternals(torch.full((width,), number), 10, ones * number / 4, ones * number)

one = Internals.new("flux1", Fingerprint("s", (1.0,), (0.5,)), {f"single-{n}": site(n + 1) for n in range(4)}, steps=7)

def worker(times):
    pid = os.fork()
    if pid == 0:
        for _ in range(times):
            add_to_file(path, one)
        os._exit(0)
    return pid

def check(total, runs):
    assert (total.runs, total.steps) == (runs, 7 * runs), (total.runs, total.steps, runs)
    for n in range(4):
        found = total.sites[f"single-{n}"]
        assert found.tokens == 10 * runs
        assert bool((found.fires == runs * (n + 1)).all())
        assert bool((found.sum == runs * (n + 1) / 4).all() and (found.sum_sq == runs * (n + 1)).all())
"""


def in_a_process(code: str, path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", WORKERS + code, str(path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_add_to_one_file_lose_nothing(tmp_path):
    code = """
pids = [worker(15) for _ in range(3)]
assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
check(Internals.load(path), 45)
"""
    in_a_process(code, tmp_path / "internals.safetensors")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path):
    """Thirty workers or more are killed at random moments; the file holds a whole number of runs and never loses one."""
    code = """
add_to_file(path, one)
runs, kills, moments = 1, 0, random.Random(0)
while kills < 30 or runs < 30:  # on a busy machine, many die before they have done anything
    pid = worker(1_000_000)
    time.sleep(moments.uniform(0.001, 0.05))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    found = Internals.load(path)
    assert found.runs >= runs
    runs, kills = found.runs, kills + 1
    check(found, runs)
check(add_to_file(path, one), runs + 1)
"""
    in_a_process(code, tmp_path / "internals.safetensors")
    assert {path.name for path in tmp_path.iterdir()} <= {"internals.safetensors", ".internals.safetensors.lock"}


def test_images_that_were_counted_before_a_kill_are_not_counted_again(tmp_path):
    path = tmp_path / "internals.safetensors"
    for drawn in ("first", "second", "second"):
        add_to_file(path, replace(recording(1), drawn=drawn))
    once = Internals.load(path)
    assert (once.runs, once.drawn) == (2, "second")
    assert add_to_file(path, recording(1)).runs == add_to_file(path, recording(1)).runs - 1, "others count each time"


@pytest.mark.parametrize(
    ("first", "second", "together", "told"),
    [
        (False, False, False, False),
        (False, True, True, True),
        (True, True, True, True),
        (None, False, None, True),  # of a file that was written before it was known
    ],
)
def test_whether_padding_counts_is_known_of_the_sum_and_told_in_the_report(tmp_path, first, second, together, told):
    path = tmp_path / "internals.safetensors"
    add_to_file(path, replace(recording(1), padded=first))
    add_to_file(path, replace(recording(2), padded=second))
    found = Internals.load(path)
    assert found.padded is together
    assert ("up to 256 words" in internals_table(found)) is told


def test_padding_that_flux2s_older_recordings_do_not_tell_of_is_none(originals):
    assert "256 words" not in internals_table(replace(recording(), family="flux2"))
    assert "256 words" not in internals_table(Internals.load(originals))
