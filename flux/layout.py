"""What a FLUX checkpoint looks like, read from key names and shapes alone.

    layout = read_layout({key: tensor.shape for key, tensor in state_dict.items()})
    layout.family, layout.hidden, layout.depth            # "flux1", 3072, 19
    for site in layout.sites:                             # every MLP of the model
        site.name, site.up, site.down, site.width         # "double-img-3", "double_blocks.3.img_mlp.0", ...

Where an MLP lives in a checkpoint (or in a model with the checkpoint's module names) is known here and
nowhere else. Widths are those of the tensors, so pruned checkpoints are read like dense ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..errors import UserError

Family = Literal["flux1", "flux2", "chroma"]
Stream = Literal["img", "txt", "single"]

#: Channels of each rotary axis, and theta, by family (black-forest-labs/flux and /flux2 `util.py`).
ROTARY: dict[Family, tuple[tuple[int, ...], int]] = {
    "flux1": ((16, 56, 56), 10_000),
    "chroma": ((16, 56, 56), 10_000),
    "flux2": ((32, 32, 32, 32), 2_000),
}
FAMILY_NAMES: dict[Family, str] = {"flux1": "FLUX.1", "flux2": "FLUX.2", "chroma": "Chroma"}

#: An empty tensor of a checkpoint whose rotary axes are not its family's; they are its shape after a first 0, so that a layout
#: is read from shapes alone. ComfyUI knows the family's axes only.
AXES_KEY = "rope_axes"

_ANCHOR = "double_blocks.0.img_attn.qkv.weight"


@dataclass(frozen=True)
class Site:
    """One MLP: `act(x @ up.T) @ down.T`, the part of the two projections that belongs to it.

    `up`, `act` and `down` are module paths. The MLP owns the rows `up_row:` of `up.weight` and the columns
    `down_column:` of `down.weight`: all of them in a double block; in a single block the first rows make
    q, k, v and the first columns read the attention. In a gated MLP, `act` is silu(x1) * x2 with x1, x2 the
    two halves of its input: neuron j owns the rows `up_row + j` (gate) and `up_row + width + j`.
    """

    name: str
    stream: Stream
    index: int
    up: str
    act: str
    down: str
    up_row: int
    down_column: int
    width: int
    gated: bool
    biased: bool

    @classmethod
    def of(cls, stream: Stream, index: int, hidden: int, width: int, gated: bool, biased: bool) -> Site:
        """The MLP of a stream in block `index` of a model of `hidden` channels."""
        if stream == "single":
            block = f"single_blocks.{index}"
            name, paths = f"single-{index}", (f"{block}.linear1", f"{block}.mlp_act", f"{block}.linear2")
            return cls(name, stream, index, *paths, 3 * hidden, hidden, width, gated, biased)
        mlp = f"double_blocks.{index}.{stream}_mlp"
        return cls(f"double-{stream}-{index}", stream, index, f"{mlp}.0", f"{mlp}.1", f"{mlp}.2", 0, 0, width, gated, biased)

    @property
    def block(self) -> str:
        """Module path of the block the MLP stands in."""
        kind = "single_blocks" if self.stream == "single" else "double_blocks"
        return f"{kind}.{self.index}"

    @property
    def modulation(self) -> str:
        """Path of the linear layer that gives this stream of the block its shift, scale and gate, where a block has its own."""
        return f"{self.block}.modulation.lin" if self.stream == "single" else f"{self.block}.{self.stream}_mod.lin"

    @property
    def regressors(self) -> int:
        """How many values the down projection reads: neurons, and in a single block attention. A regression on all of them
        takes at least as many rows."""
        return self.down_column + self.width


@dataclass(frozen=True)
class Layout:
    """Family, widths and MLP sites of one checkpoint; `prefix` is what its keys begin with, `ranks` by site the rank of its
    modulation layer where that is of low rank, `own_axes` its rotary axes where they are not the family's."""

    family: Family
    prefix: str
    hidden: int
    in_channels: int
    out_channels: int
    context: int
    vector: int | None
    guidance: bool
    depth: int
    depth_single: int
    sites: tuple[Site, ...]
    ranks: Mapping[str, int] = field(default_factory=dict)
    own_axes: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        family: Family,
        hidden: int,
        depth: int,
        depth_single: int,
        *,
        context: int = 4096,
        vector: int | None = 768,
        guidance: bool = False,
        ratio: int | None = None,
        channels: int | None = None,
        axes: tuple[int, ...] | None = None,
    ) -> Layout:
        """The layout of a dense model of these sizes.

        Args:
            context, vector: widths of the text and of the pooled text, which FLUX.1 alone has.
            ratio: neurons of an MLP for one of `hidden`; 3 in FLUX.2 and 4 else by default.
            channels: of an image token; 128 in FLUX.2 and 64 else by default.
            axes: channels of each rotary axis, together those of a head; the family's by default.
        """
        gated = family == "flux2"
        width, channels = hidden * (ratio or (3 if gated else 4)), channels or (128 if gated else 64)
        sites = tuple(Site.of(*mlp, hidden, width, gated, biased=not gated) for mlp in _mlps(depth, depth_single))
        return cls(
            family=family, prefix="", hidden=hidden, in_channels=channels, out_channels=channels, context=context,
            vector=vector if family == "flux1" else None, guidance=guidance, depth=depth, depth_single=depth_single,
            sites=sites, own_axes=None if axes == ROTARY[family][0] else axes,
        )  # fmt: skip

    @property
    def axes(self) -> tuple[int, ...]:
        return self.own_axes or ROTARY[self.family][0]

    @property
    def theta(self) -> int:
        return ROTARY[self.family][1]

    @property
    def head_dim(self) -> int:
        return sum(self.axes)

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def patch(self) -> int:
        """Side of the square of latent pixels that makes one image token."""
        return 1 if self.family == "flux2" else 2

    @property
    def modulated(self) -> tuple[Site, ...]:
        """Sites whose block has a modulation layer for their stream alone: all of FLUX.1's, none in FLUX.2 and Chroma."""
        return self.sites if self.family == "flux1" and self.vector else ()

    @property
    def neurons(self) -> int:
        return sum(site.width for site in self.sites)

    def site(self, name: str) -> Site:
        """The site called `name`; raises `UserError` where the model has none."""
        for site in self.sites:
            if site.name == name:
                return site
        raise UserError(
            f"This {FAMILY_NAMES[self.family]} model has no MLP called {name!r}; it has double-img-0 to "
            f"double-txt-{self.depth - 1} and single-0 to single-{self.depth_single - 1}."
        )


