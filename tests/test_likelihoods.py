"""Masked densities and totals estimated from batches; likelihoods against quadrature, SciPy and autograd."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torch.distributions import Normal

from probtensor.likelihoods import (
    Bernoulli,
    Entries,
    Likelihood,
    NegativeBinomial,
    Poisson,
    StudentT,
    batch_total,
    gaussian_log_prob,
)
from tests.reference import F64, close, f64

Density = Callable[[Tensor, Tensor, Tensor], Tensor]


def test_density_equals_torch():
    y, mean, variance = f64([0.0, 1.0, -3.0]), f64([0.5, 1.0, 2.0]), f64([1.0, 0.1, 7.0])
    assert close(gaussian_log_prob(y, mean, variance), Normal(mean, variance.sqrt()).log_prob(y), 1e-14)
    assert close(gaussian_log_prob(y, f64(0.5), f64(2.0)), Normal(f64(0.5), math.sqrt(2)).log_prob(y), 1e-14)


@pytest.mark.parametrize(
    ("stored", "explicit"), [(x, True) for x in (math.nan, math.inf, -math.inf, 1e300, 0.0)] + [(math.nan, False)]
)
def test_a_missing_value_has_a_finite_density_and_no_gradient(stored: float, explicit: bool):  # case 9
    observed = torch.tensor([True, False, True])
    y = f64([1.0, stored, 2.0])
    mean, variance = f64([0.0, 0.3, 0.5]).requires_grad_(), f64([1.0, 0.5, 2.0]).requires_grad_()
    density = gaussian_log_prob(y, mean, variance, observed if explicit else None)
    assert density.isfinite().all()
    assert float(density[1].detach()) == 0.0
    gradients = torch.autograd.grad(density.sum(), [mean, variance])
    alone = gaussian_log_prob(y[observed], mean[observed], variance[observed]).sum()
    for mine, right in zip(gradients, torch.autograd.grad(alone, [mean, variance]), strict=True):
        assert torch.equal(mine, right)
        assert float(mine[1]) == 0.0


def test_a_missing_value_adds_nothing_to_shared_parameters():
    y = f64([1.0, math.nan])
    mean, variance = f64(0.2).requires_grad_(), f64(0.7).requires_grad_()
    with_missing = torch.autograd.grad(gaussian_log_prob(y, mean, variance).sum(), [mean, variance])
    without = torch.autograd.grad(gaussian_log_prob(y[:1], mean, variance).sum(), [mean, variance])
    assert with_missing == without


@pytest.mark.parametrize("size", [40, 20, 1, 100])
def test_every_batch_estimates_the_total_whatever_its_size(size: int):  # case 10
    total = batch_total(torch.full((size,), -1.0, dtype=F64), 100)
    assert float(total) == pytest.approx(-100.0, rel=1e-15)


def test_batches_in_proportion_average_to_the_total():
    terms = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=F64)
    batches = torch.split(terms, [40, 40, 20])
    mean = sum(len(b) / 100 * batch_total(b, 100) for b in batches)
    assert close(mean, terms.sum(), 1e-14)


@pytest.mark.parametrize("size", [0, 6])
def test_an_impossible_batch_is_refused(size: int):
    with pytest.raises(ValueError, match=f"expected between 1 and n_total=5 terms, got {size}"):
        batch_total(torch.zeros(size, dtype=F64), 5)


# --- likelihoods: what all of them promise ----------------------------------------------------------------------------

NORMAL_Z, NORMAL_STEP = torch.linspace(-10, 10, 4001, dtype=F64), 20 / 4000


def expectation(log_density: Callable[[Tensor], Tensor], mean: Tensor, variance: Tensor) -> Tensor:
    """``E log_density(f)``, (n,), on a dense grid; `log_density` takes (n, grid)."""
    weight = (-0.5 * NORMAL_Z**2).exp() * NORMAL_STEP / math.sqrt(2 * math.pi)
    return log_density(mean[:, None] + variance.sqrt()[:, None] * NORMAL_Z) @ weight


def one_row_each(y: list[float], count: list[float] | None = None) -> Entries:
    ones = torch.ones(len(y), dtype=F64)
    n = ones if count is None else f64(count)
    return Entries(n, n, f64(y), 0 * ones, 0 * ones)


def poisson(y: Tensor, f: Tensor, _: Tensor) -> Tensor:
    return y * f - f.exp() - torch.lgamma(y + 1)


def negative_binomial(y: Tensor, f: Tensor, log_parameters: Tensor) -> Tensor:
    k = 1 / log_parameters[0].exp()
    mu = f.exp()
    ways = torch.lgamma(y + k) - torch.lgamma(k) - torch.lgamma(y + 1)
    return ways + k * (k / (k + mu)).log() + y * (mu / (k + mu)).log()


def bernoulli(y: Tensor, f: Tensor, _: Tensor) -> Tensor:
    return y * torch.nn.functional.logsigmoid(f) + (1 - y) * torch.nn.functional.logsigmoid(-f)


COUNTS, MEANS, VARIANCES = [0.0, 1.0, 7.0, 30.0, 2.0], [-1.0, 0.2, 1.5, 3.0, 0.0], [0.3, 1.0, 2.0, 0.1, 1e-4]
DISCRETE = [
    (Poisson(), poisson, [], COUNTS),
    (NegativeBinomial(), negative_binomial, [math.log(0.3)], COUNTS),
    (NegativeBinomial(), negative_binomial, [math.log(20.0)], COUNTS),
    (Bernoulli(), bernoulli, [], [0.0, 1.0, 1.0, 0.0, 1.0]),
]
each_discrete = pytest.mark.parametrize(("likelihood", "density", "parameters", "y"), DISCRETE)


@each_discrete
def test_expectations_gradients_and_sites_equal_those_of_a_dense_grid(
    likelihood: Likelihood, density: Density, parameters: list[float], y: list[float]
):
    entries = one_row_each(y, [1.0, 1.0, 2.5, 1.0, 0.5])
    mean, variance, p = (f64(x).requires_grad_() for x in (MEANS, VARIANCES, parameters))
    right = entries.count * expectation(lambda f: density(entries.value[:, None], f, p), mean, variance)
    mine = likelihood.expected_log_prob(p, entries, mean, variance)
    assert close(mine.detach(), right.detach(), 1e-9)
    asked = [mean, variance, p] if parameters else [mean, variance]
    for a, b in zip(*(torch.autograd.grad(x.sum(), asked, retain_graph=True) for x in (mine, right)), strict=True):
        assert close(a, b, 1e-7)
    slope_mean, slope_variance = torch.autograd.grad(right.sum(), [mean, variance])
    precision, shift = likelihood.sites(p.detach(), entries, mean.detach(), variance.detach())
    assert close(precision, -2 * slope_variance, 1e-8)
    assert close(shift, slope_mean + precision * mean.detach(), 1e-8)


@each_discrete
def test_damped_sites_end_at_the_highest_bound(
    likelihood: Likelihood, density: Density, parameters: list[float], y: list[float]
):
    """One unknown a row, prior N(0, 1): at the end no other Gaussian is better."""
    entries, p = one_row_each(y), f64(parameters)
    mean, variance = torch.zeros(5, dtype=F64), torch.ones(5, dtype=F64)
    precision, shift = likelihood.sites(p, entries, mean, variance)
    for _ in range(200):
        variance = 1 / (1 + precision)
        mean = variance * shift
        new = likelihood.sites(p, entries, mean, variance)
        precision, shift = torch.lerp(precision, new[0], 0.5), torch.lerp(shift, new[1], 0.5)
    mean.requires_grad_(), variance.requires_grad_()
    expected = expectation(lambda f: density(entries.value[:, None], f, p), mean, variance)
    bound = expected - 0.5 * (variance + mean**2 - variance.log())
    for gradient in torch.autograd.grad(bound.sum(), [mean, variance]):
        assert close(gradient, 0 * gradient, 1e-6)


@each_discrete
def test_without_variance_it_is_the_log_density(
    likelihood: Likelihood, density: Density, parameters: list[float], y: list[float]
):
    entries, f, p = one_row_each(y), f64(MEANS), f64(parameters)
    assert close(likelihood.expected_log_prob(p, entries, f, 0 * f), density(f64(y), f, p), 1e-12)


@each_discrete
def test_probabilities_of_the_predictive_are_the_expected_likelihood(
    likelihood: Likelihood, density: Density, parameters: list[float], y: list[float]
):
    mean, variance, p = f64(MEANS), f64(VARIANCES), f64(parameters)
    right = expectation(lambda f: density(f64(y)[:, None], f, p).exp(), mean, variance).log()
    predictive = likelihood.predictive(p, mean, variance)
    assert close(torch.from_numpy(predictive.log_prob(y)), right, 1e-3)
    exact = likelihood.predictive(p, mean, 0 * variance)
    assert close(torch.from_numpy(exact.log_prob(y)), density(f64(y), mean, p), 1e-10)


@pytest.mark.parametrize("likelihood", [Poisson(), NegativeBinomial(), Bernoulli()], ids=lambda x: x.name)
def test_far_out_everything_is_finite_and_precisions_are_not_negative(likelihood: Likelihood):
    mean = f64([-1e3, -50.0, 0.0, 50.0, 1e3])
    entries = one_row_each([1.0] * 5)
    p = likelihood.start(0.3, mean)
    for variance in (0 * mean, 0 * mean + 1.0, 0 * mean + 1e4):
        precision, shift = likelihood.sites(p, entries, mean, variance)
        for x in (precision, shift, likelihood.expected_log_prob(p, entries, mean, variance)):
            assert x.isfinite().all()
        assert (precision >= 0).all()
        assert np.isfinite(likelihood.predictive(p, mean, variance).mean).all()


EVERY = [Poisson(), NegativeBinomial(), Bernoulli(), StudentT(), StudentT(dof=3.0, nugget=False, noise_known=True)]
EVERY += [StudentT(min_dof=5.0, noise_known=True), StudentT(dof=math.inf)]


@pytest.mark.parametrize("likelihood", EVERY, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1e9])
def test_starts_lie_within_bounds(likelihood: Likelihood, share: float):
    like = torch.zeros(3, dtype=F64)
    start, bounds = likelihood.start(share, like), likelihood.bounds(like)
    P = len(likelihood.parameters)
    assert (start.shape, bounds.shape) == ((P,), (2, P))
    assert start.dtype == bounds.dtype == F64
    assert ((bounds[0] <= start) & (start <= bounds[1])).all()
    assert hash(likelihood) == hash(replace(likelihood))
    assert likelihood.light_tailed().parameters == likelihood.parameters


@pytest.mark.parametrize("likelihood", EVERY, ids=str)
def test_a_rank_without_rows_gets_nothing(likelihood: Likelihood):
    none = torch.zeros(0, dtype=F64)
    p = likelihood.start(0.3, none)
    entries = Entries(*[none] * 5)
    for x in (likelihood.expected_log_prob(p, entries, none, none), *likelihood.sites(p, entries, none, none)):
        assert x.shape == (0,)
    assert likelihood.predictive(p, none, none).sample(2, np.random.default_rng(0)).shape == (0, 2)


@pytest.mark.parametrize("likelihood", EVERY, ids=str)
def test_tensors_stay_on_the_device_of_their_arguments(likelihood: Likelihood):
    """The meta device holds no numbers, but like a GPU it does not mix with the CPU."""
    x = torch.ones(3, dtype=F64, device="meta")
    p = torch.ones(len(likelihood.parameters), dtype=F64, device="meta")
    assert likelihood.start(0.3, x).device == likelihood.bounds(x).device == x.device
    for now in (likelihood, likelihood.light_tailed()):
        for result in (
            now.expected_log_prob(p, Entries(x, x, x, x, x), x, x),
            *now.sites(p, Entries(x, x, x, x, x), x, x),
        ):
            assert result.device == x.device


def test_impossible_values_are_refused_and_missing_ones_are_not():
    for likelihood in EVERY:
        likelihood.check(f64([0.0, 1.0, math.nan]))
        likelihood.check(f64([]))
        with pytest.raises(ValueError, match="y: expected"):
            likelihood.check(f64([0.0, math.inf]))
    for likelihood in (Poisson(), NegativeBinomial()):
        likelihood.check(f64([12.0, 1e15]))
        for bad in (-1.0, 0.5):
            with pytest.raises(ValueError, match=rf"y: expected counts .*, got {bad:g} \(1 such of 2\)"):
                likelihood.check(f64([1.0, bad]))
    with pytest.raises(ValueError, match="y: expected values 0 and 1, got 2"):
        Bernoulli().check(f64([0.0, 2.0]))
    StudentT().check(f64([-3.7, 1e9]))


def test_offsets_have_the_mean_and_are_finite():
    for likelihood in EVERY:
        for mean in (0.0, 0.3, 1.0):
            offset = likelihood.offset(mean)
            assert math.isfinite(offset)
            if mean == 0.3 and not likelihood.location_scale:
                p = likelihood.start(0.3, f64([0.0]))
                assert likelihood.predictive(p, f64([offset]), f64([0.0])).mean[0] == pytest.approx(0.3)
    assert StudentT().offset(17.0) == 0


# --- Student-t --------------------------------------------------------------------------------------------------------


def cells(nugget_count: int = 3) -> Entries:
    """Cells of one, two and three rows, by their definition."""
    rows = [(f64([1.5]), f64([2.0])), (f64([0.2, -1.0]), f64([1.0, 0.5])), (f64([4.0, 4.5, 9.0]), f64([1.0, 3.0, 0.2]))]
    return merge(rows[:nugget_count])


def merge(rows: list[tuple[Tensor, Tensor]]) -> Entries:
    columns = []
    for y, r in rows:
        value = (r * y).sum() / r.sum()
        columns.append(
            [len(y), float(r.sum()), float(value), float((r * (y - value) ** 2).sum()), float(r.log().sum())]
        )
    return Entries(*f64(columns).T)


M3, V3 = f64([0.5, 0.1, 3.0]), f64([0.2, 0.5, 0.01])


@pytest.mark.parametrize("dof", [1.0, 2.5, 4.0, 30.0])
def test_one_row_without_nugget_is_students_t(dof: float):
    y, s = np.array([-3.0, 0.1, 50.0]), 0.7
    likelihood, p = StudentT(dof=dof, nugget=False), f64([2 * math.log(s)])
    zero = torch.zeros(3, dtype=F64)
    mine = likelihood.expected_log_prob(p, one_row_each(y.tolist()), zero, zero)
    assert mine.numpy() == pytest.approx(stats.t.logpdf(y, dof, scale=s), rel=1e-12)


@pytest.mark.parametrize("dof", [2.5, 30.0, math.inf])
@pytest.mark.parametrize("nugget", [True, False])
@pytest.mark.parametrize("noise_known", [True, False])
def test_without_variance_the_bound_is_the_density_integrated_over_residual_and_weight(
    dof: float, nugget: bool, noise_known: bool
):
    rows = [(np.array([1.5]), np.array([2.0])), (np.array([0.2, -1.0]), np.array([1.0, 0.5]))]
    s2, g2, f = (1.0 if noise_known else 0.3), 0.6 * nugget, np.array([0.5, 0.1])
    p = f64([math.log(x) for x, there in ((s2, not noise_known), (0.6, nugget)) if there])
    mine = StudentT(dof=dof, nugget=nugget, noise_known=noise_known).expected_log_prob(
        p, merge([(torch.from_numpy(y), torch.from_numpy(r)) for y, r in rows]), torch.from_numpy(f), 0 * M3[:2]
    )
    for i, (y, r) in enumerate(rows):

        def given_weight(w: float, y: np.ndarray = y, r: np.ndarray = r, i: int = i) -> float:
            if not nugget:
                return float(stats.norm.pdf(y, f[i], np.sqrt(s2 / (w * r))).prod())
            g = math.sqrt(g2 / w) * NORMAL_Z.numpy()[::4]
            rows_density = stats.norm.pdf(y[:, None], f[i] + g, np.sqrt(s2 / (w * r))[:, None]).prod(axis=0)
            return float((rows_density * stats.norm.pdf(g, 0, math.sqrt(g2 / w))).sum() * (g[1] - g[0]))

        if math.isinf(dof):
            right = given_weight(1.0)
        else:
            right, _ = integrate.quad(
                lambda w, h=given_weight: h(w) * stats.gamma.pdf(w, dof / 2, scale=2 / dof), 0, 60, limit=200
            )
        assert float(mine[i]) == pytest.approx(math.log(right), rel=1e-6)


@pytest.mark.parametrize("dof", [2.5, 30.0])
def test_the_bound_is_that_of_its_gamma_and_no_other_gamma_gives_a_higher_one(dof: float):
    likelihood, p, entries = StudentT(dof=dof), f64([math.log(0.3), math.log(0.6)]), cells()
    found = likelihood.residual(p, entries, M3, V3)
    assert close(found.expected_weight, found.shape / found.rate, 1e-14)

    def bound(shape: Tensor, rate: Tensor) -> Tensor:
        """E log p(y, w | f) - E log q(w), moments of w by their formulas."""
        n, W, value, scatter, log_r = entries
        v = 0.6 + 0.3 / W
        Q = scatter / 0.3 + ((value - M3) ** 2 + V3) / v
        w, log_w = shape / rate, torch.digamma(shape) - rate.log()
        log_det = (n - 1) * math.log(0.3) + W.log() + v.log() - log_r
        rows = 0.5 * (n * log_w - n * math.log(2 * math.pi) - log_det - w * Q)
        half = f64(dof / 2)
        prior = half * half.log() - torch.lgamma(half) + (half - 1) * log_w - half * w
        entropy = shape - rate.log() + torch.lgamma(shape) + (1 - shape) * torch.digamma(shape)
        return rows + prior + entropy

    best = likelihood.expected_log_prob(p, entries, M3, V3)
    assert close(bound(found.shape, found.rate), best, 1e-12)
    for a, b in ((1.1, 1.0), (1.0, 0.8), (0.9, 0.9)):
        assert (bound(a * found.shape, b * found.rate) < best).all()


@pytest.mark.parametrize("likelihood", [StudentT(), StudentT(dof=4.0, nugget=False), StudentT(dof=math.inf)], ids=str)
def test_sites_are_the_gradients_of_the_bound(likelihood: StudentT):
    for now in (likelihood, likelihood.light_tailed()):
        mean, variance, p = M3.clone().requires_grad_(), V3.clone().requires_grad_(), now.start(0.4, M3)
        bound = now.expected_log_prob(p, cells(), mean, variance).sum()
        slope_mean, slope_variance = torch.autograd.grad(bound, [mean, variance])
        precision, shift = now.sites(p, cells(), M3, V3)
        assert close(precision, -2 * slope_variance, 1e-12)
        assert close(shift, slope_mean + precision * M3, 1e-12)


def test_parameters_have_the_gradient_of_differences():
    likelihood, p = StudentT(), f64([-1.0, -0.5, 1.3])

    def total(p: Tensor) -> Tensor:
        return likelihood.expected_log_prob(p, cells(), M3, V3).sum()

    (mine,) = torch.autograd.grad(total(q := p.clone().requires_grad_()), q)
    for i, h in enumerate(1e-5 * torch.eye(3, dtype=F64)):
        assert float(mine[i]) == pytest.approx(float(total(p + h) - total(p - h)) / 2e-5, rel=1e-7)


def test_a_resting_dof_has_no_gradient():
    light = StudentT(noise_known=True, nugget=False).light_tailed()
    p = f64([1.0]).requires_grad_()
    (gradient,) = torch.autograd.grad(light.expected_log_prob(p, cells(), M3, V3).sum(), p)
    assert gradient.tolist() == [0.0]


@pytest.mark.parametrize("dof", [2.5, 5.0, math.inf])
def test_sites_climb_the_bound_of_a_gaussian_prior(dof: float):
    """Coordinate ascent: Gaussian factor, then posterior of f, again and again; the bound never falls."""
    likelihood, p, entries = StudentT(dof=dof), f64([math.log(0.1), math.log(0.2)]), cells()
    mean, variance, bounds = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64), []
    for _ in range(60):
        divergence = 0.5 * (variance + mean**2 - 1 - variance.log())
        bounds.append(likelihood.expected_log_prob(p, entries, mean, variance) - divergence)
        precision, shift = likelihood.sites(p, entries, mean, variance)
        variance = 1 / (1 + precision)
        mean = variance * shift
    steps = torch.stack(bounds).diff(dim=0)
    assert (steps >= -1e-12).all()
    assert (steps[-1].abs() < 1e-9).all()


def test_merged_rows_say_what_the_rows_say_without_nugget_and_with_gaussian_tails():
    likelihood, p = StudentT(dof=math.inf, nugget=False), f64([math.log(0.3)])
    y, r = f64([4.0, 4.5, 9.0]), f64([1.0, 3.0, 0.2])
    apart = merge([(a[None], b[None]) for a, b in zip(y, r, strict=True)])
    mean, variance = M3[2:].expand(3), V3[2:].expand(3)
    whole = likelihood.expected_log_prob(p, merge([(y, r)]), M3[2:], V3[2:])
    assert close(whole.sum(), likelihood.expected_log_prob(p, apart, mean, variance).sum(), 1e-13)
    sites = likelihood.sites(p, merge([(y, r)]), M3[2:], V3[2:])
    for a, b in zip(sites, likelihood.sites(p, apart, mean, variance), strict=True):
        assert close(a.sum(), b.sum(), 1e-13)


def test_a_large_dof_is_almost_gaussian():
    p = f64([math.log(0.3), math.log(0.6)])
    near, at = (StudentT(dof=x).expected_log_prob(p, cells(), M3, V3) for x in (9e5, math.inf))
    assert close(near, at, 1e-4)
    assert torch.equal(StudentT(dof=1e7).expected_log_prob(p, cells(), M3, V3), at)


def test_the_residual_of_a_cell_is_that_of_gaussian_conditioning():
    s2, g2 = 0.3, 0.6
    found = StudentT(dof=math.inf).residual(f64([math.log(s2), math.log(g2)]), cells(), M3, V3)
    r, y, f = f64([1.0, 3.0, 0.2]), f64([4.0, 4.5, 9.0]), 3.0
    joint = g2 * torch.ones(3, 3, dtype=F64) + torch.diag(s2 / r)  # of the three rows, given f
    gain = torch.linalg.solve(joint, g2 * torch.ones(3, dtype=F64))
    assert float(found.shrink[2] * (cells().value[2] - f)) == pytest.approx(float(gain @ (y - f)))
    assert float(found.variance[2]) == pytest.approx(float(g2 - gain.sum() * g2))
    assert found.expected_weight.tolist() == [1.0, 1.0, 1.0]
    nothing = StudentT(dof=3.0, nugget=False).residual(f64([math.log(s2)]), cells(), M3, V3)
    assert nothing.shrink.tolist() == nothing.variance.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dof", [2.5, math.inf])
def test_the_known_part_of_a_cell_is_what_its_first_rows_say_under_the_weight_of_all(dof: float):
    likelihood, p, whole = StudentT(dof=dof), f64([math.log(0.3), math.log(0.6)]), cells()
    precision, shift = likelihood.sites(p, whole, M3, V3)
    for part, right in zip(likelihood.known_part(p, whole, whole, precision), (precision, shift), strict=True):
        assert close(part, right, 1e-14)
    first = merge([(f64([1.5]), f64([2.0])), (f64([0.2]), f64([1.0])), (f64([4.0]), f64([1.0]))])
    first.weight[0] = 0.0  # a cell that had no row
    known, known_shift = likelihood.known_part(p, whole, first, precision)
    weight = likelihood.residual(p, whole, M3, V3).expected_weight
    assert close(known[1:], weight[1:] / (0.6 + 0.3 / first.weight[1:]), 1e-14)
    assert close(known_shift, known * first.value, 1e-14)
    assert float(known[0]) == 0
    assert (known <= precision).all()


@pytest.mark.parametrize("dof", [2.5, 6.0, math.inf])
def test_a_new_cell_has_the_distribution_of_draws(dof: float):
    likelihood, p = StudentT(dof=dof), f64([math.log(0.3), math.log(0.6)])
    rng = np.random.default_rng(0)
    n = 200_000
    w = rng.gamma(dof / 2, 2 / dof, n) if math.isfinite(dof) else np.ones(n)
    y = 1.0 + math.sqrt(0.2) * rng.standard_normal(n) + np.sqrt(0.9 / w) * rng.standard_normal(n)
    predictive = likelihood.predictive(p, f64([1.0]), f64([0.2]))
    for q in (0.001, 0.1, 0.5, 0.95, 0.999):
        assert float((y <= predictive.quantile(q)[0]).mean()) == pytest.approx(q, abs=4 * math.sqrt(q * (1 - q) / n))
    if math.isinf(dof):
        assert predictive.std[0] == pytest.approx(math.sqrt(1.1))
    pure = likelihood.predictive(p, f64([1.0]), f64([0.0]))
    right = stats.t(dof, 1.0, math.sqrt(0.9)) if math.isfinite(dof) else stats.norm(1.0, math.sqrt(0.9))
    assert pure.log_prob([4.0])[0] == pytest.approx(right.logpdf(4.0), abs=1e-3)


def test_parameters_are_those_that_are_learned():
    assert StudentT().parameters == ("noise_variance", "nugget_variance", "dof")
    assert StudentT(dof=3.0, nugget=False).parameters == ("noise_variance",)
    assert StudentT(noise_known=True).parameters == ("nugget_variance", "dof")
    assert StudentT(dof=math.inf, nugget=False, noise_known=True).parameters == ()
    assert StudentT().start(0.4, f64(0.0)).exp().tolist() == pytest.approx([0.2, 0.2, 4.0])
    assert StudentT(min_dof=6.0).bounds(f64(0.0)).exp().T.flatten().tolist() == pytest.approx(
        [1e-8, 1e2, 1e-8, 1e2, 6.0, 100.0]
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"dof": 0.0}, "dof"), ({"dof": math.nan}, "dof"), ({"min_dof": 0.0}, "min_dof"), ({"min_dof": 101.0}, "min_dof")],
)
def test_a_dof_that_is_none_is_refused(arguments: dict[str, float], named: str):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        StudentT(**arguments)  # type: ignore[arg-type]
