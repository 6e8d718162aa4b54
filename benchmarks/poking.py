"""Erasing one digit from a tiny FLUX with at most 2 % of its neurons, every digit in turn, and what the others lose.

    uv run python benchmarks/poking.py [--family flux1] [--digits 0 3 9] [--images 20] [--variants chosen shuffled]

Neurons are found and tuned on one half of the prompts, and measured on the other half with other seeds: a digit's share of
drawings that a reader takes for it, and the share of the other digits' that it takes for what they are asked to be.
`chosen` is what `flux-poke neurons find` gives, `learned` what it gives with --learn, `difference` a difference of means alone
(|m - m'| |W2[:, j]|, factor -1), `shuffled` and `learned shuffled` what is found and learned of prompts of other digits, drawn
at random, in the place of the digit's. Velocities alone are looked at; the reader is asked at the end.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from figures import figure
from flux_poke.errors import UserError
from flux_poke.poking.comparing import record_prompts
from flux_poke.poking.find import Search, find, shuffled, strongest
from flux_poke.poking.learn import LEARNING, learn
from flux_poke.poking.neurons import Neurons, SiteNeurons
from flux_poke.poking.poke import Poke, poked
from flux_poke.poking.tune import Exam, tune
from flux_poke.pruning.dense import Dense
from flux_poke.recording.internals import Internals
from flux_poke.tiny.data import read_digits
from flux_poke.tiny.model import SHIPPED, TinyFlux
from flux_poke.tiny.words import TEMPLATES, digit_prompts

#: Images of each prompt that are recorded, and seeds of what is recorded and of what is measured.
RECORDED, FIRST, MEASURED = 4, 10_000, 500_000


def prompts(digit: int, half: int) -> list[str]:
    """One half of a digit's prompts: both use every template, words and numerals, but never the same prompt."""
    return [digit_prompts(digit)[2 * n + (n + half) % 2] for n in range(len(TEMPLATES))]


VARIANTS = ("chosen", "learned", "difference", "shuffled", "learned shuffled")


class Reader:
    """What is read in drawings of the prompts and seeds that nothing was found on."""

    def __init__(self, tiny: TinyFlux, images: int, seed: int):
        self.tiny = tiny
        self.digits = torch.arange(10).repeat_interleave(images)
        asked = [prompts(digit, 1) for digit in range(10)]
        self.prompts = [asked[digit][n % len(asked[digit])] for digit in range(10) for n in range(images)]
        self.noise = tiny.noise(len(self.prompts), seed)
        self.dense = self.read([])

    def read(self, pokes: Sequence[Poke]) -> torch.Tensor:
        found = []
        with poked(self.tiny.flux, pokes):
            for start in range(0, len(self.prompts), 25):
                some = slice(start, start + 25)
                latents = self.tiny.sample(self.prompts[some], self.noise[some])
                found.append(read_digits(self.tiny.autoencoder.decode(latents)))
        return torch.cat(found)

    def shares(self, read: torch.Tensor, digit: int) -> tuple[float, float]:
        """Of the digit's drawings, those that read as it; of the others', those that read as they are asked to be."""
        own = self.digits == digit
        return (read[own] == digit).float().mean().item(), (read == self.digits)[~own].float().mean().item()


def learned(tiny: TinyFlux, with_it: Sequence[str], without: Sequence[str], known: Neurons, share: float) -> Neurons:
    """Neurons with weights of their own, a share of all that are known."""
    return learn(Exam.of(tiny, with_it, without, extent=LEARNING), known, Search(share=share).number(tiny.flux.layout))


