"""The README's Python examples run as they stand, in a fresh process, and its claims about them hold."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_readme_examples_run_and_do_what_it_says(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    fit, completion, factors, adapters, codes = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    check = """
import numpy as np
assert np.array_equal(mean, same.predict(X.loc[hidden]))
assert function.shape == band.shape
assert len(function) == 3
assert np.sqrt(np.mean((mean - y[hidden]) ** 2)) < 0.5 * np.std(y)
assert 0.8 < np.mean((lower < y[hidden]) & (y[hidden] < upper)) < 0.98
"""
    check_codes = """
assert abs(model.noise_std_ - 0.1) < 0.005
assert np.isfinite(filled).all() and model.components_.shape == (6, 24)
"""
    check_completion = "assert np.sqrt(np.mean((mean - y[1200:]) ** 2)) < 0.5\nassert scores.shape == (1200,)\n"
    check_adapters = """
from pathlib import Path
assert sorted(path.name for path in Path("task").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
assert "0.weight" in net.state_dict() and len(net.state_dict()) == 4
"""
    check_factors = "assert factor.shape == factor_std.shape == (30, len(model.relevance_))\n"
    tables = completion + check_completion + factors + check_factors
    script = fit + check + tables + adapters + check_adapters + codes + check_codes
    (tmp_path / "example.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-W", "error", "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_links_in_the_readme_point_to_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]
