"""One rank raises outside of any block that would end the job; the others wait for it."""

import torch

from probtensor.comm import world


def main() -> None:
    comm = world()
    if comm.rank == 1:
        raise ArithmeticError("nobody catches this")
    comm.sum(torch.ones(3))


if __name__ == "__main__":
    main()
