"""What each block would draw if it were the last: its image tokens through the model's own final layer.

    taps = BlockTaps()
    recorder = TapRecorder(layout, choose_blocks("all", layout), StepChoice.parse("every 5"))
    with recorder.watching(model, Call.at(x, sigma, sigmas), taps):
        model(x, sigma, context, vector)
    for tap in taps:                                 # by step, double blocks, single blocks
        tap.title, taps.latent(tap)                  # "Step 0 · double block 0", x0 [batch, channels, height, width]

Recording changes nothing of what the model computes. Kept are velocities in the model's precision (0.5 MB each for
1024x1024 pixels in bfloat16), on disk once they outgrow `memory_limit`; latents are made of them when they are read.
While the model runs, the tapped blocks' image tokens wait for the final layer's arguments: 25 MB a block for FLUX.1 at
1024x1024 pixels.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UserError
from ..flux.blocks import Block, blocks_of
from ..flux.layout import Layout
from ..flux.model import unpatchify
from ..recording.call import Call
from ..recording.hooks import watching_blocks, watching_tokens
from .lens import Lens

#: x0 is what the block takes for the image; "euler" is where one Euler step by its velocity leads.
View = Literal["x0", "euler"]

#: What names of raw tensors begin with.
RAW = "raw."
#: How much a block changes its tokens is measured on at most about this many of them, evenly spaced.
CHANGE_TOKENS = 128

#: (sigma [batch], model output, x_t) to x0: the signature of ComfyUI's `model_sampling.calculate_denoised`.
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]


def flow_denoise(sigma: Tensor, velocity: Tensor, x: Tensor) -> Tensor:
    """x_t - sigma * v, for models whose velocity is noise minus image."""
    return x - velocity * sigma.view(-1, 1, 1, 1)


@dataclass(frozen=True, order=True)
class Tap:
    """One block at one step; the order of taps is the order they ran in."""

    step: int
    block: Block

    @property
    def title(self) -> str:
        return f"Step {self.step} · {self.block.title}"


@dataclass(frozen=True)
class StepChoice:
    """Which steps of a run are looked at: those in any of `ranges`."""

    ranges: tuple[range, ...] = (range(2**31),)

    @classmethod
    def parse(cls, text: str) -> StepChoice:
        """From "all", "every 5", or a list such as "0, 4, 10-12"; raises `UserError` where it is none of them."""
        words = text.strip().lower()
        if words == "all":
            return cls()
        if match := re.fullmatch(r"every\s+([1-9]\d{0,8})", words):
            return cls((range(0, 2**31, int(match[1])),))
        found = []
        for part in words.split(","):
            match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part)
            if match is None or int(match[2] or match[1]) < int(match[1]):
                raise UserError(f'Steps "{text}" are not understood: write "all", "every 5", or a list such as "0, 4, 10-12".')
            found.append(range(int(match[1]), int(match[2] or match[1]) + 1))
        return cls(tuple(found))

    def __contains__(self, step: int) -> bool:
        return any(step in steps for steps in self.ranges)


@dataclass(eq=False)
class BlockTaps:
    """Block predictions of one sampling run, in order; iterating gives the taps, `latent` reads one.

    Every run makes one of its own. `skipping` counts the calls that were left out since blocks were skipped in them.

    Args:
        denoise: how the model's output becomes x0.
        to_autoencoder: brings latents from the model's space to the autoencoder's, where the two differ.
        raw: keep what the predictions are made of as well, see `raw`.
        memory_limit: bytes to hold in memory; the steps beyond go to disk and are deleted with this object.
        folder: where they go to, by default the system's folder for temporary files.
    """

    denoise: Denoise = flow_denoise
    to_autoencoder: Callable[[Tensor], Tensor] = lambda latents: latents
    memory_limit: int = 2**30
    folder: Path | None = None
    raw: bool = False
    skipping: int = field(default=0, init=False)
    _steps: dict[int, _Step] = field(default_factory=dict, init=False)
    _disk: tempfile.TemporaryDirectory | None = field(default=None, init=False)

    def add(
        self,
        call: Call,
        velocities: Mapping[Block, Tensor],
        changes: Mapping[Block, Tensor],
        raw: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds what was seen at one step; a step that is visited again is replaced."""
        tensors = {block.name: velocity for block, velocity in velocities.items()}
        tensors |= {f"{RAW}{name}": value for name, value in (raw or {}).items()}
        tensors["x"] = call.part(call.x).float().cpu()
        new = _Step(call.part(call.sigma).cpu(), call.sigma_next, changes, tensors)
        self._steps.pop(call.step, None)
        if self.bytes_in_memory + sum(tensor.nbytes for tensor in tensors.values()) > self.memory_limit:
            if self._disk is None:
                self._disk = tempfile.TemporaryDirectory(prefix="flux_poke_taps_", dir=self.folder)
            file = Path(self._disk.name) / f"step-{call.step}.safetensors"
            try:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
            except Exception as error:  # safetensors wraps a full disk in an error of its own
                raise UserError(
                    f"Block predictions could not be written to {file.parent} ({error}): free some space, or tap fewer "
                    "blocks or steps."
                ) from error
            new.tensors = file
        self._steps[call.step] = new

    @property
    def bytes_in_memory(self) -> int:
        held = (step.tensors for step in self._steps.values() if not isinstance(step.tensors, Path))
        return sum(tensor.nbytes for tensors in held for tensor in tensors.values())

    def __iter__(self) -> Iterator[Tap]:
        return (Tap(number, block) for number, step in sorted(self._steps.items()) for block in sorted(step.changes))

    def __len__(self) -> int:
        return sum(len(step.changes) for step in self._steps.values())

    def check_not_empty(self) -> None:
        """Raises `UserError` where nothing was tapped."""
        if not self._steps:
            raise UserError(
                "There are no block predictions: the sampler ran none of the chosen steps with the tapped model. Connect the "
                "MODEL that Tap Blocks gives to the sampler, and the sampler's latents to `after`."
            )

    @property
    def images(self) -> int:
        """How many images were drawn at once; raises `UserError` where nothing was tapped."""
        self.check_not_empty()
        return len(next(iter(self._steps.values())).sigma)

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted(self._steps))

    def sigma(self, step: int) -> float:
        return self._steps[step].sigma.flatten()[0].item()

    def velocity(self, tap: Tap) -> Tensor:
        """The model's output if the block were its last, float32 [batch, channels, height, width]."""
        return self._steps[tap.step].read(tap.block.name).float()

    def latent(self, tap: Tap, view: View = "x0") -> Tensor:
        """What the block takes the image for, or where its velocity leads; float32 [batch, channels, height, width]."""
        step = self._steps[tap.step]
        x = step.read("x")
        x0 = self.denoise(step.sigma, self.velocity(tap), x)
        if view == "x0":
            return x0
        sigma = step.sigma.view(-1, 1, 1, 1)
        return x + (x - x0) / sigma * (step.sigma_next - sigma)

    def raw_of(self, step: int, image: int) -> dict[str, dict[str, Tensor]]:
        """What was kept of one image at a step, empty where it is not `raw`.

        By block, its tokens `img` and `txt` [tokens, hidden] and `change`; as "context", `x` [channels, height, width],
        `sigma`, `sigma_next`, `vec` [hidden], and `text` [words, width].
        """
        found: dict[str, dict[str, Tensor]] = {}
        step_ = self._steps[step]
        for key in step_.names:
            if key.startswith(RAW):
                block, name = key.removeprefix(RAW).split(".")
                found.setdefault(block, {})[name] = step_.read(key)[image]
        for tapped, change in step_.changes.items():
            if tapped.name in found:
                found[tapped.name]["change"] = change[image]
        if found:
            levels = {"sigma": step_.sigma[image], "sigma_next": torch.tensor(step_.sigma_next), "x": step_.read("x")[image]}
            found["context"] |= levels
        return found

    def change(self, tap: Tap) -> Tensor:
        """|tokens after the block - before| / |before| of each image [batch], on evenly spaced image tokens."""
        return self._steps[tap.step].changes[tap.block].float()


