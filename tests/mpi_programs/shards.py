"""Shares of one table, read over MPI from several formats, against the table that one process reads.

Its argument is a folder with tables `x.*` of ten rows and a malformed one, `bad.csv`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mpi4py import MPI

from probtensor.comm import Comm, abort_on_error, world
from probtensor.comm_mpi import Mpi
from probtensor.readers import read_table
from probtensor.shards import read_shard


def check(path: Path, comm: Comm) -> None:
    for value in ("y", None):
        ways = {"continuous": ["when", "dose"], "categorical": ["plate", "well", "weight"]}
        X, y = read_table(path, value, columns=list(ways["continuous"] + ways["categorical"]), **ways)
        part, values = read_shard(path, comm, value, columns=list(X.columns), **ways)
        assert part.dtypes.tolist() == X.dtypes.tolist(), (path, part.dtypes, X.dtypes)
        start = sum(json.loads(n) for n in comm.gather_bytes(json.dumps(len(part)).encode())[: comm.rank])
        whole = X.iloc[start : start + len(part)].reset_index(drop=True)
        pd.testing.assert_frame_equal(part, whole, check_exact=True)
        if value is None:
            assert values is None
            assert len(part) == 10 * (comm.rank + 1) // comm.size - 10 * comm.rank // comm.size
        else:
            np.testing.assert_array_equal(values, y[start : start + len(part)])


def check_faults(folder: Path, comm: Comm) -> None:
    where = "^" if comm.size == 1 else r"^rank \d+: "
    with pytest.raises(ValueError, match=f"{where}path: expected 3 fields as the header has, got 4 on row 7 of"):
        read_shard(folder / "bad.csv", comm, "y")
    name = "missing.csv" if comm.rank == comm.size - 1 else "x.csv"
    with pytest.raises(FileNotFoundError if comm.size == 1 else ValueError, match=r"missing\.csv"):
        read_shard(folder / name, comm, "y")


def main() -> None:
    comm = world()
    folder = Path(sys.argv[1])
    # Groups of several sizes in one job: starting the ranks is what takes the time.
    sizes = [comm.size] if comm.size < 12 else [1, 2, 3, 5, comm.size - 11]
    group = MPI.COMM_WORLD.Split(int(np.repeat(np.arange(len(sizes)), sizes)[comm.rank]))
    with abort_on_error(comm):
        for ranks in (comm, Mpi(group)):
            check_faults(folder, ranks)
            for path in sorted(folder.glob("x.*")):
                check(path, ranks)
    if comm.is_root:
        print(f"ok on {comm.size}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
