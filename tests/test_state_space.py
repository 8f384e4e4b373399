"""Steps of the Matérn chain against expm, Lyapunov's equation, high precision, and other libraries."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from pyro.ops.ssm_gp import MaternKernel
from sklearn.gaussian_process.kernels import Matern

from probtensor.models.state_space import (
    matern_covariance,
    state_dim,
    stationary_covariance,
    transition,
)
from tests.reference import F64, close, exact_step, f64, scaled_drift

NUS = [0.5, 1.5, 2.5]
LENGTHSCALE, VARIANCE = f64([0.7, 3.0]), f64([1.3, 0.2])
INTENSITY = {0.5: 2.0, 1.5: 4.0, 2.5: 16.0 / 3.0}


def rate(nu: float) -> torch.Tensor:
    """lambda of each component."""
    return math.sqrt(2 * nu) / LENGTHSCALE


@pytest.mark.parametrize("nu", NUS)
def test_transition_matrix_is_the_exponential_of_the_drift_block_by_block(nu: float):
    gaps = f64([1e-8, 0.01, 0.3, 1.0, 7.0])
    A, _ = transition(nu, gaps, LENGTHSCALE, VARIANCE)
    for j, gap in enumerate(gaps):
        blocks = [scipy.linalg.expm(float(x * gap) * np.array(scaled_drift(nu))) for x in rate(nu)]
        expected = scipy.linalg.block_diag(*blocks)
        assert np.abs(A[j].numpy() - expected).max() < 1e-13


@pytest.mark.parametrize("nu", NUS)
def test_stationary_covariance_solves_lyapunovs_equation(nu: float):
    F, d = np.array(scaled_drift(nu)), state_dim(nu)
    L = np.zeros((d, d))
    L[-1, -1] = INTENSITY[nu]
    unit = scipy.linalg.solve_continuous_lyapunov(F, -L)
    expected = scipy.linalg.block_diag(*(v * unit for v in VARIANCE.numpy()))
    assert np.abs(stationary_covariance(nu, VARIANCE).numpy() - expected).max() < 1e-14


@pytest.mark.parametrize("nu", NUS)
def test_noise_is_what_keeps_the_process_stationary(nu: float):
    A, Q = transition(nu, f64([0.05, 0.3, 1.0, 7.0]), LENGTHSCALE, VARIANCE)
    P = stationary_covariance(nu, VARIANCE)
    assert close(Q, P - A @ P @ A.mT, 1e-13)
    assert torch.equal(Q, Q.mT)


@pytest.mark.parametrize("nu", NUS)
@pytest.mark.parametrize("scaled_gap", ["1e-9", "1e-7", "1e-5", "1e-3", "0.03", "0.4", "3", "30"])
def test_noise_has_full_relative_accuracy_at_any_gap(nu: float, scaled_gap: str):
    one = f64([1.0])
    A, Q = transition(nu, f64([float(scaled_gap)]), math.sqrt(2 * nu) * one, one)
    exact_A, exact_Q = map(f64, exact_step(nu, scaled_gap))
    # Entries that vanish in the stationary state are sums of terms of size one that cancel: absolute there.
    assert torch.allclose(Q[0], exact_Q, rtol=1e-12, atol=1e-15 if float(scaled_gap) > 10 else 0.0)
    assert torch.allclose(A[0], exact_A, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("nu", NUS)
def test_noise_is_positive_semi_definite_at_tiny_gaps(nu: float):
    _, Q = transition(nu, f64([1e-9, 1e-6, 1e-3]), f64([1.0]), f64([1.0]))
    scale = Q.diagonal(dim1=1, dim2=2).rsqrt()
    correlation = scale[:, :, None] * Q * scale[:, None, :]
    assert torch.linalg.eigvalsh(correlation).min() > 0


@pytest.mark.parametrize("nu", NUS)
def test_a_step_of_length_zero_changes_nothing_exactly(nu: float):
    A, Q = transition(nu, f64([0.0, 1.0]), LENGTHSCALE, VARIANCE)
    assert torch.equal(A[0], torch.eye(2 * state_dim(nu), dtype=F64))
    assert torch.equal(Q[0], torch.zeros_like(Q[0]))


@pytest.mark.parametrize("nu", NUS)
@pytest.mark.parametrize("gap", [1e4, 3e6, 1e12])
def test_a_huge_step_forgets_everything(nu: float, gap: float):
    A, Q = transition(nu, f64([gap]), LENGTHSCALE, VARIANCE)
    assert torch.equal(A[0], torch.zeros_like(A[0]))
    assert close(Q[0], stationary_covariance(nu, VARIANCE), 1e-14)


@pytest.mark.parametrize("nu", NUS)
def test_first_entry_of_the_chain_has_the_kernels_covariance(nu: float):
    gaps, d = f64([0.0, 0.01, 0.5, 4.0]), state_dim(nu)
    A, _ = transition(nu, gaps, LENGTHSCALE, VARIANCE)
    chained = (A @ stationary_covariance(nu, VARIANCE))[:, ::d, ::d].diagonal(dim1=1, dim2=2)
    assert close(chained, matern_covariance(nu, gaps[:, None], LENGTHSCALE, VARIANCE), 1e-14)


@pytest.mark.parametrize("nu", NUS)
def test_kernel_equals_scikit_learn(nu: float):
    x = np.random.default_rng(0).uniform(-3, 3, size=(20, 1))
    distance = torch.from_numpy(x - x.T)
    expected = 2.5 * Matern(length_scale=0.8, nu=nu)(x)
    assert np.abs(matern_covariance(nu, distance, 0.8, 2.5).numpy() - expected).max() < 1e-14


@pytest.mark.parametrize("nu", NUS)
def test_gradients_in_the_hyperparameters_are_right_and_finite_for_gaps_from_zero(nu: float):
    gaps = f64([0.0, 1e-3, 0.5, 4.0])
    lengthscale, variance = LENGTHSCALE.clone().requires_grad_(), VARIANCE.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: tuple(transition(nu, gaps, x, v)), (lengthscale, variance))
    (gradient,) = torch.autograd.grad(transition(nu, gaps[:1], lengthscale, variance).noise.sum(), lengthscale)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("nu", NUS)
def test_rescaling_coordinates_and_lengthscales_together_changes_nothing(nu: float):
    gaps = f64([1e-4, 0.5, 3.0])
    for one, other in zip(
        transition(nu, gaps, LENGTHSCALE, VARIANCE),
        transition(nu, gaps * 2**40, LENGTHSCALE * 2**40, VARIANCE),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("nu", [1.0, 3.5, 0])
def test_an_unknown_smoothness_is_named(nu: float):
    with pytest.raises(ValueError, match=r"nu: expected 0\.5, 1\.5 or 2\.5, got"):
        transition(nu, f64([1.0]), f64([1.0]), f64([1.0]))


def pyro_in_our_state(nu: float, gap: float) -> torch.Tensor:
    """Pyro's transition matrices (R, d, d): rows to columns, and derivatives in units of the scaled time."""
    kernel = MaternKernel(nu, 2, LENGTHSCALE.clone(), VARIANCE.sqrt()).double()
    matrix = kernel.transition_matrix(f64(gap)).detach().mT
    power = torch.arange(state_dim(nu), dtype=F64)
    unit = rate(nu)[:, None] ** power  # our state is Pyro's divided by this
    return matrix * unit[:, None, :] / unit[:, :, None]


@pytest.mark.parametrize("nu", NUS)
@pytest.mark.parametrize("gap", [0.02, 0.5, 4.0])
def test_transition_matrix_equals_pyro(nu: float, gap: float):
    ours, _ = transition(nu, f64([gap]), LENGTHSCALE, VARIANCE)
    assert close(ours[0], torch.block_diag(*pyro_in_our_state(nu, gap)), 1e-12)


def test_equal_coordinates_are_right_where_pyro_divides_by_zero():
    # Pyro's nu = 5/2 divides by the gap; a tensor with repeated coordinates has gaps of zero.
    assert pyro_in_our_state(2.5, 0.0).isnan().any()
    ours, noise = transition(2.5, f64([0.0]), LENGTHSCALE, VARIANCE)
    assert torch.equal(ours[0], torch.eye(6, dtype=F64))
    assert not noise.any()
