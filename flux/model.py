"""A FLUX transformer to run, record, cut and train without a host.

    model = Flux.load(tensors)                       # a state dict in the checkpoint's own key names
    velocity = model(x, sigma, context, vector)      # [batch, channels, height, width], as x

FLUX.1 and FLUX.2. Modules are named as the checkpoint names its tensors, and blocks are called as ComfyUI
calls its own (`block(img=, txt=, vec=, pe=)`, `block(x, vec=, pe=)`), so a hook written for one fits the other. Every width is
read from the weights: a pruned checkpoint runs like a dense one.

Follows black-forest-labs/flux and /flux2, `model.py`; its output equals ComfyUI's (tests/host).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import Linear
from torch.nn import functional as F

from ..errors import UserError
from .checkpoint import require_finite, scale_key
from .layout import AXES_KEY, FAMILY_NAMES, Layout, Site, canonical_key, read_layout

#: How far apart FLUX.2's pictures stand on the first rotary axis (black-forest-labs/flux2 `sampling.py`).
REFERENCE_STEP = 10


class Flux(nn.Module):
    """The transformer of `layout`, with weights as torch initialises them; `Flux.load` makes one with given weights."""

    def __init__(self, layout: Layout):
        super().__init__()
        if layout.family == "chroma":
            raise UserError("The reference transformer runs FLUX.1 and FLUX.2; load Chroma in ComfyUI.")
        self.layout = layout
        hidden, bias, shared = layout.hidden, layout.family == "flux1", layout.family == "flux2"
        self.img_in = Linear(layout.in_channels, hidden, bias=bias)
        self.txt_in = Linear(layout.context, hidden, bias=bias)
        self.time_in = MLPEmbedder(256, hidden, bias)
        self.vector_in = MLPEmbedder(layout.vector, hidden, bias) if layout.vector else None
        self.guidance_in = MLPEmbedder(256, hidden, bias) if layout.guidance else None
        if shared:
            self.double_stream_modulation_img = Modulation(hidden, 6, bias=False)
            self.double_stream_modulation_txt = Modulation(hidden, 6, bias=False)
            self.single_stream_modulation = Modulation(hidden, 3, bias=False)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(layout, layout.site(f"double-img-{index}"), layout.site(f"double-txt-{index}"))
            for index in range(layout.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(layout, layout.site(f"single-{index}")) for index in range(layout.depth_single)
        )
        self.final_layer = FinalLayer(hidden, layout.out_channels, bias)
        if layout.own_axes:
            self.register_buffer(AXES_KEY, torch.empty(0, *layout.own_axes))

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, source: str = "the state dict") -> Flux:
        """A model with the given weights (kept in their own precision unless `dtype` is given).

        Raises `UserError` where the tensors are not those of a FLUX.1 or FLUX.2 transformer, hold numbers that are not finite,
        or stand for others: without their scales, quantised weights run as noise.
        """
        layout = read_layout({key: tensor.shape for key, tensor in tensors.items()}, source)
        with torch.device("meta"):
            model = cls(layout)
        weights = {
            canonical_key(key, layout.prefix): tensor.to(dtype) if dtype else tensor
            for key, tensor in tensors.items()
            if key.startswith(layout.prefix)
        }
        missing = sorted(model.state_dict().keys() - weights.keys())
        if missing:
            raise UserError(
                f"{source} lacks {len(missing)} tensors of a {FAMILY_NAMES[layout.family]} model, first {missing[0]}."
            )
        for key in model.state_dict():
            if scale_key(weights, key) or f"{key.removesuffix('.weight')}.comfy_quant" in weights:
                raise UserError(
                    f"{source} has {key} quantised, with a scale beside it; expected plain numbers. Undo the scales "
                    "(`flux.weights.Plain`), or use a bf16 or fp16 file."
                )
            require_finite(weights[key], f"{source}: {key}")
        try:
            model.load_state_dict(weights, strict=False, assign=True)
        except RuntimeError as error:
            raise UserError(
                f"{source} has tensors of other shapes than its width asks for ({' '.join(str(error).split())[:300]})."
            ) from error
        return model.eval().requires_grad_(False)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        context: Tensor,
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
        references: Sequence[Tensor] = (),
    ) -> Tensor:
        """The velocity (noise minus image) at latents `x` [batch, channels, height, width], in whole patches.

        sigma [batch]: noise level, 1 = noise, 0 = image. context [batch, words, context width]: text. vector [batch, vector
        width]: pooled text. guidance [batch]: distilled guidance. references: latents of reference pictures, [batch, channels,
        height, width] each and of any size; their tokens follow those of the image (FLUX.2, FLUX.1 Kontext). Raises `UserError`
        where the model takes pooled text or guidance and it is not given.
        """
        patch, pictures = self.layout.patch, (x, *references)
        sizes = [(picture.shape[-2] // patch, picture.shape[-1] // patch) for picture in pictures]
        tokens = [rearrange(picture, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch) for picture in pictures]
        img = self.img_in(torch.cat(tokens, dim=1))
        vec = self.time_in(timestep_embedding(sigma, 256).to(img.dtype))
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(timestep_embedding(_given(guidance, "distilled guidance [batch]"), 256).to(img.dtype))
        if self.vector_in is not None:
            vec = vec + self.vector_in(_given(vector, "pooled text [batch, vector width]"))
        txt = self.txt_in(context)
        pe = self.positions(context.shape[1], sizes, x.device)

        img, _ = run_blocks(self, img, txt, vec, pe)
        return unpatchify(self.final_layer(img, vec)[:, : tokens[0].shape[1]], x, patch)

    def positions(self, words: int, sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        """Rotations for the tokens of a text and of pictures of (rows, columns) `sizes` [tokens, head dim / 2, 2, 2], float32.

        A token of a picture stands at (row, column) on axes 1 and 2; FLUX.2 also numbers the words, on axis 3, and sets picture
        n at 10 n on axis 0: the image itself, then its references. FLUX.1 sets all references at 1 on axis 0, each beside or
        below those before it, so that all of them together stay as near to a square as they can (ComfyUI's "offset").
        """
        ids = torch.zeros(words + sum(rows * columns for rows, columns in sizes), len(self.layout.axes), device=device)
        if self.layout.family == "flux2":
            ids[:words, 3] = torch.arange(words, device=device)
        first, height, width = words, 0, 0
        for number, (rows, columns) in enumerate(sizes):
            picture, top, left = ids[first : first + rows * columns], 0, 0
            picture[:, 0] = REFERENCE_STEP * number
            if number and self.layout.family == "flux1":
                picture[:, 0] = 1
                top, left = (0, width) if rows + height > columns + width else (height, 0)
                height, width = max(height, top + rows), max(width, left + columns)
            picture[:, 1] = torch.arange(top, top + rows, device=device).repeat_interleave(columns)
            picture[:, 2] = torch.arange(left, left + columns, device=device).repeat(rows)
            first += rows * columns
        return torch.cat([rope(ids[:, n], dim, self.layout.theta) for n, dim in enumerate(self.layout.axes)], dim=1)


def run_blocks(model: Any, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Image and text tokens [batch, tokens, hidden] after the blocks of `model`, one after the other.

    `model` has a `layout`, its blocks under their names in the checkpoint and, in FLUX.2, the modulations that they share:
    a `Flux`, or a part of one.
    """
    shared = model.layout.family == "flux2"
    double_blocks, single_blocks = (list(blocks.children()) for blocks in (model.double_blocks, model.single_blocks))
    if double_blocks:
        double_vec = (model.double_stream_modulation_img(vec), model.double_stream_modulation_txt(vec)) if shared else vec
        for block in double_blocks:
            img, txt = block(img=img, txt=txt, vec=double_vec, pe=pe)
    if single_blocks:
        single_vec = model.single_stream_modulation(vec) if shared else vec
        tokens, words = torch.cat((txt, img), dim=1), txt.shape[1]
        for block in single_blocks:
            tokens = block(tokens, vec=single_vec, pe=pe)
        txt, img = tokens[:, :words], tokens[:, words:]
    return img, txt


def _given(value: Tensor | None, what: str) -> Tensor:
    if value is None:
        raise UserError(f"This model takes {what}, and none is given: what it would draw without is not what it learned.")
    return value


class ModulationOut(NamedTuple):
    """What a modulation gives to one half of a block, each [batch, 1, hidden]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """Shift, scale and gate for each half of a block, from the vector [batch, hidden]; `parts` is 3 per half."""

    def __init__(self, hidden: int, parts: int, bias: bool = True, rank: int | None = None):
        super().__init__()
        self.parts = parts
        outputs = parts * hidden
        self.lin = Linear(hidden, outputs, bias=bias) if rank is None else LowRankLinear(hidden, outputs, rank)

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ...]:
        out = self.lin(F.silu(vec))[:, None].chunk(self.parts, dim=-1)
        return tuple(ModulationOut(*out[start : start + 3]) for start in range(0, self.parts, 3))


class LowRankLinear(nn.Module):
    """up (down x) + bias: a linear layer of `rank`."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.down = Linear(inputs, rank, bias=False)
        self.up = Linear(rank, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) + self.bias


class DoubleBlock(nn.Module):
    """Image and text attend to each other; each then goes through its own MLP."""

    def __init__(self, layout: Layout, img: Site, txt: Site):
        super().__init__()
        hidden, bias = layout.hidden, layout.family == "flux1"
        self.img_mod, self.txt_mod = (
            Modulation(hidden, 6, rank=layout.ranks.get(site.name)) if layout.family == "flux1" else None for site in (img, txt)
        )
        self.img_attn = Attention(layout, bias)
        self.txt_attn = Attention(layout, bias)
        self.img_mlp = mlp(hidden, img)
        self.txt_mlp = mlp(hidden, txt)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor | tuple, pe: Tensor) -> tuple[Tensor, Tensor]:
        if self.img_mod is None or self.txt_mod is None:
            (img1, img2), (txt1, txt2) = vec
        else:
            (img1, img2), (txt1, txt2) = self.img_mod(vec), self.txt_mod(vec)
        words = txt.shape[1]
        both = zip(self.txt_attn(modulate(txt, txt1)), self.img_attn(modulate(img, img1)), strict=True)
        q, k, v = (torch.cat(pair, dim=-2) for pair in both)
        attended = attention(q, k, v, pe)
        img = img + img1.gate * self.img_attn.proj(attended[:, words:])
        txt = txt + txt1.gate * self.txt_attn.proj(attended[:, :words])
        img = img + img2.gate * self.img_mlp(modulate(img, img2))
        txt = txt + txt2.gate * self.txt_mlp(modulate(txt, txt2))
        return img, txt


