"""The table of picture files through the native runner's reader: what Python reads, or refused as Python refuses."""

import re
import subprocess

import numpy as np
import pytest
from PIL import Image
from support import picture_files
from support.golden import ROOT

from lavin_rt.errors import InputError
from lavin_rt.pictures import images

pytestmark = pytest.mark.slow


def test_both_know_the_same_names_of_pictures():
    """A template's other files are passed over, by both the same."""
    source = (ROOT / "export" / "native" / "context.cpp").read_text()
    [names] = re.findall(r"kPictures\[\] = \{([^}]*)\}", source)
    assert tuple(re.findall(r'"([^"]+)"', names)) == images.PICTURE_SUFFIXES


def test_the_table_is_read_as_in_python(native_build, tmp_path):
    files = picture_files.files()
    made = [tmp_path / file.name for file in files]
    for path, file in zip(made, files, strict=True):
        path.write_bytes(file.content)
    results = tmp_path / "results"
    results.mkdir()
    command = [native_build / "read-pictures", results, *made]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    refused = dict(line.split("\t", 1) for line in done.stdout.splitlines())
    agreed = 0
    for path in made:
        result = results / f"{path.name}.ppm"
        assert result.exists() != (path.name in refused)
        try:
            expected = images.load_picture(path).permute(1, 2, 0).numpy()
        except InputError:
            assert path.name in refused
            continue
        if path.suffix != ".png":
            assert "expected PNG, convert it or use lavin-rt run" in refused[path.name]
            continue
        found = np.asarray(Image.open(result))
        assert found.shape == expected.shape, path.name
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1, path.name
        agreed += 1
    assert agreed >= 60
