"""Everything that can be wrong with a transformer checkpoint, its tensors and its config."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from safetensors.torch import save_file
from support.checks import golden, refusal, write_dit_a
from support.golden import GOLDEN

from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.checkpoint.header import picture_size
from lavin_rt.checkpoint.load import describe, load_dit, load_vae, save_vae
from lavin_rt.checkpoint.names import official_layout
from lavin_rt.checkpoint.tensors import SafetensorsFile
from lavin_rt.dit.config import PRESETS
from lavin_rt.dit.model import JDiT


def test_missing_tensors_are_named_in_one_error(tmp_path):
    message = refusal(
        load_dit, write_dit_a(tmp_path, lambda tensors, _: tensors.pop("blocks.1.cond_mlp.up_proj.weight"))
    )
    assert "misses 1 of 84 tensors: blocks.1.cond_mlp.up_proj.weight;" in message

    def drop(tensors, _):
        for name in [name for name in tensors if name.startswith("blocks.1.x_") or name == "final_layer.linear.bias"]:
            del tensors[name]
        tensors["x_embedder.1.bias"] = tensors["x_embedder.1.bias"][:-1].clone()

    message = refusal(load_dit, write_dit_a(tmp_path, drop))
    assert "misses 6 of 84 tensors" in message and "blocks.1.x_modulation.1.bias" in message
    assert "final_layer.linear.bias" in message
    assert "1 misshapen tensors: x_embedder.1.bias (is [143], expected [144])" in message


def test_a_long_list_of_tensors_is_cut(tmp_path):
    def drop(tensors, _):
        for name in [
            name for name in tensors if name.startswith("blocks.0.") and name != "blocks.0.joint_attn.x_q.weight"
        ]:
            del tensors[name]

    assert "misses 21 of 84 tensors" in (message := refusal(load_dit, write_dit_a(tmp_path, drop)))
    assert "and 15 more" in message


def test_unexpected_tensors_are_one_warning_or_strictly_an_error(tmp_path):
    def add(tensors, _):
        tensors["rope.freqs"] = torch.zeros(3)
        tensors["step"] = torch.zeros(1, dtype=torch.int64)

    path = write_dit_a(tmp_path, add)
    with pytest.warns(UserWarning) as caught:
        dit = load_dit(path)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "2 tensors that this model does not have: rope.freqs, step" in str(caught[0].message)
    assert "rope.freqs, step" in refusal(load_dit, path, strict=True)
    assert torch.equal(dit.prompt_embed, golden("dit_a")[0]["prompt_embed"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dit(GOLDEN / "dit_a.safetensors", strict=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_quantized_tensors_are_refused(tmp_path, dtype):
    name = "blocks.2.joint_attn.x_q.weight"
    message = refusal(
        load_dit, write_dit_a(tmp_path, lambda tensors, _: tensors.update({name: tensors[name].to(dtype)}))
    )
    assert name in message and "quantized" in message


def test_a_dtype_that_is_none_of_the_models(tmp_path):
    assert "torch.int8" in refusal(load_dit, write_dit_a(tmp_path), dtype=torch.int8)


def drop_config(tensors, metadata):
    metadata.clear()


def test_no_config(tmp_path):
    path = write_dit_a(tmp_path, drop_config)
    message = refusal(load_dit, path)
    assert "has no config" in message and "depth 3, hidden size 144" in message and "config.json" in message


def test_a_config_beside_the_file(tmp_path):
    path = write_dit_a(tmp_path, drop_config)
    config = golden("dit_a")[1]["config"]
    path.with_name("config.json").write_text(config)
    assert json.loads(load_dit(path).config.to_json()) == json.loads(config)
    for text, said in [("{", "is no JSON"), ("[]", "expected a JSON object"), ("{}", "lacks hidden_size")]:
        path.with_name("config.json").write_text(text)
        message = refusal(load_dit, path)
        assert said in message and "config.json" in message
    path.with_name("config.json").write_bytes(b"\xff")
    assert "cannot read" in refusal(load_dit, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 288}, "hidden_size = 288, but prompt_embed has width 144"),
        ({"depth": 4}, "depth = 4, but the file holds 3 blocks"),
        ({"depth": 2}, "depth = 2, but the file holds 3 blocks"),
        ({"kv_group": 1}, "hidden_size / kv_group = 144, but blocks.0.joint_attn.cond_k.weight has 72 rows"),
        ({"in_channels": 4}, "in_channels = 4, but x_embedder.0.weight has 64 columns"),
        ({"num_heads": 3}, "num_heads 3 is not divisible by kv_group 2"),
        ({"num_heads": 16}, "head size 9"),
        ({"num_heads": 5}, "not divisible by num_heads 5"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": "2"}, "num_heads is '2'"),
        ({"depth": 10**30}, "but the file holds 3 blocks"),
        ({"hidden_size": 10**30 * 6}, "prompt_embed has width 144"),
        ({"patch_size": 4}, "patch_size is 4"),
        ("nonsense", "is no JSON"),
        ("3", "expected a JSON object"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path, change, said):
    def reconfigure(tensors, metadata):
        is_text = isinstance(change, str)
        metadata["config"] = change if is_text else json.dumps(json.loads(metadata["config"]) | change)

    message = refusal(load_dit, write_dit_a(tmp_path, reconfigure))
    assert said in message and "lavin_dit.safetensors" in message


@pytest.mark.parametrize("size", ["0", "100", "-16", "64 ", "9" * 40])
def test_a_size_that_is_none(tmp_path, size):
    path = write_dit_a(tmp_path, lambda _, metadata: metadata.update(size=size))
    assert "expected a multiple of 16" in refusal(picture_size, SafetensorsFile.open(path))


def test_a_block_short(tmp_path):
    def drop(tensors, _):
        for name in [name for name in tensors if name.startswith("blocks.2.")]:
            del tensors[name]

    assert "depth = 3, but the file holds 2 blocks" in refusal(load_dit, write_dit_a(tmp_path, drop))


def test_another_models_file(tmp_path):
    save_vae(load_vae(GOLDEN / "stvae.pt"), tmp_path / "stvae.safetensors")
    message = refusal(load_dit, tmp_path / "stvae.safetensors")
    assert "is no LaVin-DiT transformer" in message and "decoder.conv_in.conv.bias" in message
    save_file({}, tmp_path / "empty.safetensors")
    assert "its tensors are none" in refusal(load_dit, tmp_path / "empty.safetensors")


def test_the_released_model_is_recognised_without_a_config(tmp_path):
    """A header with the released shapes over a file without data: sparse, so it takes no disk."""
    released, path = PRESETS["lavin-dit-3.4b"], tmp_path / "lavin_dit.safetensors"
    header, end = {}, 0
    for place in official_layout(released):
        start, end = end, end + 2 * math.prod(place.shape)
        header[place.official] = {"dtype": "BF16", "shape": place.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    described = describe(Checkpoint(path, path, None, "here"))
    assert described.config == released
    assert described.dtype == torch.bfloat16
    assert round(described.parameters / 1e9, 3) == 3.399
    assert described.record()["preset"] == "lavin-dit-3.4b"
    with torch.device("meta"):
        assert described.parameters == sum(parameter.numel() for parameter in JDiT(released).parameters())


def test_describing_a_checkpoint(tmp_path):
    (tmp_path / "depth_estimation").mkdir()
    files = Checkpoint(GOLDEN / "dit_b.safetensors", GOLDEN / "stvae.pt", tmp_path, "here")
    record = describe(files).record()
    assert record["parameters"] == sum(value.numel() for value in golden("dit_b")[0].values())
    assert (record["preset"], record["tasks"], record["dtype"]) == (None, ["depth_estimation"], "bfloat16")
    json.dumps(record)
