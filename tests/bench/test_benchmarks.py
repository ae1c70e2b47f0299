"""The benchmarks' own honesty: wrong results get no time, tables come from files. Nothing here is timed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from contextlib import nullcontext

import pytest
import torch

from lavin_bench import report
from lavin_bench.kernels import attention_backends
from lavin_bench.kernels.bench import WrongResult, check, largest_error, run, timed
from lavin_bench.kernels.cases import OperatorVariant, ShapeSetting, cases, settings
from lavin_rt.cli.main import main
from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.prepacked import can_prepack
from lavin_rt.errors import InputError

CPU = torch.device("cpu")
TINY = ShapeSetting(32, 1, config=DiTConfig(hidden_size=48, depth=1, num_heads=2, kv_group=2))


def test_every_case_is_right_on_the_cpu():
    found = set()
    reuse = dataclasses.replace(TINY, reuse=True)
    for case in [*cases(TINY, CPU, torch.float32), *cases(reuse, CPU, torch.float32)]:
        del case.variants["compiled"]
        assert max(check(case, torch.float32).values()) < 2e-6, case.name
        if case.operator == "joint_attention":
            assert {"flash", "padded to 128", "grouped, 256 rows"} <= case.variants.keys()
        if case.operator == "stream_linear":
            assert "prepacked" in (case.variants if can_prepack(CPU, torch.float32) else case.skipped)
        of_cpu = case.operator in ("ada_rms_norm", "gated_residual_ada_rms_norm", "swiglu")
        if of_cpu or case.operator.startswith("qk_norm_rope"):
            assert "ours" in case.variants
        else:
            assert case.skipped["ours"] == "the kernels need a CUDA device, and a CPU runs the reference"
        assert case.bytes > 0
        found.add(case.operator)
    assert found == {
        *("ada_rms_norm", "gated_residual", "gated_residual_ada_rms_norm", "qk_norm_rope", "swiglu"),
        *("stream_linear", "joint_attention", "group_norm_silu", "spatial_norm_silu", "qk_norm_rope_into"),
    }


@pytest.mark.parametrize("fault", [lambda x: x * 1.01, lambda x: x.clone().fill_(float("nan")), torch.zeros_like])
def test_a_wrong_result_gets_no_time(monkeypatch, fault, capsys):
    def faulty_cases(*arguments):
        for case in cases(*arguments):
            right = case.variants["eager"]
            wrong = OperatorVariant(lambda right=right: fault(right.call()), right.compared)
            yield dataclasses.replace(case, variants={"eager": right, "ours": wrong})

    monkeypatch.setattr("lavin_bench.kernels.bench.cases", faulty_cases)
    record = run([TINY], CPU, torch.float32, "swiglu", repeats=1)
    [failure] = record["failures"]
    assert "swiglu [32 px, 1 pair, guided]: no times, wrong results: ours" in failure
    assert not record["rows"] and " us" not in capsys.readouterr().out


def test_a_case_that_does_not_run_loses_no_other(monkeypatch):
    """Triton's errors are plain exceptions; the record is kept after every case."""

    def faulty_cases(*arguments):
        for number, case in enumerate(list(cases(*arguments))[:3]):
            broken = {"eager": case.variants["eager"], "ours": OperatorVariant(lambda: {}["PTXASError"])}
            yield dataclasses.replace(case, variants=broken if number == 1 else case.variants)

    kept = []
    monkeypatch.setattr("lavin_bench.kernels.bench.cases", faulty_cases)
    record = run(
        [TINY], CPU, torch.float32, repeats=1, show=False, save=lambda record: kept.append(len(record["rows"]))
    )
    assert len({row["operator"] for row in record["rows"]}) == 2 and "PTXASError" in record["failures"][0]
    assert len(kept) == 3 and kept == sorted(kept) and kept[0] > 0


