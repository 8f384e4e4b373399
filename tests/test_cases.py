"""Faults that users of such libraries met in public, one test each: the rows of the list of small inputs.

Rows 2, 5 to 14 and 16 are tested beside the code that they concern; those that need a whole model stand here.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch.utils._python_dispatch import TorchDispatchMode

import probtensor as pt
from probtensor.axes import CategoricalAxis, ContinuousAxis
from probtensor.estimator import UnknownLabelWarning
from probtensor.gaussian import Gamma
from probtensor.kernels import Matern
from probtensor.models import FunBaT
from probtensor.models.functional_state import Rows, State
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.models.latent_functions import latent_functions

QUICK = {"rank": 1, "n_init": 1, "tol": 10.0, "random_state": 0, "progress": False}
FORMS = ("cp", "tucker")


def float64(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def small_table(n: int = 40) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(4)
    X = pd.DataFrame({"time": rng.integers(0, 8, n) / 2, "cell": rng.choice(["a", "b", "c"], n)})
    return X, np.cos(X["time"].to_numpy()) * (1 + (X["cell"] == "b").to_numpy()) + 0.1 * rng.normal(size=n)


# Row 1
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "settings"), [((3, 2), {"rank": 2, "learn_hyperparameters": False}), ((9, 7), {})])
def test_a_prediction_never_depends_on_what_is_stored_in_a_missing_cell(form, shape, settings):
    # Five cells say little about a sixth: the prior's own variances, not learned ones, keep the interval honest.
    matrix, mask = np.outer(np.arange(1.0, shape[0] + 1), np.geomspace(1.0, 10.0, shape[1])), np.ones(shape, dtype=bool)
    truth, mask[2, 1] = matrix[2, 1], False
    results = []
    for stored in (0.0, truth, 1e6, np.nan):
        matrix[2, 1] = stored
        X, y = pt.from_dense(matrix, mask)
        model = FunBaT(form=form, **QUICK | {"tol": 1e-3, "n_init": 3} | settings).fit(X, y)
        hole = X.iloc[:1].assign(mode_0=2, mode_1=1)
        parts = [*model.predict_interval(hole), *model.predict(hole, return_std=True), [model.bound_]]
        results.append(np.concatenate(parts))
    assert all(np.array_equal(result, results[0]) for result in results)
    lower, upper, mean, *_ = results[0]
    assert lower < truth < upper
    if shape == (9, 7):
        assert mean == pytest.approx(truth, rel=0.1)


# Row 3
@pytest.mark.parametrize("form", FORMS)
def test_a_slice_without_observations_keeps_its_place_and_has_what_the_others_share(form):
    rng = np.random.default_rng(3)
    tensor = np.einsum("i,j,k->ijk", *(rng.normal(size=n) for n in (6, 5, 4))) + 0.05 * rng.normal(size=(6, 5, 4))
    tensor[0] = np.nan
    X, y = pt.from_dense(tensor)
    model = FunBaT(form=form, **QUICK | {"tol": 1e-2, "n_init": 3}).fit(X, y)
    assert tuple(axis.size for axis in model.axes_) == (6, 5, 4)
    mean, std = model.factor("mode_0")
    assert mean.shape == (6, 1)
    assert mean[1:].min() < mean[0, 0] < mean[1:].max()  # what the other slices have in common
    assert std[0, 0] ** 2 > model.hyperparameters_["mode_0"]["variance"][0]
    cells = X.iloc[:20].assign(mode_0=pd.Categorical([0] * 20, categories=range(6)))
    with pytest.warns(UnknownLabelWarning, match=r"20 rows have labels of 'mode_0' .* \(0\)"):
        lower, upper = model.predict_interval(cells)
    seen_lower, seen_upper = model.predict_interval(X)
    assert (upper - lower).mean() > 2 * (seen_upper - seen_lower).mean()
    assert model.unknown(cells)["mode_0"].all()


# Row 4
@pytest.mark.parametrize("axis", [ContinuousAxis("x"), CategoricalAxis("x")])
def test_a_cell_observed_twice_has_the_mean_and_half_the_variance(axis):
    noise_variance = 0.3

    def site(positions, values):
        functions = (latent_functions(axis.fit([0.0, 1.0]), float64(0.0)),)
        free = (torch.tensor([True]),)
        model = FunctionalTucker(functions, free, "cp", Gamma(float64(1.0), float64(1.0)), learn=False)
        rows = Rows(torch.tensor([positions]), torch.tensor(values, dtype=torch.float64))
        state: State = model.start(model.local_start(rows), torch.Generator().manual_seed(0))
        state = state._replace(noise=Gamma(float64(2.0), float64(2.0 * noise_variance)))
        sites = model.update(state, 0, model.local_statistics(state, 0, rows)).factors[0].sites
        return sites.precision[0, 0, 0], sites.shift[0, 0]

    precision, shift = site([0, 0, 1], [1.0, 3.0, 7.0])
    assert float(shift / precision) == pytest.approx(2.0, rel=1e-14)
    assert float(1 / precision) == pytest.approx(noise_variance / 2, rel=1e-14)
    precision, _ = site([0, 1], [2.0, 7.0])  # merged to their mean, they count once
    assert float(1 / precision) == pytest.approx(noise_variance, rel=1e-14)


# Row 15
@pytest.mark.parametrize("form", FORMS)
def test_ten_is_not_the_string_ten_and_seven_is_unknown_with_a_wider_interval(form):
    ids = np.tile([2, 4, 10], 8)
    x = np.arange(24) % 4 + 0.5
    X = pd.DataFrame({"id": ids, "x": x})
    model = FunBaT(form=form, **QUICK).fit(X, ids + 0.1 * np.sin(x))

    def width(labels):
        table = pd.DataFrame({"id": labels, "x": [1.5] * len(labels)})
        return np.subtract(*model.predict_interval(table)[::-1]), model.predict(table), model.unknown(table)["id"]

    known, mean, unknown = width([2, 4, 10])
    assert not unknown.any()
    assert mean[2] == pytest.approx(10.1, abs=0.5)
    for labels in ([7], ["10"], [True]):
        with pytest.warns(UnknownLabelWarning, match=rf"1 row has a label of 'id' .* \({labels[0]!r}\)"):
            wider, prior_mean, unknown = width(labels)
        assert unknown.all()
        assert (wider > known.max()).all()
        # The prior's mean is learned from the labels that were seen.
        assert mean.min() < prior_mean[0] < mean.max()


# Row 17
def test_a_saved_model_predicts_the_same_bits_in_a_new_process_without_the_data(tmp_path):
    X, y = small_table()
    new = pd.DataFrame({"time": [0.0, 0.3, 1.0 / 3.0, -5.0, 99.0], "cell": ["a", "b", "c", "a", "b"]})
    code = """
