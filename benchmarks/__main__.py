"""Command line of the benchmarks; each prints a Markdown table, which `--out` writes too."""

import platform
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
import typer
from sklearn.exceptions import ConvergenceWarning

import probtensor as pt
from benchmarks.adapters import adapter_lines
from benchmarks.completion import COMPLETION_SETS, completion_lines
from benchmarks.datasets import COUNT_SETS, FUNBAT_SETS, load_fold
from benchmarks.ranks import rank_lines
from benchmarks.scale import scale_lines
from benchmarks.sparse import bars_lines, missing_lines, patch_lines, picture_lines, step_lines
from benchmarks.sparse_ranks import sparse_rank_lines
from benchmarks.splits import count_references, count_table, funbat, funbat_counts, reference_methods, table
from probtensor import plotting
from probtensor.blocks import total_here
from probtensor.comm import Serial
from probtensor.demo import split_rows
from probtensor.inference import kalman
from probtensor.intake import Table, deal, row_keys
from probtensor.metrics import rmse
from probtensor.models import FunBaT
from probtensor.models.functional_table import table_rows
from probtensor.models.latent_functions import GaussianProcess

FIRST_DAY = 306  # of the stream's year: 1 January 2014

app = typer.Typer(no_args_is_help=True, add_completion=False)
Data = Annotated[Path, typer.Option(help="Folder with the FunBaT data sets (beijing_pm25.npz, …).")]
Out = Annotated[Path | None, typer.Option(help="File for the table.")]


@app.command()
def folds(
    data: Data,
    splits: Annotated[
        str, typer.Option(help="Of published, days, stations, cells; separated by commas.")
    ] = "published",
    sets: Annotated[str, typer.Option(help="Data sets, separated by commas.")] = ",".join(FUNBAT_SETS),
    n_folds: int = 5,
    seeds: Annotated[str, typer.Option(help="Of FunBaT, a line each; separated by commas.")] = "0",
    references: Annotated[bool, typer.Option(help="The references too, GPyTorch's sparse GP left out.")] = True,
    station: Annotated[bool, typer.Option(help="FunBaT with the station as a fourth, categorical mode too.")] = False,
    jobs: Annotated[int, typer.Option(help="Fits at a time.")] = 1,
    out: Out = None,
) -> None:
    """Accuracy on Beijing air quality and US temperatures, one setting for all, beside honest references."""
    methods = {}
    for seed in (int(seed) for seed in seeds.split(",")):
        settings = {"random_state": seed, "progress": False, "device": "cpu"}
        methods[f"**FunBaT**, seed {seed}"] = funbat(settings)
        if station:
            methods[f"**FunBaT**, with station, seed {seed}"] = funbat(settings, station=True, sets=FUNBAT_SETS[:3])
    if references:
        methods |= reference_methods(sparse_gp=False)
    lines = [f"FunBaT(random_state=seed), all else default; {_machine('cpu')}, {jobs} fits at a time", ""]
    lines += table(data, sets.split(","), splits.split(","), methods, range(n_folds), jobs)  # type: ignore[arg-type]
    _report(lines, out)


@app.command()
def counts(
    data: Annotated[Path, typer.Option(help="Folder with nyc2013_flight_delay.npz and kg_nations.npz.")],
    n_folds: int = 5,
    jobs: Annotated[int, typer.Option(help="Fits at a time.")] = 1,
    out: Out = None,
) -> None:
    """Held-out log probability of flight counts and of relations between nations, a fifth of the cells held out."""
    settings = {"random_state": 0, "progress": False}
    flights = count_references() | {
        "FunBaT, Poisson": funbat_counts(settings | {"likelihood": "poisson"}),
        "FunBaT, negative binomial": funbat_counts(settings | {"likelihood": "negative-binomial"}),
        "FunBaT, Gaussian": funbat_counts(settings | {"likelihood": "gaussian"}, "rounded"),
    }
    nations = count_references() | {
        "FunBaT, Bernoulli": funbat_counts(settings | {"likelihood": "bernoulli", "rank": 14}),
        "FunBaT, Gaussian": funbat_counts(settings | {"likelihood": "gaussian", "rank": 14}, "probability"),
    }
    lines = count_table(data, COUNT_SETS[:2], flights, range(n_folds), jobs)
    _report([*lines, "", *count_table(data, COUNT_SETS[2:], nations, range(n_folds), jobs)], out)


