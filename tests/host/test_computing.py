"""Long work in a node: where it is done, and what it says on the way."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def on_gpu(in_process, monkeypatch):
    """`computing.on_gpu` in a ComfyUI that computes on a GPU (there need be none), and what it says."""
    from flux_poke.nodes import computing, host

    said: list[str] = []
    monkeypatch.setattr(computing, "training_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(host, "say", lambda node_id, text: said.append(text))
    return lambda work: computing.on_gpu(work, "1"), said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.76 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_what_the_gpu_has_no_memory_for_goes_on_on_the_cpu(on_gpu, error: RuntimeError):
    run, said = on_gpu

    def work(device: torch.device) -> int:
        if device.type == "cuda":
            raise error
        return int(torch.eye(3, device=device).sum())

    assert run(work) == 3
    (sentence,) = said
    assert "going on on the CPU" in sentence


def test_what_fits_stays_on_the_gpu_and_other_errors_are_not_hidden(on_gpu):
    run, said = on_gpu
    assert run(lambda device: device.type) == "cuda"

    def broken(device: torch.device) -> None:
        raise RuntimeError("linalg.cholesky: the input is not positive-definite")

    with pytest.raises(RuntimeError, match="positive-definite"):
        run(broken)
    assert not said