class SingleBlock(nn.Module):
    """Attention and MLP side by side on text and image tokens: two projections for both."""

    def __init__(self, layout: Layout, site: Site):
        super().__init__()
        hidden, bias = layout.hidden, layout.family == "flux1"
        self.heads, self.hidden = layout.heads, hidden
        self.linear1 = Linear(hidden, 3 * hidden + site.width * (2 if site.gated else 1), bias=bias)
        self.linear2 = Linear(hidden + site.width, hidden, bias=bias)
        self.norm = QKNorm(layout.head_dim)
        self.mlp_act = activation(site)
        self.modulation = Modulation(hidden, 3, rank=layout.ranks.get(site.name)) if layout.family == "flux1" else None

    def forward(self, x: Tensor, vec: Tensor | tuple, pe: Tensor) -> Tensor:
        (mod,) = vec if self.modulation is None else self.modulation(vec)
        up = self.linear1(modulate(x, mod))
        q, k, v = rearrange(up[..., : 3 * self.hidden], "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k = self.norm(q, k, v)
        attended = attention(q, k, v, pe)
        neurons = self.mlp_act(up[..., 3 * self.hidden :])
        return x + mod.gate * self.linear2(torch.cat((attended, neurons), dim=-1))


class Attention(nn.Module):
    """The projections around attention; calling it gives q, k and v, each [batch, heads, tokens, head dim]."""

    def __init__(self, layout: Layout, bias: bool):
        super().__init__()
        self.heads = layout.heads
        self.qkv = Linear(layout.hidden, 3 * layout.hidden, bias=bias)
        self.norm = QKNorm(layout.head_dim)
        self.proj = Linear(layout.hidden, layout.hidden, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return (*self.norm(q, k, v), v)


class QKNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), eps=1e-6)


