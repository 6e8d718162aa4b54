"""Block predictions on a real server: tapped, decoded, animated, compared, captured from the terminal."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import time

import av
import numpy as np
import psutil
import pytest
import torch
from flux_poke.analysis.generation import find_previews
from flux_poke.analysis.taps import Tap
from flux_poke.cli import app
from flux_poke.errors import UserError
from flux_poke.flux.blocks import Block
from flux_poke.headless.client import ComfyClient, Interrupted, Result
from flux_poke.recording.internals import Internals
from flux_poke.tiny.model import SHIPPED, TinyFlux
from PIL import Image, ImageSequence
from PIL.ExifTags import IFD, Base
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

PROMPT = "a handwritten three"
DOUBLES = [Block("double", index) for index in range(2)]
SINGLES = [Block("single", index) for index in range(4)]
TAP, SAMPLE, DECODE, ANIMATE = "2", "6", "7", "8"
DECODING = "FluxPokeDecodeBlockPreviews"


@pytest.fixture
def seeing(workflow):
    """The shipped graph, without its animation."""

    def make(at_steps: str = "all", seed: int = 1, batch: int = 1, **decode) -> dict:
        graph = workflow("see_every_block_tiny")
        graph[TAP]["inputs"]["at_steps"] = at_steps
        graph[SAMPLE]["inputs"] |= {"seed": seed, "steps": 12}
        graph["5"]["inputs"]["batch_size"] = batch
        graph[DECODE]["inputs"] |= decode
        del graph[ANIMATE]
        return graph

    return make


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), float)


def shown(client: ComfyClient, result: Result, node: str) -> list[np.ndarray]:
    return [pixels(Image.open(io.BytesIO(client.fetch(file)))) for file in result.files("images", node)]


def folders(host, result: Result) -> list:
    return [host.output / found["subfolder"] for found in result.files("flux_poke", DECODE)]


def as_if_last(seed: int, batch: int) -> dict[Block, np.ndarray]:
    """Images [batch, 64, 64, 3] of each block's x0 at the first step, from the reference transformer's modules by hand."""
    tiny, states, last = TinyFlux.load(), {}, []
    flux = tiny.flux
    for block, module in zip((*DOUBLES, *SINGLES), (*flux.double_blocks, *flux.single_blocks), strict=True):
        if block.kind == "double":
            module.register_forward_hook(lambda _, __, out, block=block: states.update({block: out[0].clone()}))
        else:
            module.register_forward_hook(lambda _, __, out, block=block: states.update({block: out[:, -16:].clone()}))
    flux.final_layer.register_forward_pre_hook(lambda _, args: last.append(args[1:]))
    x = torch.randn(batch, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        flux(x, torch.ones(batch), *tiny.words([PROMPT] * batch))
        found = {}
        for block, state in states.items():
            v = flux.final_layer.forward(state, *last[0]).reshape(batch, 4, 4, 16, 2, 2)
            x0 = x - v.permute(0, 3, 1, 4, 2, 5).reshape(batch, 16, 8, 8)
            found[block] = tiny.autoencoder.decode(x0).clamp(0, 1).mul(255).permute(0, 2, 3, 1).numpy()
    return found


def test_previews_come_in_numeric_order_and_are_what_the_blocks_predict(client: ComfyClient, host, seeing):
    graph = seeing("2, 0, 10-11", seed=5, batch=2)
    graph["20"] = {"class_type": "PreviewImage", "inputs": {"images": [DECODE, 0]}}
    result = client.run(graph, extra={"extra_pnginfo": {"workflow": {"nodes": []}}})
    batch, there = shown(client, result, "20"), folders(host, result)
    expected = [Tap(step, block) for step in (0, 2, 10, 11) for block in (*DOUBLES, *SINGLES)]
    assert len(there) == 2
    assert len(batch) == 2 * len(expected)
    by_hand = as_if_last(5, 2)
    for number, folder in enumerate(there):
        previews = find_previews(folder)
        assert [tap for tap, _ in previews] == expected
        for (tap, path), image in zip(previews, batch[number * len(expected) :], strict=False):
            assert np.abs(pixels(Image.open(path)) - image).mean() < 6  # a JPEG and a PNG
            if tap.step == 0:
                assert np.abs(by_hand[tap.block][number] - image).mean() < 1
    assert "24 block predictions at 4 of 12 steps" in result.texts[TAP]

    folder = there[0]
    assert result.files("flux_poke", DECODE)[0]["files"] == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    )
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["generation_id"] == folder.name
    assert metadata["timesteps"] == pytest.approx([1 - step / 12 for step in range(13)], abs=1e-3)
    found = {key: metadata[key] for key in ("prompt", "width", "height", "num_steps", "seed", "guidance")}
    assert found == {"prompt": PROMPT, "width": 64, "height": 64, "num_steps": 12, "seed": 5, "guidance": None}
    exif = Image.open(folder / "img_0.jpg").getexif()
    assert exif[Base.ImageDescription] == PROMPT
    assert json.loads(exif.get_ifd(IFD.Exif)[Base.UserComment].removeprefix(b"ASCII\0\0\0")) == metadata
    for name in ("sheet", "differences", "contributions"):
        text = Image.open(folder / f"{name}.png").info
        assert json.loads(text["prompt"])[SAMPLE]["inputs"]["seed"] == 5
        assert json.loads(text["workflow"]) == {"nodes": []}
    assert np.array_equal(shown(client, result, DECODE)[0], pixels(Image.open(folder / "sheet.png")))


def test_pictures_are_the_same_with_and_without_taps_and_a_recording_beneath_them(client: ComfyClient, host, seeing):
    def drawn(graph: dict) -> np.ndarray:
        graph["20"] = {"class_type": "VAEDecode", "inputs": {"samples": [SAMPLE, 0], "vae": ["1", 2]}}
        graph["21"] = {"class_type": "PreviewImage", "inputs": {"images": ["20", 0]}}
        graph[SAMPLE]["inputs"] |= {"cfg": 2.0, "steps": 4}
        for node in (DECODE, "9", "10"):
            del graph[node]
        return np.stack(shown(client, client.run(graph), "21"))

    tapped, plain = seeing(seed=7, batch=2), seeing(seed=7, batch=2)
    plain[SAMPLE]["inputs"]["model"] = ["1", 0]
    recording = {"model": ["1", 0], "name": "beneath taps", "ignore_padding": True, "positive_only": False}
    tapped["30"] = {"class_type": "FluxPokeRecordInternals", "inputs": recording}
    tapped[TAP]["inputs"]["model"] = ["30", 0]
    with_taps = drawn(tapped)
    assert np.array_equal(with_taps, drawn(plain))
    assert with_taps.std() > 20  # something is drawn
    assert Internals.load(host.recorded("beneath taps")).steps == 4


def test_an_interrupt_while_sampling_and_one_while_decoding_leave_a_graph_that_runs(client: ComfyClient, host, seeing):
    def stopped(graph: dict, at: str, after: int) -> None:
        prompt_id = client.queue(graph)
        asked: list[float] = []

        def stop(node: str, step: float, _: float) -> None:
            if node == at and step >= after and not asked:
                asked.append(step)
                client.interrupt(prompt_id)

        with pytest.raises(Interrupted):
            client.wait(prompt_id, stop)
        assert asked

    root = host.output / "flux_poke"
    long = seeing("0")
    long[SAMPLE]["inputs"]["steps"] = 3000
    before = set(root.glob("????????"))
    stopped(long, SAMPLE, 5)
    assert set(root.glob("????????")) == before

    graph = seeing(seed=9, batch=2)
    stopped(graph, DECODE, 4)
    some = [folder for folder in set(root.glob("????????")) - before if (folder / "intermediates").exists()]
    assert 0 < sum(len(find_previews(folder)) for folder in some) < 2 * 6 * 12
    assert not any((folder / "sheet.png").exists() for folder in some)

    whole = folders(host, client.run(graph))  # sampled already: only decoded once more
    assert [len(find_previews(folder)) for folder in whole] == [6 * 12] * 2


def assert_says_nothing(folder) -> None:
    """None of the pictures in a folder tells how it came about."""
    for path in folder.rglob("*.*g"):
        picture = Image.open(path)
        assert not picture.getexif()
        assert not set(picture.info) & {"prompt", "workflow", "flux-poke", "exif"}


def test_options_of_decoding(client: ComfyClient, host, seeing):
    """One sampling run, decoded in several ways."""
    (plain,) = folders(host, client.run(seeing("0, 11", metadata=False)))
    assert_says_nothing(plain)
    (captioned,) = folders(host, client.run(seeing("0, 11", captions=True)))
    ((width, height),) = {Image.open(path).size for _, path in find_previews(captioned)}
    assert height > width > 64
    (euler,) = folders(host, client.run(seeing("0, 11", view="euler")))
    for (tap, path), (_, other) in zip(find_previews(plain), find_previews(euler), strict=True):
        difference = np.abs(pixels(Image.open(path)) - pixels(Image.open(other))).mean()
        assert difference > 20 if tap.step == 0 else difference < 1, tap  # the last step leads to x0

    graph = seeing("0, 11", decode=False)
    graph["11"] = {"class_type": "PreviewAny", "inputs": {"source": [DECODE, 4]}}
    result = client.run(graph)
    (latents,) = folders(host, result)
    assert {path.name for path in latents.rglob("*") if path.is_file()} == {
        "img_0.jpg", "metadata.json", "contributions.png", "step_0.safetensors", "step_11.safetensors",
    }  # fmt: skip
    with safe_open(latents / "intermediates" / "latents" / "step_11.safetensors", "pt") as file:
        assert len(file.keys()) == 6
    assert result.files("images", "10")  # the chart is drawn, what needs pictures is left out
    assert not result.files("images", "9")
    assert not result.outputs.get("11")


def test_a_lens_fitted_on_recorded_tokens_predicts_the_last_block(client: ComfyClient, host, seeing):
    root = host.output / "flux_poke"
    graph = seeing(seed=100, batch=16)
    graph[TAP] = {
        "class_type": "FluxPokeRecordLensRows",
        "inputs": {
            "model": ["1", 0], "name": "for a lens", "rows": 16, "steps": 6, "max_gb": 1.0, "sigma_from": 0.0, "sigma_to": 1.0,
            "sample_seed": 0,
        },
    }  # fmt: skip
    graph["20"] = {"class_type": "PreviewAny", "inputs": {"source": [SAMPLE, 0]}}
    for node in (DECODE, "9", "10"):
        del graph[node]
    assert "16 images" in client.run(graph).texts[TAP]
    fit = ["lens", "fit", str(root / "for a lens"), "--out", str(root / "lens.safetensors")]
    assert "1,536 tokens of 16 images" in CliRunner().invoke(app, fit, catch_exceptions=False).output

    def away_from_the_last(lens: str) -> list[float]:
        graph = seeing("2", seed=200, batch=2, decode=False)
        graph[TAP]["inputs"]["lens"] = lens
        errors = np.zeros(5)
        for folder in folders(host, client.run(graph)):
            with safe_open(folder / "intermediates" / "latents" / "step_2.safetensors", "pt") as file:
                last = file.get_tensor("single_block_3")
                errors += [
                    float((file.get_tensor(f"{block.kind}_block_{block.index}") - last).square().sum())
                    for block in (*DOUBLES, *SINGLES[:-1])
                ]
        return list(errors)

    raw, tuned = away_from_the_last(""), away_from_the_last("lens")
    assert all(with_lens < without for with_lens, without in zip(tuned, raw, strict=True))
    assert sum(tuned) < 0.7 * sum(raw)


def test_a_prompt_that_comes_from_a_node_is_written_where_it_is_connected(client: ComfyClient, host, seeing):
    (host.base / "input" / "eights.txt").write_text("an 8\n")
    graph = seeing("0", prompt=["20", 0])
    graph["20"] = {"class_type": "FluxPokePrompts", "inputs": {"file": "eights.txt", "index": 0, "regex": ""}}
    graph["3"]["inputs"]["text"] = ["20", 0]
    (folder,) = folders(host, client.run(graph))
    assert json.loads((folder / "metadata.json").read_text())["prompt"] == "an 8"


def test_each_of_two_samplers_that_draw_with_a_tapped_model_is_decoded_as_its_own(client: ComfyClient, host, seeing):
    graph = seeing("0, 11", seed=5)
    inputs = graph[SAMPLE]["inputs"] | {"seed": 6, "steps": 6}
    graph["20"] = {"class_type": "KSampler", "inputs": inputs}
    graph["21"] = {"class_type": DECODING, "inputs": graph[DECODE]["inputs"] | {"after": ["20", 0]}}
    result = client.run(graph)
    seeds = {}
    for node in (DECODE, "21"):
        (found,) = result.files("flux_poke", node)
        metadata = json.loads((host.output / found["subfolder"] / "metadata.json").read_text())
        seeds[node] = metadata["seed"], metadata["num_steps"]
    assert seeds == {DECODE: (5, 12), "21": (6, 6)}

    graph["22"] = {"class_type": "LatentBatch", "inputs": {"samples1": [SAMPLE, 0], "samples2": ["20", 0]}}
    graph["21"]["inputs"]["after"] = ["22", 0]
    with pytest.raises(UserError, match=r"2 samplers drew with the tapped model \(nodes 20, 6\).* come from several of them"):
        client.run(graph)
    graph["21"]["inputs"]["after"] = ["5", 0]
    with pytest.raises(UserError, match="come from none of them"):
        client.run(graph)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({TAP: {"blocks": "double 0-9"}}, "double blocks 0 to 1"),
        ({TAP: {"at_steps": "often"}}, 'Steps "often" are not understood'),
        ({TAP: {"at_steps": "99"}}, "ran none of the chosen steps"),
        ({TAP: {"lens": "absent"}}, "absent.safetensors"),
        ({DECODE: {"after": ["5", 0]}}, "There are no block predictions"),
        ({DECODE: {"after": ["20", 0]}}, "drew 1 images, and 2 came"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(client: ComfyClient, seeing, changes, sentence):
    graph = seeing("0", seed=3)
    graph["20"] = {"class_type": "RepeatLatentBatch", "inputs": {"samples": [SAMPLE, 0], "amount": 2}}
    for node, inputs in changes.items():
        graph[node]["inputs"] |= inputs
    with pytest.raises(UserError, match=sentence):
        client.run(graph)


def test_a_folder_of_previews_is_animated_in_numeric_order(client: ComfyClient, host):
    root = host.output / "flux_poke" / "of the first tool"
    taps = [Tap(step, block) for step in (0, 2, 10) for block in (*DOUBLES, Block("single", 0), Block("single", 10))]
    greys = {tap: 10 + 20 * number for number, tap in enumerate(taps)}
    for tap in taps:
        path = root / "decoded" / f"step_{tap.step}" / f"{tap.block.kind}_block_{tap.block.index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (greys[tap],) * 3).save(path)

    def animated(format: str, **inputs) -> list[float]:
        node = {"folder": root.name, "format": format, "fps": 4.0, "order": "step", "block_type": "all", "max_blocks": 0}
        node |= {"font_size": 0, **inputs}
        result = client.run({"1": {"class_type": "FluxPokeAnimateBlockPreviews", "inputs": node}})
        (file,) = result.files("images")
        content = io.BytesIO(client.fetch(file))
        assert file["filename"] == f"blocks.{format}"
        if format == "mp4":
            with av.open(content, "r") as film:
                assert film.streams.video[0].average_rate == 4
                return [float(np.mean(frame.to_ndarray(format="rgb24"))) for frame in film.decode(video=0)]
        with Image.open(content) as film:
            return [float(pixels(frame).mean()) for frame in ImageSequence.Iterator(film)]

    assert animated("mp4") == pytest.approx([greys[tap] for tap in taps], abs=6)
    by_block = sorted(taps, key=lambda tap: (tap.block, tap.step))
    assert animated("gif", order="block") == pytest.approx([greys[tap] for tap in by_block], abs=6)
    first = [tap for tap in taps if tap.block == Block("single", 0)]
    assert animated("webp", block_type="single", max_blocks=1) == pytest.approx([greys[tap] for tap in first], abs=6)
    with pytest.raises(UserError, match="not a name inside"):
        animated("gif", folder="../..")
    with pytest.raises(UserError, match="holds no block previews"):
        animated("gif", folder="nothing here")


def test_capture_brings_everything_from_the_server(server, host, tmp_path):
    def capture(*options: str) -> list[str]:
        command = ["capture", "--server", server.address, "--model", "tiny", "--num-steps", "4", "--output-dir", str(tmp_path)]
        result = CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return [line.split()[0] for line in result.output.splitlines() if str(tmp_path) in line]

    seven, eight = capture("--prompt", "a 7", "--prompt", "an 8", "--seed", "11")
    for number, (generation_id, prompt) in enumerate(((seven, "a 7"), (eight, "an 8"))):
        here, there = tmp_path / generation_id, host.output / "flux_poke" / generation_id
        names = {path.relative_to(there) for path in there.rglob("*") if path.is_file()}
        assert {path.relative_to(here) for path in here.rglob("*") if path.is_file()} == names
        assert all((here / name).read_bytes() == (there / name).read_bytes() for name in names)
        metadata = json.loads((here / "metadata.json").read_text())
        assert (metadata["prompt"], metadata["seed"], metadata["num_steps"]) == (prompt, 11 + number, 4)
        assert len(find_previews(here)) == 4 * 6
        with av.open(str(here / "blocks.mp4"), "r") as film:
            assert sum(1 for _ in film.decode(video=0)) == 4 * 6

    (undecoded,) = capture("--prompt", "a 7", "--seed", "11", "--no-decode-intermediates", "--no-add-sampling-metadata")
    names = {path.name for path in (tmp_path / undecoded).rglob("*") if path.is_file()}
    assert names == {"img_0.jpg", "metadata.json", "contributions.png", *(f"step_{step}.safetensors" for step in range(4))}
    again, first = (Image.open(tmp_path / one / "img_0.jpg") for one in (undecoded, seven))
    assert not again.getexif()
    assert np.array_equal(pixels(again), pixels(first))


def test_capture_starts_a_comfyui_and_stops_it_and_where_that_disables_metadata_pictures_carry_none(host, tmp_path):
    options = ["--base-directory", str(host.base), "--disable-metadata"]
    (tmp_path / "main.py").write_text(
        f"import os, runpy, sys\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        f"sys.argv += {options}\nsys.path[0] = {str(host.comfyui)!r}\n"
        f"runpy.run_path({str(host.comfyui / 'main.py')!r}, run_name='__main__')\n"
    )
    command = ["capture", "--comfyui", str(tmp_path), "--model", "tiny", "--num-steps", "2", "--prompt", "a 7"]
    result = CliRunner().invoke(app, [*command, "--output-dir", str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "out").iterdir()
    assert len(find_previews(folder)) == 2 * 6
    assert_says_nothing(folder)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_compare_refuses_a_file_before_anything_else_and_equal_images_are_alike_to_the_last_digit(client: ComfyClient, host):
    image = {"class_type": "EmptyImage", "inputs": {"width": 48, "height": 32, "batch_size": 1, "color": 0x806020}}
    compare = {"reference": ["1", 0], "variant": ["1", 0], "names": "", "file": "alike.csv"}
    graph = {"1": image, "2": {"class_type": "FluxPokeCompare", "inputs": compare}}
    client.run(graph)
    with open(host.output / "flux_poke" / "alike.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (float(row["ssim"]), float(row["relative_mse"])) == (1.0, 0.0)
    other = host.output / "flux_poke" / "theirs.json"
    other.write_text('{"of": "others"}')
    for name, sentence in (("alike.txt", "csv"), ("theirs.json", "theirs.json")):
        compare["file"], compare["variant"] = name, ["3", 0]  # which does not fit the reference, and is not reached
        graph["3"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 1, "color": 0}}
        with pytest.raises(UserError, match=sentence):
            client.run(graph)
    assert other.read_text() == '{"of": "others"}'


def test_compare_says_how_far_images_and_latents_are_apart(client: ComfyClient, host):
    def grey_image(level: int, width: int = 48) -> dict:
        inputs = {"width": width, "height": 32, "batch_size": 2, "color": level * 0x010101}
        return {"class_type": "EmptyImage", "inputs": inputs}

    graph = {
        "1": grey_image(100), "2": grey_image(110), "3": grey_image(150),
        "4": {
            "class_type": "FluxPokeCompare",
            "inputs": {
                "reference": ["1", 0], "variant": ["2", 0], "variant_3": ["3", 0], "names": "half", "file": "compared.csv",
            },
        },
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}},
    }  # fmt: skip
    result = client.run(graph)
    with open(host.output / "flux_poke" / "compared.csv", newline="") as file:
        half, other = csv.DictReader(file)
    assert (half["name"], other["name"]) == ("half", "variant 3")
    assert [float(row["relative_mse"]) for row in (half, other)] == pytest.approx([0.01, 0.25], rel=1e-4)
    assert float(half["psnr"]) == pytest.approx(20 * np.log10(255 / 10), rel=1e-4)
    assert "half: relative MSE 0.01 · PSNR 28.13 dB" in result.texts["4"]
    assert [line.split()[0] for line in result.outputs["5"]["text"][0].splitlines()] == ["variant", "half", "variant"]
    (picture,) = shown(client, result, "4")
    assert picture.shape[1] > 3 * 48

    graph["2"] = grey_image(110, width=64)
    with pytest.raises(UserError, match="half is 2 of 64x32 with 3 channels, the reference 2 of 48x32"):
        client.run(graph)

    def latents(value: float) -> dict:
        return {"class_type": "LatentMultiply", "inputs": {"samples": ["2", 0], "multiplier": value}}

    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0x808080}},
        "0": {"class_type": "FluxPokeLoadTinyFlux", "inputs": {}},
        "2": {"class_type": "VAEEncode", "inputs": {"pixels": ["1", 0], "vae": ["0", 2]}},
        "3": latents(1.0), "5": latents(1.1),
        "4": {
            "class_type": "FluxPokeCompare",
            "inputs": {"reference": ["3", 0], "variant": ["5", 0], "names": "", "file": ""},
        },
    }  # fmt: skip
    assert "variant: relative MSE 0.01 " in client.run(graph).texts["4"]


def test_compare_knows_the_times_of_what_is_drawn_and_of_what_was_drawn_before(client: ComfyClient, workflow):
    graph = {number: node for number, node in workflow("try_it_tiny").items() if number in "134567"}
    graph["6"]["inputs"] |= {"model": ["1", 0], "steps": 4, "seed": 77}
    graph |= {other: json.loads(json.dumps(graph[number])) for other, number in (("60", "6"), ("70", "7"))}
    graph["60"]["inputs"]["seed"] = 78
    graph["70"]["inputs"]["samples"] = ["60", 0]
    models = {"reference_model": ["1", 0], "variant_model": ["1", 0]}
    compare = {"reference": ["7", 0], "variant": ["70", 0], "names": "other", "file": "", **models}
    graph["8"] = {"class_type": "FluxPokeCompare", "inputs": compare}
    line = r"^([\d.]+) -> ([\d.]+) MB in memory, PSNR [\d.]+ dB, ([\d.e-]+) -> ([\d.e-]+) s a step"
    size = 4 * sum(tensor.numel() for tensor in load_file(SHIPPED["flux1"] / "flux.safetensors").values()) / 1e6

    def run() -> dict[str, float]:
        begun = time.perf_counter()
        result = client.run(graph)
        (seconds,) = result.outputs["8"]["flux_poke_step_seconds"]
        assert 0 < 3 * seconds["60"] < time.perf_counter() - begun
        before, after, *times = map(float, re.findall(line, result.texts["8"].splitlines()[0])[0])
        assert (before, after) == pytest.approx((size, size), rel=1e-3)
        assert times == pytest.approx([seconds["6"], seconds["60"]], rel=0.06)
        return seconds

    first = run()
    graph["60"]["inputs"]["seed"] = 79
    second = run()
    assert second["6"] == first["6"]  # it did not run again
    assert second["60"] != first["60"]


def test_raw_states_from_the_server_are_under_the_id_that_was_said_first_and_decode_there_and_here(server, host, tmp_path):
    def run(*words: object) -> str:
        result = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    options = ("--num-steps", 3, "--seed", 5, "--blocks", "double 1, single 3", "--steps-to-tap", "0, 2", "--raw")
    there = ("--server", server.address)
    output = run("capture", *there, "--model", "tiny", "--prompt", "a 7", *options, "--output-dir", tmp_path)
    (folder,) = tmp_path.iterdir()
    assert output.splitlines()[0] == f"{folder.name}: a 7"
    assert (host.output / "flux_poke" / folder.name / "metadata.json").is_file()
    taps = [Tap(step, block) for step in (0, 2) for block in (Block("double", 1), Block("single", 3))]
    previews = dict(find_previews(folder))
    assert [*previews] == taps
    assert (folder / "raw" / "step_2" / "single_block_3.safetensors").is_file()
    before = {tap: pixels(Image.open(path)) for tap, path in previews.items()}
    (host.base / "models" / "vae").mkdir(exist_ok=True)
    vae = host.base / "models" / "vae" / "tiny-decoder.safetensors"
    shutil.copy(SHIPPED["flux1"] / "autoencoder.safetensors", vae)
    checkpoint = SHIPPED["flux1"] / "flux.safetensors"
    for where in ((), (*there, "--vae", vae.name)):
        for path in previews.values():
            path.unlink()
        assert "4 predictions decoded" in run("decode", folder, "--checkpoint", checkpoint, *where)
        assert all(np.abs(pixels(Image.open(path)) - before[tap]).max() <= 6 for tap, path in previews.items())
    vae.unlink()
