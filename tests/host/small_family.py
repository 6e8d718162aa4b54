"""Small models of random weights in the shapes of every FLUX, and the graphs that draw with each, for test_family.py.

ComfyUI reads hidden size, depth, text and vector widths and channels from a file, so these load in its own loader; what it
hard-codes (head dim, neurons per channel) is as in the real ones. The two widths of Chroma that it hard-codes are read from the
file by `small_family_nodes.py`, which stands in the server's custom_nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from flux_poke.flux.layout import Layout
from flux_poke.flux.model import Flux
from safetensors.torch import save_file
from torch import Tensor

#: Width of the tiny FLUX's texts and pooled texts, which stand in for those of large text encoders.
TEXT = 64
#: Of the pictures, in pixels: 64 tokens.
SIDE = 128
#: Width inside of Chroma's layer that makes all modulations (5,120 in the real one).
INSIDE = 64

Graph = dict[str, dict]


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


@dataclass(frozen=True)
class Drawn:
    """Nodes that come before a sampler, and where what it reads comes out of them."""

    nodes: Graph
    positive: list
    latent: list


@dataclass(frozen=True)
class Member:
    """A FLUX: its layout, how conditioning is made for it, and which of its tokens are of text and image.

    `image_tokens`, `words` are those that count of one image and call; `cfg` above 1 doubles them.
    """

    name: str
    layout: Layout
    condition: Callable[[Drawn], Drawn] = lambda drawn: drawn
    image_tokens: int = 64
    words: int = 48
    cfg: float = 1.0

    @property
    def id(self) -> str:
        return "".join(letter if letter.isalnum() else "_" for letter in self.name).lower()

    @property
    def flux2(self) -> bool:
        return self.layout.family == "flux2"

    def save(self, path: Path) -> None:
        """Random weights, of the size that keeps what goes through the blocks from growing.

        The second half of each MLP's neurons is near the first, so that what is cut can be made up for.
        """
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        tensors = {key: _random(key, shape, generator) for key, shape in self._shapes().items()}
        for site in self.layout.sites:
            up = tensors[f"{site.up}.weight"][site.up_row :]
            for neurons in up.chunk(2) if site.gated else [up]:
                first, second = neurons.chunk(2)
                second.copy_(first + 0.1 * second)
        save_file(tensors, path)

    def _shapes(self) -> dict[str, torch.Size]:
        layout = self.layout
        like = Layout.of("flux1", layout.hidden, layout.depth, layout.depth_single, context=TEXT)
        with torch.device("meta"):
            shapes = {
                key: tensor.shape for key, tensor in Flux(like if layout.family == "chroma" else layout).state_dict().items()
            }
        if layout.family != "chroma":
            return shapes
        own = ("time_in.", "vector_in.", "guidance_in.")
        shapes = {key: shape for key, shape in shapes.items() if not key.startswith(own) and "mod" not in key}
        layer, inside = "distilled_guidance_layer", torch.Size([INSIDE])
        for name, out, into in (("in_proj", INSIDE, 64), ("out_proj", layout.hidden, INSIDE)):
            shapes |= {f"{layer}.{name}.weight": torch.Size([out, into]), f"{layer}.{name}.bias": torch.Size([out])}
        for number in range(5):
            shapes[f"{layer}.norms.{number}.scale"] = inside
            for name in ("in_layer", "out_layer"):
                shapes[f"{layer}.layers.{number}.{name}.weight"] = torch.Size([INSIDE, INSIDE])
                shapes[f"{layer}.layers.{number}.{name}.bias"] = inside
        return shapes

    def before(self, batch: int, side: int = SIDE) -> Drawn:
        """What is drawn with: text of the tiny FLUX's encoder, an empty latent, and what this FLUX is told besides."""
        empty = "EmptyFlux2LatentImage" if self.flux2 else "EmptySD3LatentImage"
        nodes = {
            "tiny": node("FluxPokeLoadTinyFlux"),
            "vae": node("RandomFlux2Autoencoder") if self.flux2 else node("FluxPokeLoadTinyFlux"),
            "8 words": node("CLIPTextEncode", clip=["tiny", 1], text="a picture of the number three in white"),
            "16 words": node("ConditioningConcat", conditioning_to=["8 words", 0], conditioning_from=["8 words", 0]),
            "32 words": node("ConditioningConcat", conditioning_to=["16 words", 0], conditioning_from=["16 words", 0]),
            "text": node("ConditioningConcat", conditioning_to=["32 words", 0], conditioning_from=["16 words", 0]),
            "picture": node("EmptyImage", width=side, height=side, batch_size=1, color=0x3060C0),
            "latent": node(empty, width=side, height=side, batch_size=batch),
        }
        return self.condition(Drawn(nodes, ["text", 0], ["latent", 0]))

    @property
    def vae(self) -> list:
        return ["vae", 0 if self.flux2 else 2]

    def sampled(self, name: str, model: list, drawn: Drawn, seed: int, steps: int) -> Graph:
        """Nodes that draw with `model`, by this FLUX's own sampling; latents come out of the node `name`."""
        if not self.flux2:
            return {
                name: node(
                    "KSampler", model=model, positive=drawn.positive, negative=["text", 0], latent_image=drawn.latent,
                    seed=seed, steps=steps, cfg=self.cfg, sampler_name="euler", scheduler="simple", denoise=1.0,
                )
            }  # fmt: skip
        return {
            f"{name}-noise": node("RandomNoise", noise_seed=seed),
            f"{name}-guider": node("BasicGuider", model=model, conditioning=drawn.positive),
            f"{name}-sampler": node("KSamplerSelect", sampler_name="euler"),
            f"{name}-sigmas": node("Flux2Scheduler", steps=steps, width=SIDE, height=SIDE),
            name: node(
                "SamplerCustomAdvanced", noise=[f"{name}-noise", 0], guider=[f"{name}-guider", 0],
                sampler=[f"{name}-sampler", 0], sigmas=[f"{name}-sigmas", 0], latent_image=drawn.latent,
            ),
        }  # fmt: skip


