"""Artifacts that lie: each is refused with one line before anything of it is loaded or run."""

from __future__ import annotations

import json
import os
import platform
import types

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checks import refusal
from support.small_artifact import read_manifest, write_manifest

from lavin_rt.artifact import load as artifact
from lavin_rt.artifact import manifest
from lavin_rt.artifact import onnxruntime as ort_session
from lavin_rt.artifact import sizes as part_sizes
from lavin_rt.artifact.aoti import AotiSession
from lavin_rt.artifact.onnx_file import external_files
from lavin_rt.errors import InputError


@pytest.fixture
def may_run():
    """For the tests whose artifact is found out when ONNX Runtime reads it."""


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch, request):
    """Fails a test in which a graph gets as far as ONNX Runtime."""
    if "may_run" in request.fixturenames:
        return

    def run(*_):
        raise AssertionError("a hostile artifact came to be loaded")

    monkeypatch.setattr(ort_session, "import_onnxruntime", run)


def edited(folder, change, hashed=True):
    """Rewrites the manifest by `change(values)`, with right hashes unless told otherwise."""
    values = read_manifest(folder)
    change(values)
    if hashed:
        write_manifest(folder, values)
    else:
        (folder / "manifest.json").write_text(json.dumps(values))
    return folder


def test_the_sound_one_gets_as_far_as_the_runtime(folder):
    with pytest.raises(AssertionError, match="came to be loaded"):
        artifact.load(folder)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/b.onnx", ".hidden", "", "manifest.json", "..", "a\0b", "x" * 300, 7, None, "a\nb"],
)
@pytest.mark.parametrize("where", ["part", "weights", "files"])
def test_names_that_leave_the_folder(folder, name, where):
    def change(values):
        if where == "part":
            values["parts"]["denoiser"]["file"] = name
        elif where == "weights":
            values["parts"]["denoiser"]["weights"] = [name]
        else:  # a key of JSON is a string whatever it was
            values["files"][f"{name or ''}/"] = {"sha256": "0" * 64, "bytes": 1}

    message = refusal(artifact.load, edited(folder, change, hashed=False))
    assert "expected plain names" in message


def test_external_data_outside_of_the_folder(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"\0" * 64)
    values = read_manifest(folder)
    for location in ("../secret", str(secret), "vae_encoder.onnx.data", "sub/../denoiser.onnx.data"):
        model = onnx.load(folder / "denoiser.onnx", load_external_data=False)
        model.graph.initializer[0].external_data[0].value = location
        (folder / "denoiser.onnx").write_bytes(model.SerializeToString())
        write_manifest(folder, values)
        message = refusal(artifact.load, folder)
        assert "takes weights from" in message and location in message


def test_external_data_hidden_in_a_subgraph_or_a_function(folder):
    tensor = onnx.numpy_helper.from_array(np.float32([1]), "hidden")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../elsewhere")
    constant = onnx.helper.make_node("Constant", [], ["hidden"], value=tensor)
    body = onnx.helper.make_graph([constant], "body", [], [onnx.helper.make_tensor_value_info("hidden", 1, [1])])
    branch = onnx.helper.make_node("If", ["choice"], ["out"], then_branch=body, else_branch=body)
    sparse = onnx.helper.make_sparse_tensor(tensor, onnx.helper.make_tensor("at", 7, [1], [0]), [4])
    function = onnx.helper.make_function("f", "F", [], ["hidden"], [constant], [onnx.helper.make_opsetid("", 23)])
    empty = onnx.helper.make_graph([], "g", [], [])
    models = [
        onnx.helper.make_model(onnx.helper.make_graph([branch], "g", [], [])),
        onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], sparse_initializer=[sparse])),
        onnx.helper.make_model(empty, functions=[function]),
    ]
    for model in models:
        (folder / "denoiser.onnx").write_bytes(model.SerializeToString())
        assert external_files(folder / "denoiser.onnx") == {"../elsewhere"}


