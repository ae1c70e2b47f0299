"""The packed step against the plain two-pass loop where the golden cases do not reach."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import torch
import triton
from support.golden import golden_cases, relative_error
from torch._dynamo.testing import CompileCounter

from lavin_kernels import launch
from lavin_kernels.reference import dit as reference
from lavin_rt.dit import cpu_operators
from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.layout import Layout, Shape
from lavin_rt.dit.model import JDiT, randomize_
from lavin_rt.dit.packed import PackedStep, resolve_impl
from lavin_rt.errors import Cancelled, InputError, NonFiniteError
from lavin_rt.sampling.sampler import sample

FALSE = shutil.which("false")  # a compiler that fails, as gcc does where Python.h is missing


def random_dit(config: DiTConfig, seed: int = 0) -> JDiT:
    return randomize_(JDiT(config), seed).eval().requires_grad_(False)


def random_latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def small_dit() -> JDiT:
    return random_dit(DiTConfig(hidden_size=144, depth=3, num_heads=2, kv_group=2))


def test_a_compiled_step_calls_the_references(small_dit, monkeypatch):
    """What a CPU calls eagerly writes into buffers part by part, of which a compiler makes little."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda step, **options: compiled.append(step.__self__.ops))
    step = PackedStep(small_dit, Layout.make(small_dit.config, Shape(1, 3, 1, 1, 4, 4, guided=True)), "torch")
    step.compiled()
    assert compiled == [reference] and step.ops is cpu_operators


@pytest.mark.slow
def test_released_widths():
    """D 2304, 32/8 heads, depth 2; 15 tokens a frame, three queries, a target of three latent frames."""
    dit = random_dit(DiTConfig(hidden_size=2304, depth=2, num_heads=32, kv_group=4))
    cond, noise = random_latents(3, 16, 9, 6, 10), random_latents(3, 16, 3, 6, 10, seed=1)
    results = [sample(dit, cond, noise, steps=4, impl=impl, query_frames=3) for impl in ("plain", "torch")]
    assert relative_error(results[1], results[0]) <= 1e-5


@pytest.mark.parametrize("guidance", [1.0, 0.0, 1.5, 7.5])
def test_guidance(small_dit, guidance):
    cond, noise = random_latents(2, 16, 3, 4, 6), random_latents(2, 16, 1, 4, 6, seed=1)
    results = [sample(small_dit, cond, noise, steps=6, guidance=guidance, impl=impl) for impl in ("plain", "torch")]
    assert relative_error(results[1], results[0]) <= 1e-5


def test_guidance_of_one_is_the_limit_of_the_guided_run(small_dit):
    """At 1.0 the null branch does not run; just beside it, it does, and cancels."""
    cond, noise = random_latents(1, 16, 3, 4, 6), random_latents(1, 16, 1, 4, 6, seed=1)
    alone, beside = (sample(small_dit, cond, noise, steps=6, guidance=g, impl="torch") for g in (1.0, 1.0 + 1e-6))
    assert relative_error(beside, alone) <= 1e-5


def test_depth_of_one_prunes_its_only_block():
    dit = random_dit(DiTConfig(hidden_size=48, depth=1, num_heads=2, kv_group=1))
    cond, noise = random_latents(1, 16, 3, 4, 4), random_latents(1, 16, 1, 4, 4, seed=1)
    results = [sample(dit, cond, noise, steps=4, impl=impl) for impl in ("plain", "torch")]
    assert relative_error(results[1], results[0]) <= 1e-5


def test_items_of_a_batch_equal_single_runs(small_dit):
    cond, noise = random_latents(3, 16, 3, 4, 6), random_latents(3, 16, 1, 4, 6, seed=1)
    batch = sample(small_dit, cond, noise, steps=6, impl="torch")
    for item in range(3):
        one = slice(item, item + 1)
        single = sample(small_dit, cond[one], noise[one], steps=6, impl="torch")
        assert relative_error(batch[one], single) <= 1e-5


