"""Slow, dense, obviously right twins of sparse coding: loops over points and states, nothing shared with the package.

Data Y (N, D) hold NaN where nothing was observed; such entries enter nowhere. A state s is a tuple of H values, for a
mixture the index of a component. ``states[n]`` lists the states that point n may be in, ``q[n]`` their probabilities.
Parameters of a model are a dict: ``log_joint_bsc(y, s, **params)``, ``sample_bsc(rng, N, **params)``, and
``m_step_bsc(Y, states, q, params)``, which gives the next dict. W is (D, H), as in the papers; float64 everywhere.

Every M-step maximises the expected log joint of the completed data, thus never lowers the bound; those of MCA and MMCA
do so for winners that stay as they were under the old W.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln, logsumexp
from scipy.stats import multivariate_normal, norm

Array = npt.NDArray[np.float64]
State = Any  # a tuple of H values, or the index of a component
Params = dict[str, Any]
States = Sequence[Sequence[State]]


# --- sets of states, and what holds for any model ---------------------------------------------------------------------


def enumerate_states(H: int, values: Sequence[float] = (0, 1)) -> list[State]:
    """All K^H states."""
    return list(itertools.product(values, repeat=H))


def et_states(candidates: Iterable[int], H: int, values: Sequence[float] = (0, 1), max_active: int = 2) -> list[State]:
    """Zero, all singletons of all H causes, and the states of 2 to max_active non-zeros inside the candidates."""
    inside = set(candidates)
    found = []
    for s in enumerate_states(H, values):
        active = {h for h in range(H) if s[h] != 0}
        if len(active) <= 1 or (len(active) <= max_active and active <= inside):
            found.append(s)
    return found


def log_joints(log_joint: Callable[[Array, State], float], Y: Array, states: States) -> list[Array]:
    """log p(y_n, s) of each point's states."""
    return [np.array([log_joint(y, s) for s in of_point]) for y, of_point in zip(Y, states, strict=True)]


def bound(log_joint: Callable[[Array, State], float], Y: Array, states: States) -> float:
    """Sum over the points of log sum_s p(y_n, s); the log-likelihood where the states are all there are."""
    return float(sum(logsumexp(values) for values in log_joints(log_joint, Y, states)))


def posterior(log_joint: Callable[[Array, State], float], Y: Array, states: States) -> list[Array]:
    """Probabilities of each point's states, normalised over these states."""
    return [np.exp(values - logsumexp(values)) for values in log_joints(log_joint, Y, states)]


def expectation(function: Callable[[Array, State], Any], Y: Array, states: States, q: Sequence[Array]) -> Array:
    """<function(y_n, s)> for each point, (N, ...)."""
    return np.array(
        [
            sum(probability * np.asarray(function(y, s), dtype=np.float64) for s, probability in zip(k, p, strict=True))
            for y, k, p in zip(Y, states, q, strict=True)
        ]
    )


def triples(Y: Array, states: States, q: Sequence[Array]) -> list[tuple[Array, State, float]]:
    """(y_n, s, q_n(s)) of all points and their states, one after the other."""
    return [(y, s, float(weight)) for y, k, p in zip(Y, states, q, strict=True) for s, weight in zip(k, p, strict=True)]


def log_normal(y: Array, mean: Array, sigma: float) -> float:
    """log N(y; mean, sigma^2 I) of the observed entries."""
    seen = ~np.isnan(y)
    return float(norm.logpdf(y[seen], mean[seen], sigma).sum())


def log_bernoulli(s: State, pi: Any) -> float:
    """log p(s) of independent binary causes; pi is one number or (H,). Zero times log zero is zero."""
    chances = np.broadcast_to(np.asarray(pi, dtype=np.float64), (len(s),))
    with np.errstate(divide="ignore"):
        return float(sum(np.log(p) if on else np.log1p(-p) for on, p in zip(s, chances, strict=True)))


def draw_binary(rng: np.random.Generator, N: int, H: int, pi: Any) -> Array:
    """N states of independent binary causes, (N, H)."""
    return (rng.random((N, H)) < np.broadcast_to(pi, (H,))).astype(np.float64)


def with_noise(rng: np.random.Generator, mean: Array, sigma: float) -> Array:
    """Add Gaussian noise to every entry, also where the mean is zero."""
    return mean + sigma * rng.standard_normal(mean.shape)


# --- linear superposition of discrete causes: BSC, DSC, TSC -----------------------------------------------------------


