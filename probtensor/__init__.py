"""Probabilistic tensor models: complete, explain and predict tables indexed by several aspects."""

from importlib.metadata import PackageNotFoundError, version

from probtensor import comm as comm
from probtensor.axes import CategoricalAxis as CategoricalAxis
from probtensor.axes import ContinuousAxis as ContinuousAxis
from probtensor.data import Observations as Observations
from probtensor.persistence import load as load

try:
    __version__ = version("probtensor")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = ["CategoricalAxis", "ContinuousAxis", "Observations", "__version__", "comm", "load"]