@app.command()
def stream(data: Data, out: Out = None) -> None:
    """A year of PM2.5 in 52 weekly batches against one fit of all of them; test rows of the published fold 0."""
    X, y, X_test, y_test = load_fold(data, "beijing_pm25", 0)
    with np.load(data / "beijing_pm25.npz", allow_pickle=False) as file:
        first = float(file["coords"][file["day"] == FIRST_DAY, 2].min())
        last = float(file["coords"][file["day"] == FIRST_DAY + 364, 2].min())
    week, week_test = (np.floor((x[:, 2] - first) / (last - first) * 52) for x in (X, X_test))
    inside, test = (week >= 0) & (week < 52), (week_test >= 0) & (week_test < 52)
    settings: dict[str, Any] = {"random_state": 0, "progress": False}
    start = time.perf_counter()
    batch = FunBaT(**settings).fit(X[inside], y[inside])
    fit_seconds = time.perf_counter() - start
    model, seconds = FunBaT(**settings), []
    for number in range(52):
        rows = week == number
        start = time.perf_counter()
        model.partial_fit(X[rows], y[rows])
        seconds.append(time.perf_counter() - start)
    errors = [rmse(y_test[test], m.predict(X_test[test])) for m in (batch, model)]
    quarters = [float(np.median(seconds[k : k + 13])) for k in (1, 13, 26, 39)]
    _report(
        [
            f"{_machine('cpu')}; {inside.sum()} rows in 52 weeks, {test.sum()} test rows of the same year",
            "",
            "| | RMSE | seconds |",
            "|---|---|---|",
            f"| all at once | {errors[0]:.4f} | {fit_seconds:.1f} |",
            f"| 52 batches | {errors[1]:.4f} ({100 * (errors[1] / errors[0] - 1):+.1f} %) | {sum(seconds):.1f}; "
            f"a batch, median by quarter: {' '.join(f'{q:.2f}' for q in quarters)} |",
        ],
        out,
    )


@app.command()
def il2(rank: int = 32, tucker_rank: str = "4,3,4,4", n_seeds: int = 5, out: Out = None) -> None:
    """IL-2 response: FunBaT against TensorLy's masked PARAFAC and per-mode biases, a fifth held out, several seeds."""
    from probtensor.demo import run_demo

    scores: dict[str, list[tuple[float, float | None, float]]] = {}
    ranks = tuple(int(r) for r in tucker_rank.split(","))
    for seed in range(n_seeds):
        result = run_demo("probtensor-demo", seed=seed, cp_rank=rank, tucker_rank=ranks, progress=False)
        for score in result.scores:
            name = score.method.split(", rank")[0]
            scores.setdefault(name, []).append((score.rmse, score.coverage, score.seconds))
    lines = ["| method | RMSE, mean | seeds | in 90 % interval | seconds |", "|---|---|---|---|---|"]
    for name, rows in sorted(scores.items(), key=lambda item: np.mean([r[0] for r in item[1]])):
        inside = [r[1] for r in rows if r[1] is not None]
        lines.append(
            f"| {name} | {np.mean([r[0] for r in rows]):.4f} | {' '.join(f'{r[0]:.4f}' for r in rows)} | "
            f"{'-' if not inside else ' '.join(f'{100 * c:.1f} %' for c in inside)} | "
            f"{np.mean([r[2] for r in rows]):.1f} |"
        )
    _report([f"CP rank {rank}, Tucker rank {tucker_rank}", "", *lines], out)


