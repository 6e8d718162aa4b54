"""The shipped workflows on ComfyUI's own page: opened, run, and opened again from what they wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flux_poke.errors import UserError
from flux_poke.recording.internals import Internals
from PIL import Image
from playwright.sync_api import expect
from shipped import CANVAS, WORKFLOWS

NAMES = list(CANVAS)
TRY_IT = CANVAS["try_it_tiny"]
RECORD = "FluxPokeRecordInternals"


def test_every_workflow_has_an_api_form_and_a_square_thumbnail():
    forms = {path.stem for path in (WORKFLOWS / "api").glob("*.json")}
    assert forms == {*NAMES}
    for name in NAMES:
        width, height = Image.open(CANVAS[name].with_suffix(".jpg")).size
        assert width == height == 512, name


def test_a_node_that_is_missing_is_complained_about(canvas, tmp_path: Path):
    """What the test above rests on."""
    graph = json.loads(TRY_IT.read_text())
    graph["nodes"][0]["type"] = "FluxPokeNoSuchNode"
    (tmp_path / "missing.json").write_text(json.dumps(graph))
    canvas.drop(tmp_path / "missing.json")
    assert "FluxPokeNoSuchNode" in canvas.complaints()


def test_run_draws_pictures_and_shows_what_was_recorded(canvas, host):
    host.internals.unlink(missing_ok=True)
    canvas.drop(TRY_IT)
    assert canvas.run() == "execution_success"
    canvas.expect_text("tiny: 1 run")
    assert canvas.pictures("SaveImage") == 4 * [[256, 256]]
    ((width, height),) = canvas.pictures("FluxPokeInternalsReport")
    assert width > height > 300
    canvas.expect_text("FLUX.1: 4,096 neurons in 8 MLPs")

    assert canvas.run() == "execution_success"  # with the next seed, which the page has drawn
    canvas.look_at(RECORD)
    canvas.expect_text("tiny: 2 runs")
    assert Internals.load(host.internals).runs == 2


def test_the_sheet_of_all_blocks_takes_the_place_of_the_live_preview(canvas, host):
    canvas.drop(CANVAS["see_every_block_tiny"])
    canvas.write("FluxPokeTapBlocks", "at_steps", "0, 10, 19")
    before = {*(host.output / "flux_poke").glob("*/sheet.png")}
    assert canvas.run() == "execution_success"
    (sheet,) = {*(host.output / "flux_poke").glob("*/sheet.png")} - before
    canvas.expect_text("18 block predictions at 3 of 20 steps")
    assert canvas.pictures("FluxPokeDecodeBlockPreviews") == [list(Image.open(sheet).size)]
    canvas.look_at("FluxPokeAnimateBlockPreviews")
    canvas.page.wait_for_function(
        "node => node.widgets.some(widget => widget.name.includes('video') || widget.name.includes('animation'))",
        arg=canvas.node("FluxPokeAnimateBlockPreviews"),
    )


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_tiny")])
def test_the_server_takes_what_needs_the_large_model_until_it_opens_the_empty_files(models, client, workflow, name: str):
    with pytest.raises(UserError, match=r"^\w+ \(node \d+\) failed: "):  # a graph that it does not take is "refused"
        client.run(workflow(name))


def test_retraining_ends_with_the_errors_of_all_layers_in_place_of_the_loss_curve(canvas):
    canvas.drop(CANVAS["retrain_layers_tiny"])
    assert canvas.run() == "execution_success"
    ((width, height),) = canvas.pictures("FluxPokeRetrainLayers")
    assert (width, height) != (512, 256)  # the curve's
    canvas.expect_text("single-3")
    canvas.drop(CANVAS["run_with_replaced_layers_tiny"])
    assert canvas.run() == "execution_success"
    canvas.expect_text("6 layers replaced, neurons cut: img512_txt512_single1024")
    assert canvas.pictures("SaveImage") == 4 * [[256, 256]]


def test_all_in_one_does_what_its_note_says(canvas):
    canvas.drop(CANVAS["flux_poke_all_in_one_tiny"])

    def draw(use: str) -> str:
        canvas.write("FluxPokeChooseModel", "use", use)
        return canvas.run()

    assert draw("normal") == "execution_success"
    assert draw("pruned") == "execution_error"  # nothing is planned yet
    assert draw("analysis") == "execution_success"
    switch = """([title, on]) => { app.graph.nodes.find(node => node.title === title).widgets[0].value = on }"""
    for title, kind, use in (("Plan?", "PlanByBudget", "pruned"), ("Retrain?", "RetrainLayers", "replaced")):
        shows = f"() => app.graph.nodes.find(node => node.type === 'FluxPoke{kind}').imgs?.length > 0"
        assert not canvas.page.evaluate(shows)
        canvas.page.evaluate(switch, [title, True])
        assert draw("normal") == "execution_success"
        canvas.page.wait_for_function(shows)
        canvas.page.evaluate(switch, [title, False])
        assert draw(use) == "execution_success"
    assert canvas.pictures("SaveImage") == 9 * [[256, 256]]


def test_one_run_makes_a_flux_of_the_size_asked_for(canvas, host):
    canvas.drop(CANVAS["fit_flux_tiny"])
    assert canvas.run() == "execution_success"
    canvas.expect_text("60 images drawn in")
    canvas.look_at("FluxPokePlanByBudget")
    canvas.expect_text("predicted relative velocity error")
    asked = canvas.node("FluxPokePlanByBudget").evaluate("node => node.widgets.find(w => w.name === 'amount').value") * 1e9
    (file,) = (host.base / "models" / "diffusion_models").glob("fitted-tiny.safetensors")
    assert abs(file.stat().st_size - asked) < 0.01 * asked
    canvas.look_at("FluxPokeCompare")
    canvas.expect_text("fitted: relative MSE")
    assert canvas.pictures("FluxPokeCompare")
    (width, height) = canvas.node("FluxPokeCompare").evaluate("node => [node.imgs[0].naturalWidth, node.imgs[0].naturalHeight]")
    assert height > width > 600


def test_a_recording_dropped_on_the_page_brings_its_graph_back(canvas, host):
    canvas.drop(TRY_IT)
    canvas.write(RECORD, "name", "dropped")
    canvas.write("KSampler", "seed", 12)
    made_with = canvas.graph()
    assert canvas.run() == "execution_success"

    canvas.drop(host.recorded("dropped"))
    assert canvas.graph() == made_with
    assert canvas.node("MarkdownNote").evaluate("note => note.widgets[0].value").startswith("1. Press **Run**")


def test_what_is_wrong_with_an_input_is_said_in_a_sentence(canvas):
    canvas.drop(TRY_IT)
    canvas.write(RECORD, "name", "../x")
    assert canvas.run() == "execution_error"
    canvas.wait_for_complaint()
    if (details := canvas.page.get_by_test_id("error-overlay-see-errors")).count():  # a dialog shows it at once
        details.click()
    canvas.expect_text("'../x' is not a name inside")


def test_the_templates_list_the_workflows_with_their_thumbnails(canvas):
    canvas.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    canvas.page.get_by_role("dialog").get_by_text("flux-poke-under-test").first.click()
    cards = canvas.page.locator("[data-testid^='template-workflow-Flux Poke']")
    for name in NAMES:
        card = canvas.page.get_by_test_id(f"template-workflow-{CANVAS[name].stem}")
        for _ in range(100):  # more of them come when the last one is seen
            if card.count():
                break
            cards.last.scroll_into_view_if_needed()
            canvas.page.wait_for_timeout(200)
        card.scroll_into_view_if_needed()  # pictures that nobody sees are not loaded
        image = card.locator("img").first
        image.wait_for()
        assert "default-template" not in image.get_attribute("src")  # ComfyUI's own, where a pack has no picture
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 512


def test_all_workflows_are_found_by_the_name_of_the_pack_and_sorted_by_what_to_try_first(canvas):
    canvas.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = canvas.page.get_by_role("dialog")
    dialog.get_by_text("flux-poke-under-test").first.click()
    dialog.get_by_placeholder("Search").first.fill("flux poke")
    cards = dialog.locator("[data-testid^='template-workflow-Flux Poke']")
    expect(cards).to_have_count(len(NAMES))


def test_a_node_shows_its_help_page(canvas):
    canvas.drop(TRY_IT)
    canvas.node(RECORD).evaluate("node => app.canvas.selectNode(node)")
    canvas.page.get_by_test_id("info-button").click()
    canvas.expect_text("A run that is interrupted or fails adds nothing.")