def test_external_data_under_a_tag_that_readers_shorten(folder):
    """ONNX Runtime takes `EA 80 80 80 10`, of 33 bits, for `6A`: the tag of a tensor's `external_data`."""
    tensor = onnx.load(folder / "denoiser.onnx", load_external_data=False).graph.initializer[0]
    entry = onnx.StringStringEntryProto(key="location", value="../elsewhere").SerializeToString()
    tensor.ClearField("external_data")
    for tag, seen in ((b"\x6a", True), (b"\xea\x80\x80\x80\x00", True), (b"\xea\x80\x80\x80\x10", False)):
        content = tensor.SerializeToString() + tag + bytes([len(entry)]) + entry
        for field in (b"\x2a", b"\x3a"):  # of a graph, and of the model
            content = field + bytes([len(content)]) + content
        (folder / "denoiser.onnx").write_bytes(content)
        if seen:
            assert external_files(folder / "denoiser.onnx") == {"../elsewhere"}
        else:
            assert "a tag of more than 32 bits" in refusal(external_files, folder / "denoiser.onnx")


@pytest.mark.parametrize("file", ["denoiser.onnx", "denoiser.onnx.data", "modulation.safetensors"])
def test_truncated_changed_missing_and_linked_files(folder, tmp_path, file):
    path, content = folder / file, (folder / file).read_bytes()
    path.write_bytes(content[:-1])
    assert "bytes, the manifest says" in refusal(artifact.load, folder)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "is not the file that was exported" in refusal(artifact.load, folder)
    path.unlink()
    assert "not complete" in refusal(artifact.load, folder)
    (tmp_path / "outside").write_bytes(content)
    path.symlink_to(tmp_path / "outside")
    assert "no plain file" in refusal(artifact.load, folder)
    path.unlink()
    os.mkfifo(path)
    assert "no plain file" in refusal(artifact.load, folder)


def test_swapped_files(folder):
    one, other = folder / "vae_encoder.onnx", folder / "vae_decoder.onnx"
    content = one.read_bytes(), other.read_bytes()
    one.write_bytes(content[1])
    other.write_bytes(content[0])
    assert "the manifest" in refusal(artifact.load, folder)


def test_swapped_files_with_their_hashes(folder, may_run):
    """Right hashes, but graphs that are not what the manifest says: found before memory is bound to them."""
    values = read_manifest(folder)
    parts = values["parts"]
    parts["vae_encoder"]["file"], parts["vae_decoder"]["file"] = "vae_decoder.onnx", "vae_encoder.onnx"
    parts["vae_encoder"]["weights"], parts["vae_decoder"]["weights"] = (
        ["vae_decoder.onnx.data"],
        ["vae_encoder.onnx.data"],
    )
    write_manifest(folder, values)
    assert "its manifest says" in refusal(artifact.load, folder)


def test_a_graph_whose_data_ends_early(folder, may_run):
    """The manifest is right about a file that is too short for its graph."""
    values = read_manifest(folder)
    (folder / "vae_encoder.onnx.data").write_bytes(b"\0" * 16)
    write_manifest(folder, values)
    assert "cannot be loaded" in refusal(artifact.load, folder)


