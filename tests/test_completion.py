"""Neural tensor completion: what it recovers, its intervals, labels in and out, files; members against a loop."""

from __future__ import annotations

import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import probtensor as pt
from probtensor.estimator import UnknownLabelWarning
from probtensor.models import NeuralTensorCompletion
from probtensor.models.completion_effects import choose_strengths, fit_effects, number_cells, subsets_of
from probtensor.models.completion_network import Batch, Kind, Rows, fill_unknown, forward, initial, places
from probtensor.models.completion_training import adam_step, train

QUICK = {"rank": 2, "hidden": (8,), "embedding": 4, "max_epochs": 2, "n_members": 2, "random_state": 0}
QUICK |= {"progress": False, "device": "cpu"}
NOISE = 0.3


def planted(n: int = 3000, sizes: tuple[int, ...] = (30, 20, 10), seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Effects of the labels, a product of one factor of each of the first two modes, and noise."""
    rng = np.random.default_rng(seed)
    index = np.stack([rng.integers(0, size, n) for size in sizes], axis=1)
    y = 7.0 + sum(rng.normal(size=size)[column] for size, column in zip(sizes, index.T, strict=True))
    if len(sizes) > 1:
        y = y + np.prod(
            [rng.normal(size=size)[column] for size, column in zip(sizes, index.T, strict=True)][:2], axis=0
        )
    X = pd.DataFrame({f"mode{k}": np.char.mod(f"m{k}-%d", column).astype(object) for k, column in enumerate(index.T)})
    return X, y + NOISE * rng.normal(size=n)


X, Y = planted()
TRAIN, TEST = slice(0, 2500), slice(2500, None)


@pytest.fixture(scope="module")
def fitted() -> NeuralTensorCompletion:
    return NeuralTensorCompletion(random_state=0, progress=False, device="cpu").fit(X[TRAIN], Y[TRAIN])


@pytest.fixture(scope="module")
def quick() -> NeuralTensorCompletion:
    return NeuralTensorCompletion(**QUICK).fit(X[TRAIN], Y[TRAIN])


def bits(model: NeuralTensorCompletion, table: pd.DataFrame) -> np.ndarray:
    return np.concatenate([*model.predict(table, return_std=True), *model.predict_interval(table)])


# What a fit gives


def test_biases_and_a_product_are_recovered_down_to_the_noise(fitted):
    assert pt.metrics.rmse(Y[TEST], fitted.predict(X[TEST])) < 1.25 * NOISE


def test_intervals_cover_what_they_say(fitted):
    lower, upper = fitted.predict_interval(X[TEST], 0.9)
    assert 0.8 < np.mean((lower <= Y[TEST]) & (Y[TEST] <= upper)) < 0.97


def test_candidates_have_weights_that_sum_to_one_and_epochs(fitted):
    assert next(iter(fitted.weights_)) == "effects"
    assert min(fitted.weights_.values()) >= 0
    assert sum(fitted.weights_.values()) == pytest.approx(1.0)
    assert set(fitted.best_epochs_) == set(fitted.weights_) - {"effects", "factors of pairs", "factors of all modes"}
    assert all(len(epochs) == 5 for epochs in fitted.best_epochs_.values())
    assert ("mode0",) in fitted.strengths_
    assert 0.5 * NOISE < fitted.noise_std_ < 2


def test_densities_and_draws_are_of_the_predictive_distribution(quick):
    drawn = quick.sample_y(X[:50], 4000)
    mean, std = quick.predict(X[:50], return_std=True)
    assert drawn.shape == (50, 4000)
    assert np.abs(drawn.mean(axis=1) - mean).max() < 0.2 * std.max()
    assert np.isfinite(quick.log_prob(X[TEST], Y[TEST])).all()


@pytest.mark.parametrize("head", ["mlp", "costco", None])
@pytest.mark.parametrize("sizes", [(7,), (7, 5), (7, 5, 4), (7, 5, 4, 3), (5, 4, 3, 2, 2)])
def test_any_number_of_modes_and_any_head(sizes, head):
    X, y = planted(400, sizes)
    model = NeuralTensorCompletion(**QUICK | {"head": head}).fit(X, y)
    assert pt.metrics.rmse(y, model.predict(X)) < y.std()


@pytest.mark.parametrize("settings", [{"biases": False}, {"interactions": False}, {"rank": 0}, {"weight_decay": 3.0}])
def test_parts_can_be_left_out(settings):
    X, y = planted(400)
    model = NeuralTensorCompletion(**QUICK | settings).fit(X, y)
    assert np.isfinite(bits(model, X)).all()
    assert ("effects" in model.weights_) == settings.get("biases", True)


@pytest.mark.parametrize("n", [1, 2, 29, 30, 31])
def test_few_rows(n):
    X, y = planted(n)
    model = NeuralTensorCompletion(**QUICK).fit(X, y)
    assert np.isfinite(bits(model, X)).all()
    assert sum(model.weights_.values()) == pytest.approx(1.0)


def test_a_constant_is_predicted_as_it_is():
    model = NeuralTensorCompletion(**QUICK).fit(X[:200], np.full(200, 3.25))
    np.testing.assert_allclose(model.predict(X[:200]), 3.25, atol=1e-6)


def test_the_unit_of_the_values_does_not_matter():
    plain = NeuralTensorCompletion(**QUICK).fit(X[:500], Y[:500])
    scaled = NeuralTensorCompletion(**QUICK).fit(X[:500], 1e5 + 1e5 * Y[:500])
    # Folds depend on what the rows hold, so that a fit does not depend on their order.
    errors = [
        pt.metrics.rmse(Y[500:], plain.predict(X[500:])),
        pt.metrics.rmse(Y[500:], scaled.predict(X[500:]) / 1e5 - 1),
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_arrays_and_numbers_as_labels_predict_as_a_table_does():
    codes = np.stack([pd.factorize(X[name], sort=True)[0] for name in X], axis=1)
    models = [
        NeuralTensorCompletion(**QUICK).fit(table, Y) for table in (codes, pd.DataFrame(codes, columns=X.columns))
    ]
    np.testing.assert_array_equal(models[0].predict(codes), models[1].predict(pd.DataFrame(codes, columns=X.columns)))


def test_float_columns_are_continuous_and_go_between_and_beyond_their_coordinates():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"time": rng.uniform(0, 6, 2000), "cell": rng.choice(list("abc"), 2000)})
    y = np.sin(table["time"]) + 0.1 * rng.normal(size=2000)
    model = NeuralTensorCompletion(random_state=0, progress=False).fit(table[:1800], y[:1800])
    assert pt.metrics.rmse(y[1800:], model.predict(table[1800:])) < 0.15
    assert np.isfinite(model.predict(pd.DataFrame({"time": [-5.0, 99.0], "cell": ["a", "b"]}))).all()


def test_sample_weight_counts_rows_and_inputs_stay_as_they_were():
    table, y, weight = X[:300].copy(), Y[:300].copy(), np.ones(300)
    before = table.copy(), y.copy()
    weighted = NeuralTensorCompletion(**QUICK).fit(table, y, weight)
    pd.testing.assert_frame_equal(table, before[0])
    np.testing.assert_array_equal(y, before[1])
    np.testing.assert_allclose(weighted.predict(table), NeuralTensorCompletion(**QUICK).fit(table, y).predict(table))


def test_noise_alone_leaves_every_member_at_the_start():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.integers(0, 1000, size=(300, 3)), columns=list("abc"))
    settings = QUICK | {"learning_rate": 0.09, "weight_decay": 0.0, "n_members": 5}
    model = NeuralTensorCompletion(**settings).fit(table, rng.normal(size=300))
    assert 0 in {epoch for epochs in model.best_epochs_.values() for epoch in epochs}
    assert np.isfinite(bits(model, table[:10])).all()


# Labels that were never seen


def test_unknown_labels_are_flagged_and_fall_back_mode_by_mode(fitted):
    new = X[:3].copy()
    new.loc[0, "mode0"] = "new"
    new.loc[1, ["mode0", "mode1", "mode2"]] = "new"
    assert fitted.unknown(new).to_numpy().tolist() == [[True, False, False], [True, True, True], [False, False, False]]
    with pytest.warns(UnknownLabelWarning):
        mean, std = fitted.predict(new, return_std=True)
    assert std[2] < 0.7 * std[0]
    assert std[0] < std[1]
    assert abs(mean[1] - Y[TRAIN].mean()) < 0.5
    rows = X[TEST].copy()
    rows["mode0"] = "new"
    with pytest.warns(UnknownLabelWarning):
        partial = fitted.predict(rows)
    assert np.corrcoef(partial, Y[TEST])[0, 1] > 0.3
    with pytest.warns(UnknownLabelWarning):
        lower, upper = fitted.predict_interval(rows, 0.9)
    assert np.mean((lower <= Y[TEST]) & (Y[TEST] <= upper)) > 0.8


def test_a_category_without_rows_is_unknown():
    table = X[:300].astype({"mode1": pd.CategoricalDtype([*sorted(X["mode1"].unique()), "nobody"])})
    model = NeuralTensorCompletion(**QUICK).fit(table, Y[:300])
    asked = table[:1].copy()
    asked["mode1"] = pd.Categorical(["nobody"], categories=table["mode1"].cat.categories)
    stranger = asked.assign(mode1="stranger")
    with pytest.warns(UnknownLabelWarning):
        np.testing.assert_array_equal(model.predict(asked), model.predict(stranger))


# Same bits, files, and what is left alone


def test_the_same_seed_gives_the_same_bits_and_no_global_generator_moves(quick):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    again = clone(quick).fit(X[TRAIN], Y[TRAIN])
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    np.testing.assert_array_equal(bits(again, X[TEST]), bits(quick, X[TEST]))
    other = NeuralTensorCompletion(**QUICK | {"random_state": 1}).fit(X[TRAIN], Y[TRAIN])
    assert not np.array_equal(other.predict(X[TEST]), quick.predict(X[TEST]))


def test_a_fresh_process_loads_the_model_and_predicts_the_same_bits(quick, tmp_path):
    quick.save(tmp_path / "a.model")
    X[TEST].to_pickle(tmp_path / "X.pkl")
    code = (
        "import numpy as np, pandas as pd, probtensor as pt\n"
        "model, X = pt.load('a.model'), pd.read_pickle('X.pkl')\n"
        "np.save('bits.npy', np.concatenate([*model.predict(X, return_std=True), *model.predict_interval(X)]))\n"
    )
    root = str(Path(__file__).parent.parent)
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"],
        cwd=tmp_path,
        check=True,
        timeout=60,
    )
    np.testing.assert_array_equal(np.load(tmp_path / "bits.npy"), bits(quick, X[TEST]))
    loaded = pt.load(tmp_path / "a.model")
    assert loaded.weights_ == quick.weights_
    assert loaded.best_epochs_ == quick.best_epochs_
    assert loaded.get_params() == quick.get_params() | {"hidden": [8], "weight_decay": [0.1, 1.0, 10.0]}


def test_a_continuous_mode_is_saved_too(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"time": rng.uniform(0, 6, 200), "cell": rng.choice(list("abc"), 200)})
    model = NeuralTensorCompletion(**QUICK).fit(table, np.sin(table["time"]))
    model.save(tmp_path / "b.model")
    np.testing.assert_array_equal(bits(pt.load(tmp_path / "b.model"), table), bits(model, table))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", -1),
        ("head", "cnn"),
        ("embedding", 0),
        ("hidden", ()),
        ("hidden", "64"),
        ("weight_decay", -1.0),
        ("weight_decay", ()),
        ("weight_decay", 1e6),
        ("n_members", 0),
        ("learning_rate", 0.0),
        ("batch_size", 2.5),
        ("max_epochs", 0),
        ("patience", 0),
        ("random_state", "seed"),
        ("device", "abacus"),
    ],
)
def test_bad_parameters_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        NeuralTensorCompletion(**QUICK | {name: value}).fit(X[:50], Y[:50])


def test_what_is_not_supported_is_refused_by_name():
    model = NeuralTensorCompletion(**QUICK)
    with pytest.raises(ValueError, match=r"^noise_std: expected None"):
        model.fit(X[:50], Y[:50], noise_std=np.ones(50))
    with pytest.raises(ValueError, match=r"^y: expected"):
        model.fit(X[:50], np.full(50, np.nan))
    with pytest.raises(NotFittedError):
        model.predict(X[:50])


# The parts


def test_effects_are_those_of_ridge_regression():
    labels = np.stack([pd.factorize(X[name])[0] for name in X], axis=1)[:200]
    subsets = subsets_of(3)
    cells = [number_cells(labels, subset, (30, 20, 10)) for subset in subsets]
    strengths, values = [2.0, 3.0, 4.0, 5.0, 6.0, 7.0], Y[:200] - Y[:200].mean()
    found, fit = fit_effects(cells, values, np.ones(200), strengths)
    design = np.concatenate([np.eye(len(part.known))[part.code] for part in cells], axis=1)
    penalty = np.concatenate([np.full(len(part.known), s) for part, s in zip(cells, strengths, strict=True)])
    exact = np.linalg.solve(design.T @ design + np.diag(penalty), design.T @ values)
    np.testing.assert_allclose(np.concatenate(found), exact, atol=1e-2)
    np.testing.assert_allclose(fit, design @ exact, atol=1e-2)


def test_effects_that_are_not_there_are_left_out():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, size=(3000, 2))
    values = rng.normal(size=12)[labels[:, 0]] + 0.5 * rng.normal(size=3000)
    cells = [number_cells(labels, subset, (12, 12)) for subset in subsets_of(2)]
    chosen = choose_strengths(cells, subsets_of(2), values, np.ones(3000), np.arange(3000) % 5 == 0)
    assert chosen[0] < 30 < chosen[1]


@pytest.mark.parametrize("head", ["mlp", "costco", None])
def test_members_trained_together_are_those_of_a_loop(head):
    kind = Kind((6, 5), 2, head, 3, (4, 3), 2 if head else 0)
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    parameters = initial(kind, 3, generator, torch.float64)
    parameters = {name: value + 0.1 * torch.randn(value.shape, **draw) for name, value in parameters.items()}
    labels = torch.randint(0, 5, (3, 20, 2), generator=generator)
    features = torch.randn(3, 20, 2, **draw) if head else None
    target, weight = torch.randn(3, 20, **draw), torch.rand(3, 20, **draw)
    decay, rate = torch.tensor([0.0, 1.0, 10.0]).double(), 0.01
    alone = []
    for m in range(3):
        own = {name: value[m].clone().requires_grad_() for name, value in parameters.items()}
        optimiser = torch.optim.AdamW([{"params": list(own.values())}], lr=rate, weight_decay=float(decay[m]))
        member = {name: value[None] for name, value in own.items()}
        inputs = None if features is None else features[m : m + 1]
        off = target[m] - forward(kind, member, places(kind, labels[m : m + 1], 1), inputs)[0]
        ((weight[m] * off**2).sum() / weight[m].sum()).backward()
        optimiser.step()
        alone.append(own)
    together = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in together.items()}
    adam_step(kind, together, moments, Batch(labels, features, target, weight), 1, rate, decay)
    for name, value in together.items():
        torch.testing.assert_close(value, torch.stack([own[name] for own in alone]), rtol=0, atol=1e-5)


def test_the_best_epoch_may_be_the_start_and_its_parameters_come_back():
    kind = Kind((6, 5), 2, "mlp", 3, (4,))
    generator = torch.Generator().manual_seed(0)
    parameters = initial(kind, 2, generator, torch.float64)
    labels = torch.randint(0, 5, (40, 2), generator=generator)
    target = torch.cat([torch.ones(30), -torch.ones(10)]).double().expand(2, -1)
    rows = Rows(labels, None, target, torch.ones(40).double())
    train_rows, test_rows = [np.arange(30)] * 2, torch.arange(30, 40).expand(2, -1)
    how = {"learning_rate": 0.1, "batch_size": 10, "max_epochs": 9, "patience": 3}
    fit = train(kind, parameters, rows, np.arange(40), train_rows, test_rows, torch.zeros(2), **how)
    assert fit.epoch.tolist() == [0, 0]
    assert len(fit.history) == 4
    for name, value in parameters.items():
        assert torch.equal(fit.parameters[name], value)


def test_labels_without_a_row_have_the_mean_of_the_others():
    kind = Kind((2, 3), 1, None, 1, (1,))
    parameters = {"bias": torch.tensor([1.0, 3.0, 9.0, 2.0, 4.0, 9.0, 9.0])[None, :, None]}
    seen = torch.tensor([[True, True, False, True, True, False, False]])
    filled = fill_unknown(kind, parameters, seen)["bias"].ravel().tolist()
    assert filled == [1.0, 3.0, 2.0, 2.0, 4.0, 3.0, 3.0]


def test_no_warnings_while_fitting_and_predicting():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NeuralTensorCompletion(**QUICK).fit(X[:100], Y[:100]).predict(X[:100])


# Validation rows of the user's, and influence


def test_validation_rows_choose_and_are_not_trained_on():
    model = NeuralTensorCompletion(**QUICK | {"max_epochs": 6}).fit(
        X[:2000], Y[:2000], X_val=X[2000:2500], y_val=Y[2000:2500]
    )
    assert pt.metrics.rmse(Y[TEST], model.predict(X[TEST])) < 2.5 * NOISE
    shifted = NeuralTensorCompletion(**QUICK | {"max_epochs": 6}).fit(
        X[:2000], Y[:2000], X_val=X[2000:2500], y_val=Y[2000:2500] + 50
    )
    assert abs(np.mean(shifted.predict(X[TEST]) - Y[TEST])) < 10
    for candidate, curves in model.validation_rmse_.items():
        assert curves.shape[1] == 2
        best = curves.min(axis=0)
        assert [int(np.argmin(curve)) for curve in curves.T] == list(model.best_epochs_[candidate])
        assert (best > 0.5 * NOISE).all()


def test_validation_rows_may_have_labels_that_training_rows_lack():
    strange = X[:3].copy()
    strange["mode0"] = "new"
    model = NeuralTensorCompletion(**QUICK).fit(
        X[TRAIN], Y[TRAIN], X_val=pd.concat([X[TEST], strange]), y_val=np.append(Y[TEST], Y[:3])
    )
    assert model.unknown(strange)["mode0"].all()


@pytest.mark.parametrize("settings", [{}, {"head": "costco"}, {"head": None}, {"biases": False}])
def test_influence_finds_the_rows_whose_values_are_wrong(settings):
    rng = np.random.default_rng(0)
    wrong = rng.choice(2000, 100, replace=False)
    y = Y.copy()
    y[wrong] += 8 * rng.choice([-1, 1], 100)
    settings = QUICK | {"max_epochs": 5, "n_checkpoints": 3} | settings
    model = NeuralTensorCompletion(**settings).fit(X[:2000], y[:2000], X_val=X[2000:2500], y_val=Y[2000:2500])
    for parameters in ("all", "last"):
        scores = model.influence(X[:2000], y[:2000], X[2000:2500], Y[2000:2500], parameters=parameters)
        assert scores.shape == (2000,)
        size = np.abs(scores)
        assert np.median(size[wrong]) > 3 * np.median(np.delete(size, wrong))
    np.testing.assert_array_equal(
        model.influence(X[:9], y[:9], X[TEST], Y[TEST], signed=False),
        np.abs(model.influence(X[:9], y[:9], X[TEST], Y[TEST])),
    )


def test_influence_is_that_of_each_member_by_its_own_gradient():
    model = NeuralTensorCompletion(**QUICK | {"biases": False, "weight_decay": 1.0, "n_checkpoints": 2}).fit(
        X[:300], Y[:300]
    )
    rows, query = (X[:20], Y[:20]), (X[300:310], Y[300:310])
    found = model.influence(*rows, *query)
    group, total = model._fitted.groups[0], torch.zeros(20)
    scale = lambda y: torch.from_numpy((y - model.y_mean_) / model.y_scale_).float()  # noqa: E731
    labels = [torch.from_numpy(model._rows(*part, "X", "y")[0]) for part in (rows, query)]
    for m in range(2):
        states = [(state, float(rates[m])) for state, rates in group.checkpoints if rates[m] > 0]
        last = float(np.mean([rate for _, rate in states])) if states else 1.0
        for state, rate in [*states, (group.parameters, last)]:
            own = {name: value[m : m + 1] for name, value in state.items()}

            def gradient(label, y, own=own):
                own = {name: value.clone().requires_grad_() for name, value in own.items()}
                loss = 0.5 * (forward(group.kind, own, places(group.kind, label[None], 1), None)[0, 0] - y) ** 2
                return torch.cat([g.ravel() for g in torch.autograd.grad(loss, list(own.values()))])

            v = sum(gradient(label, y) for label, y in zip(labels[1], scale(query[1]), strict=True))
            total += (
                rate
                / 2
                * torch.stack([gradient(label, y) @ v for label, y in zip(labels[0], scale(rows[1]), strict=True)])
            )
    np.testing.assert_allclose(found, total.numpy() * model.y_scale_**2, rtol=1e-4, atol=1e-4 * np.abs(found).max())


def test_influence_and_curves_come_back_from_a_file(tmp_path):
    model = NeuralTensorCompletion(**QUICK | {"n_checkpoints": 2}).fit(X[:300], Y[:300])
    model.save(tmp_path / "c.model")
    loaded = pt.load(tmp_path / "c.model")
    given = X[:50], Y[:50], X[TEST], Y[TEST]
    np.testing.assert_array_equal(loaded.influence(*given), model.influence(*given))
    for name, curves in model.validation_rmse_.items():
        np.testing.assert_array_equal(loaded.validation_rmse_[name], curves)


def test_bad_validation_rows_and_queries_are_named():
    model = NeuralTensorCompletion(**QUICK)
    with pytest.raises(ValueError, match=r"^y_val: expected one with X_val, got None"):
        model.fit(X[:50], Y[:50], X_val=X[50:60])
    with pytest.raises(ValueError, match=r"^y_val: expected shape \(10,\) as X_val has rows, got \(3,\)"):
        model.fit(X[:50], Y[:50], X_val=X[50:60], y_val=Y[:3])
    with pytest.raises(ValueError, match=r"^y_val: expected finite values"):
        model.fit(X[:50], Y[:50], X_val=X[50:51], y_val=[np.nan])
    model.fit(X[:50], Y[:50])
    with pytest.raises(ValueError, match=r"^parameters: expected"):
        model.influence(X[:5], Y[:5], X[5:9], Y[5:9], parameters="some")
    with pytest.raises(ValueError, match=r"^y_query: expected shape"):
        model.influence(X[:5], Y[:5], X[5:9], Y[5:6])
    with pytest.raises(ValueError, match=r"^head, rank: expected a network or factors"):
        NeuralTensorCompletion(**QUICK | {"head": None, "rank": 0}).fit(X[:50], Y[:50]).influence(
            X[:5], Y[:5], X[5:9], Y[5:9]
        )
