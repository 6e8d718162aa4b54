"""Hooks on models that torch.compile has seen."""

import torch
from flux_poke.recording.hooks import force_eager
from torch import nn
from torch.nn import Linear


def test_hooks_that_came_after_compilation_are_called():
    model = nn.Sequential(Linear(4, 4), nn.GELU()).eval()
    compiled, x, seen = torch.compile(model, backend="eager"), torch.randn(2, 4), []
    with torch.no_grad():
        compiled(x)
        handle = model[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
        with force_eager():
            assert torch.equal(compiled(x), model[1].forward(model[0](x)))
        handle.remove()
        compiled(x)
    assert len(seen) == 1
