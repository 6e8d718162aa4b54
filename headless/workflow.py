"""Graphs of `workflows/api`: filled in by the names of inputs, wherever they stand, queued and followed.

    workflow = Workflow("fit_flux")
    workflow.fill({"unet_name": "flux1-dev.safetensors", "steps": 20})
    result = follow(client, workflow.graph, progress, "The fit")

So these graphs may be changed, as long as they keep what is filled in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..progress import Progress, silent
from .client import ComfyClient, Interrupted, Result

Graph = dict[str, dict[str, Any]]

WORKFLOWS = Path(__file__).parents[1] / "workflows" / "api"
#: Names of models to what their files are called; any other name is a file's. The tiny FLUX comes with the pack.
FILES = {"flux-schnell": "flux1-schnell", "flux-dev": "flux1-dev", "flux-dev-krea": "flux1-krea-dev"}
TINY = "tiny"


class Workflow:
    """One of `WORKFLOWS`, by its file's name without the ending; `graph` is a copy to be filled."""

    def __init__(self, name: str):
        self.path = WORKFLOWS / f"{name}.json"
        self.graph: Graph = json.loads(self.path.read_text(encoding="utf-8"))

    def nodes(self, kind: str) -> list[str]:
        """Of one class; raises `UserError` where there are none."""
        found = [node for node, of in self.graph.items() if of["class_type"] == kind]
        if not found:
            raise UserError(f"{self.path} has no node {kind}, which is to be filled in: restore the file.")
        return found

    def fill(self, values: Mapping[str, Any], kind: str | None = None, needed: bool = True) -> None:
        """Puts values in place of those of the inputs of these names, of nodes of class `kind` or of all; None leaves them.

        Raises `UserError` where there is none of a name, unless it is not `needed`. Inputs that are linked stay so.
        """
        nodes = [self.graph[node]["inputs"] for node in (self.graph if kind is None else self.nodes(kind))]
        for name, value in values.items():
            places = [inputs for inputs in nodes if name in inputs and not isinstance(inputs[name], list)]
            if value is not None and not places and needed:
                raise UserError(f"{self.path} has no input called {name} to fill in: restore the file, or name an input so.")
            for inputs in places:
                inputs[name] = inputs[name] if value is None else value


def follow(
    client: ComfyClient,
    graph: Graph,
    progress: Progress = silent,
    what: str = "The run",
    weights: Mapping[str, float] | None = None,
    on_text: Callable[[str, str], None] | None = None,
    extra: Mapping[str, Any] | None = None,
    prompt_id: str | None = None,
) -> Result:
    """Queues a graph and tells how far it is until it has ended; `weights` says, by class, how long a node takes beside others,
    `on_text` is told of texts on nodes, `extra` goes with the graph, and `prompt_id` is a UUID to call the run by.

    Raises `UserError` where it fails, or is stopped there. Where `progress` raises (it is called every second at least),
    the run is stopped on the server, or taken out of its queue.
    """
    weight = {node: (weights or {}).get(of["class_type"], 1.0) for node, of in graph.items()}
    started: dict[str, float] = {}
    state = ("waiting for its turn", 0.0)

    def on_progress(node: str, value: float, total: float) -> None:
        nonlocal state
        if node:
            started[node] = weight.get(node, 0.0)
            left = started[node] * (1 - value / total if total else 1.0)
            title = graph[node].get("_meta", {}).get("title") or graph[node]["class_type"] if node in graph else "running"
            done = (sum(started.values()) - left) / sum(weight.values())
            state = f"{title}: {value}/{total}" if total else title, done
        progress(*state, 1)

    prompt_id = client.queue(graph, extra, prompt_id)
    try:
        return client.wait(prompt_id, on_progress, on_text)
    except Interrupted as error:
        raise UserError(f"{what} was stopped in ComfyUI.") from error
    except UserError:
        raise
    except BaseException:
        with suppress(UserError):  # one that was started here may have heard Ctrl-C itself
            client.cancel(prompt_id)
        raise


def model_file(model: str, there: Sequence[str]) -> str:
    """The file that holds `model`: the one called so, or the shortest name that begins so (flux1-dev-fp8 for flux1-dev)."""
    name = FILES.get(model, model)
    for found in sorted(there, key=len):
        if found == name or Path(found.replace("\\", "/")).name.startswith(name):
            return found
    raise UserError(
        f"ComfyUI has no model {model!r}: expected a file called {name}*.safetensors in models/diffusion_models, found "
        f"{', '.join(there) or 'none'}."
    )
