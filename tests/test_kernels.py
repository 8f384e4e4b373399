"""Kernels as values: equal, hashable, readable again; wrong arguments are named."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import probtensor as pt
from probtensor.kernels import Kernel, Linear, Matern, Periodic, Sum, White, kernel_from_state
from probtensor.models import FunBaT

KERNELS = [
    Matern(),
    Matern(0.5),
    Periodic(365.25),
    Periodic(0.1, n_harmonics=2),
    Linear(),
    Matern(2.5) + Periodic(7.0),
    Linear() + Matern(0.5) + Periodic(24.0, 3) + Periodic(168.0),
    Matern(1.5) + White(),
]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_survives_json(kernel: Kernel):
    again = kernel_from_state(json.loads(json.dumps(kernel.to_state())))
    assert again == kernel
    assert hash(again) == hash(kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_written_as_it_is_made(kernel: Kernel):
    names = {"Matern": Matern, "Periodic": Periodic, "Linear": Linear, "White": White}
    assert eval(repr(kernel), names) == kernel


def test_kernels_differ_where_something_differs():
    assert len({*KERNELS, *KERNELS, Periodic(7.0) + Matern(2.5)}) == len(KERNELS) + 1
    assert Periodic(7) == Periodic(7.0)
    assert hash(Matern(np.float32(2.5))) == hash(Matern(2.5))


def test_numbers_are_kept_in_types_that_json_holds():
    kernel = Periodic(np.float32(7.0), np.int64(3))
    assert (type(kernel.period), type(kernel.n_harmonics), type(Matern(np.float32(0.5)).nu)) == (float, int, float)


def test_a_sum_is_flat():
    a, b, c = Matern(0.5), Periodic(7.0), Linear()
    assert (a + b) + c == a + (b + c) == Sum((a, b, c)) == Sum([a + b, c])
    assert (a + b + c).parts == (a, b, c)
    with pytest.raises(TypeError, match="unsupported operand"):
        a + 1.0


def test_names_of_hyperparameters_are_unique_and_those_of_the_first_matern_plain():
    assert Periodic(1.0).hyperparameters == ("lengthscale", "variance")
    kernel = Linear() + Periodic(1.0) + Matern(0.5) + Periodic(2.0) + Matern(2.5)
    assert kernel.hyperparameters == (
        "linear_variance",
        "periodic_lengthscale",
        "periodic_variance",
        "lengthscale",
        "variance",
        "periodic_2_lengthscale",
        "periodic_2_variance",
        "matern_2_lengthscale",
        "matern_2_variance",
    )


def test_only_lengthscales_of_matern_kernels_have_the_unit_of_the_axis():
    assert (Matern().lengthscales, Periodic(1.0).lengthscales, Linear().lengthscales) == (("lengthscale",), (), ())
    assert (Periodic(1.0) + Matern() + Matern(0.5)).lengthscales == ("lengthscale", "matern_2_lengthscale")


@pytest.mark.parametrize("nu", [1.0, 0, -0.5, np.nan, "1.5", None, 1.5j, [1.5]])
def test_another_nu_is_refused(nu: object):
    with pytest.raises(ValueError, match=r"nu: expected 0.5, 1.5 or 2.5, got"):
        Matern(nu)


@pytest.mark.parametrize("period", [0, -1.0, np.nan, np.inf, "7", None, True])
def test_a_period_that_is_no_positive_number_is_refused(period: object):
    with pytest.raises(ValueError, match="period: expected a positive finite number, got"):
        Periodic(period)


@pytest.mark.parametrize("count", [0, -1, 2.0, "3", None, True])
def test_a_number_of_harmonics_that_is_no_positive_integer_is_refused(count: object):
    with pytest.raises(ValueError, match="n_harmonics: expected a positive integer, got"):
        Periodic(1.0, count)


@pytest.mark.parametrize("parts", [(), (Matern(),), Matern()])
def test_a_sum_of_fewer_than_two_is_refused(parts: object):
    with pytest.raises(ValueError, match="parts: expected at least two kernels, got"):
        Sum(parts)


@pytest.mark.parametrize("parts", [(White(), White()), (Matern(), White(), White()), (Matern() + White(), White())])
def test_a_sum_of_two_white_parts_is_refused(parts: tuple[Kernel, ...]):
    with pytest.raises(ValueError, match="parts: expected at most one White, got"):
        Sum(parts)
    with pytest.raises(ValueError, match="parts: expected at most one White, got"):
        Linear() + sum(parts[1:], parts[0])


def test_a_white_part_names_its_variance():
    assert (White().hyperparameters, White().lengthscales) == (("variance",), ())
    assert (White() + Matern()).hyperparameters == ("white_variance", "lengthscale", "variance")


def test_a_sum_of_other_things_is_refused():
    with pytest.raises(ValueError, match=r"parts: expected kernels, got 2\.5"):
        Sum((Matern(), 2.5))


@pytest.mark.parametrize("state", [{"kind": "RBF"}, {}])
def test_a_state_of_another_kind_is_refused(state: dict[str, object]):
    with pytest.raises(ValueError, match=r"state: expected a kind among \['Linear', .*'Sum', 'White'\], got"):
        kernel_from_state(state)


def test_kernels_load_no_library():
    code = (
        "import sys, probtensor as pt; pt.Matern() + pt.Periodic(7.0) + pt.Linear() + pt.White() == pt.Sum;"
        "sys.exit(bool({'torch', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_seasons_and_a_trend_go_on_after_the_data(tmp_path):
    """Six years of months at four stations, each with its own strength of one season and of one trend; two held out."""
    month, strength = np.arange(72.0), {"a": 1.0, "b": 2.0, "c": 0.5, "d": -1.5}
    X = pd.DataFrame([(m, station) for m in month for station in strength], columns=["month", "station"])
    a = X["station"].map(strength).to_numpy()
    truth = 0.03 * X["month"] * (1 + 0.3 * a) + a * np.exp(np.sin(2 * np.pi * X["month"] / 12))
    y = truth + 0.1 * np.random.default_rng(0).standard_normal(len(X))
    past = (X["month"] < 48).to_numpy()

    def fitted(kernel: Kernel) -> FunBaT:
        axes = [pt.ContinuousAxis("month", kernel), pt.CategoricalAxis("station")]
        model = FunBaT(rank=2, form="tucker", axes=axes, n_init=1, max_iter=100, random_state=0, progress=False)
        return model.fit(X[past], y[past])

    def error(model: FunBaT) -> float:
        return float(np.sqrt(np.mean((model.predict(X[~past]) - truth[~past]) ** 2)))

    plain, informed = fitted(Matern(1.5)), fitted(Periodic(12.0, n_harmonics=4) + Linear())
    assert error(informed) < 0.1 < 1.0 < error(plain)  # noise 0.1; values spread by 2.5
    assert informed.bound_ > plain.bound_ + 20
    assert list(informed.hyperparameters_["month"]) == ["periodic_lengthscale", "periodic_variance", "linear_variance"]
    informed.save(tmp_path / "a.model")
    loaded = pt.load(tmp_path / "a.model")
    assert loaded.axes_[0].kernel == Periodic(12.0, n_harmonics=4) + Linear()
    np.testing.assert_array_equal(loaded.predict(X[~past]), informed.predict(X[~past]))
