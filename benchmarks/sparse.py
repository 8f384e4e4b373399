"""Sparse coding beside other codes: bars found, seconds a step, pictures without noise and holes, missing entries."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import DictionaryLearning, MiniBatchDictionaryLearning
from sklearn.exceptions import ConvergenceWarning

from probtensor.comm import Serial
from probtensor.images import denoise, inpaint
from probtensor.inference.points import Points
from probtensor.inference.state_sets import few_active
from probtensor.inference.truncated_em import Preselection, run
from probtensor.metrics import psnr
from probtensor.models import BSC, DSC, GSC, MCA, MMCA, TSC
from probtensor.models.linear_coding import LinearCoding, LinearParameters
from probtensor.models.max_coding import MaxCoding
from probtensor.models.spike_slab import SlabParameters

__all__ = ["bars_lines", "missing_lines", "patch_lines", "patch_steps", "picture_lines", "step_lines"]

Array = npt.NDArray[np.float64]
CODERS = {"BSC": BSC, "TSC": TSC, "DSC": DSC, "MCA": MCA, "MMCA": MMCA, "GSC": GSC}
RELEASED = {"BSC": 0.255, "TSC": 0.715, "DSC": 0.828, "MCA": 0.769, "MMCA": 0.497, "GSC": 6.39}  # ProSper, CPU s a step


def bars_data(folder: Path, name: str) -> tuple[Array, dict[str, Any]]:
    """Points (N, 25) and ground truth; those of GSC drawn anew, since the stored ones lack noise in some rows."""
    with np.load(folder / f"bars_{name.lower()}_seed0.npz") as file:
        truth = {key: file[key] for key in file}
    if name != "GSC":
        return truth["y"].astype(float), truth
    rng = np.random.default_rng(0)
    shape = len(truth["y"]), truth["gt_W"].shape[1]
    slab = truth["gt_mu"] + rng.normal(size=shape) * np.sqrt(np.diag(truth["gt_psi_sq"]))
    codes = (rng.random(shape) < truth["gt_pi"]) * slab
    noise = math.sqrt(float(truth["gt_sigma_sq"])) * rng.normal(size=truth["y"].shape)
    return codes @ truth["gt_W"].T + noise, truth


def bars_found(components: npt.NDArray[Any], truth: npt.NDArray[Any]) -> int:
    """Columns of the truth (D, H) matched one-to-one by components (H, D) with a cosine above 0.95."""
    ours = components / np.maximum(np.linalg.norm(components, axis=1, keepdims=True), 1e-12)
    cosine = np.abs(ours @ (truth / np.linalg.norm(truth, axis=0)))
    return int((cosine[linear_sum_assignment(-cosine)] > 0.95).sum())


def bars_lines(folder: Path, seeds: int) -> list[str]:
    """Markdown lines: default settings, several starts; the log-likelihood is exact, by enumeration of all states."""
    lines = [
        "| model | bars found | prior, mean (truth) | noise (truth) | log-likelihood, worst | truth | CPU s a fit |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, coder in CODERS.items():
        Y, truth = bars_data(folder, name)
        few = Y[:1000]
        found, priors, noises, scores, seconds = [], [], [], [], []
        for seed in range(seeds):
            began = time.process_time()
            model = coder(n_components=10, random_state=seed, progress=False).fit(Y)
            seconds.append(time.process_time() - began)
            found.append(bars_found(model.components_, truth["gt_W"]))
            priors.append(np.atleast_1d(model.prior_) if name != "GSC" else np.atleast_1d(model.prior_.mean()))
            noises.append(model.noise_std_)
            scores.append(model.set_params(states="all").score(few))
        exact = coder(n_components=10, states="all", max_active=10, progress=False)
        exact.dtype_, exact.n_features_in_ = np.dtype(float), Y.shape[1]
        exact._set(true_parameters(name, truth))
        right = truth["gt_pi"] if name != "GSC" else truth["gt_pi"].mean()
        sigma = truth["gt_sigma"] if name != "GSC" else np.sqrt(truth["gt_sigma_sq"])
        shown = " ".join(f"{x:.3f}" for x in np.mean(priors, axis=0)), " ".join(f"{x:g}" for x in np.atleast_1d(right))
        lines.append(
            f"| {name} | {' '.join(map(str, found))} | {shown[0]} ({shown[1]}) | {np.mean(noises):.3f} "
            f"({float(sigma):g}) | {min(scores):.3f} | {exact.score(few):.3f} | {np.mean(seconds):.2f} |"
        )
    return lines


def true_parameters(name: str, truth: dict[str, Any]) -> Any:
    """The parameters that the data were drawn with."""
    W = torch.from_numpy(truth["gt_W"].astype(float))
    if name == "GSC":
        prob, mean, slab = (torch.from_numpy(truth[f"gt_{key}"].astype(float)) for key in ("pi", "mu", "psi_sq"))
        return SlabParameters(W, prob, mean, slab.diagonal().clone(), torch.tensor(float(truth["gt_sigma_sq"])))
    pi = truth["gt_pi"]
    prob = pi if name == "DSC" else [1 - pi, pi / 2, pi / 2] if name == "TSC" else [1 - pi, pi]
    log_prob = torch.tensor(np.array(prob, dtype=float)).log()
    variance = torch.tensor(float(truth["gt_sigma"]) ** 2, dtype=torch.float64)
    kind = MaxCoding if name in ("MCA", "MMCA") else LinearCoding
    return kind.parameters(W, log_prob, variance)


def step_lines(folder: Path) -> list[str]:
    """Markdown lines: CPU seconds of a step of EM with the released codes' sizes, and of whole fits."""
    sizes = {"BSC": (8, 5), "TSC": (7, 5), "DSC": (7, 5), "MCA": (8, 5), "MMCA": (7, 5), "GSC": (7, 4)}
    lines = [
        f"{torch.get_num_threads()} thread",
        "",
        "| model | points | H', gamma | CPU s a step | ProSper | times as fast |",
        "|---|---|---|---|---|---|",
    ]
    for name, (n_candidates, max_active) in sizes.items():
        Y, _ = bars_data(folder, name)
        model = CODERS[name](n_components=10, n_candidates=n_candidates, max_active=max_active, random_state=0)
        model.set_params(progress=False).fit(Y)
        blocks, selection = model._blocks(Y, False), model._selection()
        seconds = []
        for _ in range(5):
            began = time.process_time()
            run(
                model._model(),
                model._params,
                blocks,
                selection=selection,
                comm=Serial(),
                temperature=lambda step: 1.0,
                max_iter=4,
                tol=0.0,
                quiet=True,
                progress=False,
            )
            seconds.append((time.process_time() - began) / 5)
        best = float(np.median(seconds))
        lines.append(
            f"| {name} | {len(Y):,} | {n_candidates}, {max_active} | {best:.4f} | {RELEASED[name]} | "
            f"{RELEASED[name] / best:.0f} |"
        )
    Y, truth = bars_data(folder, "BSC")
    lines += ["", "| BSC's data, whole fit | CPU s | bars |", "|---|---|---|"]
    peers: list[tuple[str, Callable[[], Any]]] = [
        ("scikit-learn DictionaryLearning, alpha 5", lambda: DictionaryLearning(10, alpha=5, random_state=0).fit(Y)),
        ("BSC", lambda: BSC(n_components=10, random_state=0, progress=False).fit(Y)),
    ]
    for label, fit in peers:
        with no_warnings():
            began = time.process_time()
            fitted = fit()
            seconds_taken = time.process_time() - began
        lines.append(f"| {label} | {seconds_taken:.2f} | {bars_found(fitted.components_, truth['gt_W'])}/10 |")
    return lines


