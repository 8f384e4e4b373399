"""One rank fails while the others wait for it; how it fails is the first argument."""

import sys

import torch

from probtensor.comm import abort_on_error, world


def main() -> None:
    comm = world()
    with abort_on_error(comm):
        if comm.rank == comm.size - 1:
            if sys.argv[1] == "exception":
                raise ArithmeticError("this rank met a singular matrix")
            sys.exit(7)
        comm.sum(torch.ones(3))


if __name__ == "__main__":
    main()
