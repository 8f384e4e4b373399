"""Sums over rows on a GPU against the sums of all rows' own terms."""

import pytest
import torch

from probtensor.contract import CP, pack
from tests.reference import F64

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(("K", "n", "R"), [(3, 5000, 3), (2, 50, 2), (4, 77, 1), (3, 0, 2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_equal_those_of_all_rows(K: int, n: int, R: int, weighted: bool):
    from probtensor.contract_cuda import cp_sums, group_rows

    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [5, 7, 3, 4][:K]
    positions = torch.stack([torch.randint(s, (n,), generator=generator, device="cuda") for s in sizes])
    y, w = (torch.rand(n, generator=generator, dtype=F64, device="cuda") for _ in range(2))
    means = [torch.randn(s, R, generator=generator, dtype=F64, device="cuda") for s in sizes]
    seconds = [pack(m[:, :, None] * m[:, None, :] + torch.eye(R, device="cuda")) for m in means]
    groups = group_rows(positions, sizes)
    for k in range(K):
        others = [j for j in range(K) if j != k]
        weights = w if weighted else None
        found = cp_sums(groups[k], [means[j] for j in others], [seconds[j] for j in others], y, weights)
        a, aa = CP().partial(
            k,
            [x[p] for x, p in zip(means, positions, strict=True)],
            [x[p] for x, p in zip(seconds, positions, strict=True)],
        )
        terms = torch.cat([aa, y[:, None] * a], dim=1) * (w[:, None] if weighted else 1.0)
        expected = found.new_zeros(found.shape).index_add_(0, positions[k], terms)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