def log_joint_bsc(y: Array, s: State, W: Array, pi: Any, sigma: float) -> float:
    """s_h ~ Bernoulli(pi), y ~ N(W s, sigma^2 I)."""
    return log_bernoulli(s, pi) + log_normal(y, W @ np.asarray(s, dtype=np.float64), sigma)


def log_joint_dsc(y: Array, s: State, W: Array, phi: Sequence[float], probabilities: Array, sigma: float) -> float:
    """P(s_h = phi_k) = probabilities_k, y ~ N(W s, sigma^2 I)."""
    with np.errstate(divide="ignore"):
        log_prior = sum(float(np.log(probabilities[list(phi).index(value)])) for value in s)
    return log_prior + log_normal(y, W @ np.asarray(s, dtype=np.float64), sigma)


def log_joint_tsc(y: Array, s: State, W: Array, pi: float, sigma: float) -> float:
    """P(s_h = 0) = 1 - pi, P(s_h = -1) = P(s_h = 1) = pi / 2, y ~ N(W s, sigma^2 I)."""
    return log_joint_dsc(y, s, W, (-1, 0, 1), np.array([pi / 2, 1 - pi, pi / 2]), sigma)


def sample_bsc(rng: np.random.Generator, N: int, W: Array, pi: Any, sigma: float) -> tuple[Array, Array]:
    """Data (N, D) and their states (N, H)."""
    S = draw_binary(rng, N, W.shape[1], pi)
    return with_noise(rng, S @ W.T, sigma), S


def sample_dsc(
    rng: np.random.Generator, N: int, W: Array, phi: Sequence[float], probabilities: Array, sigma: float
) -> tuple[Array, Array]:
    """Data (N, D) and their states (N, H)."""
    S = rng.choice(np.asarray(phi, dtype=np.float64), size=(N, W.shape[1]), p=probabilities)
    return with_noise(rng, S @ W.T, sigma), S


def sample_tsc(rng: np.random.Generator, N: int, W: Array, pi: float, sigma: float) -> tuple[Array, Array]:
    """Data (N, D) and their states (N, H)."""
    return sample_dsc(rng, N, W, (-1, 0, 1), np.array([pi / 2, 1 - pi, pi / 2]), sigma)


def m_step_linear(Y: Array, states: States, q: Sequence[Array]) -> tuple[Array, float]:
    """W and sigma: each row of W by weighted least squares over (point, state) pairs, then the residuals' variance.

    Where the pairs leave W undetermined (a cause in no state, a pixel never observed) it is the shortest solution.
    """
    pairs = triples(Y, states, q)
    D, H = Y.shape[1], len(pairs[0][1])
    W = np.zeros((D, H))
    for d in range(D):
        rows = [(math.sqrt(weight) * np.asarray(s, float), math.sqrt(weight) * y[d]) for y, s, weight in pairs
                if not np.isnan(y[d])]  # fmt: skip
        if rows:
            W[d] = np.linalg.lstsq(np.array([row for row, _ in rows]), np.array([value for _, value in rows]))[0]
    return W, sigma_of_residuals(Y, states, q, lambda s: W @ np.asarray(s, dtype=np.float64))


def sigma_of_residuals(Y: Array, states: States, q: Sequence[Array], mean: Callable[[State], Array]) -> float:
    """Root of the expected squared distance to the mean of the state, over the observed entries."""
    total = 0.0
    for y, s, weight in triples(Y, states, q):
        seen = ~np.isnan(y)
        total += weight * float(np.sum((y[seen] - mean(s)[seen]) ** 2))
    return math.sqrt(total / np.count_nonzero(~np.isnan(Y)))


def mean_activity(Y: Array, states: States, q: Sequence[Array]) -> Array:
    """Mean over the points of P(s_h != 0), (H,)."""
    return expectation(lambda y, s: np.asarray(s, dtype=np.float64) != 0, Y, states, q).mean(axis=0)


def next_pi(Y: Array, states: States, q: Sequence[Array], old: Any) -> Any:
    """Mean activity, of each cause where the old pi is (H,), of all where it is one number."""
    activity = mean_activity(Y, states, q)
    return activity if np.ndim(old) else float(activity.mean())


def m_step_bsc(Y: Array, states: States, q: Sequence[Array], params: Params) -> Params:
    W, sigma = m_step_linear(Y, states, q)
    return {"W": W, "pi": next_pi(Y, states, q, params["pi"]), "sigma": sigma}


