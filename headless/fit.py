"""`flux-poke fit` on ComfyUI: the workflow `fit_flux` with another model, other prompts and another budget in it.

    request = FitRequest("flux1-dev", prompts, ByBudget(size=10), "flux1-dev-10gb.safetensors")
    with ComfyClient("127.0.0.1:8188") as client:
        fitted = fit_there(client, request, say=print)
    fitted.table, fitted.compared, fitted.file

It fills in `workflows/api/fit_flux.json` (for the model "tiny" `fit_flux_tiny.json`): that graph may be changed, as long as it
calibrates, plans by a budget, saves, and compares.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..progress import Progress, silent
from ..prompts import ENOUGH, split_prompts
from ..pruning.by_budget import AMOUNTS, ByBudget
from .client import ComfyClient
from .server import DEFAULT_SERVER, ComfyServer, start_options
from .workflow import TINY, Workflow, follow, model_file

CALIBRATE, PLAN, SAVE, COMPARE = "FluxPokeCalibrate", "FluxPokePlanByBudget", "FluxPokeSavePrunedFlux", "FluxPokeCompare"
#: About how long nodes take beside others.
WEIGHTS = {CALIBRATE: 60.0, PLAN: 20.0, SAVE: 10.0, "KSampler": 3.0}


@dataclass(frozen=True)
class FitRequest:
    """What to fit: `model` as `workflow.model_file` takes it, or "tiny"; `save_as` is a name in ComfyUI's diffusion_models.

    `recording` is a name in its output/flux_poke (None: by the model); a `count` of None is as many as there are prompts, up
    to `ENOUGH`. Raises `UserError` where the budget is none, there are too few prompts, or `save_as` leaves that folder.
    """

    model: str
    prompts: Sequence[str]
    what: ByBudget
    save_as: str
    recording: str | None = None
    count: int | None = None
    steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        self.what.check_options()
        if self.what.multiple is not None:
            raise UserError("On ComfyUI, the node chooses what widths are multiples of: leave --multiple out.")
        split_prompts(self.prompts)
        name = PurePosixPath(self.save_as.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or ":" in self.save_as or name.suffix != ".safetensors":
            raise UserError(
                f"ComfyUI saves the smaller checkpoint in its models/diffusion_models: expected a name such as "
                f"fitted.safetensors, found {self.save_as}."
            )


@dataclass(frozen=True)
class FittedThere:
    """What a fit on ComfyUI left: the plan's table, how a picture compares, and the file's name in its diffusion_models."""

    table: str
    compared: str
    file: str


def fit_there(
    client: ComfyClient, request: FitRequest, progress: Progress = silent, say: Callable[[str], None] = lambda _: None
) -> FittedThere:
    """Runs the workflow on the server; `say` is told what it will take once Calibrate knows.

    Raises `UserError` where the server lacks the nodes or the model, the run fails or is stopped there. Images that were
    recorded are kept, and the same request goes on from there.
    """
    client.require_node(CALIBRATE)
    workflow = filled(request, [] if request.model == TINY else client.models("diffusion_models"))
    (calibrate, *_), texts = workflow.nodes(CALIBRATE), {}
    for kind, output in ((PLAN, 1), (COMPARE, 0)):  # their texts whole, also where ComfyUI has their results from before
        texts[kind] = f"text of {kind}"
        source = [workflow.nodes(kind)[0], output]
        workflow.graph[texts[kind]] = {"class_type": "PreviewAny", "inputs": {"source": source}, "_meta": {"title": "Text"}}
    said: set[str] = set()

    def on_text(node: str, text: str) -> None:
        if node == calibrate and not said:
            said.add(text)
            say(text.splitlines()[0])

    result = follow(client, workflow.graph, progress, "The fit", WEIGHTS, on_text)
    shown = {kind: "\n".join(result.outputs.get(node, {}).get("text", [])) for kind, node in texts.items()}
    return FittedThere(shown[PLAN], shown[COMPARE], request.save_as)


def filled(request: FitRequest, model_files: Sequence[str]) -> Workflow:
    """The workflow with the request's values; `model_files` are those the server has.

    Raises `UserError` where the model is none of them, or the workflow lacks an input that the request needs.
    """
    workflow = Workflow("fit_flux_tiny" if request.model == TINY else "fit_flux")
    recorded, measured = split_prompts(request.prompts)
    number = min(ENOUGH, len(recorded)) if request.count is None else request.count
    model = TINY
    if request.model != TINY:
        model = model_file(request.model, model_files)
        if request.save_as == model:
            raise UserError(f"{model} is the dense model, which is read: give the smaller one another name with -o.")
        workflow.fill({"unet_name": model})
    what, stem = request.what, PurePosixPath(model.replace("\\", "/")).stem
    name = request.recording or f"{stem}_recording"
    asked = {"name": name, "own_prompts": "\n".join(recorded[:number]), "number": number, "first_seed": request.seed}
    workflow.fill(asked, CALIBRATE)
    ((budget, amount),) = ((words, value) for name, words in AMOUNTS.items() if (value := getattr(what, name)) is not None)
    options = {option: getattr(what, option) for option in ("touch", "precision", "protect")}
    plan = f"{PurePosixPath(request.save_as).stem}.plan.safetensors"
    workflow.fill({"budget": budget, "amount": amount, "save_as": plan, **options}, PLAN)
    workflow.fill({"save_as": request.save_as}, SAVE)
    workflow.fill({"text": measured[0], "steps": request.steps})
    return workflow


@contextmanager
def fit_server(running: str | None, comfyui: Path | None) -> Iterator[str]:
    """Address (host:port) of the server that runs, or of one that is started for the length of the `with` from the folder
    `comfyui`, whose own folders it reads and writes.

    Raises `UserError` where both are given, or it does not come up.
    """
    if comfyui is None:
        yield running or DEFAULT_SERVER
        return
    if running is not None:
        raise UserError("Give either --server (a ComfyUI that runs) or --comfyui (the folder of one to start), not both.")
    with (
        tempfile.TemporaryDirectory(prefix="flux_poke_fit_") as folder,
        ComfyServer(comfyui, start_options(), log=Path(folder) / "comfyui.log") as server,
    ):
        yield server.address