class MLPEmbedder(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool):
        super().__init__()
        self.in_layer = Linear(width, hidden, bias=bias)
        self.out_layer = Linear(hidden, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class FinalLayer(nn.Module):
    """Image tokens [batch, tokens, hidden] to patches of the velocity [batch, tokens, out channels]."""

    def __init__(self, hidden: int, out_channels: int, bias: bool):
        super().__init__()
        self.linear = Linear(hidden, out_channels, bias=bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden, 2 * hidden, bias=bias))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, ModulationOut(shift, scale, scale)))


def unpatchify(tokens: Tensor, x: Tensor, patch: int) -> Tensor:
    """What is predicted for the image tokens of latents `x` [..., height, width], [batch, tokens, channels * patch^2], in their
    size: [batch, channels, height, width]; a host fills patches up that `x` does not."""
    height, width = x.shape[-2:]
    whole = rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=-(-height // patch), p=patch, q=patch)
    return whole[..., :height, :width]


class GatedSilu(nn.Module):
    """silu(x1) * x2 with x1, x2 the two halves of the last dimension (FLUX.2's activation)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def activation(site: Site) -> nn.Module:
    return GatedSilu() if site.gated else nn.GELU(approximate="tanh")


def mlp(hidden: int, site: Site) -> nn.Sequential:
    rows = site.width * (2 if site.gated else 1)
    return nn.Sequential(Linear(hidden, rows, bias=site.biased), activation(site), Linear(site.width, hidden, bias=site.biased))


def modulate(x: Tensor, mod: ModulationOut) -> Tensor:
    return torch.addcmul(mod.shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + mod.scale)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """softmax(q k^T) v with q and k turned by their positions; [batch, heads, tokens, dim] to [batch, tokens, heads * dim]."""
    out = F.scaled_dot_product_attention(apply_rope(q, pe), apply_rope(k, pe), v)
    return rearrange(out, "b h n d -> b n (h d)")


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """x with each pair of its last dimension turned by `pe`; as complex numbers, which is one pass over x."""
    turn = torch.complex(pe[..., 0, 0], pe[..., 1, 0])
    pairs = torch.view_as_complex(x.to(pe.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def rope(position: Tensor, dim: int, theta: int) -> Tensor:
    """2x2 rotations of `dim / 2` frequencies at each position: [tokens, dim / 2, 2, 2] (Su et al. 2021, RoFormer)."""
    omega = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = position.double().cpu()[:, None] * omega
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
    return turned.to(device=position.device, dtype=torch.float32)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Embedding of 1000 t: `dim / 2` cosines, then as many sines, of frequencies 1 down to 1e-4; [batch, dim]."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-torch.log(torch.tensor(10_000.0)).item() / half))
    angle = 1000.0 * t.float()[:, None] * frequencies
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
