"""Pages of the reference, one a family: every public name of the modules that users import, by mkdocstrings.

`FAMILIES` says which module stands on which page; the names are those of its ``__all__``, read without importing it.
tests/test_docs.py checks that no public module is missing here.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Family:
    """One page.

    Attributes
    ----------
    title, text : str
        Heading, and what stands below it.
    names : tuple of str
        Modules, all public names of which are on the page, or single names ``module:Name``.
    """

    title: str
    text: str
    names: tuple[str, ...]


def _of(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}:{name}" for name in names)


FAMILIES = {
    "data": Family(
        "Data and axes",
        "What leads to `X` and `y`, what a column means, and how a fitted model is read again.",
        (
            *_of("probtensor", "from_dense", "from_xarray", "to_xarray", "read_table", "read_tns", "read_shard"),
            *_of("probtensor", "ContinuousAxis", "CategoricalAxis", "Observations", "load", "UnknownLabelWarning"),
            "probtensor.datasets",
        ),
    ),
    "kernels": Family(
        "Kernels",
        "Priors of functions over a continuous axis, given as `ContinuousAxis(name, kernel)`; `+` adds them.",
        ("probtensor.kernels",),
    ),
    "functional": Family(
        "FunBaT",
        "Functional Bayesian Tucker and CP: [the mathematics](../models/funbat.md).",
        (*_of("probtensor.models", "FunBaT"), "probtensor.models.functional_pyro"),
    ),
    "bayesian": Family(
        "Bayesian CP and Tucker",
        "Labels, with a rank that the data choose: [in use](../bayesian.md).",
        _of("probtensor.models", "BayesianCP", "BayesianTucker"),
    ),
    "classical": Family(
        "Classical decompositions",
        "Without intervals, to start from and compare with: [in use](../classical.md).",
        (
            *("probtensor.baselines", "probtensor.rank_choice"),
            *_of("probtensor.components", "Alignment", "align_components"),
        ),
    ),
    "likelihoods": Family(
        "Likelihoods and predictive distributions",
        "How values scatter around what a model says, and what `predictive` returns.",
        ("probtensor.likelihoods", "probtensor.ordinal", "probtensor.predictive"),
    ),
    "completion": Family(
        "Completion and augmentation",
        "Categorical tables: [what to use](../completion.md), [the mathematics](../models/completion.md).",
        _of("probtensor.models", "NeuralTensorCompletion", "DAIN", "AlternatingMinimization"),
    ),
    "sparse": Family(
        "Sparse coding and mixtures",
        "Points made of few components: [in use](../sparse_coding.md), [the mathematics](../models/sparse_coding.md).",
        (
            *_of("probtensor.models", "BSC", "TSC", "DSC", "GSC", "MCA", "MMCA", "NoisyOR", "MoG", "MoP"),
            *_of("probtensor.models.sparse_coding", "SparseCoder"),
            "probtensor.images",
        ),
    ),
    "adapters": Family(
        "Adapters",
        "FLoRA: [in use](../adapters.md), [the mathematics](../models/flora.md).",
        _of("probtensor.models", "FLoRAConfig", "inject_adapters", "load_adapters")
        + _of("probtensor.models.flora", "Adapters")
        + _of("probtensor.models", "relevance_penalty", "rank_report", "truncate")
        + _of("probtensor.models", "fit_laplace", "fit_by_evidence", "fit_variational", "register_with_peft")
        + _of("probtensor.models.adapter_starts", "weight_gradients", "gradient_ranks")
        + _of("probtensor.models.adapter_laplace", "AdapterLaplace", "Prediction")
        + _of("probtensor.models.adapter_variational", "AdapterPosterior"),
    ),
    "metrics": Family("Metrics", "How good predictions and intervals are.", ("probtensor.metrics",)),
    "plotting": Family(
        "Pictures", "Each function draws on axes that it is given or makes, and returns them.", ("probtensor.plotting",)
    ),
    "viewing": Family(
        "The page of a model",
        "An HTML file that needs no network: [how to](../howto/predict.md#a-page-to-look-at-and-to-send-on).",
        ("probtensor.viewing",),
    ),
    "comm": Family("Several ranks", "Communicators: [on several ranks](../ranks/README.md).", ("probtensor.comm",)),
    "influence": Family(
        "Influence", "Which training rows predictions owe something to.", ("probtensor.inference.influence",)
    ),
    "inference": Family(
        "Inference",
        "Loops and solvers, for those who write a model: tensors in, tensors out.",
        (
            *("probtensor.inference.message_passing", "probtensor.inference.kalman", "probtensor.inference.evolution"),
            *("probtensor.inference.truncated_em", "probtensor.inference.state_sets", "probtensor.inference.points"),
            *(
                "probtensor.inference.variational",
                "probtensor.inference.monte_carlo",
                "probtensor.inference.pyro_bridge",
            ),
            *("probtensor.inference.laplace", "probtensor.inference.fisher", "probtensor.inference.maximize"),
        ),
    ),
}


def public_names(module: str) -> list[str]:
    """The names in ``__all__`` of a module, read from its source; constants are left out."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assigned = {
        node.targets[0].id: node.value
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    if "__all__" not in assigned:
        raise ValueError(f"{module} has no __all__")
    return [name for name in ast.literal_eval(assigned["__all__"]) if name not in assigned]


def entries(family: Family) -> list[tuple[str, list[str]]]:
    """Modules of a page with the names of each that have an entry, in order."""
    found: dict[str, list[str]] = {}
    for item in family.names:
        module, _, name = item.partition(":")
        found.setdefault(module, []).extend([name] if name else public_names(module))
    return list(found.items())


def page(family: Family) -> str:
    """The page as Markdown."""
    lines = [f"# {family.title}", family.text]
    several = len(entries(family)) > 1
    for module, names in entries(family):
        if several:
            lines.append(f"## `{module}`")
        level = 3 if several else 2
        lines += [f"::: {module}.{name}\n    options:\n      heading_level: {level}" for name in names]
    return "\n\n".join(lines) + "\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages where the navigation says ``reference/``."""
    for item in config.nav or []:
        for name, value in item.items() if isinstance(item, dict) else ():
            if value == "reference/":
                pages: list[Any] = [{family.title: f"reference/{key}.md"} for key, family in FAMILIES.items()]
                item[name] = ["reference/index.md", *pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    from mkdocs.structure.files import File

    index = [
        "# Reference",
        "Every public name, from its docstring. `(n, K)` after an array is its shape. What a module has beside these"
        " names is its own affair and may change.",
    ]
    for key, family in FAMILIES.items():
        links = ", ".join(f"[`{name}`][{module}.{name}]" for module, names in entries(family) for name in names)
        index.append(f"**[{family.title}]({key}.md)**: {links}")
        files.append(File.generated(config, f"reference/{key}.md", content=page(family)))
    files.append(File.generated(config, "reference/index.md", content="\n\n".join(index) + "\n"))
    return files
