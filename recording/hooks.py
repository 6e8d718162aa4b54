"""Hooks that are called, whatever was compiled before, and the image tokens that pass between blocks.

    with hooks_heard():
        model(x)                                     # also where torch.compile compiled it earlier, without hooks
    with watching_image_tokens(model, {0, 5}, see):  # see(place, img): what enters block number `place`, or the final layer
        model(...)

What leaves a block is what enters the next one: whatever a host adds in between (a ControlNet, say) is in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def hooks_heard() -> Iterator[None]:
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


@contextmanager
def watching_image_tokens(model: nn.Module, places: Collection[int], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Calls `see(place, img)` with the image tokens [batch, tokens, hidden] that enter the blocks at `places`.

    The place after the last block is the final layer. References of an edit follow the image's own tokens. `img` is the
    model's own memory, which the next block may overwrite: use it at once or clone it, and do not write to it. Works on
    any model with FLUX's module names; hooks are gone when the `with` ends.
    """
    doubles: list[Any] = list(model.get_submodule("double_blocks").children())
    singles: list[Any] = list(model.get_submodule("single_blocks").children())
    final = len(doubles) + len(singles)
    words = 0

    def entering(place: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal words
            if place < len(doubles):
                img, words = kwargs["img"], kwargs["txt"].shape[1]
            else:
                img = args[0] if place == final else args[0][:, words:]
            if place in places:
                see(place, img)

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(hooks_heard())
        for place, module in enumerate((*doubles, *singles, model.get_submodule("final_layer"))):
            # The last double block tells how many text tokens come first in a single block.
            if place in places or place == len(doubles) - 1:
                hooks.callback(module.register_forward_pre_hook(entering(place), with_kwargs=True).remove)
        yield
