"""Load Tiny FLUX: the FLUX that ships with the pack, through ComfyUI's own loaders."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.sd
import comfy.taesd.taesd
import comfy.utils
import torch
from comfy.sd1_clip import escape_important, token_weights
from comfy.supported_models_base import ClipTarget
from comfy_api.latest import io

from ..errors import UserError
from ..flux.layout import Family
from ..tiny.model import SHIPPED
from ..tiny.words import FLUX2_VOCABULARY, PADDED, VOCABULARY, WordEncoder, known_words
from . import inputs

#: What the node offers.
FAMILIES: dict[str, Family] = {"FLUX.1": "flux1", "FLUX.2": "flux2"}
#: What the word encoder of each is made with.
TINY_WORDS: dict[Family, dict[str, Any]] = {
    "flux1": {"vocabulary": VOCABULARY, "pooled": True},
    "flux2": {"vocabulary": FLUX2_VOCABULARY, "pooled": False},
}


class LoadTinyFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        tooltip = "FLUX.1 draws from a prompt; FLUX.2 (laid out as klein) also takes a reference digit, by ReferenceLatent."
        return inputs.schema(
            cls,
            "Load Tiny FLUX",
            "A FLUX of 2.3 million weights that draws handwritten digits at 64x64, for trying everything on any machine "
            "without a download. Prompts such as 'three' or 'a 7'; 20 steps, euler, simple, cfg 1.",
            [io.Combo.Input("family", options=[*FAMILIES], default="FLUX.1", optional=True, tooltip=tooltip)],
            [io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            hidden=[],
        )

    @classmethod
    def execute(cls, family: str = "FLUX.1") -> io.NodeOutput:
        known = FAMILIES[family]
        if known == "flux2" and not hasattr(comfy.taesd.taesd, "DecoderFlux2"):
            raise UserError("This ComfyUI has no small autoencoder for FLUX.2 (TAEF2): update ComfyUI, or choose FLUX.1.")
        folder = SHIPPED[known]
        try:
            model = comfy.sd.load_diffusion_model(str(folder / "flux.safetensors"))
        except ValueError as error:
            raise UserError(
                f"This ComfyUI cannot load the tiny FLUX ({error}): older ones take FLUX at its full width alone. Update "
                "ComfyUI; the other nodes work with FLUX itself."
            ) from error
        weights = comfy.utils.load_torch_file(str(folder / "autoencoder.safetensors"))
        vae = comfy.sd.VAE(sd=weights, metadata={"tae_latent_channels": 128} if known == "flux2" else None)
        words = TINY_WORDS[known]
        target = ClipTarget(partial(TinyTokenizer, words["vocabulary"]), partial(TinyTextEncoder, words))
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
        clip.load_sd(comfy.utils.load_torch_file(str(folder / "words.safetensors")))
        return io.NodeOutput(model, clip, vae)


class TinyTokenizer:
    """Words to ids, with ComfyUI's (word:1.2) weights, under the two names FLUX nodes ask for."""

    def __init__(self, vocabulary, embedding_directory=None, tokenizer_data=None):
        self.vocabulary = vocabulary

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs):
        parts = token_weights(escape_important(text), 1.0)
        pairs = [(word, weight) for part, weight in parts for word in known_words(part, self.vocabulary)]
        pairs += [(0, 1.0)] * (PADDED - len(pairs))
        tokens = [(*pair, 0) for pair in pairs] if return_word_ids else pairs
        return {"l": [tokens], "t5xxl": [tokens]}

    def untokenize(self, pairs):
        return [(pair, self.vocabulary[pair[0]]) for pair in pairs]

    def state_dict(self):
        return {}


class TinyTextEncoder(torch.nn.Module):
    """The word encoder with the methods that ComfyUI's CLIP calls: context from "t5xxl", pooled vector from "l" (FLUX.1)."""

    def __init__(self, words, device="cpu", dtype=None, model_options=None):
        super().__init__()
        self.words = WordEncoder(**words).to(device=device, dtype=dtype)
        self.dtypes = {dtype}

    def set_clip_options(self, options) -> None:
        pass

    def reset_clip_options(self) -> None:
        pass

    @torch.no_grad()
    def encode_token_weights(self, tokens):
        device = self.words.text.weight.device

        def ids_and_weights(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            ids = torch.tensor([[pair[0] for pair in row] for row in tokens[name]], device=device)
            return ids, torch.tensor([[pair[1] for pair in row] for row in tokens[name]], device=device)

        ids, weights = ids_and_weights("t5xxl")
        context = self.words.encode(ids)[0] * weights[..., None]
        return context, self.words.encode(ids_and_weights("l")[0])[1]

    def load_sd(self, sd):
        return self.words.load_state_dict({key: tensor.float() for key, tensor in sd.items()}, strict=False)