@pytest.mark.parametrize("operator", ["joint_attention", "stream_linear", "swiglu"])
def test_on_a_gpu_every_operator_is_timed_as_a_graph(operator, monkeypatch):
    """Called from Python, attention and linears of small pictures would be timed with the host in it."""
    [case, *_] = [case for case in cases(TINY, CPU, torch.float32) if case.operator == operator]
    asked = []
    monkeypatch.setattr("lavin_bench.kernels.bench.measure", lambda *arguments, graph, **options: asked.append(graph))
    timed(case, 1, torch.device("cuda")), timed(case, 1, CPU)
    assert asked == [True, False]


def test_norms_are_held_against_what_they_must_move():
    """The map read once and written once, and the latents of the decoder's: twice the reading would give shares above
    the whole where the L2 holds the map.
    """
    for case in cases(TINY, CPU, torch.float32):
        if "norm_silu" in case.operator:
            channels, latent = int(case.setting.split()[0]), TINY.size // 8
            side = int(case.setting.split("x")[1].split(",")[0])
            latents = 2 * channels * latent**2 * case.operator.startswith("spatial")
            assert case.bytes == 4 * (2 * channels * side**2 + latents), case.name


def test_a_wrong_baseline_is_found_too(monkeypatch):
    [case] = [case for case in cases(TINY, CPU, torch.float32) if case.operator == "swiglu"]
    with pytest.raises(WrongResult, match="eager"):
        check(dataclasses.replace(case, variants={"eager": OperatorVariant(lambda: torch.ones(1))}), torch.float32)


def test_largest_error_takes_the_worst_and_never_passes_nan():
    truth = (torch.ones(4), torch.ones(4))
    assert largest_error((torch.ones(4), torch.full((4,), 1.5)), truth) == pytest.approx(0.5)
    assert largest_error((torch.ones(4), torch.full((4,), float("nan"))), truth) == float("inf")
    with pytest.raises(WrongResult, match="1 results; expected 2"):
        largest_error((torch.ones(4),), truth)


def test_the_standard_run_has_the_published_work():
    """10,240 + 3,072 rows and 23.17 TFLOP of attention in 22 blocks."""
    [standard] = [s for s in settings(torch.device("cuda")) if s.size == 512 and not s.reuse]
    branches = standard.layout(CPU).branches
    lens = [cond + x for cond, x in zip(branches.cond_lens, branches.x_lens, strict=True)]
    assert lens == [10240, 3072]
    attention = 22 * sum(4 * rows * rows * 2304 for rows in lens)
    assert attention / 1e12 == pytest.approx(23.17, abs=0.01)
    assert len(settings(torch.device("cuda"), full=True)) == 18


RECORD = {
    "kind": "kernels",
    "header": {
        "device": "Some GPU",
        "dtype": "bfloat16",
        "torch": "2.13.0",
        "date": "2026-01-02T03",
        "commit": "a" * 40,
    },
    "rows": [
        {
            "operator": "joint_attention",
            "setting": "512 px",
            "variant": "ours",
            "seconds": {"median": 2e-3, "low": 1.9e-3, "high": 2.1e-3},
            "rate": 500e12,
            "unit": "FLOP/s",
            "share_of_ceiling": 0.63,
            "relative_error": 2e-3,
        }
    ],
}


def test_report_fills_the_readme_from_files(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps(RECORD))
    text = "before\n<!-- results: gpu.json -->\nstale\n<!-- end -->\nafter\n"
    filled = report.fill(text, tmp_path)
    assert "stale" not in filled and filled.startswith("before\n") and filled.endswith("<!-- end -->\nafter\n")
    assert "| `joint_attention`, 512 px | ours | 2000 µs (1900–2100) | 500 TFLOP/s | 63% | 2.0e-03 |" in filled
    assert "Some GPU, bfloat16, torch 2.13.0, 2026-01-02, commit aaaaaaaaaa." in filled
    assert report.fill(filled, tmp_path) == filled


