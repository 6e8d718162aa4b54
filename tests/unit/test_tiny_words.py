"""tiny/words.py: prompts to word ids, context and vector."""

import pytest
import torch
from flux_poke.tiny.words import DIGIT_WORDS, PADDED, TEMPLATES, VOCABULARY, WordEncoder, digit_prompts, word_ids


def spelled(prompt):
    return [VOCABULARY[number] for number in word_ids(prompt)]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("three", ["three"]),
        ("A Seven!", ["a", "seven"]),
        ("the digit 3, in chalk", ["the", "digit", "3", "in", "chalk"]),
        ("42", ["4", "2"]),
        ("a purple nine", ["a", "?", "nine"]),
        ("x7y", ["?", "7", "?"]),
        ("", []),
        ("...", []),
    ],
)
def test_a_prompt_becomes_its_words_and_padding(prompt, words):
    assert spelled(prompt) == words + [""] * (PADDED - len(words))


def test_a_prompt_longer_than_the_padding_keeps_all_its_words():
    assert spelled("one two three four five six seven eight nine zero") == [
        "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "zero",
    ]  # fmt: skip


def test_every_prompt_it_is_trained_on_is_in_the_vocabulary_and_names_its_digit():
    for digit in range(10):
        prompts = digit_prompts(digit)
        assert len(set(prompts)) == 2 * len(TEMPLATES)
        for prompt in prompts:
            words = [word for word in spelled(prompt) if word]
            assert "?" not in words
            assert [word for word in words if word in DIGIT_WORDS or word.isdigit()] in ([DIGIT_WORDS[digit]], [str(digit)])


def test_no_word_stands_twice_in_the_vocabulary():
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_context_is_the_table_row_of_each_word_and_vector_the_mean_without_padding():
    torch.manual_seed(0)
    encoder = WordEncoder(16)
    context, vector = encoder(["a 7", "the number seven in white chalk on a black picture"])
    assert context.shape == (2, 10, 16)
    assert encoder.vector is not None
    assert vector.shape == (2, 16)
    assert encoder.vector is not None
    ids = [VOCABULARY.index(word) for word in ("a", "7")]
    torch.testing.assert_close(context[0], encoder.text.weight[ids + [0] * 8])
    torch.testing.assert_close(vector[0], (encoder.vector.weight[ids[0]] + encoder.vector.weight[ids[1]]) / 2)


def test_the_vector_does_not_depend_on_how_far_a_prompt_is_padded():
    torch.manual_seed(0)
    encoder = WordEncoder(16)
    _, alone = encoder(["three"])
    _, beside = encoder(["three", "a picture of the handwritten digit three in white chalk"])
    torch.testing.assert_close(beside[:1], alone)


def test_a_prompt_without_words_has_a_vector_of_zeros():
    context, vector = WordEncoder(16)([""])
    assert context.shape == (1, PADDED, 16)
    assert vector.abs().max() == 0


def test_weights_come_back_in_float32_and_of_their_own_width():
    torch.manual_seed(0)
    encoder = WordEncoder(24)
    loaded = WordEncoder.load({key: tensor.bfloat16() for key, tensor in encoder.state_dict().items()})
    assert loaded.width == 24
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(["a 7"])[0], encoder(["a 7"])[0], rtol=1e-2, atol=1e-2)