@app.command()
def sweep(data: Data, n_sweeps: int = 30, threads: int = 1, out: Out = None) -> None:
    """Seconds of one sweep of message passing on PM2.5 (13,572 rows), hyperparameters fixed; released code: 1.74 s."""
    torch.set_num_threads(threads)
    X, y, _, _ = load_fold(data, "beijing_pm25", 0)
    lines = ["| model | wall seconds a sweep, median | CPU seconds, median |", "|---|---|---|"]
    for form, rank, nu, main in (
        ("cp", 2, 0.5, False),
        ("cp", 2, 0.5, True),
        ("cp", 2, 1.5, True),
        ("tucker", 2, 1.5, True),
        ("tucker", 5, 0.5, False),
    ):
        model = FunBaT(
            rank=rank,
            form=form,  # type: ignore[arg-type]
            axes=[pt.ContinuousAxis(kernel=pt.Matern(nu))] * 3,
            main_effects=main,
            likelihood="gaussian",
            nugget=False,
            calibration=0,
            learn_hyperparameters=False,
            max_iter=1,
            n_init=1,
            random_state=0,
            progress=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(X, y)
        positions = torch.from_numpy(np.stack([axis.positions(X[:, k]) for k, axis in enumerate(model.axes_)], axis=1))
        values = torch.from_numpy((y - model.y_mean_) / model.y_scale_)
        table_ = deal(Table(positions, values, None, None, row_keys(positions, values)), Serial())
        parts, _ = table_rows(model._model, table_)
        state, walls, cpus = model._state, [], []
        with torch.no_grad():
            for _ in range(n_sweeps):
                wall, cpu = time.perf_counter(), time.process_time()
                for block in model._model.blocks:
                    sums = total_here(model._model.local_statistics(state, block, rows) for rows in parts)
                    state = model._model.update(state, block, sums)
                state, parts = model._model.end_sweep(state, parts)
                float(model._model.bound(state))
                walls.append(time.perf_counter() - wall)
                cpus.append(time.process_time() - cpu)
        name = f"{form}, rank {rank}, nu = {nu}{', main effects' if main else ''}"
        lines.append(f"| {name} | {np.median(walls[2:]):.4f} | {np.median(cpus[2:]):.4f} |")
    _report([f"{threads} thread(s), {sum(axis.size for axis in model.axes_)} distinct coordinates", "", *lines], out)


@app.command()
def smoother(
    device: str = "cpu", sizes: str = "1000,10000,100000", nu: float = 1.5, rank: int = 2, out: Out = None
) -> None:
    """Seconds to smooth a chain of T coordinates, parallel in time, against one step after the other."""
    lines = ["| T | parallel, s | sequential, s (from 2,000 steps) | ratio |", "|---|---|---|---|"]
    for T in (int(size) for size in sizes.split(",")):
        generator = torch.Generator(device).manual_seed(0)
        times = torch.rand(T, generator=generator, dtype=torch.float64, device=device).cumsum(0)
        process = GaussianProcess(times, pt.Matern(nu))
        hyper = torch.stack([times.new_full((rank,), 3.0).log(), times.new_zeros(rank)])
        precision = times.new_ones(T, rank).diag_embed()
        sites = kalman.Sites(precision, torch.randn(T, rank, generator=generator, dtype=torch.float64, device=device))
        chain = process.chain(hyper, times)
        seconds = _timed(lambda: kalman.smooth(chain, sites), device)  # noqa: B023 - called at once
        steps = min(T, 2000)
        one_by_one = _timed(lambda: _sequential(chain, sites, steps), device) * T / steps  # noqa: B023
        lines.append(f"| {T:,} | {seconds:.4f} | {one_by_one:.2f} | {one_by_one / seconds:.0f} |")
    _report([f"{_machine(device)}, Matern nu = {nu}, {rank} coupled functions, float64", "", *lines], out)


@app.command()
def scale(
    device: str = "cpu",
    sizes: str = "100000,1000000,10000000",
    rank: int = 8,
    coordinates: int = 1000,
    dtype: Literal["float32", "float64"] = "float64",
    out: Out = None,
) -> None:
    """Seconds of a CP sweep of three modes against the number of rows, beside what the memory's bandwidth allows."""
    chosen = {"float32": torch.float32, "float64": torch.float64}[dtype]
    numbers = [int(size) for size in sizes.split(",")]
    lines = scale_lines(device, numbers, rank=rank, coordinates=coordinates, dtype=chosen)
    title = f"{_machine(device)}, rank {rank}, {coordinates:,} coordinates a mode, {dtype}"
    _report([f"{title}; {torch.get_num_threads()} threads", "", *lines], out)


@app.command()
def ranks(
    ranks: Annotated[str, typer.Option(help="Numbers of MPI ranks, 1 the first; separated by commas.")] = "1,2",
    sizes: str = "2000000",
    rank: int = 8,
    coordinates: int = 1000,
    dtype: Literal["float32", "float64"] = "float64",
    device: str = "cpu",
    launcher: Annotated[str, typer.Option(help="What starts the ranks, without their number.")] = "mpiexec",
    out: Out = None,
) -> None:
    """Seconds of a CP sweep of three modes on several MPI ranks, beside what the cost model predicts."""
    options = {"rank": rank, "coordinates": coordinates, "dtype": dtype, "device": device}
    numbers = [[int(x) for x in text.split(",")] for text in (ranks, sizes)]
    lines = rank_lines(launcher.split(), numbers[0], numbers[1], **options)
    title = f"{_machine(device)}, CP of rank {rank}, {coordinates:,} coordinates a mode, {dtype}, {launcher}"
    _report([title, "", *lines], out)


@app.command()
def devices(out: Out = None) -> None:
    """The same fit on CPU and GPU: differences of mean, standard deviation and bound."""
    rng = np.random.default_rng(0)
    X = np.column_stack(
        [rng.uniform(0, 5, 20_000).round(3), rng.uniform(0, 5, 20_000).round(2), rng.integers(0, 9, 20_000)]
    )
    axes = [pt.ContinuousAxis(), pt.ContinuousAxis(), pt.CategoricalAxis()]
    y = np.sin(X[:, 0]) * np.cos(X[:, 1]) * (1 + X[:, 2] / 9) + 0.1 * rng.normal(size=len(X))
    train, test = split_rows(len(y), 0.2, 0)
    lines = [
        f"{_machine('cpu')} against {_machine('cuda')}",
        "",
        "| form | CPU, s | GPU, s | mean differs by | std differs by | bound differs by |",
        "|---|---|---|---|---|---|",
    ]
    forms: tuple[Literal["cp", "tucker"], ...] = ("cp", "tucker")
    for form in forms:
        found = []
        for device in ("cpu", "cuda"):
            model = FunBaT(
                rank=3,
                form=form,
                axes=axes,
                likelihood="gaussian",
                nugget=False,
                calibration=0,
                device=device,
                learn_hyperparameters=False,  # an optimiser's path magnifies the last bit
                tol=0.0,
                max_iter=30,
                n_init=1,
                random_state=0,
                progress=False,
            )
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(X[train], y[train])
            found.append((time.perf_counter() - start, *model.predict(X[test], return_std=True), model.bound_))
        (cpu_s, cpu_mean, cpu_std, cpu_bound), (gpu_s, gpu_mean, gpu_std, gpu_bound) = found
        lines.append(
            f"| {form} | {cpu_s:.2f} | {gpu_s:.2f} | {np.abs(cpu_mean - gpu_mean).max():.1e} | "
            f"{np.abs(cpu_std - gpu_std).max():.1e} | {abs(cpu_bound / gpu_bound - 1):.1e} |"
        )
    _report(lines, out)


@app.command()
def figure(data: Data, out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("air.png")) -> None:
    """Draw a fit of PM2.5: functions of the modes, calibration on test rows, relevance of the components, the bound."""
    import matplotlib.pyplot as plt

    X, y, X_test, y_test = load_fold(data, "beijing_pm25", 0)
    named, named_test = (pd.DataFrame(x, columns=["temperature", "pressure", "time"]) for x in (X, X_test))
    model = FunBaT(random_state=0, progress=False).fit(named, y)
    panels = plt.figure(figsize=(12.6, 7.6), layout="constrained").subplots(2, 3).ravel()
    plotting.plot_factors(model, max_components=2, axes=panels[:3])
    plotting.plot_calibration(y_test, model.predictive(named_test), ax=panels[3])
    plotting.plot_relevance(model, ax=panels[4])
    plotting.plot_bound(model, ax=panels[5])
    panels[0].figure.savefig(out, dpi=110)


def _sequential(chain: kalman.Chain, sites: kalman.Sites, steps: int) -> torch.Tensor:
    """A forward pass, one step after the other: what any sequential filter must at least do."""
    A, Q, H = chain
    L, h = H.T @ sites.precision @ H, (sites.shift @ H)[..., None]
    one = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    m, P = torch.zeros_like(h[0]), torch.zeros_like(Q[0])
    for j in range(steps):
        m, P = A[j] @ m, A[j] @ P @ A[j].T + Q[j]
        gain = torch.linalg.inv(one + P @ L[j])
        m, P = gain @ (m + P @ h[j]), gain @ P
    return m


def _timed(work, device: str, repeats: int = 3) -> float:  # type: ignore[no-untyped-def]
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with torch.no_grad():
            work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if "model name" in line]
        if cpu.exists()
        else []
    )
    return names[0] if names else platform.processor()