def test_callback_sees_every_step_and_can_end_the_run(small_dit):
    cond, noise = random_latents(1, 16, 3, 4, 6), random_latents(1, 16, 1, 4, 6, seed=1)
    seen = []
    complete = sample(
        small_dit, cond, noise, steps=6, impl="torch", callback=lambda *step: seen.append((*step[:2], step[2].shape))
    )
    assert seen == [(step, 5, noise.shape) for step in range(1, 6)]

    def cancel(step, evaluations, latents):
        if step == 2:
            raise Cancelled

    for impl in ("plain", "torch"):
        with pytest.raises(Cancelled):
            sample(small_dit, cond, noise, steps=6, impl=impl, callback=cancel)
        assert torch.equal(sample(small_dit, cond, noise, steps=6, impl="torch"), complete)


@pytest.mark.parametrize("impl", ["plain", "torch"])
def test_non_finite_latents_name_their_step(small_dit, impl):
    cond, noise = random_latents(1, 16, 3, 4, 6), random_latents(1, 16, 1, 4, 6, seed=1)
    noise[0, 3, 0, 1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="step 1 of 19"):
        sample(small_dit, cond, noise, impl=impl)

    def poison(step, evaluations, latents):
        if step == 7:
            latents[0, 0, 0, 0, 0] = float("inf")

    noise = random_latents(1, 16, 1, 4, 6, seed=1)
    with pytest.raises(NonFiniteError, match="step 8 of 19") as error:
        sample(small_dit, cond, noise, impl=impl, callback=poison)
    assert error.value.step == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cond_latents": torch.zeros(1, 16, 4, 6)}, "cond_latents is"),
        ({"cond_latents": torch.zeros(1, 8, 3, 4, 6)}, r"expected floating point \[B, 16"),
        ({"noise": torch.zeros(1, 16, 1, 4, 6, dtype=torch.uint8)}, "noise is torch.uint8"),
        ({"noise": torch.zeros(2, 16, 1, 4, 6)}, "noise is"),
        ({"noise": torch.zeros(1, 16, 1, 4, 4)}, "noise is"),
        ({"cond_latents": torch.zeros(1, 16, 3, 3, 6), "noise": torch.zeros(1, 16, 1, 3, 6)}, "even height"),
        ({"steps": 5}, "even number"),
        ({"guidance": float("nan")}, "guidance"),
        ({"query_frames": 4}, "query_frames is 4"),
        ({"query_frames": 0}, "query_frames is 0"),
        ({"impl": "fast"}, "impl is 'fast'"),
    ],
)
def test_bad_input_is_named(small_dit, change, message):
    inputs = {"cond_latents": torch.zeros(1, 16, 3, 4, 6), "noise": torch.zeros(1, 16, 1, 4, 6), **change}
    with pytest.raises(InputError, match=message) as error:
        sample(small_dit, **inputs)
    assert "\n" not in str(error.value)


