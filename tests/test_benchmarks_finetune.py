"""The fine-tuning benchmarks on stand-ins for their data: draws, methods, MobileNetV2's layers, calibration."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from benchmarks import adapter_calibration, finetune, finetune_commands, finetune_data, finetune_methods
from benchmarks.__main__ import app
from benchmarks.finetune_jobs import draw, load_job
from benchmarks.finetune_networks import MobileLower, MobileUpper, RNet
from benchmarks.finetune_table import read_rates, tuning_tasks
from probtensor.models.flora import Adapters


def torchvision_state():
    """Random weights of MobileNetV2 under the names of torchvision, and ours with the same."""
    torch.manual_seed(0)
    lower, upper, state = MobileLower(), MobileUpper(5), {}
    for network in (lower, upper):
        for name, value in network.state_dict().items():
            if name.endswith("running_mean"):
                value.normal_(std=0.1)

    def put(name, layer):
        state.update({f"{name}.{key}": value for key, value in layer.state_dict().items()})

    put("features.0.0", lower.conv)
    put("features.0.1", lower.norm)
    for number, block in enumerate([*lower.blocks, *upper.blocks], start=1):
        at = 0
        if number > 1:
            put(f"features.{number}.conv.0.0", block.expand)
            put(f"features.{number}.conv.0.1", block.norm1)
            at = 1
        put(f"features.{number}.conv.{at}.0", block.depthwise)
        put(f"features.{number}.conv.{at}.1", block.norm2)
        put(f"features.{number}.conv.{at + 1}", block.project)
        put(f"features.{number}.conv.{at + 2}", block.norm3)
    put("features.18.0", upper.last)
    put("features.18.1", upper.norm)
    put("classifier.1", upper.head)
    return state, lower, upper


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits that are bright quarters of a picture, with MobileNetV2 and R-Net of random weights."""
    folder, rng = tmp_path_factory.mktemp("mobile"), np.random.default_rng(0)
    y = np.repeat(np.arange(3), 20)
    x = rng.integers(0, 60, (60, 1, 28, 28))
    for n, label in enumerate(y):
        x[n, 0, 14 * (label // 2) :, 14 * (label % 2) :][:14, :14] += 180
    arrays = finetune_data.mobile_weights(torchvision_state()[0])
    part = np.tile([1, 1, 2], 20)
    common = {"y": y.astype(np.uint8), "part": part}
    np.savez(folder / "mobile.npz", x=x.astype(np.uint8), **common, **arrays)
    small = finetune_data.base_arrays(RNet(2), "base")
    np.savez(folder / "digits.npz", x=x[..., 2:-2, 2:-2].astype(np.uint8), **common, **small)
    return folder


@pytest.fixture(scope="module")
def job(folder):
    job = load_job(folder, "mobile")
    job.settings = dataclasses.replace(job.settings, epochs=2)
    return job


def test_weights_of_mobilenet_come_to_their_layers(folder, job):
    _, lower, upper = torchvision_state()
    network = job.network(0)
    assert job.inputs[0].shape == (60, 64, 4, 4)
    for name, value in upper.state_dict().items():
        if not name.startswith("head"):
            torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    with np.load(folder / "mobile.npz") as file:
        grey = torch.from_numpy(file["x"][:4]).float() / 255
    x = (F.interpolate(grey, scale_factor=64 / 28, mode="bilinear").expand(-1, 3, -1, -1)).clone()
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        x[:, channel] = (x[:, channel] - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(lower.eval()(x), job.inputs[0][:4], rtol=0.02, atol=0.02)


def test_ours_adapts_depthwise_layers_within_the_size_of_lora_and_leaves_the_base(job):
    rows, _ = draw(job, 0, tuning=False)
    network, times = finetune.train(job, "flora", 0.01, 3.0, 0, rows)
    deltas = Adapters(network).deltas("default")
    assert sum("depthwise" in name for name in deltas) == 7
    assert any(bool(deltas[name].core.any()) for name in deltas if "depthwise" in name)
    wanted = finetune_methods.lora_count(lambda: job.network(0), job.settings.targets, job.settings.rank)
    assert finetune_methods.n_trained(network) < 1.02 * wanted
    assert len(times) == 2 * (len(rows) // job.settings.batch)
    for name, buffer in network.named_buffers():
        if "running" in name:
            assert torch.equal(buffer, job.bases[0][name])


def test_lora_without_depthwise_layers_is_only_for_networks_that_have_them(monkeypatch):
    monkeypatch.setattr(finetune_methods.importlib.util, "find_spec", lambda name: None if name == "lycoris" else name)
    assert finetune_commands.methods_of("digits", ["lora", "pointwise"]) == (["lora"], [])
    wanted, skipped = finetune_commands.methods_of("mobile", ["lora", "pointwise", "flora"])
    assert wanted == ["pointwise", "flora"]
    assert "LoRA" in skipped[1]
    assert "lycoris is not installed" in skipped[1]


def test_peers_take_depthwise_layers_as_far_as_they_can(job):
    pytest.importorskip("peft")
    pytest.importorskip("lycoris")
    for method, taken in (("lora", True), ("pointwise", False), ("loha", True), ("lokr", True), ("locon", True)):
        network = job.network(0)
        finetune_methods.attach(method, network, job.settings.targets, 2, 0, (lambda m, b: m(b), []))
        trained = [name for name, p in network.named_parameters() if p.requires_grad]
        assert any("depthwise" in name for name in trained) == taken, method


def test_scores_and_the_temperature_of_logits_by_hand():
    labels = torch.tensor([0, 1, 1, 0])
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]], dtype=torch.float64)
    scores = adapter_calibration.scores_of(p, labels)
    assert scores.accuracy == 75
    assert scores.brier == pytest.approx(2 * (0.01 + 0.04 + 0.49 + 0.16) / 4)
    assert scores.nll == pytest.approx(-np.log([0.9, 0.8, 0.3, 0.6]).mean())
    outputs = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = torch.multinomial(outputs.softmax(1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    grid = np.linspace(0.5, 8, 400)
    best = min(grid, key=lambda T: float(F.cross_entropy(4 * outputs / T, drawn)))
    assert adapter_calibration.tuned_scale(4 * outputs, drawn) == pytest.approx(best, abs=0.02)


def test_the_calibration_command_gives_its_table(folder, tmp_path):
    out = tmp_path / "table.md"
    arguments = ["--data", folder, "--job", "digits", "--seeds", "2", "--rate", "0.01", "--out", out]
    ways = "scaled,kronecker"
    result = CliRunner().invoke(app, ["calibration", *map(str, arguments), "--ways", ways], catch_exceptions=False)
    assert result.exit_code == 0
    lines = out.read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")][1:] == [
        "| point estimate",
        "| logits divided by a temperature ¹",
        "| `fit_laplace`, Kronecker, `tune_temperature` ¹",
    ]
    assert "seeds: 2" in out.read_text()


def test_grids_given_by_hand_take_the_place_of_a_methods_own() -> None:
    grids = read_rates("lora=0.007,0.01 flora=0.03:1,0.03:3")
    assert grids == {"lora": [(0.007, 1.0), (0.01, 1.0)], "flora": [(0.03, 1.0), (0.03, 3.0)]}
    tasks = tuning_tasks("mobile", ["lora", "full"], 2, grids)
    assert [(t.rate, t.seed) for t in tasks if t.method == "lora"] == [(0.007, 0), (0.007, 1), (0.01, 0), (0.01, 1)]
    assert len([t for t in tasks if t.method == "full"]) == 10
    with pytest.raises(ValueError, match="rates: expected method=rate"):
        read_rates("lora")
