"""Updates, bound and predictions of the functional tensor model against row-by-row, dense mathematics."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torch.distributions import Gamma as TorchGamma
from torch.distributions import kl_divergence

from probtensor.cells import merge_rows, single_rows
from probtensor.contract import unpack
from probtensor.gaussian import Gamma
from probtensor.inference.kalman import Sites
from probtensor.inference.maximize import maximize
from probtensor.intake import Table
from probtensor.kernels import Matern, White
from probtensor.likelihoods import Bernoulli, Entries, Likelihood, NegativeBinomial, Poisson, StudentT
from probtensor.models import FunBaT
from probtensor.models.functional_state import Rows, State
from probtensor.models.functional_table import table_rows
from probtensor.models.functional_tucker import LIGHT_TAILS, FunctionalTucker
from probtensor.models.latent_functions import ExchangeableRows, GaussianProcess
from tests.reference import (
    F64,
    blocks,
    close,
    condition_on_ones,
    core_posterior,
    dense_kl,
    dense_posterior,
    dense_prior,
    entry,
    entry_second,
    f64,
    mode_statistics,
    squared_error,
    superdiagonal,
)

LIKE = torch.empty(0, dtype=F64)
SIZES = (5, 4, 6, 3, 3)
NUS = (1.5, None, 0.5, 2.5, None)  # None: a categorical mode
TUCKER_RANKS = (2, 3, 1, 2, 1)


def build(
    form: str, K: int, *, main_effects: bool, ranks: tuple[int, ...] | None = None, **options
) -> FunctionalTucker:
    """A model of K modes, continuous and categorical, as the estimator would build it."""
    ranks = ranks or (TUCKER_RANKS[:K] if form == "tucker" else (2,) * K)
    extra = main_effects and K > 1
    if form == "tucker":
        free = [[False] * extra + [True] * r for r in ranks]
    else:
        free = [[True] * ranks[0] + [j == k for j in range(K)] * extra for k in range(K)]
    functions = []
    for size, nu in zip(SIZES[:K], NUS[:K], strict=True):
        steps = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=F64) + 0.3
        functions.append(ExchangeableRows(size, LIKE) if nu is None else GaussianProcess(steps.cumsum(0), Matern(nu)))
    noise_prior = Gamma(f64(1.3), f64(0.8))
    return FunctionalTucker(tuple(functions), tuple(map(torch.tensor, free)), form, noise_prior, **options)


def make_rows(K: int, n: int, seed: int = 0) -> Rows:
    """Cells at random, some of them twice, some coordinates never; values with structure and noise."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.randint(size, (n,), generator=generator) for size in SIZES[:K]])
    positions[0][positions[0] == 1] = 0  # coordinate 1 of the first mode is in no row
    effects = [torch.randn(size, generator=generator, dtype=F64) for size in SIZES[:K]]
    values = math.prod(e[p] for e, p in zip(effects, positions, strict=True)) + sum(
        e.flip(0)[p] for e, p in zip(effects, positions, strict=True)
    )
    values = values + 0.3 * torch.randn(n, generator=generator, dtype=F64)
    return Rows(positions, (values - values.mean()) / values.std())


def begin(model: FunctionalTucker, rows: Rows, seed: int = 0, trial: int = 0) -> State:
    return model.start(model.local_start(rows), torch.Generator().manual_seed(seed), trial)


@torch.no_grad()
def sweeps(model: FunctionalTucker, rows: Rows, state: State, n: int) -> tuple[State, list[float]]:
    bounds = []
    for _ in range(n):
        for block in model.blocks:
            state = model.update(state, block, model.local_statistics(state, block, rows))
        state, (rows,) = model.end_sweep(state, [rows])
        bounds.append(float(model.bound(state)))
    return state, bounds


def dense_core(model: FunctionalTucker, state: State) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the core; CP has a known one."""
    if state.core is not None:
        return state.core.mean.reshape(model.ranks), state.core.covariance
    size = math.prod(model.ranks)
    return superdiagonal(model.ranks[0], len(model.ranks)), torch.zeros(size, size, dtype=F64)


def dense_moments(state: State) -> tuple[list[Tensor], list[Tensor]]:
    return [f.mean for f in state.factors], [unpack(f.second) for f in state.factors]


def mode_prior(model: FunctionalTucker, state: State, mode: int) -> Tensor:
    """Prior covariance (T, F, T, F) of the mode's latent functions."""
    f, hyper = model.functions[mode], state.factors[mode].log_hyperparameters
    if isinstance(f, GaussianProcess):
        return dense_prior(f.kernel.nu, f.coordinates, *hyper.exp())
    variance, mean_variance = hyper.exp()
    prior = torch.zeros(f.size, hyper.shape[1], f.size, hyper.shape[1], dtype=F64)
    for i in range(f.size):
        for j in range(f.size):
            prior[i, :, j, :] = torch.diag(mean_variance + (variance if i == j else 0.0))
    return prior


