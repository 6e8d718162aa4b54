"""What a neuron writes: its column of the down projection, through the final layer, as a picture.

    writer = Writer.of(checkpoint, checkpoint.layout)              # canonical keys; None for Chroma
    latents = writer.latents(site, weights.down, strengths)        # [width, channels, height, width]
    pictures = written_pictures(writer, autoencoder.decode, atlas, [("double-img-3", 1207)])

A linear look, by the weights alone. The column, gated as its block gates it, is added to every token of an empty field of 2 by
2 tokens; the final layer makes a change of the velocity of it, and what is taken from the velocity is added to the picture.
What later blocks do with it is left out (or is what a tuned lens says). Scale and gate are those of noise level .5 without
pooled text. Each writes with the sign of its strongest place, and all at one size, that of ordinary latents: how much that is
beside the rest of a token is not told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..flux.autoencoder import to_picture
from ..flux.blocks import Block
from ..flux.layout import Layout, Site
from ..flux.model import Flux, timestep_embedding
from ..flux.weights import SiteWeights, full_precision
from ..recording.atlas import Atlas
from .decoding import Decode
from .lens import Lens

#: Tokens along a field, noise level and, where a model takes it, distilled guidance that neurons are looked at with.
FIELD, SIGMA, GUIDANCE = 2, 0.5, 3.5
#: Fields that are decoded at once.
TOGETHER = 16


class Writer:
    """What neurons of a FLUX.1 or FLUX.2 write; `tensors` have canonical keys, and are read when they are needed."""

    def __init__(self, tensors: Mapping[str, Tensor], layout: Layout, lens: Lens | None = None):
        self.tensors, self.layout, self.lens = tensors, layout, lens
        with torch.device("meta"):
            self._model = Flux(layout)
        self._vec = self._vector()
        final = self._read("final_layer")
        self._scale = 1 + final.adaLN_modulation(self._vec).chunk(2, dim=-1)[1]
        self._out = final.linear.weight

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layout: Layout, lens: Lens | None = None) -> Writer | None:
        """None where the final layer is not read alone, as in Chroma; raises `UserError` where the lens is of another model."""
        if lens is not None:
            lens.check_fits(layout)
        return None if layout.family == "chroma" else cls(tensors, layout, lens)

    @torch.no_grad()
    def latents(self, site: Site, down: Tensor, strengths: Tensor) -> Tensor | None:
        """Of columns `down` [hidden, n], by the sign of `strengths` [n]: [n, channels, 2 patches, 2 patches].

        None in the text's own MLPs: the final layer does not read text.
        """
        if site.stream == "txt":
            return None
        added = (down * strengths.sign()).T.to(self._out) * self._gate(site)
        block = Block("single" if site.stream == "single" else "double", site.index)
        if self.lens is not None and block in self.lens.weights:
            added = F.linear(added, self.lens.weights[block].to(added))
        added = added - added.mean(1, keepdim=True)  # as its layer norm does
        drawn = F.linear(-added * self._scale, self._out)
        drawn = drawn / drawn.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(drawn.dtype).tiny)
        patch = self.layout.patch
        return drawn.unflatten(1, (-1, patch, patch)).repeat(1, 1, FIELD, FIELD)

    def _vector(self) -> Tensor:
        vec = self._read("time_in")(timestep_embedding(torch.tensor([SIGMA]), 256))
        if self.layout.guidance:
            vec = vec + self._read("guidance_in")(timestep_embedding(torch.tensor([GUIDANCE]), 256))
        if self.layout.vector:
            vec = vec + self._read("vector_in")(torch.zeros(1, self.layout.vector))
        return vec

    def _gate(self, site: Site) -> Tensor:
        """What the site's block multiplies its MLP's output by [1, hidden]."""
        single = site.stream == "single"
        shared = "single_stream_modulation" if single else f"double_stream_modulation_{site.stream}"
        path = shared if self.layout.family == "flux2" else site.modulation.removesuffix(".lin")
        return self._read(path)(self._vec)[-1].gate[:, 0]

    @torch.no_grad()
    def _read(self, path: str) -> Any:
        module = self._model.get_submodule(path)
        weights = {key: full_precision(self.tensors, f"{path}.{key}") for key in module.state_dict()}
        module.load_state_dict(weights, assign=True)
        return module.requires_grad_(False)


def decoded(latents: Tensor, decode: Decode) -> Iterator[Tensor]:
    """Pictures [3, height, width] in 0..1, on the CPU."""
    for some in latents.split(TOGETHER):
        yield from decode(some).cpu()


def written_pictures(
    writer: Writer, decode: Decode, atlas: Atlas, neurons: Sequence[tuple[str, int]]
) -> list[Image.Image | None]:
    """What each of `neurons` writes; None for those of the text's own MLPs."""
    found: list[Image.Image | None] = [None] * len(neurons)
    for name in dict.fromkeys(name for name, _ in neurons):
        places = [place for place, (other, _) in enumerate(neurons) if other == name]
        chosen, site = torch.tensor([neurons[place][1] for place in places]), writer.layout.site(name)
        down = SiteWeights.read(writer.tensors, site, up=False).down[:, chosen]
        latents = writer.latents(site, down, atlas.sites[name].value[chosen, 0])
        for place, picture in zip(places, [] if latents is None else decoded(latents, decode), strict=latents is not None):
            found[place] = to_picture(picture)
    return found
