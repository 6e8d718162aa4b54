"""Making sure that hooks are called.

with hooks_heard():
    model(x)                                     # also where torch.compile compiled it earlier, without hooks
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
