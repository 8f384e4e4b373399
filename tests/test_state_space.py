"""Steps of the chains of all kernels against expm, Lyapunov's equation, high precision, and other libraries."""

import math

import numpy as np
import pyro
import pytest
import scipy.linalg
import scipy.special
import torch
from pyro.ops.ssm_gp import MaternKernel
from sklearn.gaussian_process.kernels import ExpSineSquared, Matern

import probtensor as pt
from probtensor.kernels import Kernel
from probtensor.models.kernel_states import Extent, KernelState, kernel_state
from probtensor.models.state_space import (
    block_diagonal,
    matern_covariance,
    state_dim,
    stationary_covariance,
    transition,
)
from tests.reference import F64, close, exact_step, f64, scaled_drift
from tests.reference_kernels import fourier_coefficients, kernel_covariance

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
    with pyro.get_param_store().scope():  # the kernel puts its parameters there
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


# --- kernels of one's choice ------------------------------------------------------------------------------------------

KERNELS = [
    *map(pt.Matern, NUS),
    pt.Periodic(1.7),
    pt.Periodic(20.0, n_harmonics=1),
    pt.Linear(),
    pt.Matern(1.5) + pt.Periodic(1.7, n_harmonics=3),
    pt.Periodic(0.9, n_harmonics=2) + pt.Linear() + pt.Matern(2.5) + pt.Periodic(7.0, n_harmonics=3),
]
X = f64([-1.0, -0.2, -0.2 + 1e-9, 3.0, 3.5, 9.0])
EXTENT = Extent(4.0, 10.0, 6)


def form_and_hyper(kernel: Kernel, R: int = 2) -> tuple[KernelState, torch.Tensor]:
    unit = torch.rand(len(kernel.hyperparameters), R, generator=torch.Generator().manual_seed(2), dtype=F64)
    return kernel_state(kernel, EXTENT), 0.4 + 1.1 * unit


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_chained_states_have_the_kernels_covariance(kernel: Kernel):
    form, hyper = form_and_hyper(kernel)
    h = f64(form.observe)
    for i, x in enumerate(X):
        prior = form.prior(x[None], hyper)
        A, _ = form.step(X[i:] - x, hyper)  # (n, R, d, d)
        chained = torch.einsum("i,nrij,rjk,k->rn", h, A, prior[0], h)
        expected = torch.stack([kernel_covariance(kernel, x[None], X[i:], hyper[:, r], X)[0] for r in range(2)])
        assert close(chained, expected, 1e-13)
        assert close(form.covariance(x[None], X[i:], hyper)[:, 0], expected, 1e-13)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_a_step_keeps_the_prior_and_two_steps_are_one(kernel: Kernel):
    form, hyper = form_and_hyper(kernel)
    (A, B, AB), Q = form.step(f64([0.3, 1.9, 2.2]), hyper)
    assert close(B @ A, AB, 1e-14)
    assert close(B @ Q[0] @ B.mT + Q[1], Q[2], 1e-14)
    priors = form.prior(f64([0.5, 0.8]), hyper)
    assert close(A @ priors[0] @ A.mT + Q[0], priors[-1], 1e-14)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_a_step_of_length_zero_changes_nothing_for_any_kernel(kernel: Kernel):
    form, hyper = form_and_hyper(kernel)
    A, Q = form.step(f64([0.0, 1.0]), hyper)
    assert torch.equal(block_diagonal(A)[0], torch.eye(2 * len(form.observe), dtype=F64))
    assert torch.equal(Q[0], torch.zeros_like(Q[0]))


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_gradients_in_the_hyperparameters_of_any_kernel(kernel: Kernel):
    form, hyper = form_and_hyper(kernel)
    hyper.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: (form.prior(X[:2], h), form.step(f64([0.0, 0.5]), h).noise), hyper)


@pytest.mark.parametrize("n_harmonics", [1, 2, 7, 40])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_prior_of_a_periodic_state_holds_the_bessel_functions(n_harmonics: int, scale: float):
    form = kernel_state(pt.Periodic(3.0, n_harmonics), EXTENT)
    low, high = form.bounds()[0]
    lengthscale = low + scale * (high - low)
    bessel = scipy.special.ive(np.arange(n_harmonics + 1), 1 / lengthscale**2)
    bessel[1:] *= 2
    diagonal = form.prior(X[:1], f64([[lengthscale], [2.5]]))[0, 0].diagonal()
    q = torch.cat([diagonal[:1], diagonal[1::2]])
    assert np.abs(q.numpy() - 2.5 * bessel / bessel.sum()).max() < 1e-14
    assert torch.equal(diagonal[1::2], diagonal[2::2])
    # what the bounds' comment promises: little is cut off
    cut = 1 - bessel.sum()
    assert cut < (0.12 if n_harmonics == 1 else 0.03)
    assert close(fourier_coefficients(f64(lengthscale))[: n_harmonics + 1], torch.from_numpy(bessel), 1e-14)


def test_many_harmonics_are_the_periodic_kernel_of_scikit_learn():
    # Theirs is exp(-2 sin^2(pi d / p) / l^2), the same as ours.
    x = np.random.default_rng(0).uniform(-9, 9, size=(20, 1))
    expected = 2.5 * ExpSineSquared(length_scale=0.7, periodicity=1.3)(x)
    form, at = kernel_state(pt.Periodic(1.3, 30), EXTENT), torch.from_numpy(x[:, 0])
    assert np.abs(form.covariance(at, at, f64([[0.7], [2.5]]))[0].numpy() - expected).max() < 1e-13


def test_a_periodic_state_returns_after_any_number_of_periods():
    form, hyper = form_and_hyper(pt.Periodic(0.25))
    A, Q = form.step(f64([0.25, 0.5, 0.25 * 2**40]), hyper)
    assert torch.equal(A, torch.eye(15, dtype=F64).expand(3, 2, 15, 15))
    assert not Q.any()


def test_an_unknown_kernel_is_named():
    with pytest.raises(TypeError, match="kernel: expected Matern, Periodic, Linear or a sum of them, got float"):
        kernel_state(1.5, EXTENT)
