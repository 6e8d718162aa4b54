"""Hooks that run whatever was compiled before, the tokens that pass between blocks, and which blocks ran.

    with force_eager():
        model(x)                                     # also where torch.compile compiled it earlier, without hooks
    with watching_tokens(model, {0, 5}, see):        # see(block_index, img, txt): what enters a block, or the final layer
        model(...)
    with watching_blocks(model) as ran:
        model(...)
    ran.whole                                        # False where blocks were skipped

What leaves a block is what enters the next one: whatever a host adds in between (a ControlNet, say) is in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def force_eager() -> Iterator[None]:
    """Compiled models run as they were written while the `with` lasts; others are not affected.

    torch.compile does not look for hooks that came after it (`torch._dynamo.config.skip_nnmodule_hook_guards`): the call
    would run its old graph, and nothing would be recorded, without a word. Needs torch 2.6; before, there is no such switch.
    """
    # Nothing is compiled where the compiler was never loaded; loading it takes seconds.
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def blocks_in(model: nn.Module) -> list[nn.Module]:
    """The modules of all blocks, in the order they run."""
    return [block for name in ("double_blocks", "single_blocks") for block in model.get_submodule(name).children()]


@dataclass
class Ran:
    count: int
    blocks: set[int] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        return len(self.blocks) == self.count

    @property
    def skipped(self) -> bool:
        """Whether the model ran, but not all of it."""
        return bool(self.blocks) and not self.whole


@contextmanager
def watching_blocks(model: nn.Module) -> Iterator[Ran]:
    """Tells which blocks of `model` run while the `with` lasts.

    Guidance by skipped layers calls the model without some of them, and a cache of the host's without most: what such a call
    computes is not what the model does, and recorders leave it out.
    """
    blocks = blocks_in(model)
    ran = Ran(len(blocks))
    with ExitStack() as hooks:
        hooks.enter_context(force_eager())
        for block_index, block in enumerate(blocks):

            def note(*_: Any, block_index: int = block_index) -> None:
                ran.blocks.add(block_index)

            hooks.enter_context(block.register_forward_pre_hook(note))
        yield ran


def left_out(calls: int) -> str:
    """The sentence on `calls` calls that were not recorded, since blocks were skipped in them; empty where there were none."""
    if not calls:
        return ""
    return (
        f"{calls} model call{' that skips' if calls == 1 else 's that skip'} blocks (guidance by skipped layers, a cache) "
        f"{'is' if calls == 1 else 'are'} left out."
    )


@contextmanager
def watching_tokens(
    model: nn.Module, block_indices: Collection[int], see: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    """Calls `see(block_index, img, txt)` with the tokens [batch, tokens, hidden] that enter the blocks at `block_indices`.

    The index after the last block is the final layer; the text there is what left the last block. References of an edit follow
    the image's own tokens. Both are the model's own memory, which the next block may overwrite: use them at once or clone
    them, and do not write to them. Works on any model with FLUX's module names; hooks are gone when the `with` ends.
    """
    depth, blocks = len(list(model.get_submodule("double_blocks").children())), blocks_in(model)
    final, txt = len(blocks), torch.empty(0, 0)

    def entering(block_index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal txt
            if block_index < depth:
                img, txt = kwargs["img"], kwargs["txt"]
            elif block_index < final:
                txt, img = args[0].tensor_split([txt.shape[1]], dim=1)
            else:
                img = args[0]
            if block_index in block_indices:
                see(block_index, img, txt)

        return hook

    def leaving(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal txt
        txt = output[1] if final == depth else output[:, : txt.shape[1]]

    with ExitStack() as hooks:
        hooks.enter_context(force_eager())
        for block_index, module in enumerate((*blocks, model.get_submodule("final_layer"))):
            # The last double block that runs tells how many text tokens come first in a single block.
            if block_index in block_indices or block_index < depth:
                hooks.enter_context(module.register_forward_pre_hook(entering(block_index), with_kwargs=True))
        if final in block_indices:
            hooks.enter_context(blocks[-1].register_forward_hook(leaving))
        yield