def _report(lines: list[str], out: Path | None) -> None:
    text = "\n".join(lines) + "\n"
    print(text)
    if out is not None:
        out.write_text(text)


@app.command()
def sparse(
    data: Annotated[Path, typer.Option(help="Folder with the bars data (bars_bsc_seed0.npz, …) and house.png.")],
    parts: Annotated[str, typer.Option(help="Of bars, steps, missing, pictures; separated by commas.")] = "bars,steps",
    seeds: int = 10,
    out: Out = None,
) -> None:
    """Sparse coding: bars found with default settings, seconds a step, missing entries, pictures."""
    torch.set_num_threads(1)
    made = {
        "bars": lambda: bars_lines(data, seeds),
        "steps": lambda: step_lines(data),
        "missing": lambda: missing_lines(data),
        "pictures": lambda: picture_lines(data / "house.png", min(seeds, 3)),
    }
    lines = [line for part in parts.split(",") for line in ["", *made[part]()]]
    _report([f"{_machine('cpu')}, one thread", *lines], out)


@app.command()
def sparse_ranks(
    ranks: Annotated[str, typer.Option(help="Numbers of MPI ranks, 1 the first; separated by commas.")] = "1,2",
    sizes: str = "100000",
    launcher: Annotated[str, typer.Option(help="What starts the ranks, without their number.")] = "mpiexec",
    out: Out = None,
) -> None:
    """Seconds of a step of BSC over points on disk, on several MPI ranks, and the memory that it takes."""
    numbers = [[int(x) for x in text.split(",")] for text in (ranks, sizes)]
    _report([_machine("cpu"), "", *sparse_rank_lines(launcher.split(), *numbers)], out)


