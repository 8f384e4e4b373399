"""White parts of functions, integrated out and put back, against dense algebra at each coordinate."""

import math

import pytest
import torch
from torch import Tensor

from probtensor.inference.kalman import Sites
from probtensor.models.white import add_white, draw_white, without_white
from tests.reference import F64, close, f64, random_sites

VARIANCES = [f64([0.3]), f64([0.7, 0.02]), f64([1e-6, 2.0, 0.4])]
T = 5


def sites_of(variance: Tensor, seed: int = 0) -> Sites:
    """Sites at five coordinates: nothing was seen at the second, and at the third one direction only."""
    R = len(variance)
    precision, shift = (x.clone() for x in random_sites(torch.Generator().manual_seed(seed), T, R))
    precision[1], shift[1] = 0.0, 0.0
    direction = torch.arange(1.0, R + 1, dtype=F64)
    precision[2], shift[2] = 3.0 * torch.outer(direction, direction), 0.8 * direction
    return Sites(precision, shift)


def prior_of(R: int) -> tuple[Tensor, Tensor]:
    """Means (5, R) and covariances (5, R, R) of the smooth parts, before the sites."""
    generator = torch.Generator().manual_seed(R)
    half = torch.randn(T, R, R, generator=generator, dtype=F64)
    return torch.randn(T, R, generator=generator, dtype=F64), half @ half.mT + 0.1 * torch.eye(R, dtype=F64)


def posterior(mean: Tensor, covariance: Tensor, sites: Sites) -> tuple[Tensor, Tensor]:
    """Normals (n, R) times sites, one by one."""
    inverse = torch.linalg.inv(covariance)
    new = torch.linalg.inv(inverse + sites.precision)
    return (new @ ((inverse @ mean[..., None]) + sites.shift[..., None])).squeeze(-1), new


@pytest.mark.parametrize("variance", VARIANCES, ids=len)
def test_sites_without_the_white_part_are_its_integral(variance: Tensor):
    sites = sites_of(variance)
    smooth, constant = without_white(variance, sites)
    V_inverse, generator = torch.diag(1 / variance), torch.Generator().manual_seed(7)
    for _ in range(4):
        g = torch.randn(T, len(variance), generator=generator, dtype=F64)
        found, expected = constant.clone(), 0.0
        for L, h, new_L, new_h, x in zip(*sites, *smooth, g, strict=True):
            # exp(h' (x + e) - (x + e)' L (x + e) / 2) over e ~ N(0, V), completing the square.
            slope, curvature = h - L @ x, L + V_inverse
            expected = expected + h @ x - 0.5 * x @ L @ x + 0.5 * slope @ torch.linalg.solve(curvature, slope)
            expected = expected - 0.5 * torch.logdet(curvature) - 0.5 * variance.log().sum()
            found = found + new_h @ x - 0.5 * x @ new_L @ x
        assert float(found) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)
    assert close(smooth.precision, smooth.precision.mT, 1e-12)
    assert torch.equal(smooth.precision[1], torch.zeros_like(smooth.precision[1]))


@pytest.mark.parametrize("variance", VARIANCES, ids=len)
def test_functions_have_the_posterior_of_smooth_and_white_part_together(variance: Tensor):
    sites, (mean, covariance) = sites_of(variance), prior_of(len(variance))
    smooth_sites, _ = without_white(variance, sites)
    found = add_white(variance, sites, *posterior(mean, covariance, smooth_sites))
    expected = posterior(mean, covariance + torch.diag(variance), sites)
    assert close(found[0], expected[0], 1e-9)
    assert close(found[1], expected[1], 1e-9)
    # Where nothing was seen, the white part has its prior.
    assert close(found[0][1], mean[1], 1e-12)
    assert close(found[1][1], covariance[1] + torch.diag(variance), 1e-12)


def test_a_white_part_of_almost_no_variance_changes_nothing():
    variance, (mean, covariance) = f64([1e-14, 1e-14]), prior_of(2)
    sites = sites_of(variance)
    smooth, constant = without_white(variance, sites)
    assert close(smooth.precision, sites.precision, 1e-10)
    assert close(smooth.shift, sites.shift, 1e-10)
    assert abs(float(constant)) < 1e-10
    found = add_white(variance, sites, mean, covariance)
    assert close(found[0], mean, 1e-10)
    assert close(found[1], covariance, 1e-10)


def test_sites_without_the_white_part_have_the_right_gradients_in_its_variance():
    sites = sites_of(f64([0.7, 0.02]))
    variance = f64([0.7, 0.02]).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: (*without_white(v, sites)[0], without_white(v, sites)[1]), (variance,))


@pytest.mark.parametrize("variance", VARIANCES, ids=len)
def test_draws_around_given_smooth_parts_have_the_moments_of_the_white_part(variance: Tensor):
    n, R, sites = 20_000, len(variance), sites_of(variance)
    smooth, _ = prior_of(R)
    draws = draw_white(variance, sites, smooth.expand(n, T, R), torch.Generator().manual_seed(0))
    assert draws.shape == (n, T, R)
    # Given the smooth part, the value is N(smooth, V) times its site, and independent of all other coordinates.
    mean, covariance = posterior(smooth, torch.diag(variance).expand(T, R, R), sites)
    expected = torch.block_diag(*covariance)
    found = torch.cov(draws.reshape(n, T * R).T)
    std = expected.diagonal().sqrt()
    assert ((draws.mean(0) - mean).reshape(-1).abs() <= 4.5 * std / math.sqrt(n)).all()
    assert ((found - expected).abs() <= 6 * std[:, None] * std / math.sqrt(n)).all()


@pytest.mark.parametrize("variance", VARIANCES, ids=len)
def test_draws_around_drawn_smooth_parts_have_the_posterior_moments(variance: Tensor):
    n, R, sites = 20_000, len(variance), sites_of(variance)
    mean, covariance = posterior(*prior_of(R), without_white(variance, sites)[0])
    normal = torch.randn(n, T, R, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    smooth = mean + (torch.linalg.cholesky(covariance) @ normal).squeeze(-1)
    draws = draw_white(variance, sites, smooth, torch.Generator().manual_seed(0))
    expected_mean, expected = add_white(variance, sites, mean, covariance)
    std = expected.diagonal(dim1=1, dim2=2).sqrt()
    assert ((draws.mean(0) - expected_mean).abs() <= 4.5 * std / math.sqrt(n)).all()
    found = torch.stack([torch.cov(draws[:, t].T).reshape(R, R) for t in range(T)])
    assert ((found - expected).abs() <= 6 * std[:, :, None] * std[:, None, :] / math.sqrt(n)).all()
    again = draw_white(variance, sites, smooth[:5], torch.Generator().manual_seed(3))
    assert torch.equal(again, draw_white(variance, sites, smooth[:5], torch.Generator().manual_seed(3)))
