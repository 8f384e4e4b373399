"""The ranks named on the command line stay away from a barrier; the others must say which."""

import sys
import time

from probtensor.comm import abort_on_error
from probtensor.comm_mpi import Mpi


def main() -> None:
    comm = Mpi()
    absent = [int(argument) for argument in sys.argv[1:]]
    with abort_on_error(comm):
        comm.barrier(timeout=30.0)
        if comm.rank in absent:
            time.sleep(120.0)
        comm.barrier(timeout=1.0)


if __name__ == "__main__":
    main()
