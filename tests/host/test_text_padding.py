"""Which words of a text count: padding of ComfyUI's own tokenizers and encoders, with small encoders of random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_family import MEMBERS, TEXT

PROMPTS = ("a red fox", "a lighthouse on a cliff above the sea, in the last light of a long day in late summer")
STEPS = 2
#: Sizes of the encoders, in the places of the real ones'.
T5 = {"d_model": 64, "d_ff": 64, "d_kv": 16, "num_heads": 4, "num_layers": 1}
QWEN = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}


@pytest.fixture
def encoder(in_process):
    """ComfyUI's own tokenizer and text encoder for a model, as a CLIP."""
    import comfy.sd
    import comfy.text_encoders.flux
    import comfy.text_encoders.pixart_t5
    from comfy.supported_models_base import ClipTarget

    kinds = {
        "flux1": (comfy.text_encoders.flux.FluxTokenizer, comfy.text_encoders.flux.flux_clip()),
        "chroma": (comfy.text_encoders.pixart_t5.PixArtTokenizer, comfy.text_encoders.pixart_t5.pixart_te()),
        "flux2": (comfy.text_encoders.flux.KleinTokenizer, comfy.text_encoders.flux.klein_te()),
    }

    def make(family: str):
        sizes = {"t5xxl_model_config": T5, "qwen3_4b_model_config": QWEN, "dtype": torch.float32}
        clip = comfy.sd.CLIP(ClipTarget(*kinds[family]), model_options=sizes)
        generator = torch.Generator().manual_seed(0)
        for parameter in clip.cond_stage_model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return clip

    return make


@pytest.fixture
def model(in_process, tmp_path):
    """A MODEL that reads what the encoder of its family gives."""
    import comfy.sd

    def make(name: str, context: int, vector: int | None = None):
        (member,) = (member for member in MEMBERS if member.name == name)
        member = replace(member, layout=replace(member.layout, context=context, vector=vector))
        member.save(tmp_path / "model.safetensors")
        return comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"))

    return make


@pytest.fixture
def counted(in_process, tmp_path):
    """What a sampling run with a conditioning counts: words of each call, and whether padding may be among them."""
    import comfy.sample
    from flux_poke.nodes.models import flux_layout, model_fingerprint
    from flux_poke.nodes.recorders import InternalsRun, Recorded
    from flux_poke.nodes.watching import Watch, sampling_clone
    from flux_poke.recording.recording import Recording

    def run(model, positive, negative=None, cfg=1.0, name="recording", **options):
        where = Recorded(Recording.at(tmp_path / name), flux_layout(model), model_fingerprint(model))
        watched = sampling_clone(model, Watch(None, lambda: [InternalsRun(where, {}, **options)]))
        channels = model.get_model_object("latent_format").latent_channels
        noise = torch.randn(1, channels, 4, 4, generator=torch.Generator().manual_seed(0))
        comfy.sample.sample(
            watched, noise, STEPS, cfg, "euler", "simple", positive, negative or positive, torch.zeros_like(noise), seed=0,
            disable_pbar=True,
        )  # fmt: skip
        found = where.recording.internals()
        return found.sites["double-txt-0"].tokens // STEPS, found.padded

    return run


def encoded(clip, prompt: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "long"])
def test_what_kleins_encoder_pads_a_prompt_with_does_not_count(encoder, model, counted, prompt: str):
    clip = encoder("flux2")
    conditioning = encoded(clip, prompt)
    ids = [token for token, _ in clip.tokenize(prompt)["qwen3_4b"][0]]
    spoken = sum(token != 151643 for token in ids)  # <|endoftext|>
    assert conditioning[0][0].shape[1] == len(ids) == 512 > spoken > 10
    flux = model("FLUX.2 klein 4B", 96)
    assert counted(flux, conditioning) == (spoken, False)
    assert counted(flux, conditioning, name="all", ignore_padding=False) == (512, True)


def test_each_prompts_own_words_count_under_guidance(encoder, model, counted):
    clip = encoder("flux2")
    both = [encoded(clip, prompt) for prompt in PROMPTS]
    words = [int(one[0][1]["attention_mask"].sum()) for one in both]
    flux = model("FLUX.2 klein 4B", 96)
    assert words[0] != words[1]
    assert counted(flux, *both, cfg=2.0) == (sum(words), False)
    assert counted(flux, *both, cfg=2.0, positive_only=True, name="positive") == (words[0], False)


def test_words_that_are_appended_to_a_padded_text_count(encoder, model, counted):
    clip = encoder("flux2")
    text, told = encoded(clip, PROMPTS[0])[0]
    longer = [[torch.cat([text, torch.randn(1, 7, 96)], dim=1), told]]
    assert counted(model("FLUX.2 klein 4B", 96), longer) == (int(told["attention_mask"].sum()) + 7, False)