@pytest.mark.parametrize("name", ["benchmarks/README.md", "docs/guide.md"])
def test_documents_are_as_the_result_files_say(name):
    document = report.RESULTS.parents[1] / name
    assert report.fill(document.read_text()) == document.read_text(), "run make readme"


def test_operators_that_do_not_exist_are_refused(capsys):
    assert main(["bench", "kernels", "--operator", "nosuch"]) == 2
    assert "nosuch" in capsys.readouterr().err


def test_every_result_file_makes_a_table():
    for path in report.RESULTS.glob("*.json"):
        assert report.render(json.loads(path.read_text())).count("|") > 10, path.name


def test_every_attention_backend_is_the_one_it_is_called_by(monkeypatch):
    """The records of two names once came from one backend."""
    asked = []
    monkeypatch.setattr(attention_backends, "sdpa_kernel", lambda backend: asked.append(backend) or nullcontext())
    q, k, v = (torch.randn(3, heads, 8) for heads in (2, 1, 1))
    made = attention_backends._attempts(q, k, v, [3], [3])
    for name in attention_backends.BACKENDS:
        made[name][0]()()
    assert asked == list(attention_backends.BACKENDS.values())


def test_no_two_backends_in_a_record_round_alike():
    for path in report.RESULTS.glob("*.json"):
        errors: dict[tuple[str, ...], str] = {}
        for row in json.loads(path.read_text()).get("rows", []):
            if row.get("variant") in (*attention_backends.BACKENDS, "flex"):
                place = (row["operator"], row["setting"], row["relative_error"])
                assert errors.setdefault(place, row["variant"]) == row["variant"], (path.name, place)