def m_step_dsc(Y: Array, states: States, q: Sequence[Array], params: Params) -> Params:
    W, sigma = m_step_linear(Y, states, q)
    phi = params["phi"]
    shares = expectation(lambda y, s: [np.mean(np.asarray(s) == value) for value in phi], Y, states, q).mean(axis=0)
    return {"W": W, "phi": phi, "probabilities": shares, "sigma": sigma}


def m_step_tsc(Y: Array, states: States, q: Sequence[Array], params: Params) -> Params:
    W, sigma = m_step_linear(Y, states, q)
    return {"W": W, "pi": next_pi(Y, states, q, params["pi"]), "sigma": sigma}


# --- spike and slab: GSC ----------------------------------------------------------------------------------------------


def log_joint_gsc(y: Array, s: State, W: Array, pi: Array, mu: Array, Psi: Array, sigma: float) -> float:
    """s_h ~ Bernoulli(pi_h), z ~ N(mu, Psi), y ~ N(W (s * z), sigma^2 I), z integrated out. Psi is (H, H), or (H,)."""
    seen = ~np.isnan(y)
    if not seen.any():
        return log_bernoulli(s, pi)
    A = (W * np.asarray(s, dtype=np.float64))[seen]
    covariance = A @ as_matrix(Psi) @ A.T + sigma**2 * np.eye(len(A))
    return log_bernoulli(s, pi) + float(multivariate_normal(A @ mu, covariance).logpdf(y[seen]))


def slab_posterior(
    y: Array, s: State, W: Array, mu: Array, Psi: Array, sigma: float, **others: Any
) -> tuple[Array, Array]:
    """Mean (H,) and covariance (H, H) of all z given y and s: the conditional of the joint Gaussian of (z, y).

    z of inactive causes are in it: at their prior where Psi is diagonal, moved by the active ones where it is not.
    """
    seen = ~np.isnan(y)
    A, P = (W * np.asarray(s, dtype=np.float64))[seen], as_matrix(Psi)
    gain = P @ A.T @ np.linalg.inv(A @ P @ A.T + sigma**2 * np.eye(len(A)))
    return mu + gain @ (y[seen] - A @ mu), P - gain @ A @ P


def slab_posterior_by_parts(
    y: Array, s: State, W: Array, mu: Array, Psi: Array, sigma: float, **others: Any
) -> tuple[Array, Array]:
    """The same from the formulas: the active z given y by precisions, then the inactive ones given the active ones."""
    seen, P = ~np.isnan(y), as_matrix(Psi)
    a, i = np.flatnonzero(s), np.flatnonzero(np.asarray(s) == 0)
    Wa, Paa = W[np.ix_(seen, a)], P[np.ix_(a, a)]
    Lambda = np.linalg.inv(Wa.T @ Wa / sigma**2 + np.linalg.inv(Paa))
    kappa = mu[a] + Lambda @ Wa.T @ (y[seen] - Wa @ mu[a]) / sigma**2
    B = P[np.ix_(i, a)] @ np.linalg.inv(Paa)
    mean, covariance = np.zeros(len(mu)), np.zeros(P.shape)
    mean[a], mean[i] = kappa, mu[i] + B @ (kappa - mu[a])
    covariance[np.ix_(a, a)] = Lambda
    covariance[np.ix_(i, a)] = B @ Lambda
    covariance[np.ix_(a, i)] = (B @ Lambda).T
    covariance[np.ix_(i, i)] = P[np.ix_(i, i)] - B @ P[np.ix_(a, i)] + B @ Lambda @ B.T
    return mean, covariance


def as_matrix(Psi: Array) -> Array:
    """Psi as (H, H), where it may be the (H,) of a diagonal."""
    return np.diag(Psi) if np.ndim(Psi) == 1 else np.asarray(Psi)


def sample_gsc(
    rng: np.random.Generator, N: int, W: Array, pi: Array, mu: Array, Psi: Array, sigma: float
) -> tuple[Array, Array, Array]:
    """Data (N, D), which causes are active (N, H), and all z (N, H)."""
    S = draw_binary(rng, N, W.shape[1], pi)
    Z = rng.multivariate_normal(mu, as_matrix(Psi), size=N)
    return with_noise(rng, (S * Z) @ W.T, sigma), S, Z


