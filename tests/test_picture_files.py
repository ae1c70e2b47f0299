"""Every file of the table is read as what it shows, within a grey level, or refused in one line."""

import numpy as np
import picture_files
import pytest
from checks import refusal

from lavin_rt import images

FILES = picture_files.files()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_shows_what_it_should(tmp_path, file):
    path = tmp_path / file.name
    path.write_bytes(file.content)
    if file.shows is None:
        assert str(path) in refusal(images.load_picture, path)
        return
    read = images.load_picture(path).permute(1, 2, 0).numpy()
    assert read.shape == file.shows.shape
    assert np.abs(read.astype(int) - file.shows.astype(int)).max() <= 1