MODELS = [
    (form, K, main_effects)
    for form in ("cp", "tucker")
    for K in (1, 2, 3)
    for main_effects in ((True, False) if K > 1 else (False,))
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: f"{p[0]}-{p[1]}-{'effects' if p[2] else 'plain'}")
def fitted(request) -> tuple[FunctionalTucker, Rows, State]:
    """A tiny problem after some sweeps: noise and hyperparameters have moved."""
    form, K, main_effects = request.param
    model, rows = build(form, K, main_effects=main_effects, log_scale=0.7), make_rows(K, 14)
    return model, rows, sweeps(model, rows, begin(model, rows), 6)[0]


# --- the start and the order of the updates ---------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_a_sweep_updates_coarse_modes_first_and_the_core_before_them(K: int):
    modes = {1: (0,), 2: (1, 0), 3: (1, 0, 2), 5: (3, 4, 1, 0, 2)}[K]  # of 5, 4, 6, 3 and 3 coordinates
    assert build("cp", K, main_effects=True).blocks == modes
    assert build("tucker", K, main_effects=True).blocks == ("core", *modes)


@pytest.mark.parametrize("K", [2, 3, 5])
def test_of_the_main_effects_only_that_of_the_coarsest_mode_is_there_at_the_start(K: int):
    model, rows = build("cp", K, main_effects=True), make_rows(K, 60)
    coarsest = model.blocks[0]
    for mode, factor in enumerate(begin(model, rows).factors):
        effect = factor.mean[:, 2 + mode]
        if mode != coarsest:
            assert torch.equal(effect, torch.zeros_like(effect))
            continue
        means = torch.stack([rows.values[rows.positions[mode] == t].mean() for t in range(SIZES[mode])])
        assert float(torch.corrcoef(torch.stack([effect, means]))[0, 1]) > 0.9
        assert (effect.abs() <= means.abs().max()).all()  # shrunk, or smoothed


# --- one update of each block -----------------------------------------------------------------------------------------


def test_statistics_of_a_mode_are_sums_over_its_rows(fitted):
    model, rows, state = fitted
    for mode, rank in enumerate(model.ranks):
        statistics = model.local_statistics(state, mode, rows)
        precision, shift = mode_statistics(*dense_core(model, state), mode, *dense_moments(state), *rows[:2])
        assert close(unpack(statistics[:, :-rank]), precision, 1e-11)
        assert close(statistics[:, -rank:], shift, 1e-11)


def test_update_of_a_mode_conditions_on_its_columns_of_ones(fitted):
    model, rows, state = fitted
    model = replace(model, learn=False)
    for mode, free in enumerate(model.free):
        new = model.update(state, mode, model.local_statistics(state, mode, rows))
        tau = state.noise.mean
        precision, shift = mode_statistics(*dense_core(model, state), mode, *dense_moments(state), *rows[:2])
        prior = mode_prior(model, state, mode)
        mean, covariance = condition_on_ones(prior, free, tau * precision, tau * shift)
        factor = new.factors[mode]
        assert close(factor.mean[:, free], mean)
        assert torch.equal(factor.mean[:, ~free], torch.ones_like(factor.mean[:, ~free]))
        second = unpack(factor.second)
        outer = factor.mean[:, :, None] * factor.mean[:, None, :]
        assert close((second - outer)[:, free][:, :, free], blocks(covariance))
        assert close(second[:, ~free], outer[:, ~free], 1e-14)
        assert close(factor.divergence, dense_kl(mean, covariance, prior), 1e-8)
        error = squared_error(*dense_core(model, new), *dense_moments(new), *rows[:2])
        assert float(new.squared_error) == pytest.approx(error, rel=1e-10)


def test_update_of_the_core_uses_its_prior_and_all_second_moments(fitted):
    model, rows, state = fitted
    if state.core is None:
        assert "core" not in model.blocks
        return
    new = model.update(state, "core", model.local_statistics(state, "core", rows))
    mean, covariance = core_posterior(state.noise.mean, *dense_moments(state), *rows[:2])
    assert close(new.core.mean, mean, 1e-10)
    assert close(new.core.covariance, covariance, 1e-10)


def test_update_of_the_noise(fitted):
    model, rows, state = fitted
    new, _ = model.end_sweep(state, [rows])
    error = squared_error(*dense_core(model, state), *dense_moments(state), *rows[:2])
    assert float(new.noise.shape) == pytest.approx(1.3 + 14 / 2)
    assert float(new.noise.rate) == pytest.approx(0.8 + error / 2, rel=1e-10)
    assert new.sweep == state.sweep + 1


def test_noise_and_hyperparameters_wait_for_the_factors():
    model, rows = build("tucker", 2, main_effects=True), make_rows(2, 14)
    first = begin(model, rows)
    state, _ = sweeps(model, rows, first, 4)
    for now, then in zip(state.factors, first.factors, strict=True):
        assert torch.equal(now.log_hyperparameters, then.log_hyperparameters)
    assert state.noise == first.noise
    state, _ = sweeps(model, rows, state, 1)
    assert state.noise != first.noise
    assert not torch.equal(state.factors[0].log_hyperparameters, first.factors[0].log_hyperparameters)