def picture_lines(picture: Path, seeds: int) -> list[str]:
    """Markdown lines: noise and holes removed from a grey-scale picture, PSNR in dB."""
    from matplotlib.image import imread
    from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, inpaint_biharmonic

    image = imread(picture).astype(float)
    image = (image if image.ndim == 2 else image[..., 0]) * (255.0 if image.max() <= 1 else 1.0)
    sigma = 25.0

    def coder() -> GSC:
        return GSC(n_components=64, max_iter=25, random_state=0, progress=False)

    def learned(noisy: Array) -> Array:
        peer = MiniBatchDictionaryLearning(
            64, alpha=sigma, transform_algorithm="omp", transform_n_nonzero_coefs=2, random_state=0, max_iter=20
        )
        return denoise(noisy, _WithReconstruct(peer), n_train=10_000, random_state=0)

    remove: dict[str, Callable[[Array], Array]] = {
        "GSC, 64 components, patches 8 x 8": lambda x: denoise(x, coder(), n_train=10_000, random_state=0),
        "scikit-learn MiniBatchDictionaryLearning, 64, OMP of 2": learned,
        "scikit-image total variation, best weight": lambda x: best_of(
            image, [denoise_tv_chambolle(x / 255, weight=w) * 255 for w in (0.06, 0.08, 0.1, 0.12, 0.15)]
        ),
        "scikit-image non-local means, best of 6": lambda x: best_of(
            image,
            [
                denoise_nl_means(x / 255, h=h * sigma / 255, sigma=sigma / 255, patch_size=5, patch_distance=d) * 255
                for h in (0.6, 0.8, 1.0)
                for d in (6, 11)
            ],
        ),
    }
    fill: dict[str, Callable[[Array], Array]] = {
        "GSC, 64 components, patches 8 x 8": lambda x: inpaint(x, coder(), n_train=3000, random_state=0),
        "scikit-image biharmonic": lambda x: inpaint_biharmonic(np.nan_to_num(x) / 255, np.isnan(x)) * 255,
    }
    lines = [f"{picture.name}, {image.shape[0]} x {image.shape[1]}; {seeds} draws", ""]
    for title, methods, spoil in (
        (f"Gaussian noise of {sigma:g}", remove, lambda rng: image + sigma * rng.normal(size=image.shape)),
        ("half of the pixels missing", fill, lambda rng: np.where(rng.random(image.shape) < 0.5, np.nan, image)),
    ):
        lines += [f"| {title} | PSNR, dB | CPU s |", "|---|---|---|"]
        for name, method in methods.items():
            found, seconds = [], []
            for seed in range(seeds):
                given = spoil(np.random.default_rng(seed))
                with no_warnings():
                    began = time.process_time()
                    found.append(psnr(method(given), image))
                    seconds.append(time.process_time() - began)
            lines.append(f"| {name} | {' '.join(f'{x:.2f}' for x in found)} | {np.mean(seconds):.1f} |")
        lines.append("")
    return lines[:-1]