def test_auto_is_settled_by_device_and_head_size(monkeypatch):
    fits = DiTConfig(hidden_size=144, depth=1, num_heads=2, kv_group=1)  # head size 72
    odd = DiTConfig(hidden_size=84, depth=1, num_heads=2, kv_group=1)  # head size 42
    assert resolve_impl("auto", torch.device("cpu"), fits) == "torch"
    monkeypatch.setattr(launch, "driver_fault", lambda: "")
    for capability, impl in (((7, 5), "torch"), ((8, 0), "triton"), ((12, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert resolve_impl("auto", torch.device("cuda"), fits) == impl
        assert resolve_impl("triton", torch.device("cuda"), fits) == "triton"
    assert resolve_impl("auto", torch.device("cuda"), odd) == "torch"
    with pytest.raises(InputError, match="need a CUDA device and the package triton"):
        resolve_impl("triton", torch.device("cpu"), fits)
    with pytest.raises(InputError, match="multiple of 8"):
        resolve_impl("triton", torch.device("cuda"), odd)


@pytest.mark.parametrize(("compiler", "fault"), [(FALSE, "CalledProcessError"), ("", "Failed to find C compiler")])
def test_a_machine_where_triton_cannot_build_its_driver(compiler, fault, monkeypatch, tmp_path):
    nvidia = import_module("triton.backends.nvidia.driver")
    config = DiTConfig(hidden_size=144, depth=1, num_heads=2, kv_group=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvidia.CudaDriver, "is_active", lambda: True)
    monkeypatch.setattr(nvidia, "library_dirs", lambda: [])
    monkeypatch.setattr(triton.runtime, "driver", type(triton.runtime.driver)())
    monkeypatch.setattr(launch, "driver_fault", launch.driver_fault.__wrapped__)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    if compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.delenv("CC", raising=False)
    with pytest.warns(UserWarning, match=f"{fault}.*gcc python3-dev.*impl='torch' runs instead"):
        assert resolve_impl("auto", torch.device("cuda"), config) == "torch"
    with pytest.raises(InputError, match=f"impl is 'triton'.*{fault}.*gcc python3-dev.*or use impl='torch'"):
        resolve_impl("triton", torch.device("cuda"), config)


def test_the_plain_model_is_differentiable(golden_dit):
    """Training uses it: every parameter that a velocity depends on gets a gradient."""
    case = golden_cases("dit_c")["forward0"]
    dit = random_dit(DiTConfig(hidden_size=48, depth=2, num_heads=2, kv_group=2)).requires_grad_(True)
    dit(case["latents"], case["t"], case["cond_latents"]).square().mean().backward()
    without = {name for name, parameter in dit.named_parameters() if not parameter.grad.abs().sum() > 0}
    assert not without


def test_every_shape_is_compiled_once(monkeypatch):
    """Ten shapes, each sampled twice: ten compilations, though torch allows eight of the same code by default."""
    counter = CompileCounter()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **options: compile(network, backend=counter, **options))
    dit = random_dit(DiTConfig(hidden_size=48, depth=1, num_heads=2, kv_group=2))
    for half in range(1, 11):
        for _ in range(2):
            cond, noise = random_latents(1, 16, 3, 4, 2 * half), random_latents(1, 16, 1, 4, 2 * half, seed=1)
            sample(dit, cond, noise, steps=4, impl="torch", compile=True)
    assert counter.frame_count == 10


@pytest.mark.slow
def test_a_compiled_step_is_cached_across_processes(tmp_path):
    """The second process takes from the disk what the first compiled."""
    code = (
        "import torch\n"
        "from torch._dynamo.utils import counters\n"
        "from test_packed import DiTConfig, random_dit, random_latents, sample\n"
        "dit = random_dit(DiTConfig(hidden_size=48, depth=1, num_heads=2, kv_group=2))\n"
        "cond, noise = random_latents(1, 16, 3, 4, 4), random_latents(1, 16, 1, 4, 4, seed=1)\n"
        "sample(dit, cond, noise, steps=4, impl='torch', compile=True)\n"
        "found = counters['aot_autograd'], counters['inductor']\n"
        "print(sum(count[kind] for count in found for kind in count if kind.endswith('cache_hit')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    hits = [int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout) for _ in range(2)]
    assert hits[0] == 0 and hits[1] >= 1


def test_compiled_step_equals_the_eager_one():
    dit = random_dit(DiTConfig(hidden_size=48, depth=2, num_heads=2, kv_group=2))
    cond, noise = random_latents(1, 16, 3, 4, 4), random_latents(1, 16, 1, 4, 4, seed=1)
    eager, compiled = (sample(dit, cond, noise, steps=6, impl="torch", compile=c) for c in (False, True))
    assert relative_error(compiled, eager) <= 1e-5