def m_step_gsc(Y: Array, states: States, q: Sequence[Array], params: Params) -> Params:
    """Exact EM. Psi stays (H, H) or (H,) as it was.

    With x = s * z, and m, C the moments of z given y_n and s, E[x] = s * m and E[x x'] = (C + m m') * s s'. Row d of W
    solves W_d sum E[x x'] = sum y_d E[x] over the pairs observed at d; sigma^2 is the mean of E[(y_d - W_d x)^2].

    Full Psi: the completed data hold all z, active or not, so mu and Psi are the mean and covariance of z over all
    pairs. Diagonal Psi: z of an inactive cause tells nothing, so the completed data leave it out, and mu_h, Psi_h are
    those of the pairs where h is active; they stay as they were where it never is.
    """
    pairs = triples(Y, states, q)
    moments = [slab_posterior(y, s, **params) for y, s, _ in pairs]
    (N, D), H = Y.shape, len(params["mu"])
    first = [np.asarray(s) * m for (_, s, _), (m, _) in zip(pairs, moments, strict=True)]
    second = [np.outer(s, s) * (C + np.outer(m, m)) for (_, s, _), (m, C) in zip(pairs, moments, strict=True)]
    W = np.zeros((D, H))
    squares, count = 0.0, np.count_nonzero(~np.isnan(Y))
    for d in range(D):
        left, right = np.zeros((H, H)), np.zeros(H)
        for (y, _, weight), x, xx in zip(pairs, first, second, strict=True):
            if not np.isnan(y[d]):
                left += weight * xx
                right += weight * y[d] * x
        W[d] = np.linalg.pinv(left) @ right
        for (y, _, weight), x, xx in zip(pairs, first, second, strict=True):
            if not np.isnan(y[d]):
                squares += weight * (y[d] ** 2 - 2 * y[d] * W[d] @ x + W[d] @ xx @ W[d])

    if np.ndim(params["Psi"]) == 2:
        mu = sum(weight * m for (_, _, weight), (m, _) in zip(pairs, moments, strict=True)) / N
        Psi = sum(
            weight * (C + np.outer(m - mu, m - mu)) for (_, _, weight), (m, C) in zip(pairs, moments, strict=True)
        ) / N  # fmt: skip
    else:
        mu, Psi = params["mu"].copy(), params["Psi"].copy()
        for h in range(H):
            active = [(w, m[h], C[h, h]) for (_, s, w), (m, C) in zip(pairs, moments, strict=True) if s[h]]
            total = sum(w for w, _, _ in active)
            if total > 0:
                mu[h] = sum(w * m for w, m, _ in active) / total
                Psi[h] = sum(w * (v + (m - mu[h]) ** 2) for w, m, v in active) / total
    return {"W": W, "pi": mean_activity(Y, states, q), "mu": mu, "Psi": Psi, "sigma": math.sqrt(squares / count)}


# --- the strongest cause wins: MCA, MMCA ------------------------------------------------------------------------------


def winners(s: State, W: Array, by_magnitude: bool) -> list[int | None]:
    """For each pixel the active cause with the largest (or largest absolute) entry of W, the first of equals."""
    active = [h for h in range(len(s)) if s[h]]
    strength = np.abs(W) if by_magnitude else W
    return [max(active, key=lambda h, d=d: strength[d, h]) if active else None for d in range(len(W))]


def strongest(s: State, W: Array, by_magnitude: bool) -> Array:
    """The winner's entry of W at each pixel, (D,); zero where no cause is active."""
    return np.array([0.0 if h is None else W[d, h] for d, h in enumerate(winners(s, W, by_magnitude))])


def log_joint_mca(y: Array, s: State, W: Array, pi: Any, sigma: float) -> float:
    """s_h ~ Bernoulli(pi), y ~ N(ybar, sigma^2 I), ybar_d = max_h s_h W_dh with W >= 0."""
    return log_bernoulli(s, pi) + log_normal(y, strongest(s, W, False), sigma)


def log_joint_mmca(y: Array, s: State, W: Array, pi: Any, sigma: float) -> float:
    """s_h ~ Bernoulli(pi), y ~ N(ybar, sigma^2 I), ybar_d the s_h W_dh of largest magnitude, with its sign."""
    return log_bernoulli(s, pi) + log_normal(y, strongest(s, W, True), sigma)


