"""What an adapter is: ranks, scale, start, and which weights of a model it updates."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from probtensor.resources import is_integer, is_number

__all__ = ["FLoRAConfig", "key_matches", "names_match"]

INITS = ("zero", "weight", "gradient")
BIASES = ("none", "adapted", "all")
FORMS = ("tucker", "cp")


@dataclass(frozen=True)
class FLoRAConfig:
    """Settings of a FLoRA adapter: low-rank Tucker updates of weights of any order.

    Parameters
    ----------
    r : int, default 8
        Rank of every mode that is not a kernel's: inputs, outputs, experts, vocabulary. Ranks are cut to their mode's
        size.
    kernel_r : int, default 2
        Rank of the spatial modes of convolutions' kernels.
    alpha : "rms" or float, default "rms"
        A step of size ``lr`` in the core moves the weight by about ``alpha·lr``, whatever its order and ranks. "rms":
        the power of two nearest to the weight's root mean square when the adapter is injected, so that a step is ``lr``
        of the weight's size; for a weight of zeros to ``1/√(I2·…·IN)``, with which inputs of size 1 have outputs of
        size 1. The number is saved with the adapter.
    dropout : float, default 0.0
        Probability with which an entry of the layer's input is dropped, for the update alone. Only for layers that have
        one input of numbers: linear and convolutions.
    target_modules : "all", str or sequence of str, default "all"
        "all": the weights of every layer of a known kind. A string: a regular expression that the whole name of the
        module, or of the parameter, matches. A sequence: names, or the ends of names from a dot on; each must be found.
        Parameters of other modules, of any order, are adapted by their name ("moe.experts").
    exclude_modules : str or sequence of str, default ()
        What to leave out, in the same manner.
    rank_pattern : mapping of str to (int or sequence of int), default {}
        Other ranks for parameters: keys are regular expressions for names or their ends, the first that matches
        serves. An integer takes the place of `r`, a sequence gives the rank of each mode.
    alpha_pattern : mapping of str to ("rms" or float), default {}
        Other values of `alpha`, in the same manner.
    init : {"zero", "weight", "gradient"}, default "zero"
        The factors at the start: random orthonormal columns, or leading singular vectors of the weight's unfoldings, or
        of a gradient's (`weight_gradients`). The core starts at zero in each case, so the model does not change.
    form : {"tucker", "cp"}, default "tucker"
        "cp": the core is diagonal, so that the update is a sum of `r` outer products, over all modes of the weight;
        `kernel_r` is not used. For matrices that is LoRA with a size for each component. Starts are random, and ranks
        are not found from data.
    modules_to_save : sequence of str, default ()
        Modules that are trained in full (a new head), by names or their ends: each of their parameters gets an update
        that is dense, with a scale of 1: `alpha` is not for them. Their buffers stay the base's.
    bias : {"none", "adapted", "all"}, default "none"
        Which biases are trained in full: none, those beside adapted weights, or all of the model's.
    random_state : int, default 0
        Seed of the factors; no global generator is read or moved.

    Raises
    ------
    ValueError
        If a setting is malformed.

    Notes
    -----
    For a matrix the update is ``A G Bᵀ``; the set of these is LoRA's, the start and the dynamics differ.

    References
    ----------
    Si et al. (2025), "Maintaining Structural Integrity in Parameter Spaces for Parameter Efficient Fine-tuning", ICLR.
    Hu et al. (2022), "LoRA: Low-Rank Adaptation of Large Language Models", ICLR.

    Examples
    --------
    >>> config = FLoRAConfig(r=16, target_modules=["conv1", "fc"], rank_pattern={"fc": 4})
    >>> config.ranks("net.conv1.weight", (256, 128, 3, 3), n_kernel_modes=2), config.ranks("net.fc.weight", (10, 256))
    ((16, 16, 2, 2), (4, 4))
    """

    r: int = 8
    kernel_r: int = 2
    alpha: float | Literal["rms"] = "rms"
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all"
    exclude_modules: str | Sequence[str] = ()
    rank_pattern: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float | Literal["rms"]] = field(default_factory=dict)
    init: Literal["zero", "weight", "gradient"] = "zero"
    form: Literal["tucker", "cp"] = "tucker"
    modules_to_save: Sequence[str] = ()
    bias: Literal["none", "adapted", "all"] = "none"
    random_state: int = 0

    def __post_init__(self) -> None:
        """Check every setting; sequences and mappings are copied, so that later changes of them have no effect."""
        for name in ("r", "kernel_r"):
            _check_rank(name, getattr(self, name))
        _check_alpha("alpha", self.alpha)
        if not (is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout: expected a number from 0 to below 1, got {self.dropout!r}")
        for name, choices in (("init", INITS), ("bias", BIASES), ("form", FORMS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.form == "cp" and self.init != "zero":
            raise ValueError(f"init: expected 'zero' with form='cp', got {self.init!r}")
        if not (is_integer(self.random_state) and 0 <= self.random_state < 2**63):
            raise ValueError(f"random_state: expected an integer >= 0, got {self.random_state!r}")
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _checked_names(name, getattr(self, name), regex=True))
        object.__setattr__(self, "modules_to_save", _checked_names("modules_to_save", self.modules_to_save))
        if not self.target_modules:
            raise ValueError("target_modules: expected at least one name, got none")
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping):
                raise ValueError(f"{name}: expected a mapping, got {pattern!r}")
            for key, value in pattern.items():
                _check_regex(name, key)
                if name == "alpha_pattern":
                    _check_alpha(f"{name}[{key!r}]", value)
                elif isinstance(value, Sequence) and not isinstance(value, str):
                    for rank in value:
                        _check_rank(f"{name}[{key!r}]", rank)
                else:
                    _check_rank(f"{name}[{key!r}]", value)
            plain = {key: v if is_number(v) or isinstance(v, str) else tuple(v) for key, v in pattern.items()}
            object.__setattr__(self, name, plain)

    def ranks(self, name: str, shape: Sequence[int], n_kernel_modes: int = 0) -> tuple[int, ...]:
        """Ranks of a parameter, cut to its shape; with ``form="cp"`` one rank, cut to what any tensor needs at most.

        Parameters
        ----------
        name : str
            The parameter's full name.
        shape : sequence of int
        n_kernel_modes : int, default 0
            How many of the last modes are a kernel's.

        Raises
        ------
        ValueError
            If `rank_pattern` gives another number of ranks than there are modes.
        """
        value = _first_match(self.rank_pattern, name, self.r)
        if self.form == "cp":
            if isinstance(value, tuple):
                raise ValueError(f"rank_pattern: expected one rank for {name!r} with form='cp', got {value}")
            return (min(value, math.prod(shape) // max(shape)),)
        n_plain = len(shape) - n_kernel_modes
        ranks = value if isinstance(value, tuple) else (value,) * n_plain + (self.kernel_r,) * n_kernel_modes
        if len(ranks) != len(shape):
            raise ValueError(f"rank_pattern: expected {len(shape)} ranks for {name!r} {tuple(shape)}, got {ranks}")
        return tuple(min(rank, size) for rank, size in zip(ranks, shape, strict=True))

    def alpha_of(self, name: str) -> float | Literal["rms"]:
        """The `alpha` of a parameter, by its full name."""
        value = _first_match(self.alpha_pattern, name, self.alpha)
        return "rms" if value == "rms" else float(value)

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON takes them; ``FLoRAConfig(**config.as_dict()) == config``."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def names_match(wanted: str | Sequence[str], aliases: Iterable[str]) -> str | None:
    """The entry of `wanted` that one of a parameter's names matches, or None.

    Examples
    --------
    >>> names_match(("fc", "head"), ("net.head.weight", "net.head"))
    'head'
    >>> names_match("head", ("net.head.weight", "net.head")) is None
    True
    """
    if isinstance(wanted, str):
        return wanted if any(re.fullmatch(wanted, alias) for alias in aliases) else None
    names = tuple(aliases)
    return next((e for e in wanted if any(name == e or name.endswith("." + e) for name in names)), None)


def key_matches(key: str, name: str) -> bool:
    """Whether a key of a pattern fits a parameter, by its full name, its module's, or the end of one.

    Examples
    --------
    >>> key_matches("conv[12]", "net.conv1.weight"), key_matches("conv", "net.conv1.weight")
    (True, False)
    """
    return any(re.fullmatch(rf"(.*\.)?({key})", each) for each in (name, name.rpartition(".")[0]))


def _first_match(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if key_matches(key, name)), default)


def _check_rank(name: str, value: object) -> None:
    if not (is_integer(value) and value >= 1):  # type: ignore[operator]
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")


def _check_alpha(name: str, value: object) -> None:
    if value != "rms" and not (is_number(value) and math.isfinite(value) and value > 0):  # type: ignore[arg-type, operator]
        raise ValueError(f"{name}: expected 'rms' or a positive number, got {value!r}")


def _check_regex(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {value!r}")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name}: expected a regular expression, got {value!r} ({error})") from error


def _checked_names(name: str, value: object, regex: bool = False) -> str | tuple[str, ...]:
    if isinstance(value, str) and regex:
        _check_regex(name, value)
        return value
    if isinstance(value, str) or not isinstance(value, Iterable) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{name}: expected {'a string or ' * regex}strings, got {value!r}")
    return tuple(value)
