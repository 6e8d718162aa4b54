"""Load Tiny FLUX: the FLUX that ships with the pack, through ComfyUI's own loaders."""

from __future__ import annotations

import comfy.sd
import comfy.utils
import torch
from comfy.sd1_clip import escape_important, token_weights
from comfy.supported_models_base import ClipTarget
from comfy_api.latest import io

from ..errors import UserError
from ..tiny.model import FOLDER
from ..tiny.words import PADDED, WordEncoder, known_words
from . import host


class LoadTinyFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeLoadTinyFlux",
            display_name="Load Tiny FLUX",
            category=host.CATEGORY,
            description="A FLUX of 2.3 million weights that draws handwritten digits at 64x64, for trying everything on "
            "any machine without a download. Prompts such as 'three' or 'a 7'; 20 steps, euler, simple, cfg 1.",
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        try:
            model = comfy.sd.load_diffusion_model(str(FOLDER / "flux.safetensors"))
        except ValueError as error:
            raise UserError(
                f"This ComfyUI cannot load the tiny FLUX ({error}): older ones take FLUX at its full width alone. Update "
                "ComfyUI; the other nodes work with FLUX itself."
            ) from error
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(FOLDER / "autoencoder.safetensors")))
        clip = comfy.sd.CLIP(ClipTarget(TinyTokenizer, TinyTextEncoder), model_options={"dtype": torch.float32})
        clip.load_sd(comfy.utils.load_torch_file(str(FOLDER / "words.safetensors")))
        return io.NodeOutput(model, clip, vae)


class TinyTokenizer:
    """Words to ids, with ComfyUI's (word:1.2) weights, under the two names FLUX nodes ask for."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs):
        pairs = [(word, weight) for part, weight in token_weights(escape_important(text), 1.0) for word in known_words(part)]
        pairs += [(0, 1.0)] * (PADDED - len(pairs))
        tokens = [(*pair, 0) for pair in pairs] if return_word_ids else pairs
        return {"l": [tokens], "t5xxl": [tokens]}

    def untokenize(self, pairs):
        return pairs

    def state_dict(self):
        return {}


class TinyTextEncoder(torch.nn.Module):
    """The word encoder with the methods that ComfyUI's CLIP calls: context from "t5xxl", pooled vector from "l"."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__()
        self.words = WordEncoder().to(device=device, dtype=dtype)
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
