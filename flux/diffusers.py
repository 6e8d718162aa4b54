"""How the diffusers package names a FLUX's tensors, and what of a FLUX it has a place for.

    pieces("flux1", "double_blocks.3.img_attn.qkv.weight")
        # ("transformer_blocks.3.attn.to_q.weight", "transformer_blocks.3.attn.to_k.weight", "....to_v.weight")
    whole("flux1", "transformer_blocks.3.attn.to_k.weight")      # ("double_blocks.3.img_attn.qkv.weight", 1)

Names are those of `FluxTransformer2DModel` and `Flux2Transformer2DModel` (diffusers, models/transformers). One tensor of a
checkpoint is one there, or several that stand below each other in it. `SWAPPED` alone has its two halves in the other order:
diffusers gives the scale of the final layer before its shift.
"""

from __future__ import annotations

import re
from functools import cache

from .layout import Family

#: Modules whose tensors' first and second half change places.
SWAPPED = "final_layer.adaLN_modulation.1"
#: The class of a family; of Chroma, diffusers names the blocks as FLUX.1's and all else in another way.
CLASSES: dict[Family, str] = {"flux1": "FluxTransformer2DModel", "flux2": "Flux2Transformer2DModel"}

_ATTENTION = {
    "double_blocks.{}.img_attn.qkv": (
        "transformer_blocks.{}.attn.to_q", "transformer_blocks.{}.attn.to_k", "transformer_blocks.{}.attn.to_v",
    ),
    "double_blocks.{}.txt_attn.qkv": (
        "transformer_blocks.{}.attn.add_q_proj", "transformer_blocks.{}.attn.add_k_proj",
        "transformer_blocks.{}.attn.add_v_proj",
    ),
    "double_blocks.{}.img_attn.norm.query_norm": ("transformer_blocks.{}.attn.norm_q",),
    "double_blocks.{}.img_attn.norm.key_norm": ("transformer_blocks.{}.attn.norm_k",),
    "double_blocks.{}.txt_attn.norm.query_norm": ("transformer_blocks.{}.attn.norm_added_q",),
    "double_blocks.{}.txt_attn.norm.key_norm": ("transformer_blocks.{}.attn.norm_added_k",),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "single_blocks.{}.norm.query_norm": ("single_transformer_blocks.{}.attn.norm_q",),
    "single_blocks.{}.norm.key_norm": ("single_transformer_blocks.{}.attn.norm_k",),
}  # fmt: skip
_ENDS = {
    "img_in": ("x_embedder",), "txt_in": ("context_embedder",), "final_layer.linear": ("proj_out",),
    SWAPPED: ("norm_out.linear",),
}  # fmt: skip


def _embedder(own: str, theirs: str) -> dict[str, tuple[str, ...]]:
    return {f"{own}.in_layer": (f"{theirs}.linear_1",), f"{own}.out_layer": (f"{theirs}.linear_2",)}


#: By family, the module of a checkpoint, {} for its block, and what it is there, from the first row to the last.
_MODULES: dict[Family, dict[str, tuple[str, ...]]] = {
    "flux1": {
        **_ENDS,
        **_embedder("time_in", "time_text_embed.timestep_embedder"),
        **_embedder("vector_in", "time_text_embed.text_embedder"),
        **_embedder("guidance_in", "time_text_embed.guidance_embedder"),
        **_ATTENTION,
        "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
        "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
        "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
        "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
        "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
        "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
        "single_blocks.{}.linear1": (
            "single_transformer_blocks.{}.attn.to_q", "single_transformer_blocks.{}.attn.to_k",
            "single_transformer_blocks.{}.attn.to_v", "single_transformer_blocks.{}.proj_mlp",
        ),
        "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
        "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
    },
    "flux2": {
        **_ENDS,
        **_embedder("time_in", "time_guidance_embed.timestep_embedder"),
        **_embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
        **_ATTENTION,
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
        "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.linear_in",),
        "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.linear_out",),
        "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.linear_in",),
        "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.linear_out",),
        "single_blocks.{}.linear1": ("single_transformer_blocks.{}.attn.to_qkv_mlp_proj",),
        "single_blocks.{}.linear2": ("single_transformer_blocks.{}.attn.to_out",),
    },
}  # fmt: skip
_MODULES["chroma"] = _MODULES["flux1"]
_BLOCK = re.compile(r"(?<=blocks\.)\d+(?=\.)")


def modules(family: Family, module: str) -> tuple[str, ...]:
    """What diffusers calls a checkpoint's module, from its first row to its last; empty where it has none."""
    pattern, index = _pattern(module)
    return tuple(name.replace("{}", index) for name in _MODULES[family].get(pattern, ()))


def pieces(family: Family, key: str) -> tuple[str, ...]:
    """The tensors that diffusers has for a checkpoint's tensor (canonical key), below each other; empty where it has none."""
    module, _, what = key.rpartition(".")
    return tuple(f"{name}.{'weight' if what == 'scale' else what}" for name in modules(family, module))


def whole(family: Family, key: str) -> tuple[str, int] | None:
    """The checkpoint's tensor (canonical key) that a tensor of diffusers is a piece of, and which one; None where of none."""
    module, _, what = key.rpartition(".")
    pattern, index = _pattern(module)
    found = _wholes(family).get(pattern)
    if found is None or what not in ("weight", "bias"):
        return None
    own = found[0].replace("{}", index)
    return f"{own}.{'scale' if own.endswith('_norm') else what}", found[1]


@cache
def _wholes(family: Family) -> dict[str, tuple[str, int]]:
    return {name: (own, place) for own, names in _MODULES[family].items() for place, name in enumerate(names)}


def _pattern(module: str) -> tuple[str, str]:
    """A module with {} for its block, and the block."""
    found = _BLOCK.search(module)
    return (module, "") if found is None else (module[: found.start()] + "{}" + module[found.end() :], found[0])