def sample_mca(rng: np.random.Generator, N: int, W: Array, pi: Any, sigma: float) -> tuple[Array, Array]:
    """Data (N, D) and their states (N, H)."""
    S = draw_binary(rng, N, W.shape[1], pi)
    return with_noise(rng, np.array([strongest(s, W, False) for s in S]), sigma), S


def sample_mmca(rng: np.random.Generator, N: int, W: Array, pi: Any, sigma: float) -> tuple[Array, Array]:
    """Data (N, D) and their states (N, H)."""
    S = draw_binary(rng, N, W.shape[1], pi)
    return with_noise(rng, np.array([strongest(s, W, True) for s in S]), sigma), S


def m_step_strongest(Y: Array, states: States, q: Sequence[Array], params: Params, by_magnitude: bool) -> Params:
    """W_dh = mean of y_d where h wins pixel d under the old W, as it was where h never does; sigma with the new W."""
    above, below = np.zeros(params["W"].shape), np.zeros(params["W"].shape)
    for y, s, weight in triples(Y, states, q):
        for d, h in enumerate(winners(s, params["W"], by_magnitude)):
            if h is not None and not np.isnan(y[d]):
                above[d, h] += weight * y[d]
                below[d, h] += weight
    W = np.where(below > 0, above / np.where(below > 0, below, 1.0), params["W"])
    sigma = sigma_of_residuals(Y, states, q, lambda s: strongest(s, W, by_magnitude))
    return {"W": W, "pi": next_pi(Y, states, q, params["pi"]), "sigma": sigma}


def m_step_mca(Y: Array, states: States, q: Sequence[Array], params: Params) -> Params:
    return m_step_strongest(Y, states, q, params, by_magnitude=False)


def m_step_mmca(Y: Array, states: States, q: Sequence[Array], params: Params) -> Params:
    return m_step_strongest(Y, states, q, params, by_magnitude=True)


# --- noisy or ---------------------------------------------------------------------------------------------------------


def log_joint_noisy_or(y: Array, s: State, W: Array, pi: Any) -> float:
    """s_h ~ Bernoulli(pi_h), P(y_d = 0) = prod_h (1 - W_dh)^s_h, binary y."""
    total = log_bernoulli(s, pi)
    for d, value in enumerate(y):
        if not np.isnan(value):
            off = math.prod(1 - W[d, h] for h in range(len(s)) if s[h])
            chance = 1 - off if value else off
            total += math.log(chance) if chance > 0 else -math.inf
    return total


def sample_noisy_or(rng: np.random.Generator, N: int, W: Array, pi: Any) -> tuple[Array, Array]:
    """Binary data (N, D) and their states (N, H)."""
    S = draw_binary(rng, N, W.shape[1], pi)
    fired = (rng.random((N, *W.shape)) < W) & (S[:, None, :] == 1)
    return fired.any(axis=2).astype(np.float64), S


def m_step_noisy_or(Y: Array, states: States, q: Sequence[Array], params: Params) -> Params:
    """EM with the completed data (y, s, x), where x_dh ~ Bernoulli(s_h W_dh) says whether cause h fired at pixel d.

    y_d is 1 if any fired. Given s and y_d = 0 none did; given y_d = 1, P(x_dh = 1) = s_h W_dh / P(y_d = 1 | s), since
    x_dh = 1 implies y_d = 1. The expected log joint holds
    sum q(s) s_h [<x_dh> log W_dh + (1 - <x_dh>) log(1 - W_dh)]: W_dh becomes the mean of <x_dh> over the pairs that are
    observed at d and have h active, and stays as it was where there are none.
    """
    W = params["W"]
    fired, active = np.zeros(W.shape), np.zeros(W.shape)
    for y, s, weight in triples(Y, states, q):
        for d, h in itertools.product(range(len(y)), range(len(s))):
            if s[h] and weight > 0 and not np.isnan(y[d]):
                active[d, h] += weight
                if y[d]:
                    fired[d, h] += weight * W[d, h] / (1 - math.prod(1 - W[d, g] for g in range(len(s)) if s[g]))
    new = np.where(active > 0, fired / np.where(active > 0, active, 1.0), W)
    return {"W": new, "pi": next_pi(Y, states, q, params["pi"])}


# --- mixtures: a state is the index of a component --------------------------------------------------------------------


def component_covariance(covariance: Array, h: int, D: int) -> Array:
    """Sigma_h (D, D) of covariance (H,) spherical, (H, D) diagonal or (H, D, D) full."""
    return np.asarray(covariance[h]) if np.ndim(covariance) == 3 else np.diag(np.broadcast_to(covariance[h], (D,)))


