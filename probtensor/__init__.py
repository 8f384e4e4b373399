"""Probabilistic tensor models: complete, explain and predict tables indexed by several aspects.

A name loads its module when it is first used: importing the package, and ``probtensor --help``, load neither torch nor
pandas.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

try:
    __version__ = version("probtensor")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "CategoricalAxis",
    "ContinuousAxis",
    "Linear",
    "Matern",
    "Observations",
    "Periodic",
    "Sum",
    "UnknownLabelWarning",
    "White",
    "__version__",
    "comm",
    "components",
    "datasets",
    "from_dense",
    "from_xarray",
    "images",
    "inference",
    "load",
    "metrics",
    "models",
    "plotting",
    "read_shard",
    "read_table",
    "read_tns",
    "to_xarray",
    "viewing",
]

if TYPE_CHECKING:  # what __getattr__ finds, for type checkers and editors; without it they would believe any name
    from probtensor import comm as comm
    from probtensor import components as components
    from probtensor import datasets as datasets
    from probtensor import images as images
    from probtensor import inference as inference
    from probtensor import metrics as metrics
    from probtensor import models as models
    from probtensor import plotting as plotting
    from probtensor import viewing as viewing
    from probtensor.axes import CategoricalAxis as CategoricalAxis
    from probtensor.axes import ContinuousAxis as ContinuousAxis
    from probtensor.data import Observations as Observations
    from probtensor.estimator import UnknownLabelWarning as UnknownLabelWarning
    from probtensor.kernels import Linear as Linear
    from probtensor.kernels import Matern as Matern
    from probtensor.kernels import Periodic as Periodic
    from probtensor.kernels import Sum as Sum
    from probtensor.kernels import White as White
    from probtensor.persistence import load as load
    from probtensor.readers import from_dense as from_dense
    from probtensor.readers import from_xarray as from_xarray
    from probtensor.readers import read_table as read_table
    from probtensor.readers import read_tns as read_tns
    from probtensor.readers import to_xarray as to_xarray
    from probtensor.shards import read_shard as read_shard
else:
    _HOMES = {
        **dict.fromkeys(("CategoricalAxis", "ContinuousAxis"), "probtensor.axes"),
        "Observations": "probtensor.data",
        "UnknownLabelWarning": "probtensor.estimator",
        **dict.fromkeys(("Linear", "Matern", "Periodic", "Sum", "White"), "probtensor.kernels"),
        "load": "probtensor.persistence",
        **dict.fromkeys(("from_dense", "from_xarray", "read_table", "read_tns", "to_xarray"), "probtensor.readers"),
        "read_shard": "probtensor.shards",
    }
    _SUBMODULES = ("comm", "components", "datasets", "images", "inference", "metrics", "models", "plotting", "viewing")

    def __getattr__(name):
        if name in _SUBMODULES:
            return import_module(f"probtensor.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'probtensor' has no attribute {name!r}", name=name)
        globals()[name] = found = getattr(import_module(_HOMES[name]), name)  # so that it is looked up only once
        return found

    def __dir__():
        return sorted({*globals(), *__all__})