@dataclass
class _Step:
    """One step's x and velocities, in memory or in a file."""

    sigma: Tensor
    sigma_next: float
    changes: Mapping[Block, Tensor]
    tensors: dict[str, Tensor] | Path

    @property
    def names(self) -> list[str]:
        if isinstance(self.tensors, Path):
            with safe_open(self.tensors, framework="pt") as file:
                return [*file.keys()]
        return [*self.tensors]

    def read(self, key: str) -> Tensor:
        if isinstance(self.tensors, Path):
            with safe_open(self.tensors, framework="pt") as file:
                return file.get_tensor(key)
        return self.tensors[key]


class TapRecorder:
    """Records the predictions of `blocks` of a model of `layout`, at the steps of a run that `steps` holds.

    With a `lens`, each block's tokens go through its affine map before the final layer.
    """

    def __init__(self, layout: Layout, blocks: Collection[Block], steps: StepChoice = StepChoice(), lens: Lens | None = None):
        self.layout, self.steps, self.lens = layout, steps, lens
        everything = blocks_of(layout)
        self._last = len(everything)
        self._tapped = {everything.index(block) + 1: block for block in sorted(blocks)}

    @contextmanager
    def watching(self, model: nn.Module, call: Call, taps: BlockTaps) -> Iterator[None]:
        """Hooks on `model` for one call of it; what is seen goes to `taps` when the call ends well.

        A call in which blocks were skipped is left out, and counted in `taps.skipping`.
        """
        if call.step not in self.steps or not call.rows:
            yield
            return
        patch = self.layout.patch
        height, width = call.x.shape[-2:]
        tokens = -(-height // patch) * -(-width // patch)
        states: dict[Block, Tensor] = {}
        samples: dict[int, Tensor] = {}
        velocities: dict[Block, Tensor] = {}
        raw: dict[str, Tensor] = {}

        @torch.no_grad()
        def see(block_index: int, img: Tensor, txt: Tensor) -> None:
            img = call.part(img)[:, :tokens]
            samples[block_index] = img[:, :: max(1, tokens // CHANGE_TOKENS)].to(torch.float32, copy=True)
            if block_index in self._tapped and block_index != self._last:
                states[self._tapped[block_index]] = img.clone()
            if taps.raw and block_index in self._tapped:
                name = self._tapped[block_index].name
                raw[f"{name}.img"], raw[f"{name}.txt"] = (part.to("cpu", copy=True) for part in (img, call.part(txt)))

        @torch.no_grad()
        def predict(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Tensor) -> None:
            if not ran.whole:
                return
            others = [_rows(value, call) for value in args[1:]]
            named = {key: _rows(value, call) for key, value in kwargs.items()}
            if taps.raw:
                raw["context.vec"] = (others[0] if others else named["vec"]).to("cpu", copy=True)
                if call.context is not None:
                    raw["context.text"] = call.part(call.context).to("cpu", copy=True)
            for block in list(states):
                state = states.pop(block)
                if self.lens is not None:
                    state = self.lens(block, state)
                # forward, not a call: hooks (this one too) belong to the model's own call
                velocities[block] = unpatchify(module.forward(state, *others, **named), call.x, patch)
            if self._last in self._tapped:
                velocities[self._tapped[self._last]] = unpatchify(call.part(out)[:, :tokens], call.x, patch)

        before_and_after = {block_index - 1 for block_index in self._tapped} | set(self._tapped)
        with ExitStack() as hooks:
            ran = hooks.enter_context(watching_blocks(model))
            hooks.enter_context(model.get_submodule("final_layer").register_forward_hook(predict, with_kwargs=True))
            hooks.enter_context(watching_tokens(model, before_and_after, see))
            yield
        taps.skipping += ran.skipped
        if velocities:
            moved = torch.stack(list(velocities.values())).cpu()  # one wait for the device a step
            changes = torch.stack([_change(samples[index - 1], samples[index]) for index in self._tapped]).cpu()
            changed = dict(zip(self._tapped.values(), changes, strict=True))
            taps.add(call, dict(zip(velocities, moved, strict=True)), changed, raw)


def _change(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)


def _rows(value: Any, call: Call) -> Any:
    """`value` with every tensor in it that has one row for each of the batch cut to those that images are read from."""
    if isinstance(value, Tensor):
        return call.part(value) if value.ndim and len(value) == len(call.images) else value
    if isinstance(value, tuple | list):
        return type(value)(_rows(part, call) for part in value)
    return value