def by_difference(dense: Dense, with_it: Sequence[Internals], without: Sequence[Internals], share: float) -> Neurons:
    """A difference of means alone."""
    whole = find(dense.tensors, dense.layout, with_it, without, Search(share=1.0, spare=0.0, chance=False))
    effects = {name: site.placed(site.measured.effect, whole.widths[name]) for name, site in whole.sites.items()}
    chosen, _ = strongest(effects, Search(share=share).number(dense.layout))
    sites = {}
    for name, indices in chosen.items():
        known = whole.sites[name]
        if len(indices):
            sites[name] = SiteNeurons(indices, known.measured.part(torch.isin(known.indices, indices)))
    return replace(whole, sites=sites)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--family", choices=("flux1", "flux2"), default="flux1")
    parser.add_argument("--digits", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--images", type=int, default=20, help="drawings of every digit")
    parser.add_argument("--seed", type=int, default=MEASURED, help="of the first drawing that is measured")
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = SHIPPED[given.family] / "flux.safetensors"
    dense, tiny = Dense.open(path), TinyFlux.load(path)
    recorded = [
        record_prompts(tiny, dense.fingerprint, prompts(digit, 0), RECORDED, FIRST + 1000 * digit) for digit in range(10)
    ]
    reader = Reader(tiny, given.images, given.seed)
    means: dict[str, list[tuple[float, float, float]]] = {name: [] for name in given.variants}
    columns = "".join(f"{name:>18}  factor  read  others" for name in given.variants)
    print(f"digit   before{columns}", flush=True)
    for digit in given.digits:
        with_it, without = recorded[digit], [one for other in range(10) if other != digit for one in recorded[other]]
        asked, others_asked = prompts(digit, 0), [prompt for n in range(10) if n != digit for prompt in prompts(n, 0)]

        def search(spare: float, share: float = given.share, with_it=with_it, without=without) -> Neurons:
            return find(dense.tensors, dense.layout, with_it, without, Search(share=share, spare=spare, chance=False))

        found: dict[str, tuple[Neurons, float]] = {}
        if {"chosen", "shuffled"} & {*given.variants}:
            tuned = tune(Exam.of(tiny, asked, others_asked), search)
            found["chosen"] = tuned, tuned.own_factor
            with suppress(UserError):  # nothing stands out
                control = search(tuned.spare or 0.0, given.share, *shuffled(without, len(with_it), digit))
                found["shuffled"] = control, tuned.own_factor
        if "learned" in given.variants:
            found["learned"] = learned(tiny, asked, others_asked, search(0.0, 1.0), given.share), 0.0
        if "learned shuffled" in given.variants:
            some = random.Random(digit).sample(others_asked, len(asked))
            rest = [prompt for prompt in others_asked if prompt not in some]
            drawn = shuffled(without, len(with_it), digit)
            found["learned shuffled"] = learned(tiny, some, rest, search(0.0, 1.0, *drawn), given.share), 0.0
        if "difference" in given.variants:
            found["difference"] = by_difference(dense, with_it, without, given.share), -1.0
        before = reader.shares(reader.dense, digit)
        told = ""
        facts: dict[str, float] = {}
        for name in given.variants:
            neurons, factor = found.get(name, (None, 1.0))
            own, others = reader.shares(reader.dense if neurons is None else reader.read([Poke(neurons, factor)]), digit)
            count = 0 if neurons is None else neurons.count
            means[name].append((own, others, others - before[1]))
            told += f"{count:>18}{factor:>8.2f}{own:>6.0%}{100 * (others - before[1]):>+8.1f}"
            facts |= {f"{name} neurons": count, f"{name} factor": factor, f"{name} read": own, f"{name} others": others}
        figure(
            f"{digit:>5}{before[0]:>9.0%}{told}",
            family=given.family, digit=digit, before=before[0], others_before=before[1], **facts,
        )  # fmt: skip
    for name, rows in means.items():
        erased = sum(own < 0.2001 for own, _, _ in rows)  # 4 of 20 are 0.2 in float32, and a little more
        lost = -100 * sum(change for _, _, change in rows) / len(rows)
        figure(
            f"{name:<18}{erased} of {len(rows)} digits read in at most 20 % of their drawings; others lose {lost:.1f} points",
            family=given.family, variant=name, erased=erased, digits=len(rows), points_lost=lost,
        )  # fmt: skip


if __name__ == "__main__":
    main()