def test_what_t5_pads_flux1s_prompts_with_counts_and_the_recording_says_so(encoder, model, counted):
    assert counted(model("FLUX.1 dev", 64, 768), encoded(encoder("flux1"), PROMPTS[0])) == (256, True)


def test_prompts_of_chromas_encoder_are_not_padded(encoder, model, counted):
    clip = encoder("chroma")
    words, _ = counted(model("FLUX.1 schnell", 64, TEXT), encoded(clip, PROMPTS[0]))
    assert words == len(clip.tokenize(PROMPTS[0])["t5xxl"][0]) < 20


@pytest.mark.parametrize(
    ("name", "family", "context", "vector"), [("FLUX.1 dev", "flux1", 64, 768), ("FLUX.2 klein 4B", "flux2", 96, None)]
)
def test_calibrate_leaves_padding_out(encoder, model, in_process, tmp_path, name: str, family: str, context: int, vector):
    """It encodes itself, and asks the tokenizer."""
    from flux_poke.nodes.calibrating import Drawer, calibrate
    from flux_poke.nodes.models import flux_layout, model_fingerprint
    from flux_poke.nodes.recorders import Recorded
    from flux_poke.recording.calibration import asked_images
    from flux_poke.recording.recording import Recording

    flux, clip = model(name, context, vector), encoder(family)
    where = Recorded(Recording.at(tmp_path / "recording"), flux_layout(flux), model_fingerprint(flux))
    draw = Drawer(flux, clip, where.layout, 128, 128, 20, 3.5 if where.layout.guidance else None)
    asked = asked_images(PROMPTS, 4, 0, draw.settings)
    calibrate(draw, where, asked, asked, 1.0, {}, None)
    if family == "flux2":
        spoken = [sum(token != 151643 for token, _ in clip.tokenize(prompt)["qwen3_4b"][0]) for prompt in PROMPTS]
    else:
        spoken = [len([token for token, _ in clip.tokenize(prompt)["t5xxl"][0] if token]) for prompt in PROMPTS]
    assert spoken[0] < spoken[1] < 100
    internals = where.recording.internals()
    assert internals.sites["double-txt-0"].tokens == 20 * 2 * sum(spoken)
    assert internals.sites["single-0"].tokens == 20 * (2 * sum(spoken) + 4 * 64)
    assert internals.padded is False


@pytest.mark.parametrize("family", ["flux1", "chroma", "flux2"])
def test_the_words_that_a_model_reads_are_told_token_by_token(encoder, family: str):
    from flux_poke.nodes.tokens import token_texts
    from transformers import Qwen2Tokenizer

    clip, prompt = encoder(family), "a (red:1.2) fox, quietly"
    context = encoded(clip, prompt)[0][0][0]
    texts = token_texts(clip, prompt, context)
    assert len(texts) <= len(context)
    inner = getattr(clip.tokenizer, "qwen3_4b" if family == "flux2" else "t5xxl", None) or clip.tokenizer.clip_t5xxl
    assert isinstance(inner.tokenizer, Qwen2Tokenizer) == (family == "flux2")
    if family == "flux2":  # ComfyUI sets the prompt into a template, without weights
        whole = "<|im_start|>user\na (red:1.2) fox, quietly<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        pieces = [inner.tokenizer.convert_tokens_to_string([piece]) for piece in inner.tokenizer.tokenize(whole)]
        assert len(texts) == len(pieces)
        assert "\\n" in texts
        assert [text for text in texts if text.isalnum()] == [piece.strip() for piece in pieces if piece.strip().isalnum()]
        assert {"red", "fox", "quietly"} <= {*texts}
    else:
        assert texts[-1] == "</s>"
        spoken = [text for text in texts[:-1] if text != "\u2581"]  # which stands for a space
        assert spoken == ["a", "red", "fox", ",", "quietly"]
    zeros = torch.zeros(2, context.shape[1])  # as ComfyUI sets before the texts of FLUX.2
    assert token_texts(clip, prompt, torch.cat([zeros, context])) == ("", "", *texts)
    # Not the prompt's text alone: more words were added, or another prompt is read.
    assert token_texts(clip, prompt, torch.cat([context, torch.ones(7, context.shape[1])])) == ()
    assert token_texts(clip, prompt, context[:3]) == ()


def test_an_encoder_that_does_not_tell_its_words_tells_none(in_process):
    from types import SimpleNamespace

    from flux_poke.nodes.tokens import token_texts

    assert token_texts(SimpleNamespace(tokenizer=None), "a fox", torch.ones(8, 4)) == ()