def _random(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if key.endswith("scale"):
        return torch.ones(shape)
    size = 0.02 if len(shape) == 1 else shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * size


def _guided(guidance: float) -> Callable[[Drawn], Drawn]:
    def condition(drawn: Drawn) -> Drawn:
        nodes = {**drawn.nodes, "guidance": node("FluxGuidance", conditioning=drawn.positive, guidance=guidance)}
        return Drawn(nodes, ["guidance", 0], drawn.latent)

    return condition


def _referring(*others: Callable[[Drawn], Drawn], pictures: int = 1) -> Callable[[Drawn], Drawn]:
    """Edits of a reference picture."""

    def condition(drawn: Drawn) -> Drawn:
        nodes, positive = dict(drawn.nodes), drawn.positive
        vae = ["vae", 2 if nodes["vae"]["class_type"] == "FluxPokeLoadTinyFlux" else 0]
        nodes["reference"] = node("VAEEncode", pixels=["picture", 0], vae=vae)
        for number in range(pictures):
            nodes[f"refer-{number}"] = node("ReferenceLatent", conditioning=positive, latent=["reference", 0])
            positive = [f"refer-{number}", 0]
        found = Drawn(nodes, positive, drawn.latent)
        for other in others:
            found = other(found)
        return found

    return condition


def _concatenating(kind: str, **inputs) -> Callable[[Drawn], Drawn]:
    """A picture, and perhaps a mask, on further channels."""

    def condition(drawn: Drawn) -> Drawn:
        batch = drawn.nodes["latent"]["inputs"]["batch_size"]
        side = drawn.nodes["latent"]["inputs"]["width"]
        found = _guided(30.0)(drawn)
        more = {
            "mask": node("SolidMask", value=1.0, width=side, height=side),
            "concat": node(
                kind, positive=found.positive, negative=["text", 0], vae=["vae", 2], pixels=["picture", 0], **inputs
            ),
            "batch": node("RepeatLatentBatch", samples=["concat", 2], amount=batch),
        }
        return Drawn({**found.nodes, **more}, ["concat", 0], ["batch", 0])

    return condition


def _styled(drawn: Drawn) -> Drawn:
    """A picture's tokens after those of the text, by a style model (Redux)."""
    more = {
        "style": node("RandomStyleModel", width=TEXT, tokens=9),
        "styled": node(
            "StyleModelApply", conditioning=drawn.positive, style_model=["style", 0], clip_vision_output=["style", 1],
            strength=1.0, strength_type="multiply",
        ),
    }  # fmt: skip
    return _guided(3.5)(Drawn({**drawn.nodes, **more}, ["styled", 0], drawn.latent))


def _flux1(guidance: bool = True, channels: int = 64) -> Layout:
    return Layout.of("flux1", 128, 1, 2, context=TEXT, vector=TEXT, guidance=guidance, channels=channels)


def _fill(channels: int) -> Layout:
    return replace(_flux1(channels=channels), out_channels=64)


def _flux2(hidden: int, single: int, guidance: bool = False) -> Layout:
    return Layout.of("flux2", hidden, 1, single, context=TEXT, guidance=guidance)


MEMBERS = (
    Member("FLUX.1 dev", _flux1(), _guided(3.5)),
    Member("FLUX.1 schnell", _flux1(guidance=False)),
    Member("FLUX.1 Kontext", _flux1(), _referring(_guided(2.5))),
    Member("FLUX.1 Fill", _fill(384), _concatenating("InpaintModelConditioning", mask=["mask", 0], noise_mask=False)),
    Member("FLUX.1 Depth, Canny", _fill(128), _concatenating("InstructPixToPixConditioning")),
    Member("FLUX.1 Redux", _flux1(), _styled, words=57),
    Member("Chroma", Layout.of("chroma", 128, 1, 2, context=TEXT), cfg=2.0),
    Member("FLUX.2 klein 4B", _flux2(128, 2)),
    Member("FLUX.2 klein 4B, editing", _flux2(128, 2), _referring(pictures=2)),
    Member("FLUX.2 klein 9B", _flux2(256, 1)),
    Member("FLUX.2 dev", _flux2(128, 2, guidance=True), _guided(4.0)),
)
