"""Safetensors files: what this package and the safetensors library write and read of each other, and broken files."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checks import DTYPES, refusal, same_bytes, write_dit_a
from support.golden import GOLDEN

from lavin_rt.checkpoint.header import dit_config
from lavin_rt.checkpoint.load import load_dit
from lavin_rt.checkpoint.tensors import SafetensorsFile, write_safetensors
from lavin_rt.errors import InputError


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 6797711832\n", "Git LFS"),
        (b"<!DOCTYPE html><html><body>Not Found</body></html>", "web page"),
        (b"PK\x03\x04" + b"\0" * 40, "torch.save"),
        (pickle.dumps({"a": 1}, protocol=2), "torch.save"),
        (b"\x1f\x8b\x08" + b"\0" * 40, "gzip"),
        (b"\x05\0\0", "is not a safetensors file"),
        ((5).to_bytes(8, "little") + b"[1,2]", "is not a safetensors file"),
        ((5).to_bytes(8, "little") + b"{1,2}", "header is no JSON"),
        ((5).to_bytes(8, "little") + b"{\xff\xff\xff}", "header is no JSON"),
        ((100).to_bytes(8, "little") + b"{}", "is truncated"),
    ],
)
def test_files_that_are_no_safetensors_files(tmp_path, content, said):
    path = tmp_path / "lavin_dit.safetensors"
    path.write_bytes(content)
    message = refusal(load_dit, path)
    assert said in message and str(path) in message


def test_no_file_at_all(tmp_path):
    assert "No such file" in refusal(load_dit, tmp_path / "lavin_dit.safetensors")
    assert "Is a directory" in refusal(load_dit, tmp_path)


def with_header(path, header: dict | str, data: int) -> None:
    encoded = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(data))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, ""),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "do not make F32 [2]"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "is truncated: it has"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "4 bytes follow its last tensor"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "starts at byte"),
        ({"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}, "unknown dtype 'F31'"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "unknown dtype"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "the shape [-2]"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "the shape [2.0]"),
        ({"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}, "the shape"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, "the shape 2"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "the offsets [8, 0]"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}, "the offsets"),
        ({"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}, "do not make"),
        ({"dtype": "F32", "shape": [2]}, "has no dtype, shape and data_offsets"),
        ("F32", "has no dtype, shape and data_offsets"),
    ],
)
def test_headers_are_checked(tmp_path, entry, said):
    path = tmp_path / "a.safetensors"
    with_header(path, {"tensor": entry}, 8)
    if said:
        assert said in refusal(SafetensorsFile.open, path)
    else:
        assert SafetensorsFile.open(path).entries["tensor"].shape == (2,)


def test_overlapping_doubled_and_strange_names(tmp_path):
    path, entry = tmp_path / "a.safetensors", {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    with_header(path, {"a": entry, "b": entry}, 4)
    assert "starts at byte" in refusal(SafetensorsFile.open, path)
    with_header(path, f'{{"a": {json.dumps(entry)}, "a": {json.dumps(entry)}}}', 4)
    assert "no JSON" in refusal(SafetensorsFile.open, path)
    with_header(path, {"a\nb" * 1000: {"dtype": "U8"}}, 4)
    refusal(SafetensorsFile.open, path)
    with_header(path, "{" + '"a":{' * 100_000, 4)
    refusal(SafetensorsFile.open, path)
    with_header(path, {"__metadata__": {"config": 3}}, 0)
    assert "metadata" in refusal(SafetensorsFile.open, path)
    with_header(path, {"__metadata__": None}, 0)
    assert "metadata" in refusal(SafetensorsFile.open, path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = write_dit_a(tmp_path)
    file = SafetensorsFile.open(path)
    last = max(file.entries, key=lambda name: file.entries[name].start)
    with file.reader() as reader:
        os.truncate(path, path.stat().st_size - 1)
        message = refusal(reader.read_into, last, torch.empty(file.entries[last].shape, dtype=torch.bfloat16))
    assert "ended while reading" in message


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_truncation_goes_unnoticed(tmp_path_factory, data):
    content = (GOLDEN / "dit_a.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    length = data.draw(st.one_of(st.integers(0, header), st.integers(header, len(content) - 1)))
    path = tmp_path_factory.mktemp("cut") / "a.safetensors"
    path.write_bytes(content[:length])
    refusal(load_dit, path)
    path.unlink()


@settings(max_examples=200, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_header_is_refused_or_harmless(tmp_path_factory, changes):
    """Whatever bytes of a header change: an `InputError`, or a file whose tensors all lie inside it."""
    content = bytearray((GOLDEN / "dit_a.safetensors").read_bytes()[:10_000_000])
    header = 8 + int.from_bytes(content[:8], "little")
    for position, value in changes:
        content[position % header] = value
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    path.write_bytes(content)
    try:
        file = SafetensorsFile.open(path)
        assert all(header <= entry.start <= entry.start + entry.size <= len(content) for entry in file.entries.values())
        dit_config(file)
    except InputError as error:
        assert "\n" not in str(error)
    path.unlink()


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=5),
    dtype=st.sampled_from(DTYPES),
    note=st.text(max_size=20),
)
def test_what_is_written_the_safetensors_library_reads(tmp_path_factory, shapes, dtype, note):
    tensors = {f"tensor {index}": torch.randn(shape).to(dtype) for index, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("written") / "a.safetensors"
    layout = [(name, dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_safetensors(path, layout, iter(tensors.values()), {"note": note})
    assert same_bytes(load_file(path), tensors)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"note": note}
    save_file(tensors, path, {"note": note})
    file = SafetensorsFile.open(path)
    assert file.metadata == {"note": note}
    with file.reader() as reader:
        for name, tensor in tensors.items():
            read = torch.empty_like(tensor)
            reader.read_into(name, read)
            assert torch.equal(read, tensor)
    path.unlink()


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, [("a", torch.float32, (2,))], [torch.ones(2)], {})
    before = path.read_bytes()

    def broken():
        yield torch.zeros(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, [("a", torch.float32, (2,)), ("b", torch.float32, (2,))], broken(), {})
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(path, [("a", torch.float32, (2,))], [torch.zeros(3)], {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