def log_joint_mog(y: Array, s: State, W: Array, covariance: Array, pies: Array) -> float:
    """h ~ Cat(pies), y ~ N(W_h, Sigma_h); covariance (H,) spherical, (H, D) diagonal or (H, D, D) full."""
    seen = ~np.isnan(y)
    if not seen.any():
        return math.log(pies[s])
    Sigma = component_covariance(covariance, s, len(y))[np.ix_(seen, seen)]
    return math.log(pies[s]) + float(multivariate_normal(W[seen, s], Sigma).logpdf(y[seen]))


def log_joint_mop(y: Array, s: State, W: Array, pies: Array) -> float:
    """h ~ Cat(pies), y_d ~ Poisson(W_dh)."""
    seen = ~np.isnan(y)
    rate = W[seen, s]
    return math.log(pies[s]) + float(np.sum(y[seen] * np.log(rate) - rate - gammaln(y[seen] + 1)))


def sample_mog(
    rng: np.random.Generator, N: int, W: Array, covariance: Array, pies: Array
) -> tuple[Array, npt.NDArray[np.intp]]:
    """Data (N, D) and their components (N,)."""
    component = rng.choice(len(pies), size=N, p=pies)
    Sigma = [component_covariance(covariance, h, len(W)) for h in range(len(pies))]
    return np.array([rng.multivariate_normal(W[:, h], Sigma[h]) for h in component]), component


def sample_mop(rng: np.random.Generator, N: int, W: Array, pies: Array) -> tuple[Array, npt.NDArray[np.intp]]:
    """Counts (N, D) and their components (N,)."""
    component = rng.choice(len(pies), size=N, p=pies)
    return rng.poisson(W.T[component]).astype(np.float64), component


def completed(y: Array, mean: Array, Sigma: Array) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D, D) of the whole y given its observed entries, under N(mean, Sigma)."""
    seen = ~np.isnan(y)
    gain = Sigma[:, seen] @ np.linalg.inv(Sigma[np.ix_(seen, seen)])
    filled = mean + gain @ (y[seen] - mean[seen])
    return np.where(seen, y, filled), Sigma - gain @ Sigma[seen]


def m_step_mog(Y: Array, states: States, q: Sequence[Array], params: Params) -> Params:
    """Exact EM; the covariance keeps its form.

    Spherical and diagonal: a missing entry tells nothing, and is left out. Full: what is missing is completed by its
    conditional mean and covariance given what was observed, under the old parameters.
    """
    covariance = np.asarray(params["covariance"])
    D, H = params["W"].shape
    pairs = triples(Y, states, q)
    W, new, pies = params["W"].copy(), covariance.copy(), np.zeros(H)
    for h in range(H):
        mine = [(y, weight) for y, s, weight in pairs if s == h]
        total = sum(weight for _, weight in mine)
        pies[h] = total / len(Y)
        if covariance.ndim == 3:
            filled = [(weight, *completed(y, params["W"][:, h], covariance[h])) for y, weight in mine]
            W[:, h] = sum(w * m for w, m, _ in filled) / total
            new[h] = sum(w * (C + np.outer(m - W[:, h], m - W[:, h])) for w, m, C in filled) / total
            continue
        squares, counts = np.zeros(D), np.zeros(D)
        for d in range(D):
            observed = [(y[d], weight) for y, weight in mine if not np.isnan(y[d])]
            counts[d] = sum(weight for _, weight in observed)
            W[d, h] = sum(weight * value for value, weight in observed) / counts[d]
            squares[d] = sum(weight * (value - W[d, h]) ** 2 for value, weight in observed)
        new[h] = squares / counts if covariance.ndim == 2 else squares.sum() / counts.sum()
    return {"W": W, "covariance": new, "pies": pies}


def m_step_mop(Y: Array, states: States, q: Sequence[Array], params: Params) -> Params:
    """Exact EM: mean count of each component over the observed entries."""
    above, below, pies = np.zeros(params["W"].shape), np.zeros(params["W"].shape), np.zeros(params["W"].shape[1])
    for y, h, weight in triples(Y, states, q):
        pies[h] += weight / len(Y)
        for d in np.flatnonzero(~np.isnan(y)):
            above[d, h] += weight * y[d]
            below[d, h] += weight
    return {"W": above / below, "pies": pies}
