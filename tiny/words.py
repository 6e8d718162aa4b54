"""The tiny word encoder: a table of embeddings for the words that name a digit.

A prompt becomes its words, lower case; a word that is not in the table becomes "?", and short prompts are padded
with "" to `PADDED` words, as FLUX.1's own text encoder pads. The pooled vector, which FLUX.1 alone takes, is the mean of a
second table over the words that are no padding. A file with other words than `VOCABULARY`, such as `flux-poke train` makes
(`grown`), names them in its header.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Embedding, functional

from ..parsing import from_json

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = (
    "", "?", *DIGIT_WORDS, *(str(digit) for digit in range(10)),
    "a", "an", "the", "digit", "number", "numeral", "figure", "handwritten", "written", "by", "hand", "drawing", "of",
    "picture", "image", "in", "chalk", "ink", "white", "on", "black",
)  # fmt: skip
#: FLUX.2's table also has words for what is done with a reference picture.
FLUX2_VOCABULARY = (*VOCABULARY, "negative", "same", "copy", "it", "its")
PADDED = 8

#: ComfyUI sets zeros before a text for FLUX.2 until it is this long.
FLUX2_TEXT = 512

#: Prompts the tiny FLUX is trained on; `{}` is the digit as a word or as a numeral.
TEMPLATES = (
    "{}", "a {}", "the {}", "digit {}", "the digit {}", "number {}", "the number {}", "a handwritten {}",
    "a picture of a {}", "an image of the digit {}", "a {} drawing", "a {} in chalk", "the numeral {} written by hand",
)  # fmt: skip

#: Prompts beside a reference digit, for its negative and for the digit as it is.
NEGATIVE_TEMPLATES = (
    "negative", "a negative", "the negative", "its negative", "a negative of it", "the negative of it", "it in negative",
    "the same in negative", "the same digit in negative", "a negative of the digit", "the negative of the image",
)  # fmt: skip
COPY_TEMPLATES = (
    "copy", "a copy", "the copy", "its copy", "a copy of it", "the copy of it", "it", "the same", "the same digit",
    "a copy of the digit", "the copy of the image",
)  # fmt: skip


class WordEncoder(nn.Module):
    """Prompts to context [prompts, words, width] and vector [prompts, width], which is None where not `pooled`.

    A prompt is of at least `padded` words.
    """

    def __init__(self, width: int = 64, vocabulary: Sequence[str] = VOCABULARY, padded: int = PADDED, pooled: bool = True):
        super().__init__()
        self.vocabulary, self.padded = tuple(vocabulary), padded
        self.text = Embedding(len(self.vocabulary), width)
        self.vector = Embedding(len(self.vocabulary), width) if pooled else None

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> WordEncoder:
        header = metadata or {}
        vocabulary = from_json(header["vocabulary"]) if "vocabulary" in header else VOCABULARY
        width, padded = tensors["text.weight"].shape[1], int(header.get("padded", PADDED))
        model = cls(width, vocabulary, padded, pooled="vector.weight" in tensors)
        model.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
        return model.eval().requires_grad_(False)

    @property
    def header(self) -> dict[str, str]:
        """What a file says of it where its words are not `VOCABULARY`."""
        if (self.vocabulary, self.padded) == (VOCABULARY, PADDED):
            return {}
        return {"vocabulary": json.dumps(self.vocabulary), "padded": str(self.padded)}

    @property
    def width(self) -> int:
        return self.text.embedding_dim

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        return self.encode(self.ids(prompts).to(self.text.weight.device))

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """Word ids [prompts, words]."""
        ids = [word_ids(prompt, self.vocabulary, self.padded) for prompt in prompts]
        longest = max(len(row) for row in ids)
        return torch.tensor([row + [0] * (longest - len(row)) for row in ids])

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Context and vector of word ids [prompts, words], 0 = padding."""
        if self.vector is None:
            return self.text(ids), None
        spoken = (ids > 0).unsqueeze(-1)
        vector = (self.vector(ids) * spoken).sum(1) / spoken.sum(1).clamp(min=1)
        return self.text(ids), vector


def known_words(text: str, vocabulary: Sequence[str] = VOCABULARY) -> list[int]:
    """Places in the vocabulary of the words of `text`."""
    return [vocabulary.index(word) if word in vocabulary else 1 for word in words_of(text)]


def words_of(text: str) -> list[str]:
    """Words, lower case, and digits one by one."""
    return re.findall(r"[^\W\d_]+|\d", text.lower())


def word_ids(prompt: str, vocabulary: Sequence[str] = VOCABULARY, padded: int = PADDED) -> list[int]:
    """`known_words` of a prompt, padded to at least `padded`."""
    ids = known_words(prompt, vocabulary)
    return ids + [0] * (padded - len(ids))


def grown(captions: Iterable[str], most: int = 10_000) -> tuple[tuple[str, ...], int]:
    """A vocabulary for `captions`, and how many words the longest has.

    It is one of those that ship where that has all of their words, else padding, "?" and the `most` frequent words.
    """
    counts: Counter[str] = Counter()
    longest = PADDED
    for caption, number in Counter(captions).items():
        words = words_of(caption)
        for word in words:
            counts[word] += number
        longest = max(longest, len(words))
    for shipped in (VOCABULARY, FLUX2_VOCABULARY):
        if counts.keys() <= set(shipped):
            return shipped, longest
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[:most]
    return ("", "?", *frequent), longest


def digit_prompts(digit: int) -> list[str]:
    """Every way the templates name `digit`."""
    return [template.format(name) for template in TEMPLATES for name in (DIGIT_WORDS[digit], str(digit))]


def pad_text(context: Tensor) -> Tensor:
    """A text for FLUX.2 [batch, words, width], as ComfyUI gives it to the model: [batch, 512, width] unless it is longer."""
    return functional.pad(context, (0, 0, max(FLUX2_TEXT - context.shape[1], 0), 0))
