"""Rules of the house that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "lavin_kernels": "kernels/lavin_kernels",
    "lavin_rt": "lavin_rt",
    "lavin_export": "export/lavin_export",
    "lavin_bench": "benchmarks/lavin_bench",
}
LINES = 400

SOURCES = [(package, path) for package, folder in FOLDERS.items() for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize(("package", "path"), SOURCES, ids=lambda value: getattr(value, "name", value))
def test_source(package, path):
    text = path.read_text()
    name = str(path.relative_to(ROOT))
    tree = ast.parse(text)
    assert text.count("\n") <= LINES, f"{name} has more than {LINES} lines: divide it"
    environment = [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert not environment, f"{name}:{environment} reads the environment: settings are arguments"
    assert path.name != "utils.py", "name a file after what it does"


@pytest.mark.parametrize("package", [*FOLDERS, "lavin_kernels.reference.dit"])
def test_import_leaves_the_environment_and_the_folder_alone(package, tmp_path):
    code = (
        f"import os; before = dict(os.environ)\nimport {package}\n"
        "import torch\n"
        "assert dict(os.environ) == before and not torch.cuda.is_initialized()\n"
        "assert torch.get_default_dtype() == torch.float32"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())


def test_import_of_the_package_does_not_wait_for_torch():
    code = "import sys, lavin_rt; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