def test_tuning_keeps_the_fastest_right_candidate(monkeypatch):
    """With stand-ins for the device: a wrong candidate and one that raises are dropped, and the choice is by median."""
    from lavin_bench.kernels import tune
    from lavin_bench.timing import Timing

    [case] = [case for case in cases(TINY, CPU, torch.float32) if case.operator == "swiglu"]
    right = case.variants["eager"]

    def ours():
        block = tune.tuning.config("swiglu", CPU, torch.float32)["block"]
        if block == 1:
            raise RuntimeError("out of shared memory")
        return right.call() * (1.1 if block == 2 else 1.0)

    case = dataclasses.replace(case, variants={"eager": right, "ours": OperatorVariant(ours)})
    listed = [{"block": block, "num_warps": 1} for block in (1, 2, 3, 4)]
    monkeypatch.setattr(tune, "candidates", lambda kernel, capability: listed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def measured(calls, *arguments, **options):
        return {name: Timing.of([1.0 if "block=4 " in name else 2.0]) for name in calls}

    monkeypatch.setattr(tune, "measure", measured)
    found = tune.tune("swiglu", case, CPU, torch.float32, repeats=1)
    assert found["best"] == {"block": 4, "num_warps": 1}
    assert found["dropped"] == {
        "block=1 num_warps=1": "RuntimeError: out of shared memory",
        "block=2 num_warps=1": "wrong result, error 1.0e-01",
    }
    assert len(found["times"]) == 3  # today's configuration and two candidates


def test_candidates_that_end_or_hold_up_their_process_are_dropped_with_the_reason(monkeypatch):
    """Four processes: one aborts at its second candidate, one never returns from its first, one began its second just
    before the end. What was not reached is not dropped.
    """
    from lavin_bench.kernels import tune

    program = (
        "import json, os, sys, time\n"
        "for kernel, candidate in json.loads(sys.argv[1]):\n"
        "    if candidate['block'] == 5: os.abort()\n"
        "    if candidate['block'] == 7: os.utime(sys.stdout.fileno(), (2e9, 2e9))\n"
        "    if candidate['block'] in (2, 7): time.sleep(60)\n"
        "    print(json.dumps({'said': 'wrong' * (candidate['block'] == 1)}), flush=True)\n"
    )
    popen = tune.subprocess.Popen
    monkeypatch.setattr(
        tune.subprocess,
        "Popen",
        lambda command, **options: popen([sys.executable, "-c", program, command[-1]], **options),
    )
    monkeypatch.setattr(tune, "candidates", lambda kernel, capability: [{"block": block} for block in range(1, 13)])
    found = tune.tried(["swiglu"], CPU, torch.float32, workers=4, seconds=5)
    silent = "ended or held up its process"
    assert found == {"swiglu": {"block=1": "wrong", "block=2": silent, "block=5": silent}}


def test_what_fails_beside_others_is_tried_again_alone_but_what_breaks_the_device_ends_the_process(monkeypatch, capsys):
    from lavin_bench.kernels import tune

    [case] = [case for case in cases(TINY, CPU, torch.float32) if case.operator == "swiglu"]
    right, block, broken = case.variants["eager"], lambda: tune.tuning.config("swiglu", CPU, torch.float32)["block"], []

    def ours():
        if block() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        broken.extend([True] * (block() == 4))
        return right.call() * (1.1 if block() == 3 else 1.0)

    def synchronize(device):
        if broken:
            raise RuntimeError("an illegal memory access was encountered")

    case = dataclasses.replace(case, variants={"eager": right, "ours": OperatorVariant(ours)})
    monkeypatch.setattr(tune, "case_of", lambda *_: case)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    share = [("swiglu", {"block": block, "num_warps": 1}) for block in (1, 2, 3, 4, 5)]
    tune._try_candidates(CPU, torch.float32, share)
    assert [json.loads(line)["said"] for line in capsys.readouterr().out.splitlines()] == [
        *("", "", "wrong result, error 1.0e-01")
    ]


@pytest.mark.parametrize(("free", "processors", "most"), [(24e9, 32, 8), (11e9, 32, 3), (2e9, 32, 1), (80e9, 4, 4)])
def test_processes_that_share_a_device_have_memory_each(monkeypatch, free, processors, most):
    from lavin_bench.kernels import tune

    monkeypatch.setattr(tune, "memory_at_hand", lambda device: free)
    monkeypatch.setattr(tune.os, "cpu_count", lambda: processors)
    assert tune.processes_at_once(CPU) == most


def test_tuning_chooses_kernels_by_their_operator(monkeypatch, tmp_path):
    from lavin_bench.kernels import tune

    monkeypatch.setattr(tune, "resolve_device", lambda name: torch.device("cuda"))
    options = argparse.Namespace(device="auto", operator="nothing", output=str(tmp_path / "tuned.json"))
    with pytest.raises(InputError, match=r"'nothing'.*ada_rms_norm, .*swiglu"):
        tune.bench_tune(options)
    monkeypatch.setattr(tune, "tried", lambda chosen, *_: {kernel: {} for kernel in chosen})
    monkeypatch.setattr(tune, "case_of", lambda kernel, *_: kernel)
    monkeypatch.setattr(tune, "tune", lambda *_: {"times": {"a": {"median": 1.0}}, "today": "a", "best": "a"})
    record = tune.tune_all(CPU, "group_norm", 1, lambda record: None)
    assert list(record["kernels"]) == ["channel_moments", "group_norm_silu"]


def test_every_tuned_kernel_has_candidates_and_a_case():
    from lavin_bench.kernels.tune import candidates
    from lavin_kernels import tuning
    from lavin_kernels.table import KERNELS

    operators = {case.operator for case in cases(TINY, CPU, torch.float32)}
    for kernel, operator in KERNELS.items():
        assert operator in operators
        keys = {frozenset(candidate) for candidate in candidates(kernel, tuning.CPU_CAPABILITY)}
        today = frozenset(tuning.config(kernel, CPU, torch.bfloat16))
        assert today in keys, f"{kernel}: candidates with {keys}, today {today}"


def test_tuning_without_a_gpu_is_refused(capsys):
    assert main(["bench", "tune", "--device", "cpu"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
