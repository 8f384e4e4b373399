"""What the benchmarks' commands share: the application, the machine's name, the table's way out."""

import platform
from pathlib import Path
from typing import Annotated

import torch
import typer

__all__ = ["Out", "app", "machine", "report"]

app = typer.Typer(no_args_is_help=True, add_completion=False)
Out = Annotated[Path | None, typer.Option(help="File for the table.")]


def machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if "model name" in line]
        if cpu.exists()
        else []
    )
    return names[0] if names else platform.processor()


def report(lines: list[str], out: Path | None) -> None:
    text = "\n".join(lines) + "\n"
    print(text)
    if out is not None:
        out.write_text(text)
