"""Erasing one digit from a tiny FLUX with at most 2 % of its neurons, every digit in turn, and what the others lose.

    uv run python benchmarks/poking.py [--family flux1] [--digits 0 3 9] [--images 20] [--variants chosen shuffled]

Neurons are found and tuned on one half of the prompts, and measured on the other half with other seeds: a digit's share of
drawings that a reader takes for it, and the share of the other digits' that it takes for what they are asked to be.
`chosen` is what `flux-poke neurons find` gives, `difference` a difference of means alone (|m - m'| |W2[:, j]|, factor -1), and
`shuffled` the search with prompts of other digits, drawn at random, in the place of the digit's. The tuner sees velocities
alone; the reader is asked at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from figures import figure
from flux_poke.errors import UserError
from flux_poke.poking.comparing import record_prompts
from flux_poke.poking.find import Search, find, shuffled, strongest
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


VARIANTS = ("chosen", "difference", "shuffled")


class Reader:
    """What is read in drawings of the prompts and seeds that nothing was found on."""

    def __init__(self, tiny: TinyFlux, images: int):
        self.tiny = tiny
        self.digits = torch.arange(10).repeat_interleave(images)
        asked = [prompts(digit, 1) for digit in range(10)]
        self.prompts = [asked[digit][n % len(asked[digit])] for digit in range(10) for n in range(images)]
        self.noise = tiny.noise(len(self.prompts), MEASURED)
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


def by_difference(dense: Dense, with_it: Sequence[Internals], without: Sequence[Internals], share: float) -> Neurons:
    """A difference of means alone."""
    whole = find(dense.tensors, dense.layout, with_it, without, Search(share=1.0, spare=0.0, chance=False))
    effects = {
        name: torch.zeros(whole.widths[name]).index_copy(0, site.indices, site.measured.effect)
        for name, site in whole.sites.items()
    }
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
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = SHIPPED[given.family] / "flux.safetensors"
    dense, tiny = Dense.open(path), TinyFlux.load(path)
    recorded = [
        record_prompts(tiny, dense.fingerprint, prompts(digit, 0), RECORDED, FIRST + 1000 * digit) for digit in range(10)
    ]
    reader = Reader(tiny, given.images)
    means: dict[str, list[tuple[float, float, float]]] = {name: [] for name in given.variants}
    columns = "".join(f"{name:>11} others" for name in given.variants)
    print(f"digit   before  neurons  factor  shuffled{columns}", flush=True)
    for digit in given.digits:
        with_it, without = recorded[digit], [one for other in range(10) if other != digit for one in recorded[other]]
        exam = Exam.of(tiny, prompts(digit, 0), [prompt for n in range(10) if n != digit for prompt in prompts(n, 0)])

        def search(spare: float, with_it=with_it, without=without) -> Neurons:
            what = Search(share=given.share, spare=spare, chance=False)
            return find(dense.tensors, dense.layout, with_it, without, what)

        tuned = tune(exam, search)
        factor, number = tuned.factor or 0.0, 0
        means_alone = by_difference(dense, with_it, without, given.share)
        pokes = {"chosen": [Poke(tuned, factor)], "difference": [Poke(means_alone, -1.0)]}
        try:
            control = search(tuned.spare or 0.0, *shuffled(without, len(with_it), digit))
            number, pokes["shuffled"] = control.count, [Poke(control, factor)]
        except UserError:  # nothing stands out
            pokes["shuffled"] = []
        before = reader.shares(reader.dense, digit)
        read = {
            name: reader.shares(reader.read(pokes[name]) if pokes[name] else reader.dense, digit) for name in given.variants
        }
        for name, (own, others) in read.items():
            means[name].append((own, others, others - before[1]))
        told = "".join(f"{own:>11.0%}{others - before[1]:>+7.1%}" for own, others in read.values())
        figure(
            f"{digit:>5}{before[0]:>9.0%}{tuned.count:>9}{factor:>8.2f}{number:>10}{told}",
            family=given.family, digit=digit, before=before[0], others_before=before[1], neurons=tuned.count, factor=factor,
            spare=tuned.spare or 0.0, by_chance=number,
            **{f"{name}_read": own for name, (own, _) in read.items()},
            **{f"{name}_others": others for name, (_, others) in read.items()},
        )  # fmt: skip
    for name, rows in means.items():
        erased = sum(own < 0.2001 for own, _, _ in rows)  # 4 of 20 are 0.2 in float32, and a little more
        lost = -100 * sum(change for _, _, change in rows) / len(rows)
        figure(
            f"{name:<11}{erased} of {len(rows)} digits read in at most 20 % of their drawings; others lose {lost:.1f} points",
            family=given.family, variant=name, erased=erased, digits=len(rows), points_lost=lost,
        )  # fmt: skip


if __name__ == "__main__":
    main()
