"""Loading and saving the released model's shapes in bfloat16 without a second copy in memory."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lavin_rt.checkpoint.names import official_layout
from lavin_rt.checkpoint.tensors import SafetensorsFile
from lavin_rt.dit.config import PRESETS

ALLOWED = 1.15  # resident memory above the interpreter with its imports, in sizes of the file

MEASURE = """
import json, sys, time
import torch
from lavin_rt.checkpoint.load import load_dit, save_dit

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))

path, resident_modulation, copy = sys.argv[1], sys.argv[2] == "resident", sys.argv[3]
before, began = resident("VmRSS"), time.perf_counter()
dit = load_dit(path, dtype=torch.bfloat16, resident_modulation=resident_modulation)
report = {"seconds": time.perf_counter() - began, "bytes": resident("VmHWM") - before}
began = time.perf_counter()
save_dit(dit, copy)
report |= {"saving seconds": time.perf_counter() - began, "bytes after saving": resident("VmHWM") - before}
print(json.dumps(report))
"""


def write_released_shapes(path: Path) -> None:
    """Random bytes under the released model's names, sorted by name as other writers do."""
    noise = memoryview(random.Random(0).randbytes(32 * 2**20))
    places = sorted(official_layout(PRESETS["lavin-dit-3.4b"]), key=lambda place: place.official)
    sizes = [2 * math.prod(place.shape) for place in places]
    header, end = {}, 0
    for place, size in zip(places, sizes, strict=True):
        header[place.official] = {"dtype": "BF16", "shape": place.shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for index, size in enumerate(sizes):
            while size:
                # Every tensor starts elsewhere in the noise, so that one in another's place shows.
                start = index * 9973 % (len(noise) // 2)
                size -= file.write(noise[start : start + min(size, len(noise) - start)])


def assert_same_tensors(one: Path, other: Path) -> None:
    one, other = SafetensorsFile.open(one), SafetensorsFile.open(other)
    assert one.entries.keys() == other.entries.keys()
    with open(one.path, "rb") as left, open(other.path, "rb") as right:
        for name, entry in one.entries.items():
            left.seek(entry.start)
            right.seek(other.entries[name].start)
            assert left.read(entry.size) == right.read(other.entries[name].size), name


@pytest.mark.slow
def test_the_released_shapes_load_and_save_within_memory(tmp_path, capsys):
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from /proc, which is not here")
    with open("/proc/meminfo") as meminfo:
        available = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))
    free = shutil.disk_usage(tmp_path).free
    if available < 12e9 or free < 20e9:
        pytest.skip(f"needs 12 GB of memory and 20 GB of disk, has {available / 1e9:.0f} and {free / 1e9:.0f} free")
    path, copy = tmp_path / "lavin_dit.safetensors", tmp_path / "copy.safetensors"
    try:
        write_released_shapes(path)
        size = path.stat().st_size
        for mode in ("in the file", "resident"):
            command = [sys.executable, "-c", MEASURE, path, mode, copy]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            report = json.loads(done.stdout)
            with capsys.disabled():
                print(
                    f"\nmodulation {mode}, file of {size / 1e9:.2f} GB: loading peaks at {report['bytes'] / size:.3f} "
                    f"of it in {report['seconds']:.1f} s, saving at {report['bytes after saving'] / size:.3f} "
                    f"in {report['saving seconds']:.1f} s"
                )
            assert report["bytes"] <= ALLOWED * size
            assert report["bytes after saving"] <= ALLOWED * size
            assert_same_tensors(path, copy)
            copy.unlink()
    finally:
        path.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)
