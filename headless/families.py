"""Graphs that draw with a FLUX on ComfyUI, by family: which nodes, text encoders and autoencoder each wants.

    setup = Setup.find(client, "flux1-dev", clip=[], vae=None)
    graph = setup.graph("a fox", seed=7, request)
    graph["sample"], graph["decode"]                 # SamplerCustomAdvanced, VAEDecode

Node names are words, so that what is put between them (Tap Blocks) can be.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from ..draw import Asked, DrawRequest, Shift
from ..errors import UserError
from ..flux.sampling import SHIFTS
from ..pruning.dense import PRUNED_FORMAT
from .client import ComfyClient
from .workflow import TINY, Graph, model_file

Kind = Literal["tiny", "flux1", "flux2", "chroma"]
#: What ComfyUI calls the samplers that are nearest to ours.
SAMPLERS = {"euler": "euler", "heun": "heun", "dpmpp_2m": "dpmpp_2m", "stochastic": "euler_ancestral"}
PRUNED = "FluxPokeLoadPrunedCheckpoint"


@dataclass(frozen=True)
class Usual:
    """How a model is drawn with by default. `clips` are beginnings of the names of text encoders' files, for `type` of the
    node that loads them; `distilled`: guidance is told to the model, else it is classifier-free."""

    clips: tuple[str, ...]
    type: str
    vae: str
    steps: int
    guidance: float
    shift: Shift
    distilled: bool = False
    references: bool = False
    size: int = 1024


T5, KLEIN_4B, KLEIN_9B = "t5xxl", "qwen_3_4b", "qwen_3_8b"
#: By a pattern in the file's name, the first that is found.
USUAL: tuple[tuple[str, Kind, Usual], ...] = (
    (r"klein.*9b", "flux2", Usual((KLEIN_9B,), "flux2", "flux2", 4, 1.0, "flux2", references=True)),
    (r"klein", "flux2", Usual((KLEIN_4B,), "flux2", "flux2", 4, 1.0, "flux2", references=True)),
    (r"flux\.?-?_?2", "flux2", Usual(("mistral",), "flux2", "flux2", 20, 4.0, "flux2", distilled=True, references=True)),
    (r"chroma", "chroma", Usual((T5,), "chroma", "ae", 26, 4.0, 1.0)),
    (r"schnell", "flux1", Usual(("clip_l", T5), "flux", "ae", 4, 0.0, 1.0, distilled=True)),
    (r"kontext", "flux1", Usual(("clip_l", T5), "flux", "ae", 20, 2.5, "dynamic", distilled=True, references=True)),
    (r"", "flux1", Usual(("clip_l", T5), "flux", "ae", 20, 3.5, "dynamic", distilled=True)),
)
TINY_USUAL = Usual((), "", "", 20, 1.0, 1.0, size=64)


@dataclass(frozen=True)
class Setup:
    """A model on a server and what belongs to it: names of files as ComfyUI lists them."""

    kind: Kind
    usual: Usual
    model: str
    loader: str = "UNETLoader"
    clips: tuple[str, ...] = ()
    vae: str = ""

    @classmethod
    def find(cls, client: ComfyClient, model: str, clip: Sequence[str] = (), vae: str | None = None) -> Setup:
        """By the lists of the server. `model` is as `model_file` takes it, or "tiny"; `clip` and `vae` take the place of the
        files that would be found.

        Raises `UserError` where the model, or a file that it wants, is not there.
        """
        if model == TINY:
            if clip or vae:
                raise UserError("The tiny FLUX brings its own text encoder and autoencoder: leave --clip and --vae out.")
            return cls("tiny", TINY_USUAL, TINY)
        file = model_file(model, client.models("diffusion_models"))
        name = PurePosixPath(file.replace("\\", "/")).name.lower()
        kind, usual = next((kind, usual) for pattern, kind, usual in USUAL if re.search(pattern, name))
        if clip and len(clip) != len(usual.clips):
            wanted = " and ".join(usual.clips)
            raise UserError(f"{file} takes {len(usual.clips)} text encoders ({wanted}), found {len(clip)} after --clip.")
        encoders, autoencoders = client.models("text_encoders"), client.models("vae")
        usual_files: list[str | None] = [None] * len(usual.clips)
        found = tuple(
            _file(wanted, encoders, given, "text_encoders", "--clip")
            for wanted, given in zip(usual.clips, clip or usual_files, strict=True)
        )
        pruned = client.metadata("diffusion_models", file).get("format") == PRUNED_FORMAT
        loader = PRUNED if pruned else "UNETLoader"
        return cls(kind, usual, file, loader, found, _file(usual.vae, autoencoders, vae, "vae", "--vae"))

    def graph(self, asked: Asked, request: DrawRequest, references: Sequence[str] = ()) -> Graph:
        """Draws one picture; `references` are names in ComfyUI's input folder.

        Raises `UserError` where the model takes none and some are given, or a negative prompt would do nothing.
        """
        usual = self.usual
        if references and not usual.references:
            raise UserError(f"{self.model} takes no reference pictures: leave --input-image out, or use FLUX.2 or Kontext.")
        guidance = usual.guidance if request.guidance is None else request.guidance
        against = guidance != 1 and not usual.distilled
        if request.negative and not against:
            why = "its guidance is distilled" if usual.distilled else "--guidance is 1"
            raise UserError(f"A negative prompt does nothing to {self.model}, since {why}: leave --negative out.")
        width, height = (usual.size if size is None else size for size in (request.width, request.height))
        empty = "EmptyFlux2LatentImage" if self.kind == "flux2" else "EmptySD3LatentImage"
        graph: Graph = {
            **self._loaders(),
            "prompt": node("CLIPTextEncode", clip=self._clip, text=asked.prompt),
            "latent": node(empty, width=width, height=height, batch_size=1),
            "noise": node("RandomNoise", noise_seed=asked.seed),
            "sampler": node("KSamplerSelect", sampler_name=SAMPLERS[request.integrator]),
            "sigmas": _timer(request.steps or usual.steps, request.shift or usual.shift, width, height),
        }
        positive = ["prompt", 0]
        if usual.distilled:
            graph["guidance"] = node("FluxGuidance", conditioning=positive, guidance=guidance)
            positive = ["guidance", 0]
        negative = ["negative", 0]
        if against:
            graph["negative"] = node("CLIPTextEncode", clip=self._clip, text=request.negative)
        for number, name in enumerate(references):
            image, scaled, encoded = (f"{part} {number}" for part in ("picture", "scaled", "encoded"))
            graph[image] = node("LoadImage", image=name)
            graph[scaled] = node(
                "ImageScale", image=[image, 0], upscale_method="lanczos", width=width, height=height, crop="center"
            )
            graph[encoded] = node("VAEEncode", pixels=[scaled, 0], vae=self.decoder)
            graph[f"reference {number}"] = node("ReferenceLatent", conditioning=positive, latent=[encoded, 0])
            positive = [f"reference {number}", 0]
            if against:
                graph[f"negative reference {number}"] = node("ReferenceLatent", conditioning=negative, latent=[encoded, 0])
                negative = [f"negative reference {number}", 0]
        if against:
            graph["guider"] = node("CFGGuider", model=["model", 0], positive=positive, negative=negative, cfg=guidance)
        else:
            graph["guider"] = node("BasicGuider", model=["model", 0], conditioning=positive)
        inputs = {name: [name, 0] for name in ("noise", "guider", "sampler", "sigmas")}
        graph["sample"] = node("SamplerCustomAdvanced", **inputs, latent_image=["latent", 0])
        graph["decode"] = node("VAEDecode", samples=["sample", 0], vae=self.decoder)
        return graph

    def _loaders(self) -> Graph:
        if self.kind == "tiny":
            return {"model": node("FluxPokeLoadTinyFlux")}
        names = {f"clip_name{number}": name for number, name in enumerate(self.clips, start=1)}
        if len(self.clips) == 1:
            clip = node("CLIPLoader", clip_name=self.clips[0], type=self.usual.type)
        else:
            clip = node("DualCLIPLoader", **names, type=self.usual.type)
        return {
            "model": node(self.loader, unet_name=self.model, weight_dtype="default"),
            "clip": clip,
            "vae": node("VAELoader", vae_name=self.vae),
        }

    @property
    def _clip(self) -> list[Any]:
        return ["model", 1] if self.kind == "tiny" else ["clip", 0]

    @property
    def decoder(self) -> list[Any]:
        """Where the VAE comes from, as a link."""
        return ["model", 2] if self.kind == "tiny" else ["vae", 0]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node in API form."""
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def _timer(steps: int, shift: Shift, width: int, height: int) -> dict[str, Any]:
    static = 1.0 if isinstance(shift, str) else shift
    (words,) = (words for words, bent in SHIFTS.items() if bent == (shift if isinstance(shift, str) else None))
    return node("FluxPokeFluxTimer", steps=steps, shift=words, static_shift=static, denoise=1.0, width=width, height=height)


def _file(wanted: str, there: Sequence[str], given: str | None, folder: str, option: str) -> str:
    """The file called `given`, or else the shortest whose name begins with `wanted`."""
    if given is not None:
        if given not in there:
            raise UserError(f"ComfyUI has no {given} in models/{folder}: found {', '.join(there) or 'none'}.")
        return given
    for name in sorted(there, key=lambda name: (len(name), name)):
        if PurePosixPath(name.replace("\\", "/")).name.lower().startswith(wanted):
            return name
    raise UserError(
        f"ComfyUI has no file called {wanted}* in models/{folder}, which this model wants: put it there, or name another with "
        f"{option}. Found {', '.join(there) or 'none'}."
    )
