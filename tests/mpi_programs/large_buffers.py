"""A sum and a broadcast of more bytes than a 32-bit count can say."""

import torch

from probtensor.comm import abort_on_error, world


def main() -> None:
    comm = world()
    with abort_on_error(comm):
        n = 2**28 + 3  # float64: 2 GiB and a little
        marks = torch.tensor([0, 2**26, n // 2, n - 1])  # in several chunks; the rest stays 0, and so costs no memory
        values = torch.zeros(n, dtype=torch.float64)
        values[marks] = float(comm.rank + 1)
        total = comm.sum(values)
        assert torch.equal(total.nonzero().squeeze(1), marks)
        assert (total[marks] == comm.size * (comm.size + 1) / 2).all()
        del total
        received = comm.broadcast(values, root=comm.size - 1)
        assert torch.equal(received.nonzero().squeeze(1), marks)
        assert (received[marks] == comm.size).all()
    if comm.is_root:
        print("ok")


if __name__ == "__main__":
    main()