class _WithReconstruct:
    """scikit-learn's dictionaries with what `probtensor.images` asks of a model."""

    def __init__(self, learner: Any) -> None:
        self._learner = learner

    def fit(self, Y: Array) -> "_WithReconstruct":
        self._learner.fit(Y)
        return self

    def reconstruct(self, Y: Array) -> Array:
        return np.asarray(self._learner.transform(Y) @ self._learner.components_)


def missing_lines(folder: Path, share: float = 0.5) -> list[str]:
    """Markdown lines: entries missing at random; errors of dictionary and noise against the truth."""
    lines = [
        f"| {100 * share:g} % missing | W's error, share of its norm | height of bars / truth | sigma / truth |",
        "|---|---|---|---|",
    ]
    for name in ("BSC", "GSC"):
        Y, truth = bars_data(folder, name)
        holed = np.where(np.random.default_rng(1).random(Y.shape) < share, np.nan, Y)
        model = CODERS[name](n_components=10, random_state=0, progress=False).fit(holed)
        components = model.components_
        # GSC: the dictionary has the scale of slabs whose mean square is one, in truth 1 + 1.
        W = truth["gt_W"].T if name == "BSC" else truth["gt_W"].T * math.sqrt(2.0)
        cosine = (components / np.linalg.norm(components, axis=1, keepdims=True)) @ W.T
        row, column = linear_sum_assignment(-np.abs(cosine))
        signed = components[row] * np.sign(cosine[row, column])[:, None]
        error = np.linalg.norm(signed - W[column]) / np.linalg.norm(W)
        sigma = float(truth["gt_sigma"]) if name == "BSC" else math.sqrt(float(truth["gt_sigma_sq"]))
        height = (signed * W[column]).sum() / (W**2).sum()
        lines.append(f"| {name} | {100 * error:.1f} % | {height:.3f} | {model.noise_std_ / sigma:.3f} |")
    return lines


def patch_steps(device: str, n: int, n_components: int, side: int) -> tuple[Callable[[int], object], float]:
    """So many steps of BSC on n random patches, in float32, and the operations of the products of one."""
    D, H = side**2, n_components
    generator = torch.Generator(device).manual_seed(0)
    W = torch.randn(D, H, generator=generator, device=device)
    y = torch.randn(n, D, generator=generator, device=device)
    y += (torch.rand(n, H, generator=generator, device=device) < 3 / H).float() @ W.T
    size = 2**17 if device.startswith("cuda") else 512
    blocks = [Points.of(part, False) for part in y.split(size)]
    like = torch.zeros((), device=device)
    selection = Preselection(few_active(8, 5, (1.0,), like), H)
    params = LinearParameters(W + 0.1, like.new_tensor([1 - 3 / H, 3 / H]).log(), like + 2.0)

    def steps(count: int) -> object:
        return run(
            LinearCoding((1.0,)),
            params,
            blocks,
            selection=selection,
            comm=Serial(),
            temperature=lambda step: 1.0,
            max_iter=count,
            tol=0.0,
            quiet=True,
            progress=False,
        )

    states = len(selection.table.values)
    return steps, 2.0 * n * (2 * D * H + 2 * states * (8 + 36))


def patch_lines(device: str, sizes: Sequence[int], n_components: int, side: int) -> list[str]:
    """Markdown lines: seconds of a step of BSC on random patches, in float32, and the share of the card's peak."""
    lines = [
        f"BSC, H = {n_components}, {side} x {side}, H' = 8, gamma = 5, float32; {torch.get_num_threads()} threads",
        "",
        "| device | patches | seconds a step | microseconds a patch | GFLOP of products a step | TFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for n in sizes:
        steps, flops = patch_steps(device, n, n_components, side)
        taken = []
        for count in (1, 0, 5):
            began = _now(device)
            steps(count)
            taken.append(_now(device) - began)
        seconds = (taken[2] - taken[1]) / 5
        name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
        per_patch, rate = 1e6 * seconds / n, flops / seconds / 1e12
        lines.append(f"| {name} | {n:,} | {seconds:.3f} | {per_patch:.2f} | {flops / 1e9:.0f} | {rate:.2f} |")
    return lines


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def best_of(truth: Array, candidates: Sequence[Array]) -> Array:
    """The candidate nearest to the truth."""
    return max(candidates, key=lambda x: psnr(x, truth))


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Without warnings of steps that were too few: their number is chosen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