@pytest.mark.parametrize("block", ["core", 0, 1, 2])
def test_statistics_add_up_over_parts_and_chunks_of_the_rows(monkeypatch: pytest.MonkeyPatch, block):
    model, rows = build("tucker", 3, main_effects=True), make_rows(3, 200)
    state = begin(model, rows)
    state, _ = sweeps(model, rows, state, 1)
    whole = model.local_statistics(state, block, rows)
    parts = [
        Rows(rows.positions[:, s], rows.values[s]) for s in (slice(0, 1), slice(1, 1), slice(1, 150), slice(150, 200))
    ]
    assert close(sum(model.local_statistics(state, block, p) for p in parts), whole, 1e-12)
    monkeypatch.setattr("probtensor.models.functional_tucker.CHUNK", 1)
    assert len(list(model.chunks(torch.empty(200)))) > 2
    assert close(model.local_statistics(state, block, rows), whole, 1e-12)


# --- the bound --------------------------------------------------------------------------------------------------------


def test_bound_equals_the_dense_evidence_lower_bound(fitted):
    model, rows, state = fitted
    core, covariance = dense_core(model, state)
    means, seconds = dense_moments(state)
    q, p = TorchGamma(*state.noise), TorchGamma(*model.noise_prior)
    mean_log = torch.digamma(state.noise.shape) - state.noise.rate.log()
    error = squared_error(core, covariance, means, seconds, *rows[:2])
    expected = 14 * (0.5 * mean_log - 0.5 * math.log(2 * math.pi) - 0.7) - 0.5 * state.noise.mean * error
    expected = expected - kl_divergence(q, p)
    for mode, factor in enumerate(state.factors):
        prior = mode_prior(model, state, mode)
        mean, joint, _ = dense_posterior(prior, *factor.sites)
        expected = expected - dense_kl(mean, joint, prior)
    if state.core is not None:
        expected = expected - dense_kl(*state.core, torch.eye(len(state.core.mean), dtype=F64))
    assert float(model.bound(state)) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("form", ["cp", "tucker"])
@pytest.mark.parametrize(("K", "main_effects"), [(1, False), (2, True), (3, True), (3, False), (4, True), (5, True)])
def test_the_bound_never_falls(form: str, K: int, main_effects: bool):
    model, rows = build(form, K, main_effects=main_effects), make_rows(K, 60, seed=K)
    start = begin(model, rows, seed=K, trial=K % 3)
    state, bounds = sweeps(model, rows, start, 30)
    changes = np.diff(bounds)
    assert (changes >= -1e-9 * max(abs(bounds[-1]), 60)).all(), changes.min()
    assert bounds[-1] > bounds[0]
    for now, then in zip(state.factors, start.factors, strict=True):
        assert not torch.equal(now.log_hyperparameters, then.log_hyperparameters)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 30])
def test_hyperparameters_start_inside_their_bounds(size: int):
    # The optimiser moves a start from outside onto the bound, and the evidence bound could fall.
    model = build("cp", 2, main_effects=True)
    model = replace(
        model, functions=(GaussianProcess(torch.arange(size, dtype=F64), Matern(1.5)), ExchangeableRows(4, LIKE))
    )
    rows = Rows(torch.zeros(2, 3, dtype=torch.int64), f64([1.0, 2.0, 3.0]))
    for f, factor in zip(model.functions, begin(model, rows).factors, strict=True):
        lower, upper = f.bounds(3)
        assert ((lower <= factor.log_hyperparameters) & (factor.log_hyperparameters <= upper)).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_bound_never_falls_on_axes_of_few_coordinates(size: int):
    functions = (
        GaussianProcess(torch.arange(size, dtype=F64), Matern(1.5)),
        GaussianProcess(torch.arange(6, dtype=F64), Matern(0.5)),
    )
    model = replace(build("cp", 2, main_effects=True), functions=functions)
    generator = torch.Generator().manual_seed(size)
    positions = torch.stack([torch.randint(f.size, (50,), generator=generator) for f in functions])
    values = torch.where(positions[0] % 2 == 0, 1.0, -1.0).double() + 0.1 * positions[1]
    rows = Rows(positions, values + 0.1 * torch.randn(50, generator=generator, dtype=F64))
    _, bounds = sweeps(model, rows, begin(model, rows), 20)
    assert (np.diff(bounds) >= -1e-9 * max(abs(bounds[-1]), 50)).all()


@pytest.mark.parametrize("form", ["cp", "tucker"])
def test_damping_keeps_the_fixed_point(form: str):
    plain, rows = build(form, 2, main_effects=False, ranks=(1, 1), learn=False), make_rows(2, 40)
    damped = replace(plain, damping=0.4)
    start = begin(plain, rows)
    state, undamped = sweeps(plain, rows, start, 300)
    other, bounds = sweeps(damped, rows, start, 600)
    assert bounds[-1] == pytest.approx(undamped[-1], abs=1e-6)
    assert close(other.noise.rate, state.noise.rate, 1e-5)
    _, (bound,) = sweeps(damped, rows, state, 1)
    assert bound == pytest.approx(undamped[-1], abs=1e-6)


