"""Pictures of probabilities of classes: dots are the bins."""

from __future__ import annotations

import numpy as np
import pytest

from probtensor.metrics import reliability_curve
from probtensor.plotting import plot_reliability

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


def test_dots_are_the_bins_and_the_error_is_written():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), size=300)
    labels = np.array([rng.choice(4, p=row) for row in p])
    ax = plot_reliability(labels, p, 10)
    confidence, accuracy, _ = reliability_curve(labels, p, 10)
    np.testing.assert_allclose(ax.collections[-1].get_offsets(), np.column_stack([confidence, accuracy]))
    assert ax.get_title(loc="left").startswith("expected calibration error ")
    assert plot_reliability(labels, p, ax=ax) is ax
    matplotlib.pyplot.close("all")