@app.command()
def patches(
    sizes: str = "10000",
    device: str = "cpu",
    n_components: int = 256,
    side: int = 16,
    out: Out = None,
) -> None:
    """Seconds of a step of BSC against the number of patches."""
    lines = patch_lines(device, [int(size) for size in sizes.split(",")], n_components, side)
    _report([_machine(device), "", *lines], out)


@app.command()
def completion(
    data: Annotated[Path, typer.Option(help="Folder with dain_synthetic10k.npz, nyc2019_taxi_fares.npz, ….")],
    sets: Annotated[str, typer.Option(help="Data sets, separated by commas.")] = ",".join(COMPLETION_SETS),
    seeds: Annotated[str, typer.Option(help="Of splits and fits; separated by commas.")] = "0,1,2,3,4",
    out: Out = None,
) -> None:
    """Neural tensor completion against the mean, additive effects and boosted trees, a tenth of the rows held out."""
    torch.set_num_threads(1)
    lines = completion_lines(data, sets.split(","), [int(seed) for seed in seeds.split(",")])
    _report([f"{_machine('cpu')}, one thread", "", *lines], out)


@app.command()
def adapters(rank: int = 16, kernel_rank: int = 2, repeats: int = 15, out: Out = None) -> None:
    """A layer with a FLoRA adapter beside the frozen layer: time of forward and backward, bytes kept for backward."""
    torch.set_num_threads(1)
    lines = adapter_lines(rank, kernel_rank, repeats)
    _report([f"{_machine('cpu')}, one thread; r = {rank}, kernel ranks {kernel_rank}", "", *lines], out)


if __name__ == "__main__":
    app()