def select_sites(
    layout: Layout,
    double: tuple[int, int] | None = None,
    single: tuple[int, int] | None = None,
    streams: Sequence[str] = ("img", "txt", "single"),
) -> tuple[Site, ...]:
    """The sites of `streams` whose block is in the range (first, last) for its kind; None = all blocks.

    Raises `UserError` where a range is outside of the model.
    """
    for kind, chosen, depth in (("double", double, layout.depth), ("single", single, layout.depth_single)):
        if chosen is not None and not 0 <= chosen[0] <= chosen[1] < depth:
            raise UserError(
                f"{kind} layers {chosen[0]} to {chosen[1]} are asked for, but the model's {kind} blocks are 0 to {depth - 1}: "
                "choose a first and a last one among them."
            )

    ranges = {"img": double, "txt": double, "single": single}
    wanted = ((site, ranges[site.stream]) for site in layout.sites if site.stream in streams)
    return tuple(site for site, chosen in wanted if chosen is None or chosen[0] <= site.index <= chosen[1])


def canonical_key(key: str, prefix: str = "") -> str:
    """`key` without `prefix`, and with the names of norms (of q and k, and Chroma's) as in the first releases (`.scale`)."""
    key = key.removeprefix(prefix)
    if key.endswith(("query_norm.weight", "key_norm.weight")) or re.match(r"distilled_guidance_layer\.norms\.\d+\.weight", key):
        key = key.removesuffix("weight") + "scale"
    return key