def test_damped_messages_are_mixtures_of_old_and_new():
    plain, rows = build("tucker", 2, main_effects=True, learn=False), make_rows(2, 40)
    state, _ = sweeps(plain, rows, begin(plain, rows), 5)
    damped = replace(plain, damping=0.3)
    statistics = plain.local_statistics(state, 0, rows)
    old, new, mixed = (
        s.factors[0].sites for s in (state, plain.update(state, 0, statistics), damped.update(state, 0, statistics))
    )
    assert close(mixed.precision, 0.3 * old.precision + 0.7 * new.precision, 1e-12)
    assert close(mixed.shift, 0.3 * old.shift + 0.7 * new.shift, 1e-12)
    statistics = plain.local_statistics(state, "core", rows)
    cores = [s.core for s in (state, plain.update(state, "core", statistics), damped.update(state, "core", statistics))]
    old_p, new_p, mixed_p = (torch.linalg.inv(c.covariance) for c in cores)
    assert close(mixed_p, 0.3 * old_p + 0.7 * new_p, 1e-9)
    shifts = [p @ c.mean for p, c in zip((old_p, new_p, mixed_p), cores, strict=True)]
    assert close(shifts[2], 0.3 * shifts[0] + 0.7 * shifts[1], 1e-9)


# --- other likelihoods ------------------------------------------------------------------------------------------------

HEAVY = StudentT(dof=4.0, nugget=True)


