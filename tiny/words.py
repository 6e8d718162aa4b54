"""The tiny word encoder: a table of embeddings for the words that name a digit.

A prompt becomes its words, lower case; a word that is not in the table becomes "?", and short prompts are padded
with "" to `PADDED` words, as FLUX.1's own text encoder pads. The pooled vector is the mean of a second table over
the words that are no padding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = (
    "", "?", *DIGIT_WORDS, *(str(digit) for digit in range(10)),
    "a", "an", "the", "digit", "number", "numeral", "figure", "handwritten", "written", "by", "hand", "drawing", "of",
    "picture", "image", "in", "chalk", "ink", "white", "on", "black",
)  # fmt: skip
PADDED = 8

#: Prompts the tiny FLUX is trained on; `{}` is the digit as a word or as a numeral.
TEMPLATES = (
    "{}", "a {}", "the {}", "digit {}", "the digit {}", "number {}", "the number {}", "a handwritten {}",
    "a picture of a {}", "an image of the digit {}", "a {} drawing", "a {} in chalk", "the numeral {} written by hand",
)  # fmt: skip


class WordEncoder(nn.Module):
    """Prompts to context [prompts, words, 64] and vector [prompts, 64]."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.text = nn.Embedding(len(VOCABULARY), width)
        self.vector = nn.Embedding(len(VOCABULARY), width)

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor]) -> WordEncoder:
        model = cls(tensors["text.weight"].shape[1])
        model.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
        return model.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        return self.text.embedding_dim

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = [word_ids(prompt) for prompt in prompts]
        longest = max(len(row) for row in ids)
        return self.encode(torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=self.text.weight.device))

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Context and vector of word ids [prompts, words], 0 = padding."""
        spoken = (ids > 0).unsqueeze(-1)
        vector = (self.vector(ids) * spoken).sum(1) / spoken.sum(1).clamp(min=1)
        return self.text(ids), vector


def known_words(text: str) -> list[int]:
    """Places in `VOCABULARY` of the words of `text`."""
    return [VOCABULARY.index(word) if word in VOCABULARY else 1 for word in re.findall(r"[a-z]+|\d", text.lower())]


def word_ids(prompt: str) -> list[int]:
    """`known_words` of a prompt, padded to at least `PADDED`."""
    ids = known_words(prompt)
    return ids + [0] * (PADDED - len(ids))


def digit_prompts(digit: int) -> list[str]:
    """Every way the templates name `digit`."""
    return [template.format(name) for template in TEMPLATES for name in (DIGIT_WORDS[digit], str(digit))]