def read_layout(shapes: Mapping[str, Sequence[int]], source: str = "the state dict") -> Layout:
    """The layout of a checkpoint given as `{key: shape}`.

    Raises `UserError`, naming `source`, where this is not a FLUX.1, FLUX.2 or Chroma transformer.
    """
    prefix = _find_prefix(shapes, source)
    keys = {canonical_key(key, prefix): tuple(shape) for key, shape in shapes.items() if key.startswith(prefix)}

    def shape(key: str) -> tuple[int, ...]:
        if key not in keys:
            raise UserError(f"{source} looks like a FLUX checkpoint but has no {prefix}{key}: the file is incomplete.")
        if len(keys[key]) != 2:
            raise UserError(
                f"{source}: {prefix}{key} has the shape {keys[key]}, expected a matrix. Packed weights look like this: "
                "use a bf16, fp16 or fp8 file."
            )
        return keys[key]

    family: Family = "flux1"
    if "double_stream_modulation_img.lin.weight" in keys:
        family = "flux2"
    elif any(key.startswith("distilled_guidance_layer.") for key in keys):
        family = "chroma"
    if "double_blocks.0.img_mlp.gate_proj.weight" in keys:
        raise UserError(f"{source} has MLPs of three projections (Ovis); FLUX.1, FLUX.2 and Chroma are known here.")

    hidden, context = shape("txt_in.weight")
    depth, depth_single = _count(keys, "double_blocks"), _count(keys, "single_blocks")
    vector = keys.get("vector_in.in_layer.weight")
    sites = []
    for stream, index in _mlps(depth, depth_single):
        site = Site.of(stream, index, hidden, 0, gated=False, biased=False)
        rows = shape(f"{site.up}.weight")[0] - site.up_row
        width = shape(f"{site.down}.weight")[1] - site.down_column
        if rows not in (width, 2 * width):
            raise UserError(
                f"{source}: {site.down}.weight reads {width} neurons but {site.up}.weight makes {rows} values, neither one nor "
                "two for each. Packed 4-bit weights look like this: use a bf16, fp16 or fp8 file."
            )
        sites.append(replace(site, width=width, gated=rows == 2 * width, biased=f"{site.down}.bias" in keys))
    return Layout(
        family=family, prefix=prefix, hidden=hidden, in_channels=shape("img_in.weight")[1],
        out_channels=shape("final_layer.linear.weight")[0], context=context, vector=vector[1] if vector else None,
        guidance="guidance_in.in_layer.weight" in keys, depth=depth, depth_single=depth_single, sites=tuple(sites),
        ranks={site.name: shape(down)[0] for site in sites if (down := f"{site.modulation}.down.weight") in keys},
        own_axes=keys[AXES_KEY][1:] if AXES_KEY in keys else None,
    )  # fmt: skip


def _mlps(depth: int, depth_single: int) -> Iterator[tuple[Stream, int]]:
    """Stream and block of every MLP, as they run."""
    for index in range(depth):
        yield "img", index
        yield "txt", index
    for index in range(depth_single):
        yield "single", index


def _find_prefix(shapes: Mapping[str, object], source: str) -> str:
    for key in shapes:
        if key.endswith(_ANCHOR):
            return key.removesuffix(_ANCHOR)
    if any(key.startswith(("transformer_blocks.", "single_transformer_blocks.")) for key in shapes):
        raise UserError(
            f"{source} is a FLUX in the diffusers layout (transformer_blocks.*); expected the original layout "
            "(double_blocks.*), as ComfyUI's diffusion_models folder holds it. `flux-poke convert` makes one of the other."
        )
    found = ", ".join(sorted(shapes)[:3]) or "nothing"
    raise UserError(
        f"{source} is not a FLUX checkpoint: looked for a key that ends with {_ANCHOR}, found {len(shapes)} others "
        f"({found} ...)."
    )


def _count(keys: Iterable[str], kind: str) -> int:
    return 1 + max((int(match[1]) for key in keys if (match := re.match(rf"{kind}\.(\d{{1,9}})\.", key))), default=-1)