import sys
import numpy as np, pandas as pd
import probtensor as pt
new = pd.DataFrame({"time": [0.0, 0.3, 1.0 / 3.0, -5.0, 99.0], "cell": ["a", "b", "c", "a", "b"]})
results = []
for path in sys.argv[1:]:
    model = pt.load(path)
    results += [*model.predict(new, return_std=True), model.sample_y(new, 2), *model.factor("time")]
sys.stdout.write("".join(result.tobytes().hex() for result in results))
"""
    root = Path(__file__).parent.parent
    expected = []
    for form in FORMS:
        model = FunBaT(form=form, **QUICK | {"rank": 2}).fit(X, y)
        model.save(tmp_path / form)
        expected += [*model.predict(new, return_std=True), model.sample_y(new, 2), *model.factor("time")]
    command = [sys.executable, "-W", "error", "-c", code, *(str(tmp_path / form) for form in FORMS)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "".join(x.tobytes().hex() for x in expected), result.stderr


# Row 18
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_have_the_precision_of_the_input(form, dtype, tmp_path):
    X, y = small_table()
    X = X.assign(time=X["time"].astype(dtype))
    model = FunBaT(form=form, **QUICK).fit(X, y.astype(dtype))
    model.save(tmp_path / "a.model")
    for fitted in (model, pt.load(tmp_path / "a.model")):
        results = [*fitted.predict(X, return_std=True), *fitted.predict_interval(X), fitted.sample_y(X, 2)]
        results += [*fitted.factor("time"), *fitted.factor("cell"), *fitted.main_effect("cell"), fitted.log_prob(X, y)]
        assert {result.dtype for result in results} == {np.dtype(dtype)}
    wide = FunBaT(form=form, **QUICK).fit(X, y)
    np.testing.assert_allclose(model.predict(X), wide.predict(X), atol=1e-5)


# Row 19
def test_what_the_user_passes_in_is_bit_equal_after_the_fit():
    X, y = small_table()
    y[3] = -0.0
    axes = [CategoricalAxis("cell"), ContinuousAxis("time", Matern(2.5))]
    before = (X.copy(deep=True), y.tobytes(), list(axes))
    y.flags.writeable = False
    model = FunBaT(form="cp", axes=axes, **QUICK).fit(X, y)
    model.predict(X, return_std=True), model.log_prob(X, y), model.sample_y(X)
    pd.testing.assert_frame_equal(X, before[0])
    assert (y.tobytes(), axes) == before[1:]

    array, values = torch.rand(30, 2, dtype=torch.float64).round(decimals=1), torch.rand(30, dtype=torch.float64)
    kept = array.clone(), values.clone()
    FunBaT(form="tucker", **QUICK).fit(array, values).predict(array)
    assert torch.equal(array, kept[0])
    assert torch.equal(values, kept[1])

    dense = np.array([[1.0, np.nan], [3.0, 4.0]])
    FunBaT(form="cp", **QUICK).fit(*pt.from_dense(dense))
    np.testing.assert_array_equal(dense, [[1.0, np.nan], [3.0, 4.0]])


# Row 21
@pytest.mark.parametrize("form", FORMS)
def test_one_seed_gives_one_result_and_global_generators_are_untouched(form):
    X, y = small_table()

    def results():
        model = FunBaT(form=form, **QUICK | {"n_init": 2}).fit(X, y)
        return [*model.predict(X, return_std=True), model.sample_y(X, 3, random_state=1), model.bound_history_]

    def generators():
        return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()  # noqa: NPY002

    before = generators()
    first = results()
    FunBaT(form=form, **QUICK | {"random_state": None}).fit(X, y).sample_y(X, random_state=None)
    assert generators() == before
    np.random.random(7), torch.rand(7), random.random()  # noqa: NPY002
    assert all(np.array_equal(*pair) for pair in zip(first, results(), strict=True))


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 8)
        return result


# Row 22
@pytest.mark.parametrize("form", FORMS)
def test_a_thousand_cells_of_a_large_tensor_take_megabytes(form):
    shape, n = (512, 3, 3, 512), 1000
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.integers(0, size, n) for size in shape])
    X[:512, 0] = X[:512, 3] = np.arange(512)
    model = FunBaT(form=form, **QUICK | {"rank": 2})
    with LargestTensor():
        model.fit(X[:50] % 3, rng.normal(size=50))  # what is imported and compiled at the first use is not counted
    tracemalloc.start()
    try:
        with LargestTensor() as seen:
            model.fit(X, rng.normal(size=n)).predict(X, return_std=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tuple(axis.size for axis in model.axes_) == shape
    assert seen.largest * 8 < 16 * 2**20
    assert seen.largest < np.prod(shape) / 2
    assert peak < 16 * 2**20


# Row 23
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("main_effects", [True, False])
@pytest.mark.parametrize("n_times", [2, 4, 12])
def test_the_bound_never_falls_in_any_update(form, main_effects, n_times):
    rng = np.random.default_rng(n_times)
    position, cell = np.r_[np.arange(n_times), rng.integers(0, n_times, 50)], rng.integers(0, 3, n_times + 50)
    y = 3 * rng.normal(size=n_times)[position] * (1 + cell) + 0.05 * rng.normal(size=n_times + 50)
    rows = Rows(torch.tensor(np.stack([position, cell])), torch.tensor((y - y.mean()) / y.std()))
    axes = (ContinuousAxis("time").fit(np.arange(n_times) / 2), CategoricalAxis("cell").fit(range(3)))
    extra = [True] if main_effects else []
    if form == "tucker":
        free = [torch.tensor([not x for x in extra] + [True, True])] * 2
    else:
        free = [torch.tensor([True, True, *([k == 0, k == 1] if extra else [])]) for k in range(2)]
    functions = tuple(latent_functions(axis, rows.values) for axis in axes)
    model = FunctionalTucker(functions, tuple(free), form, Gamma(float64(1.0), float64(1.0)))
    bounds = []
    with torch.no_grad():
        state = model.start(model.local_start(rows), torch.Generator().manual_seed(0))
        for _ in range(10):
            for block in model.blocks:
                state = model.update(state, block, model.local_statistics(state, block, rows))
                complete = bounds or block == model.blocks[-1]  # the bound needs every block, and its squared error
                if complete and block != "core":
                    bounds.append(float(model.bound(state)))
            state, (rows,) = model.end_sweep(state, [rows])
            bounds.append(float(model.bound(state)))
    assert (np.diff(bounds) >= -1e-9 * np.abs(bounds[1:])).all()


# Row 23
@pytest.mark.parametrize("form", FORMS)
def test_the_reason_of_the_stop_is_recorded_and_a_warning_says_what_to_try(form):
    X, y = small_table()
    with pytest.warns(
        ConvergenceWarning, match=r"max_iter=9 .* Raise max_iter or tol, .* bound_history_; a lower rank"
    ) as w:
        model = FunBaT(form=form, **QUICK | {"tol": 0.0, "max_iter": 9}).fit(X, y)
    assert [warning.filename for warning in w] == [__file__]
    assert (model.converged_, model.n_iter_, model.stop_reason_) == (False, 9, "max_iter=9 sweeps done")
    assert np.all(np.diff(model.bound_history_) >= -1e-9 * abs(model.bound_))
    assert model.bound_history_[-1] > model.bound_history_[-3]  # it still rose: not flagged as converged

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = FunBaT(form=form, **QUICK | {"tol": 1e-3, "max_iter": 500}).fit(X, y)
    history, limit = model.bound_history_, 1e-3 * max(abs(model.bound_), len(y))
    assert model.converged_
    assert model.n_iter_ == len(history) < 500
    assert "tol=0.001" in model.stop_reason_
    assert abs(history[-1] - history[-3]) <= limit
    for phase in np.split(history, model.phase_starts_[1:]):
        assert np.all(np.diff(phase) >= -1e-9 * abs(model.bound_))
    settled = [i for i in range(19, len(history) - 1) if abs(history[i] - history[i - 2]) <= limit / 2]
    assert not settled  # and it did not go on for long after it had


# Row 17
@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_model_predicts_the_same_bits_on_another_number_of_threads(form, tmp_path):
    X, y = pt.datasets.load_il2()
    model = FunBaT(**QUICK | {"rank": 8 if form == "cp" else 4, "form": form}).fit(X[::3], y[::3])
    expected = model.predict(X, return_std=True)
    model.save(tmp_path / "il2.model")
    program = (
        "import sys, numpy as np, torch, probtensor as pt; torch.set_num_threads(int(sys.argv[2]))\n"
        "X, _ = pt.datasets.load_il2(); m = pt.load(sys.argv[1])\n"
        "np.save(sys.argv[1] + '.npy', np.stack(m.predict(X, return_std=True)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for threads in ("1", "2"):
        command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "il2.model"), threads]
        subprocess.run(command, check=True, timeout=120, env=environment)
        np.testing.assert_array_equal(np.load(tmp_path / "il2.model.npy"), np.stack(expected))
