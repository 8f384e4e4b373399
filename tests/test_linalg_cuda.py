"""Inverses of small matrices on a GPU against torch's."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def matrices(n: int, D: int, dtype: torch.dtype) -> torch.Tensor:
    """``1 + C J`` for covariances and precisions of very different sizes, some of them singular."""
    generator = torch.Generator("cuda").manual_seed(0)
    roots = torch.randn(2, n, D, max(D // 2, 1), generator=generator, dtype=dtype, device="cuda")
    scale = 10.0 ** torch.randint(-3, 3, (2, n, 1, 1), generator=generator, device="cuda")
    C, J = scale * (roots @ roots.mT)
    return torch.eye(D, dtype=dtype, device="cuda") + C @ J


@pytest.mark.parametrize("D", [1, 2, 3, 4, 9, 16, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inverses_and_determinants_are_as_good_as_conditions_allow(D: int, dtype: torch.dtype):
    from probtensor.linalg_cuda import inverse_and_log_det

    matrix = matrices(50, D, torch.float64).to(dtype)
    expected, log_det = torch.linalg.inv(matrix.double()), torch.linalg.slogdet(matrix.double()).logabsdet

    def errors(inverse: torch.Tensor, log: torch.Tensor) -> tuple[float, float]:
        inverse_error = (inverse - expected).abs().amax((-2, -1)) / expected.abs().amax((-2, -1))
        return float(inverse_error.max()), float((log - log_det).abs().max())

    worst = float(torch.linalg.cond(matrix.double()).max()) * torch.finfo(dtype).eps
    inverse_error, log_error = errors(*inverse_and_log_det(matrix))
    assert inverse_error < 10 * worst
    assert log_error < 10 * D * worst


def test_rows_are_exchanged_where_the_first_pivot_is_zero():
    from probtensor.linalg_cuda import inverse_and_log_det

    matrix = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 4.0], [1.0, 0.0, 0.0]], device="cuda")
    found, log_det = inverse_and_log_det(matrix[None])
    torch.testing.assert_close(found[0], torch.linalg.inv(matrix))
    torch.testing.assert_close(log_det.exp(), torch.full_like(log_det, 8.0))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_what_has_no_inverse_gives_no_finite_numbers(value: float):
    from probtensor.linalg_cuda import inverse_and_log_det

    found, log_det = inverse_and_log_det(torch.full((3, 4, 4), value, dtype=torch.float64, device="cuda"))
    assert not found.isfinite().any(dim=(1, 2)).all()
    assert not log_det.isfinite().any()


def test_no_matrices_and_several_dimensions_of_them():
    from probtensor.linalg_cuda import inverse_and_log_det

    found, log_det = inverse_and_log_det(torch.empty(0, 3, 3, device="cuda"))
    assert (found.shape, log_det.shape) == ((0, 3, 3), (0,))
    matrix = matrices(6, 3, torch.float64).reshape(2, 3, 3, 3)
    torch.testing.assert_close(inverse_and_log_det(matrix.mT)[0], torch.linalg.inv(matrix).mT)
