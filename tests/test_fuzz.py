"""Some thousand hostile cases for every reader of files; `make fuzz` runs the same fuzzers for longer."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
import run as fuzz
import seeds

pytestmark = pytest.mark.slow
SECONDS = 60  # on a machine so slow that it does not come to all cases
CASES = {"python/vae": 300, "python/archive": 600, "python/picture": 1500}
PYTHON, NATIVE = 3000, 20000


def hold(reader: str, command: list, work: Path, cases: int) -> None:
    outcome = fuzz.run(reader, command, work, SECONDS, CASES.get(reader, cases))
    assert not outcome.crash
    assert outcome.cases >= 100 and outcome.coverage > 10, outcome


@pytest.mark.parametrize("reader", seeds.PYTHON)
def test_what_python_reads(tmp_path, reader):
    if missing := fuzz.missing_python():
        pytest.skip(missing)
    hold(f"python/{reader}", [sys.executable, fuzz.HERE / "readers.py", reader], tmp_path, PYTHON)


@pytest.fixture(scope="module")
def fuzzers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzers")
    if missing := fuzz.missing_native() or fuzz.build(folder):
        pytest.skip(missing)
    return folder


@pytest.mark.parametrize("reader", seeds.NATIVE)
def test_what_the_native_runner_reads(fuzzers, tmp_path, reader):
    hold(f"native/{reader}", [fuzzers / f"fuzz-{reader}"], tmp_path, NATIVE)
