"""Optimisation profiles as the command line gives them, and the shapes that they mean."""

from __future__ import annotations

import argparse

import pytest
import torch
from support.checks import refusal

from lavin_export.networks import denoiser
from lavin_export.networks import vae as vae_parts
from lavin_export.to_tensorrt import export as to_tensorrt
from lavin_export.to_tensorrt.build import BuildOptions
from lavin_export.to_tensorrt.export import DEFAULT_PROFILE
from lavin_export.to_tensorrt.profiles import Range, for_vae, parse, with_null_branches
from lavin_rt.dit.config import PRESETS


def test_the_default_is_512_pixels_and_four_pairs():
    profile = parse(DEFAULT_PROFILE)
    assert profile == parse("")
    one = Range(1, 1, 1)
    assert (profile.batch, profile.target_frames, profile.cond_frames) == (one, one, Range(9, 9, 9))
    assert profile.height == profile.width == Range(64, 64, 64)


def test_ranges():
    profile = parse("height=256:1024, width=256:512:1024,pairs=1:2:8,batch=4")
    assert profile.height == Range(32, 128, 128) and profile.width == Range(32, 64, 128)
    assert profile.cond_frames == Range(3, 5, 17) and profile.batch == Range(4, 4, 4)
    assert parse("cond_frames=2:9").cond_frames == Range(2, 9, 9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("size=512", "expected each of batch, pairs"),
        ("height=512,height=256", "at most once"),
        ("height=big", "NAME=LEAST:TUNED:MOST"),
        ("height=1:2:3:4", "NAME=LEAST:TUNED:MOST"),
        pytest.param("height=" + "16" * 2500, "NAME=LEAST:TUNED:MOST", id="more digits than Python reads"),
        ("height=-16", "NAME=LEAST:TUNED:MOST"),
        ("height=500", "multiples of 16"),
        ("height=512:256", "expected LEAST:TUNED:MOST, ascending"),
        ("batch=0", "ascending"),
        ("pairs=4,cond_frames=9", "either pairs or cond_frames"),
    ],
)
def test_refusals(text, words):
    assert words in refusal(parse, text)


def test_shapes_of_the_denoiser():
    inputs, _, _ = denoiser.specification(PRESETS["lavin-dit-3.4b"], "bfloat16")
    profile = parse("batch=1:1:2,pairs=2:4:4,height=256:512,width=512")
    bounds = profile.bounds(inputs)
    assert bounds == {
        "latents": ((1, 16, 1, 32, 64), (1, 16, 1, 64, 64), (2, 16, 1, 64, 64)),
        "cond_latents": ((1, 16, 5, 32, 64), (1, 16, 9, 64, 64), (2, 16, 9, 64, 64)),
    }
    ranges = profile.ranges(inputs)
    assert ranges == {
        "batch": [1, 2],
        "cond_frames": [5, 9],
        "target_frames": [1, 1],
        "height": [32, 64],
        "width": [64, 64],
    }


def test_shapes_of_the_vae():
    [profile] = for_vae([parse("batch=4,height=256:512"), parse("batch=1,pairs=8,height=256:512")])
    inputs, _, _ = vae_parts.specification("encoder", "float16", 5)
    assert profile.bounds(inputs) == {
        "pixels": ((1, 3, 5, 256, 512), (1, 3, 5, 512, 512), (1, 3, 5, 512, 512)),
    }
    assert profile.ranges(inputs) == {"rows": [32, 64], "columns": [64, 64]}
    inputs, _, _ = vae_parts.specification("decoder", "float16", 5)
    assert profile.bounds(inputs)["latents"][0] == (1, 16, 2, 32, 64)


def test_guidance_gets_profiles_of_its_own():
    picture, clip = parse(""), parse("target_frames=2:3,cond_frames=9")
    profiles = with_null_branches([picture, clip, picture])
    assert profiles[:2] == [picture, clip]
    assert [profile.cond_frames for profile in profiles[2:]] == [Range(2, 2, 2), Range(3, 4, 4)]
    # A profile for the null branch that was asked for is not doubled.
    null = parse("cond_frames=2")
    assert with_null_branches([picture, null]) == [picture, null]


def test_a_timing_cache_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(to_tensorrt, "import_tensorrt", lambda purpose: None)
    monkeypatch.setattr(to_tensorrt, "resolve_device", torch.device)
    options = BuildOptions(timing_cache=tmp_path)
    said = refusal(to_tensorrt.export_tensorrt, None, tmp_path / "artifact", options=options)
    assert said.startswith(f"{tmp_path}: cannot be written (Is a directory)")


@pytest.mark.parametrize("workspace", ["nan", "inf", "-1", "0", "1e300"])
def test_a_workspace_that_is_none(monkeypatch, workspace):
    monkeypatch.setattr(to_tensorrt, "import_tensorrt", lambda purpose: None)
    monkeypatch.setattr(to_tensorrt, "resolve_device", torch.device)
    parser = argparse.ArgumentParser()
    to_tensorrt.add_arguments(parser)
    given = parser.parse_args([f"--workspace={workspace}"])
    given.device = "cpu"
    assert f"--workspace is {float(workspace)} GiB; expected" in refusal(to_tensorrt.from_arguments, given)
