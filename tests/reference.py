"""Slow, dense, obviously right twins of the fast routines. Clarity before speed; the package imports nothing of it."""

import torch
from torch import Tensor

from probtensor.models.state_space import matern_covariance


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
    T, R = shift.shape
    K = torch.zeros(T, R, T, R)
    for r in range(R):
        K[:, r, :, r] = matern_covariance(nu, times[:, None] - times[None, :], lengthscale[r], variance[r])
    L = torch.zeros(T, R, T, R)
    for t in range(T):
        L[t, :, t, :] = precision[t]
    K, L, h = K.reshape(T * R, T * R), L.reshape(T * R, T * R), shift.reshape(T * R)
    one = torch.eye(T * R)
    covariance = torch.linalg.solve(one + K @ L, K)
    log_z = 0.5 * h @ covariance @ h - 0.5 * torch.linalg.slogdet(one + K @ L).logabsdet
    return (covariance @ h).reshape(T, R), covariance.reshape(T, R, T, R), log_z


def sequential_smoother(
    matrix: Tensor, noise: Tensor, observe: Tensor, precision: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Kalman filter and Rauch-Tung-Striebel smoother, one step after the other, with the update in information form.

    Returns smoothed means (T, D), covariances (T, D, D) and the log-normaliser.
    """
    T, D, _ = matrix.shape
    H = observe
    one = torch.eye(D)
    filtered_m, filtered_P, predicted_m, predicted_P = [], [], [], []
    m, P, log_z = torch.zeros(D), torch.zeros(D, D), torch.tensor(0.0)
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
