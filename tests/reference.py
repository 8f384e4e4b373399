"""Slow, dense, obviously right twins of the fast routines. Clarity before speed; the package imports nothing of it.

Everything is float64 on the CPU. Covariances of T coordinates and R functions have shape (T, R, T, R).
"""

import itertools
import math
from collections.abc import Sequence

import mpmath
import torch
from torch import Tensor

from probtensor.models.state_space import matern_covariance

F64 = torch.float64


def f64(values: object) -> Tensor:
    """A float64 tensor of numbers."""
    return torch.tensor(values, dtype=F64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    """Whether the largest error is below `tolerance` times the largest expected number (times 1 where all are less)."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return True
    return bool((actual - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


# --- state space ------------------------------------------------------------------------------------------------------


def scaled_drift(nu: float) -> list[list[float]]:
    """Drift F of the state (f, f', f'') in the time s = lambda t: the companion matrix of (x + 1)^d."""
    d = round(nu + 0.5)
    rows = [[1.0 if j == i + 1 else 0.0 for j in range(d)] for i in range(d - 1)]
    return [*rows, [-float(math.comb(d, i)) for i in range(d)]]


def exact_step(nu: float, s: str, digits: int = 80) -> tuple[list[list[float]], list[list[float]]]:
    """A = expm(F s) and Q = P_inf - A P_inf A' at unit variance, in `digits` digits, so that nothing cancels."""
    third = mpmath.mpf(1)
    with mpmath.workdps(digits):
        third = mpmath.mpf(1) / 3
        stationary = {
            0.5: mpmath.matrix([[1]]),
            1.5: mpmath.matrix([[1, 0], [0, 1]]),
            2.5: mpmath.matrix([[1, 0, -third], [0, third, 0], [-third, 0, 1]]),
        }[nu]
        A = mpmath.expm(mpmath.matrix(scaled_drift(nu)) * mpmath.mpf(s))
        Q = stationary - A * stationary * A.T
        d = stationary.rows
        return tuple([[float(M[i, j]) for j in range(d)] for i in range(d)] for M in (A, Q))


# --- Gaussian processes and chains ------------------------------------------------------------------------------------


def dense_prior(nu: float, times: Tensor, lengthscale: Tensor, variance: Tensor) -> Tensor:
    """Prior covariance (T, R, T, R) of R independent Matérn processes."""
    T, R = len(times), len(variance)
    K = torch.zeros(T, R, T, R, dtype=F64)
    for r in range(R):
        K[:, r, :, r] = matern_covariance(nu, times[:, None] - times[None, :], lengthscale[r], variance[r])
    return K


def dense_posterior(prior: Tensor, precision: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (T, R), covariance (T, R, T, R) and log-normaliser of ``N(0, prior)`` times one R x R site a coordinate."""
    T, R = shift.shape
    L = torch.zeros(T, R, T, R, dtype=F64)
    for t in range(T):
        L[t, :, t, :] = precision[t]
    K, L, h = prior.reshape(T * R, T * R), L.reshape(T * R, T * R), shift.reshape(T * R)
    one = torch.eye(T * R, dtype=F64)
    covariance = torch.linalg.solve(one + K @ L, K)
    log_z = 0.5 * h @ covariance @ h - 0.5 * torch.linalg.slogdet(one + K @ L).logabsdet
    return (covariance @ h).reshape(T, R), covariance.reshape(T, R, T, R), log_z


def dense_gp(
    nu: float,
    times: Tensor,
    lengthscale: Tensor,
    variance: Tensor,
    precision: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior of R independent Matérn processes at T times under coupled R x R sites, by one (T R) x (T R) matrix.

    Returns the mean (T, R), the joint covariance (T, R, T, R) and the log-normaliser.
    """
    return dense_posterior(dense_prior(nu, times, lengthscale, variance), precision, shift)


def dense_gp_at(
    nu: float,
    times: Tensor,
    lengthscale: Tensor,
    variance: Tensor,
    precision: Tensor,
    shift: Tensor,
    where: Tensor,
) -> tuple[Tensor, Tensor]:
    """Posterior mean (n, R) and joint covariance (n, R, n, R) at other times: they join the rest without a site."""
    T, (n, R) = len(times), (len(where), shift.shape[1])
    precision = torch.cat([precision, torch.zeros(n, R, R, dtype=F64)])
    shift = torch.cat([shift, torch.zeros(n, R, dtype=F64)])
    mean, covariance, _ = dense_gp(nu, torch.cat([times, where]), lengthscale, variance, precision, shift)
    return mean[T:], covariance[T:, :, T:, :]


def blocks(covariance: Tensor) -> Tensor:
    """The R x R covariance of each coordinate, (T, R, R), from the joint (T, R, T, R)."""
    return torch.stack([covariance[t, :, t, :] for t in range(covariance.shape[0])])


def sequential_smoother(
    matrix: Tensor, noise: Tensor, observe: Tensor, precision: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Kalman filter and Rauch-Tung-Striebel smoother, one step after the other, with the update in information form.

    Returns smoothed means (T, D), covariances (T, D, D) and the log-normaliser. Needs regular predicted covariances.
    """
    T, D, _ = matrix.shape
    H = observe
    one = torch.eye(D, dtype=F64)
    filtered_m, filtered_P, predicted_m, predicted_P = [], [], [], []
    m, P, log_z = torch.zeros(D, dtype=F64), torch.zeros(D, D, dtype=F64), f64(0.0)
    for j in range(T):
        m, P = matrix[j] @ m, matrix[j] @ P @ matrix[j].T + noise[j]
        predicted_m.append(m)
        predicted_P.append(P)
        L, h = H.T @ precision[j] @ H, H.T @ shift[j]
        gain = torch.linalg.inv(one + P @ L)
        rest = h - L @ m
        log_z = log_z + h @ m - 0.5 * m @ L @ m + 0.5 * rest @ gain @ P @ rest - 0.5 * torch.logdet(one + P @ L)
        m, P = gain @ (m + P @ h), gain @ P
        filtered_m.append(m)
        filtered_P.append(P)
    means, covariances = [filtered_m[-1]], [filtered_P[-1]]
    for j in range(T - 2, -1, -1):
        G = torch.linalg.solve(predicted_P[j + 1], matrix[j + 1] @ filtered_P[j]).T
        means.append(filtered_m[j] + G @ (means[-1] - predicted_m[j + 1]))
        covariances.append(filtered_P[j] + G @ (covariances[-1] - predicted_P[j + 1]) @ G.T)
    return torch.stack(means[::-1]), torch.stack(covariances[::-1]), log_z


def dense_kl(mean: Tensor, covariance: Tensor, prior: Tensor) -> Tensor:
    """Kullback-Leibler divergence of N(mean, covariance) from N(0, prior), all of it flattened."""
    m = mean.reshape(-1)
    n = len(m)
    C, K = covariance.reshape(n, n), prior.reshape(n, n)
    log_dets = torch.linalg.slogdet(K).logabsdet - torch.linalg.slogdet(C).logabsdet
    return 0.5 * (torch.linalg.solve(K, C).trace() + m @ torch.linalg.solve(K, m) - n + log_dets)


# --- tensors, one row at a time ---------------------------------------------------------------------------------------


def superdiagonal(rank: int, K: int) -> Tensor:
    """The core that makes a Tucker structure CP."""
    core = torch.zeros([rank] * K, dtype=F64)
    for r in range(rank):
        core[(r,) * K] = 1.0
    return core


def kron(parts: Sequence[Tensor]) -> Tensor:
    """Kronecker product of vectors or of matrices, first factor slowest; of none, 1."""
    total = torch.ones([1] * parts[0].ndim, dtype=F64) if len(parts) else torch.ones(1, dtype=F64)
    for part in parts:
        total = torch.kron(total, part)
    return total


def core_second(core: Tensor, covariance: Tensor) -> Tensor:
    """E W W', shape (R_1, ..., R_K, R_1, ..., R_K)."""
    flat = core.reshape(-1)
    return (torch.outer(flat, flat) + covariance).reshape(*core.shape, *core.shape)


def entry(core: Tensor, vectors: Sequence[Tensor]) -> float:
    """f = sum_{r1..rK} W[r1..rK] prod_k u^k[rk], one term after the other."""
    total = 0.0
    for index in itertools.product(*map(range, core.shape)):
        total += float(core[index]) * math.prod(float(u[r]) for u, r in zip(vectors, index, strict=True))
    return total


def entry_second(core: Tensor, covariance: Tensor, seconds: Sequence[Tensor]) -> float:
    """E f^2, one pair of terms after the other."""
    WW = core_second(core, covariance).numpy()
    matrices = [M.numpy() for M in seconds]
    total = 0.0
    for p in itertools.product(*map(range, core.shape)):
        for q in itertools.product(*map(range, core.shape)):
            total += WW[p + q] * math.prod(M[i, j] for M, i, j in zip(matrices, p, q, strict=True))
    return total


def message(
    core: Tensor, covariance: Tensor, mode: int, means: Sequence[Tensor], seconds: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """E a (R_k,) and E a a' (R_k, R_k) of one row, for a = W_(k) (kron of the other modes), by Kronecker products."""
    K, R = core.ndim, core.shape[mode]
    others = [k for k in range(K) if k != mode]
    unfolded = core.permute(mode, *others).reshape(R, -1)
    pairs = core_second(core, covariance).permute(mode, *others, K + mode, *(K + k for k in others))
    pairs = pairs.reshape(R, -1, R, unfolded.shape[1])
    if not others:
        return unfolded[:, 0], pairs[:, 0, :, 0]
    a = unfolded @ kron([means[k] for k in others])
    aa = torch.einsum("puqw,uw->pq", pairs, kron([seconds[k] for k in others]))
    return a, aa


def mode_statistics(
    core: Tensor,
    covariance: Tensor,
    mode: int,
    means: Sequence[Tensor],
    seconds: Sequence[Tensor],
    positions: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sums of E a a' (T, R, R) and of y E a (T, R) over the rows of each coordinate, row after row."""
    T, R = means[mode].shape
    precision, shift = torch.zeros(T, R, R, dtype=F64), torch.zeros(T, R, dtype=F64)
    for n, y in enumerate(values):
        row = [int(p) for p in positions[:, n]]
        m = [x[i] for x, i in zip(means, row, strict=True)]
        M = [x[i] for x, i in zip(seconds, row, strict=True)]
        a, aa = message(core, covariance, mode, m, M)
        precision[row[mode]] += aa
        shift[row[mode]] += y * a
    return precision, shift


def condition_on_ones(prior: Tensor, free: Tensor, precision: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior of a mode's free columns when the others are known to be one.

    The joint Gaussian of all columns (the known ones with a prior N(0, 1), which does not matter) under the sites is
    conditioned on the known columns. Gives mean (T, F) and covariance (T, F, T, F) of the F free columns.
    """
    T, R = shift.shape
    joint = torch.zeros(T, R, T, R, dtype=F64)
    columns = free.nonzero().squeeze(-1).tolist()
    for i, r in enumerate(columns):
        for j, q in enumerate(columns):
            joint[:, r, :, q] = prior[:, i, :, j]
    for r in (~free).nonzero().squeeze(-1).tolist():
        joint[:, r, :, r] = torch.eye(T, dtype=F64)
    mean, covariance, _ = dense_posterior(joint, precision, shift)
    is_free = free.repeat(T)
    m, C = mean.reshape(-1), covariance.reshape(T * R, T * R)
    gain = torch.linalg.solve(C[~is_free][:, ~is_free], C[~is_free][:, is_free]).T
    m_free = m[is_free] + gain @ (1.0 - m[~is_free])
    C_free = C[is_free][:, is_free] - gain @ C[~is_free][:, is_free]
    F = len(columns)
    return m_free.reshape(T, F), C_free.reshape(T, F, T, F)


def core_posterior(
    tau: Tensor, means: Sequence[Tensor], seconds: Sequence[Tensor], positions: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of vec(W) ~ N(0, I) given the rows, row after row."""
    size = math.prod(x.shape[1] for x in means)
    precision, shift = torch.eye(size, dtype=F64), torch.zeros(size, dtype=F64)
    for n, y in enumerate(values):
        row = [int(p) for p in positions[:, n]]
        precision = precision + tau * kron([x[i] for x, i in zip(seconds, row, strict=True)])
        shift = shift + tau * y * kron([x[i] for x, i in zip(means, row, strict=True)])
    covariance = torch.linalg.inv(precision)
    return covariance @ shift, covariance


def squared_error(
    core: Tensor,
    covariance: Tensor,
    means: Sequence[Tensor],
    seconds: Sequence[Tensor],
    positions: Tensor,
    values: Tensor,
) -> float:
    """sum_n E (y_n - f_n)^2, row after row."""
    total = 0.0
    for n, y in enumerate(values):
        row = [int(p) for p in positions[:, n]]
        f = entry(core, [x[i] for x, i in zip(means, row, strict=True)])
        ff = entry_second(core, covariance, [x[i] for x, i in zip(seconds, row, strict=True)])
        total += float(y) ** 2 - 2 * float(y) * f + ff
    return total


# --- random inputs ----------------------------------------------------------------------------------------------------


def random_sites(generator: torch.Generator, T: int, R: int) -> tuple[Tensor, Tensor]:
    """Sites in turn coupled and regular, singular (rank one), and zero; shifts lie in the range of the precision."""
    roots = torch.randn(T, R, R, generator=generator, dtype=F64)
    roots[1::3, :, 1:] = 0.0
    roots[2::3] = 0.0
    targets = torch.randn(T, R, 1, generator=generator, dtype=F64)
    precision = 2.0 * roots @ roots.mT
    return precision, (precision @ targets).squeeze(-1)


def random_moments(generator: torch.Generator, n: int, R: int) -> tuple[Tensor, Tensor]:
    """Means (n, R) and second moments (n, R, R) of random Gaussians."""
    mean = torch.randn(n, R, generator=generator, dtype=F64)
    root = torch.randn(n, R, R, generator=generator, dtype=F64)
    return mean, root @ root.mT / R + mean[:, :, None] * mean[:, None, :]


def random_covariance(generator: torch.Generator, size: int) -> Tensor:
    """A positive definite matrix."""
    root = torch.randn(size, size, generator=generator, dtype=F64)
    return root @ root.T / size + 0.1 * torch.eye(size, dtype=F64)
