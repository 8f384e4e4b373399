"""Command line of the benchmarks; each prints a Markdown table, which `--out` writes too."""

from benchmarks import (
    adapter_commands,
    bayesian_commands,
    classical_commands,
    completion_commands,
    finetune_commands,
    funbat_commands,
    run_commands,
    sparse_commands,
)
from benchmarks.commands import app

__all__ = [
    "adapter_commands",
    "bayesian_commands",
    "classical_commands",
    "completion_commands",
    "finetune_commands",
    "funbat_commands",
    "run_commands",
    "sparse_commands",
]

if __name__ == "__main__":
    app()