def test_another_version_format_kind_and_device(folder, monkeypatch):
    values = read_manifest(folder)

    def with_value(**changes):
        return edited(folder, lambda found: found.update({**values, **changes}))

    assert "this package reads 1" in refusal(artifact.load, with_value(version=2))
    assert "not of a lavin-rt artifact" in refusal(artifact.load, with_value(format="other"))
    assert "kind" in refusal(artifact.load, with_value(kind="pickle"))
    assert "dtype" in refusal(artifact.load, with_value(dtype="int8"))
    assert "size is 100" in refusal(artifact.load, with_value(size=100))
    cuda = {"device": "cuda", "compute_capability": [9, 0]}
    assert "choose --device cuda" in refusal(artifact.load, with_value(target=cuda))
    assert "scales latents" in refusal(artifact.load, with_value(latent_scaling={"shift": 0.0, "scale": 1.0}))
    with_value(target=cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    read = manifest.Manifest.read(folder)
    assert "compute capability 9.0, cuda:0 has 8.6" in refusal(read.check_device, torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    read.check_device(torch.device("cuda:0"))


@pytest.mark.parametrize("option", ["plugins", "refit", "strip_plan", "weight_streaming", "version_compatible"])
def test_a_tensorrt_plan_of_0_1_with_an_option_that_is_gone(folder, option):
    before = dict.fromkeys(manifest.ONLY_IN_0_1, False)
    edited(folder, lambda values: values.update(kind="tensorrt", options=before))
    manifest.Manifest.read(folder)
    edited(folder, lambda values: values.update(options={**before, option: True}))
    said = refusal(artifact.load, folder, trust=True)
    assert f"made with --{option.replace('_', '-')}, which only lavin-rt 0.1 had; export it again" in said


def test_a_tensorrt_plan_of_0_1_for_several_kinds_of_gpu(folder):
    target = {"device": "cuda", "compute_capability": [8, 0], "hardware_compatibility": "ampere_plus"}
    edited(folder, lambda values: values.update(kind="tensorrt", target=target, options={"refit": True}))
    assert "made with --refit and --hardware-compatibility, which" in refusal(artifact.load, folder, trust=True)


@pytest.mark.parametrize("kind", ["tensorrt", "aoti"])
def test_code_needs_trust(folder, kind):
    edited(folder, lambda values: values.update(kind=kind))
    assert "--trust" in refusal(artifact.load, folder)


def test_a_package_of_code_whose_folder_is_not_utf8(tmp_path):
    """It is no package; that its path is one that PyTorch's loader cannot take is nobody's fault."""
    part = {"file": "x.pt2", "weights": [], "machine": platform.machine(), "cpu_level": "DEFAULT"}
    whose = types.SimpleNamespace(versions={"torch": torch.__version__}, check_device=lambda device: None)
    folder = tmp_path / os.fsdecode(b"n\xff")
    folder.mkdir()
    (folder / "x.pt2").write_bytes(b"PK")
    assert "x.pt2 cannot be loaded (" in refusal(AotiSession, folder, part, whose, torch.device("cpu"))


def test_bfloat16_on_a_cpu(folder):
    edited(folder, lambda values: values.update(dtype="bfloat16"))
    assert "ONNX Runtime cannot compute on a CPU" in refusal(artifact.load, folder)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff\xfe", b"{", b'{"format": "lavin-rt artifact"}', b"[" * 200_000, b'{"format": 1e999}']
)
def test_manifests_that_are_none(folder, content):
    (folder / "manifest.json").write_bytes(content)
    refusal(artifact.load, folder)


def test_a_manifest_that_is_huge_a_link_or_missing(folder, tmp_path):
    path = folder / "manifest.json"
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    assert "no manifest is larger" in refusal(artifact.load, folder)
    path.unlink()
    assert "cannot read" in refusal(artifact.load, folder)
    path.symlink_to(tmp_path / "nowhere")
    assert "no plain file" in refusal(artifact.load, folder)


def leaves(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_in_any_place_of_a_manifest_is_an_input_error_or_fine(sound, tmp_path_factory, data):
    """Reading never fails in another way than with an `InputError`, whatever stands where."""
    values = read_manifest(sound)
    path = data.draw(st.sampled_from([path for path in leaves(values) if path]))
    json_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    replaced = data.draw(
        json_values | st.lists(json_values, max_size=3) | st.dictionaries(st.text(max_size=3), json_values)
    )
    owner = values
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = replaced
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "manifest.json").write_text(json.dumps(values))
    try:
        read = manifest.Manifest.read(folder)
        read.record()
        read.check_device(torch.device("cpu"))
        part_sizes.bind_sizes(read.parts["denoiser"], [[1, 16, 1, 4, 4], [1, 16, 2, 4, 4], [1, 2, 4, 24], [24]])
    except InputError as error:
        assert "\n" not in str(error)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_onnx_file_is_an_input_error_or_read(sound, tmp_path_factory, data):
    content = bytearray((sound / "denoiser.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzzed") / "denoiser.onnx"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert isinstance(external_files(path), set)
    except InputError as error:
        assert "damaged or no ONNX file" in str(error)
