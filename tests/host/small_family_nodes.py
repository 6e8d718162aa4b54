"""Stands in the test server's custom_nodes: small Chromas can be loaded, and there are a style model (Redux) and FLUX.2's small
autoencoder with random weights.

ComfyUI's detection of Chroma writes the widths of the one that was released; here they are those of the file.
"""

import comfy.clip_vision
import comfy.ldm.flux.redux
import comfy.model_detection
import comfy.sd
import comfy.taesd.taesd
import torch

_detect = comfy.model_detection.detect_unet_config


def detect_unet_config(state_dict, key_prefix, metadata=None):
    config = _detect(state_dict, key_prefix, metadata=metadata)
    if config is not None and config.get("image_model") == "chroma":
        out = state_dict[f"{key_prefix}distilled_guidance_layer.out_proj.weight"]
        config["out_dim"], config["hidden_dim"] = out.shape
    return config


comfy.model_detection.detect_unet_config = detect_unet_config


def random_weights(module):
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in module.state_dict().items()}


class RandomStyleModel:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"width": ("INT", {"default": 64}), "tokens": ("INT", {"default": 9})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("STYLE_MODEL", "CLIP_VISION_OUTPUT"), "make", "test"

    def make(self, width, tokens):
        encoder = comfy.ldm.flux.redux.ReduxImageEncoder(redux_dim=32, txt_in_features=width)
        encoder.load_state_dict(random_weights(encoder))
        seen = comfy.clip_vision.Output()
        seen["last_hidden_state"] = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(1))
        return comfy.sd.StyleModel(encoder), seen


class RandomFlux2Autoencoder:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "make", "test"

    def make(self):
        weights = random_weights(comfy.taesd.taesd.TAESD(latent_channels=128))
        weights |= {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
        return (comfy.sd.VAE(sd=weights, metadata={"tae_latent_channels": 128}),)


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (RandomStyleModel, RandomFlux2Autoencoder)}
