"""Commands that measure adapters."""

import torch

from benchmarks.adapters import adapter_lines
from benchmarks.adapters_cuda import cuda_adapter_lines
from benchmarks.commands import Out, app, machine, report


@app.command()
def adapters(rank: int = 16, kernel_rank: int = 2, repeats: int = 15, device: str = "cpu", out: Out = None) -> None:
    """A layer with a FLoRA adapter beside the frozen layer: time of forward and backward, bytes kept for backward."""
    if device != "cpu":
        found = cuda_adapter_lines(rank, kernel_rank, repeats)
        report([f"{machine(device)}; r = {rank}, kernel ranks {kernel_rank}", "", *found], out)
        return
    torch.set_num_threads(1)
    lines = adapter_lines(rank, kernel_rank, repeats)
    report([f"{machine('cpu')}, one thread; r = {rank}, kernel ranks {kernel_rank}", "", *lines], out)