def cell_rows(K: int, n: int, seed: int = 0) -> Rows:
    """Rows of cells, most of them repeated, with relative precisions and a few outliers."""
    rows = make_rows(K, n, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    values = rows.values.clone()
    values[:: max(n // 5, 1)] += 6.0
    precision = 0.5 + torch.rand(n, generator=generator, dtype=F64)
    cells = merge_rows(rows.positions.T, values, None, precision)
    return Rows(cells.positions.T.contiguous(), cells.entries.value, None, cells.entries)


def plain_rows(rows: Rows, values: Tensor, count: Tensor | None = None, precision: Tensor | None = None) -> Rows:
    return Rows(rows.positions, values, None, single_rows(values, count, precision))


def begun(model: FunctionalTucker, rows: Rows, seed: int = 0) -> tuple[Rows, State]:
    state = begin(model, rows, seed)
    return model.begin(state, rows), state


def dense_student_log_prob(log_parameters: Tensor, entries: Entries, mean: Tensor, second: Tensor, nu: float) -> float:
    """Cell after cell, the logarithm of an integral over its weight: ``E_q(f)`` inside the exponent, w integrated out.

    ``max_q(w) E log p(y, w | f) - log q(w)`` is ``log int p(w) exp E_q(f) log p(y | w, f) dw``.
    """
    noise, nugget = (float(x) for x in log_parameters.exp()[:2])
    total = 0.0
    for n, W, value, scatter, log_r, m, ff in zip(*(x.tolist() for x in (*entries, mean, second)), strict=True):
        v = nugget + noise / W
        distance = scatter / noise + (value**2 - 2 * value * m + ff) / v
        log_det = (n - 1) * math.log(noise) + math.log(W) + math.log(v) - log_r

        def integrand(w: float, n=n, distance=distance) -> float:
            return stats.gamma.pdf(w, nu / 2, scale=2 / nu) * w ** (n / 2) * math.exp(-0.5 * w * distance)

        peak = (nu + n) / (nu + distance)  # pieces around the peak, so that none is missed
        inner = sum(
            integrate.quad(integrand, a * peak, b * peak, epsabs=0, epsrel=1e-11)[0]
            for a, b in ((0, 0.3), (0.3, 1), (1, 3), (3, 30))
        )
        total += math.log(inner) - 0.5 * (n * math.log(2 * math.pi) + log_det)
    return total


LIKELIHOOD_MODELS = [(form, K, K > 1) for form in ("cp", "tucker") for K in (1, 2, 3)]


@pytest.mark.parametrize(("form", "K", "main_effects"), LIKELIHOOD_MODELS)
def test_the_bound_with_heavy_tails_equals_the_dense_expectation(form: str, K: int, main_effects: bool):
    model = build(form, K, main_effects=main_effects, likelihood=HEAVY, log_scale=0.7, relevance_prior=(1.0, 0.01))
    rows, state = begun(model, cell_rows(K, 14))
    state, _ = sweeps(model, rows, state, LIGHT_TAILS + 3)
    core, covariance = dense_core(model, state)
    means, seconds = dense_moments(state)
    at = [[int(p) for p in position] for position in rows.positions.T]
    f = f64([entry(core, [m[i] for m, i in zip(means, row, strict=True)]) for row in at])
    ff = f64([entry_second(core, covariance, [s[i] for s, i in zip(seconds, row, strict=True)]) for row in at])
    expected = dense_student_log_prob(state.log_parameters, rows.entries, f, ff, 4.0) - 14 * 0.7
    for mode, factor in enumerate(state.factors):
        prior = mode_prior(model, state, mode)
        mean, joint, _ = dense_posterior(prior, *factor.sites)
        expected -= float(dense_kl(mean, joint, prior))
        categorical = isinstance(model.functions[mode], ExchangeableRows)
        variance = factor.log_hyperparameters.exp().sum(0) if categorical else factor.log_hyperparameters[-1].exp()
        expected -= float((variance.log() + 0.01 / variance).sum())  # Gamma(1, 0.01) on one over it, and its Jacobian
    if state.core is not None:
        expected -= float(dense_kl(*state.core, torch.eye(len(state.core.mean), dtype=F64)))
    assert float(state.n_rows) == 14
    assert float(model.bound(state)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("form", "K", "main_effects"), LIKELIHOOD_MODELS)
@pytest.mark.parametrize("dof", [4.0, None], ids=["dof 4", "learned"])
def test_the_bound_never_falls_within_a_phase(form: str, K: int, main_effects: bool, dof: float | None):
    likelihood = replace(HEAVY, dof=dof)
    model = build(form, K, main_effects=main_effects, likelihood=likelihood, relevance_prior=(1.0, 0.01))
    rows, state = begun(model, cell_rows(K, 60, seed=K), seed=K)
    end, bounds = sweeps(model, rows, state, LIGHT_TAILS + 12)
    for phase in (bounds[:LIGHT_TAILS], bounds[LIGHT_TAILS:]):
        changes = np.diff(phase)
        assert (changes >= -1e-9 * max(abs(bounds[-1]), 60)).all(), changes.min()
    assert bounds[LIGHT_TAILS - 1] > bounds[0]
    assert (end.log_parameters != state.log_parameters).all()


def test_moments_at_the_rows_are_those_of_the_entries(fitted):
    model, rows, state = fitted
    core, covariance = dense_core(model, state)
    means, seconds = dense_moments(state)
    found_mean, found_variance = replace(model, offset=0.6).at_rows(state, rows)
    for n, row in enumerate(rows.positions.T.tolist()):
        f = entry(core, [m[i] for m, i in zip(means, row, strict=True)])
        ff = entry_second(core, covariance, [s[i] for s, i in zip(seconds, row, strict=True)])
        assert float(found_mean[n]) == pytest.approx(f + 0.6, rel=1e-10)
        assert float(found_variance[n]) == pytest.approx(ff - f**2, rel=1e-8, abs=1e-12)


def test_heavy_tails_wait_and_keep_their_parameters_in_place():
    model = build("cp", 2, main_effects=True, likelihood=StudentT())
    assert model.likelihood_at(0) == model.likelihood_at(LIGHT_TAILS - 1) == StudentT().light_tailed()
    assert model.likelihood_at(LIGHT_TAILS) == StudentT()
    rows, state = begun(model, cell_rows(2, 40))
    light, _ = sweeps(model, rows, state, LIGHT_TAILS)
    assert torch.equal(light.log_parameters[-1], state.log_parameters[-1])  # the dof rests
    heavy, _ = sweeps(model, model.begin(light, rows), light, 2)
    assert not torch.equal(heavy.log_parameters[-1], state.log_parameters[-1])


def dense_elbo(prior: Tensor, offset: float, log_prob: Callable[[Tensor], Tensor], at: Tensor) -> Callable:
    """``(mean (T,), log lambda (T,)) -> ELBO`` of a Gaussian with precision ``prior^-1 + diag(lambda)``.

    The best Gaussian has this form (Opper and Archambeau 2009). `log_prob` gives (n, nodes) at (n, nodes) of f, and
    Gauss-Hermite nodes the expectations.
    """
    z, weights = (f64(x) for x in np.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()
    inverse = torch.linalg.inv(prior)

    def elbo(mean: Tensor, log_lambda: Tensor) -> tuple[Tensor, Tensor]:
        covariance = torch.linalg.inv(inverse + torch.diag(log_lambda.exp()))
        f = offset + mean[at, None] + covariance.diagonal()[at, None].sqrt() * z
        return (log_prob(f) @ weights).sum() - dense_kl(mean, covariance, prior), covariance

    return elbo


def poisson_log_prob(y: Tensor, f: Tensor) -> Tensor:
    return y[:, None] * f - f.exp() - torch.lgamma(y[:, None] + 1)


def bernoulli_log_prob(y: Tensor, f: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid((2 * y[:, None] - 1) * f)


COUNTS = f64([3.0, 0.0, 1.0, 7.0, 2.0, 2.0, 12.0, 0.0])
BINARY = f64([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
SIMPLE = [(Poisson(), COUNTS, poisson_log_prob, 0.9), (Bernoulli(), BINARY, bernoulli_log_prob, -0.4)]
SIMPLE_IDS = ["poisson", "bernoulli"]


@pytest.mark.parametrize(("likelihood", "y", "log_prob", "offset"), SIMPLE, ids=SIMPLE_IDS)
def test_counts_and_binary_values_reach_the_best_gaussian(likelihood, y, log_prob, offset):
    model = build("cp", 1, main_effects=False, ranks=(1,), learn=False, likelihood=likelihood, offset=offset)
    at = torch.tensor([0, 0, 1, 3, 2, 4, 3, 0])  # of coordinates 0 to 4, some in several rows
    rows, state = begun(model, plain_rows(Rows(at[None], y), y))
    state, bounds = sweeps(model, rows, state, 150)
    T = SIZES[0]
    prior = mode_prior(model, state, 0).reshape(T, T)
    elbo = dense_elbo(prior, offset, lambda f: log_prob(y, f), at)

    def objective(x: Tensor) -> Tensor:
        return elbo(*x)[0]

    start = torch.zeros(2, T, dtype=F64)
    far = torch.full_like(start, 15.0)
    best = maximize(objective, start, torch.stack([-far, far]), 2000)
    value, covariance = elbo(*best)
    assert bounds[-1] == pytest.approx(float(value), abs=1e-5)
    assert close(state.factors[0].mean[:, 0], best[0], 1e-3)
    assert close(unpack(state.factors[0].second)[:, 0, 0] - best[0] ** 2, covariance.diagonal(), 1e-2)
    # At what the sweeps found the dense bound is theirs, and has no slope.
    sites = state.factors[0].sites.precision[:, 0, 0]
    found = torch.stack([state.factors[0].mean[:, 0], sites.log()]).requires_grad_()
    value, _ = elbo(*found)
    (slope,) = torch.autograd.grad(value, found)
    assert float(value.detach()) == pytest.approx(bounds[-1], abs=1e-7)
    assert float(slope.abs().max()) < 1e-5


@pytest.mark.parametrize(("likelihood", "y", "log_prob", "offset"), SIMPLE, ids=SIMPLE_IDS)
def test_the_bound_is_below_the_evidence_and_near_it(likelihood, y, log_prob, offset):
    # One label: the evidence is a one-dimensional integral.
    functions = (ExchangeableRows(1, LIKE),)
    model = replace(
        build("cp", 1, main_effects=False, ranks=(1,), learn=False, likelihood=likelihood, offset=offset),
        functions=functions,
    )
    rows, state = begun(model, plain_rows(Rows(torch.zeros(1, len(y), dtype=torch.int64), y), y))
    state, bounds = sweeps(model, rows, state, 100)
    grid = torch.linspace(-8, 8, 8001, dtype=F64)
    log_joint = log_prob(y, (offset + grid).expand(len(y), -1)).sum(0) - 0.5 * grid**2 - 0.5 * math.log(2 * math.pi)
    log_evidence = float(torch.logsumexp(log_joint, 0)) + math.log(16 / 8000)
    assert log_evidence - 0.02 < bounds[-1] < log_evidence
    density = torch.softmax(log_joint, 0)
    mean = float(density @ grid)
    assert float(state.factors[0].mean) == pytest.approx(mean, abs=0.03)
    std = math.sqrt(float(density @ (grid - mean) ** 2))
    assert float(state.factors[0].second) - mean**2 == pytest.approx(std**2, rel=0.1)


@pytest.mark.parametrize("likelihood", [Poisson(), NegativeBinomial(), Bernoulli()], ids=lambda x: x.name)
@pytest.mark.parametrize(("form", "K"), [("cp", 2), ("tucker", 3)])
def test_damped_steps_of_counts_and_binary_values_settle(likelihood: Likelihood, form: str, K: int):
    rows = make_rows(K, 80, seed=4)
    y = (rows.values > 0).double() if likelihood.name == "bernoulli" else (2 * rows.values.exp()).round()
    model = build(form, K, main_effects=True, likelihood=likelihood, offset=likelihood.offset(float(y.mean())))
    rows, state = begun(model, plain_rows(rows, y))
    _, bounds = sweeps(model, rows, state, 60)
    assert np.isfinite(bounds).all()
    assert bounds[-1] > bounds[0]
    assert abs(bounds[-1] - bounds[-3]) < 0.05 * 80


# --- weights and known errors -----------------------------------------------------------------------------------------


WEIGHTED = {
    "gaussian": None,
    "gaussian factors": StudentT(dof=math.inf, nugget=False),
    "gaussian with residuals": StudentT(dof=math.inf, nugget=True),
    "student-t with residuals": HEAVY,
    "poisson": Poisson(),
    "bernoulli": Bernoulli(),
}


@pytest.mark.parametrize("likelihood", WEIGHTED.values(), ids=WEIGHTED.keys())
@pytest.mark.parametrize("form", ["cp", "tucker"])
def test_a_row_of_weight_two_is_the_row_twice(likelihood: Likelihood | None, form: str):
    model = build(form, 2, main_effects=True, likelihood=likelihood)
    rows = make_rows(2, 30)
    y = rows.values if likelihood is None or likelihood.location_scale else (rows.values > 0).double()
    count = torch.ones(30, dtype=F64)
    count[7] = 2.0
    again = torch.tensor([*range(30), 7])

    def table(rows: Tensor, weights: Tensor | None) -> Rows:
        given = Table(make_rows(2, 30).positions.T[rows], y[rows], weights, None, rows)
        return table_rows(model, given)[0][0]

    ends = []
    for given in (table(torch.arange(30), count), table(again, None)):
        begun_rows, state = begun(model, given)
        ends.append(sweeps(model, begun_rows, state, LIGHT_TAILS + 4))
    (weighted, bounds), (twice, other) = ends
    assert float(weighted.n_rows) == float(twice.n_rows) == 31
    np.testing.assert_allclose(bounds, other, rtol=1e-8)
    for a, b in zip(weighted.factors, twice.factors, strict=True):
        assert close(a.mean, b.mean, 1e-6)
        assert close(a.second, b.second, 1e-6)


def test_known_errors_give_the_posterior_of_a_dense_gaussian_process():
    model = build("cp", 1, main_effects=False, ranks=(1,), learn=False)
    model = replace(model, likelihood=StudentT(dof=math.inf, nugget=False, noise_known=True))
    generator = torch.Generator().manual_seed(0)
    at = torch.tensor([0, 0, 3, 4, 4, 2, 0])  # nothing at coordinate 1
    y, std = torch.randn(7, generator=generator, dtype=F64), 0.1 + torch.rand(7, generator=generator, dtype=F64)
    given = Table(at[:, None], y, None, 1 / std**2, torch.arange(7))
    rows, state = begun(model, table_rows(model, given)[0][0])
    state, bounds = sweeps(model, rows, state, 2)
    prior = mode_prior(model, state, 0).reshape(5, 5)
    cross, gram = prior[:, at], prior[at][:, at] + torch.diag(std**2)
    mean = cross @ torch.linalg.solve(gram, y)
    covariance = prior - cross @ torch.linalg.solve(gram, cross.T)
    assert close(state.factors[0].mean[:, 0], mean, 1e-10)
    assert close(unpack(state.factors[0].second)[:, 0, 0], covariance.diagonal() + mean**2, 1e-10)
    # Linear and Gaussian: the bound is the log evidence.
    evidence = torch.distributions.MultivariateNormal(torch.zeros_like(y), gram).log_prob(y)
    assert bounds[-1] == pytest.approx(float(evidence), rel=1e-10)


# --- prediction -------------------------------------------------------------------------------------------------------


def new_coordinates(model: FunctionalTucker) -> list[Tensor]:
    """Seen, between, outside; known and unknown labels."""
    continuous = f64([-3.0, 0.9, 1.7, 40.0, 1.7])
    categorical = torch.tensor([0, -1, 2, 1, 2])
    return [continuous if isinstance(f, GaussianProcess) else categorical for f in model.functions]


def test_predictive_moments_equal_brute_force(fitted):
    model, _, state = fitted
    coordinates = new_coordinates(model)
    mean, variance = model.predict(state, coordinates)
    core, core_covariance = dense_core(model, state)
    for n in range(5):
        vectors, seconds = [], []
        for mode, free in enumerate(model.free):
            moments = model.functions_at(state, mode, coordinates[mode][n : n + 1])
            u, M = torch.ones(len(free), dtype=F64), torch.ones(len(free), len(free), dtype=F64)
            u[free] = moments.mean[0]
            M = torch.outer(u, u)
            index = free.nonzero().squeeze(-1)
            M[index[:, None], index] += moments.covariance[0]
            vectors.append(u)
            seconds.append(M)
        f = entry(core, vectors)
        assert float(mean[n]) == pytest.approx(f, rel=1e-10, abs=1e-12)
        expected = entry_second(core, core_covariance, seconds) - f**2
        assert float(variance[n]) == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_draws_have_the_predictive_moments(fitted):
    model, _, state = fitted
    n_draws, coordinates = 3000, new_coordinates(model)
    draws = model.sample(state, coordinates, n_draws, torch.Generator().manual_seed(0))
    assert draws.shape == (n_draws, 5)
    assert close(draws[:, 2], draws[:, 4], 1e-12)  # one joint draw: equal cells are equal
    mean, variance = model.predict(state, coordinates)
    assert ((draws.mean(0) - mean).abs() <= 4.5 * (variance / n_draws).sqrt()).all()
    squares = (draws - mean) ** 2
    assert ((squares.mean(0) - variance).abs() <= 5 * squares.std(0) / math.sqrt(n_draws)).all()


def test_posterior_is_a_function_of_sites_and_hyperparameters(fitted):
    model, _, state = fitted
    for mode, factor in enumerate(state.factors):
        again = model.factor(mode, Sites(*factor.sites), factor.log_hyperparameters)
        assert torch.equal(again.mean, factor.mean)
        assert torch.equal(again.second, factor.second)
        assert torch.equal(again.divergence, factor.divergence)


# --- planted tensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_a_planted_tucker_tensor_is_found_from_every_seed(rank: int, seed: int):
    # The authors' code: median error .583 at rank 3, since the core's axes change order between update and prediction.
    rng = np.random.default_rng([rank, seed])
    X = rng.uniform(size=(600, 3)).round(2)  # a coordinate has six rows
    waves = rng.uniform(1, 6, size=(3, rank)), rng.uniform(0, 2 * np.pi, size=(3, rank))
    factors = [np.sin(X[:, [k]] * waves[0][k] + waves[1][k]) for k in range(3)]
    core = rng.normal(size=(rank,) * 3)
    clean = np.einsum("na,nb,nc,abc->n", *factors, core)
    clean /= clean.std()
    y = clean + 0.05 * rng.normal(size=600)
    train, test = slice(0, 450), slice(450, None)
    model = FunBaT(
        rank,
        "tucker",
        likelihood="gaussian",
        nugget=False,
        n_init=1,
        max_iter=60,
        tol=1e-2,
        random_state=seed,
        progress=False,
    ).fit(X[train], y[train])
    mean, std = model.predict(X[test], return_std=True)
    assert np.sqrt(np.mean((mean - clean[test]) ** 2)) < 0.1
    # The noise prior Gamma(1, 1) counts like two rows of noise variance one: with 450 rows, .05 becomes .083.
    assert 0.05 < model.noise_std_ < 0.12
    assert np.mean(np.abs(mean - y[test]) < 1.96 * std) > 0.9


@pytest.mark.parametrize(("likelihood", "times"), [(Bernoulli(), 4.0), (Poisson(), 1.0)], ids=lambda x: str(x)[:9])
def test_rows_of_little_information_count_more_than_once_at_first_and_once_later(likelihood: Likelihood, times: float):
    model = build("cp", 2, main_effects=False, likelihood=likelihood)
    y = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=F64)
    rows = Rows(torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]), y, None, single_rows(y, None, None))
    at, parameters = torch.zeros(4, dtype=F64), likelihood.start(0.5, y)
    early, late = (model._with_sites(rows, sweep, parameters, at, at + 0.1) for sweep in (0, 8))
    assert close(early.precision, times * late.precision)
    assert close(early.values, late.values)


def test_interactions_of_binary_values_survive_the_start():
    rng = np.random.default_rng(0)
    codes = np.stack(np.meshgrid(*[np.arange(12)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    factors = rng.normal(size=(3, 12, 4)) * 1.6
    odds = math.prod(factors[k][codes[:, k]] for k in range(3)).sum(1)
    y = (rng.random(len(odds)) < 1 / (1 + np.exp(-odds))).astype(float)
    train = rng.random(len(y)) < 0.8
    X = np.char.mod("%d", codes).astype(object)
    model = FunBaT(rank=6, likelihood="bernoulli", random_state=0, progress=False).fit(X[train], y[train])
    best = np.mean(y[~train] * -np.log1p(np.exp(-odds[~train])) - (1 - y[~train]) * np.log1p(np.exp(odds[~train])))
    found = float(np.mean(model.log_prob(X[~train], y[~train])))
    assert model.effective_rank_ >= 4
    assert found > 0.5 * best + 0.5 * math.log(0.5)  # at least half way from a coin to the truth


def test_few_coordinates_are_smooth_unless_rows_say_otherwise():
    process, rng = GaussianProcess(torch.arange(4, dtype=F64), Matern(1.5) + White()), np.random.default_rng(0)
    model = replace(build("cp", 2, main_effects=False), functions=(process, process))
    hyper = process.initial_hyperparameters(2)
    white = list(process.named(hyper)).index("white_variance")
    larger, smaller = hyper.clone(), hyper.clone()
    larger[white] += math.log(100)  # as much as the smooth part
    smaller[white] -= math.log(100)
    prior = [float(model._log_relevance(process, h, 0)) for h in (smaller, hyper, larger)]
    assert prior == pytest.approx([-math.log1p(1e-2), -math.log(2), -math.log(101)])  # half a logarithm, two functions
    # On a straight line of four points the white part stays small, on a long jagged one it does not.
    found = []
    for values in (np.arange(4.0), np.arange(60) / 20 + rng.normal(size=60)):
        X = np.arange(float(len(values)))[:, None].repeat(40, axis=0)
        y = values.repeat(40) + 0.01 * rng.normal(size=len(X))
        fitted = FunBaT(rank=1, nugget=False, random_state=0, progress=False).fit(X, y)
        (named,) = fitted.hyperparameters_.values()
        found.append(float(named["white_variance"].sum() / named["variance"].sum()))
    assert found[0] < 0.02 < 0.2 < found[1]
