"""The pipeline's and the start's benchmarks: what they measure is right, what is wrong gets no time. Nothing here is
timed.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from support.command import exit_code
from support.golden import relative_error

from lavin_bench import report
from lavin_bench.pipeline import bench as pipeline
from lavin_bench.pipeline import startup
from lavin_bench.pipeline import variants as pipeline_variants
from lavin_bench.pipeline.checks import graphs_equal_eager
from lavin_bench.pipeline.startup import Clock
from lavin_bench.pipeline.variants import (
    AUTHORS_COMPILED,
    AUTHORS_EAGER,
    CPU_CONFIG,
    CPU_VAE,
    GUIDANCE,
    QUICK_CONFIG,
    RELEASED,
    Baselines,
    Setting,
    Variant,
    as_loaded,
    in_float32,
    oracles,
    random_model,
    random_vae,
    variants,
    weights_bytes,
    whole_calls,
)
from lavin_bench.pipeline.waterfall import waterfall
from lavin_rt.cli.main import main
from lavin_rt.dit import prepacked
from lavin_rt.dit.model import JDiT
from lavin_rt.sampling.denoisers import PackedNetwork
from lavin_rt.sampling.sampler import sample
from lavin_rt.sampling.speeds import SPEEDS

CPU = torch.device("cpu")
TINY = Setting(32, 2, QUICK_CONFIG, CPU_VAE)
SPEEDY = [f"savings, compiled, {speed}" for speed in SPEEDS if speed != "exact"]
COMPILED = [AUTHORS_COMPILED, "savings, compiled", "task(query), compiled", *SPEEDY]
WITHOUT_PEERS = [*COMPILED, AUTHORS_EAGER, "ONNX Runtime"]


@pytest.fixture(scope="module")
def models():
    return random_model(TINY.config, CPU), random_vae(TINY.vae, CPU)


def lay_out_everything(patch: pytest.MonkeyPatch) -> None:
    """Linears of narrow models in float32 in oneDNN's layout, too, which would not pay."""
    patch.setattr(prepacked, "LEAST_WIDTH", 1)
    patch.setattr(prepacked, "DTYPES", (torch.float32,))


@pytest.fixture(scope="module")
def record() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        # `test_command` starts the processes that tell the memory.
        patch.setattr(pipeline.Meter, "_working_bytes", lambda *arguments: 1000)
        lay_out_everything(patch)
        return pipeline.run([TINY], CPU, torch.float32, 2, 6, 6, show=False, without=COMPILED)


def test_a_setting_of_which_nothing_ran_is_a_failure(monkeypatch):
    def fails() -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline, "variants", lambda *arguments, **options: {"exact savings": Variant(fails, False)})
    record = pipeline.run([TINY], CPU, torch.float32, 1, 6, 6, show=False, whole=False)
    assert "out of memory" in record["settings"][0]["skipped"][0]["reason"]
    assert "no sampling was measured" in record["failures"][0]


def test_every_variant_samples_the_same(models, monkeypatch):
    """Every eager rung and the whole calls by two schedules, one after the other, against the plain model."""
    dit, vae = models
    lay_out_everything(monkeypatch)
    assert prepacked.prepacked(as_loaded(dit)) and not prepacked.prepacked(dit)
    for steps in (6, 4):
        sampled, answered = oracles(dit, vae, TINY, steps, whole=True)
        baselines = Baselines(dit, vae)
        for truth, found in (
            (sampled, variants(dit, TINY, baselines)),
            (answered, whole_calls(dit, vae, TINY, baselines)),
        ):
            for name in set(found) - set(COMPILED):
                assert relative_error(found[name].make()(steps), truth) <= 1e-5, name


def test_speeds_are_rungs_with_their_own_work(models, monkeypatch):
    """A run of every speed, uncompiled here, is that of the plain model; its FLOPs are fewer."""
    dit, _ = models
    monkeypatch.setattr(pipeline_variants, "PackedNetwork", lambda dit, impl, compile=False: PackedNetwork(dit, impl))
    found = variants(dit, TINY, Baselines(dit))
    for name in SPEEDY:
        variant = found[name]
        truth = sample(dit, *TINY.latents(CPU), None, GUIDANCE, "plain", speed=variant.speed)
        assert relative_error(variant.make()(6), truth) <= 1e-5, name
        assert TINY.flops(variant.speed, 20) < TINY.flops("exact", 20) == 19 * TINY.useful_flops


def test_the_truth_is_of_the_same_weights_in_float32_and_never_all_of_them_at_once():
    half = random_model(QUICK_CONFIG, CPU, torch.bfloat16)
    full = copy.deepcopy(half).float()
    before = [parameter.clone() for parameter in half.parameters()]
    assert all(parameter.dtype == torch.bfloat16 and (parameter != 0).all() for parameter in before)
    for one, other in zip(full.modulation_parameters(0), half.modulation_parameters(0), strict=True):
        assert torch.equal(one, other.float())

    wide = []

    def count(part: torch.nn.Module, arguments: object) -> None:
        blocks = [parameter for block in half.blocks for parameter in block.parameters()]
        wide.append(sum(parameter.dtype == torch.float32 for parameter in blocks))

    for block in half.blocks:
        block.mlp.register_forward_pre_hook(count)
    inputs = (*TINY.latents(CPU)[::-1],)
    with in_float32(half), torch.no_grad():
        found = half(inputs[0], torch.tensor([0.25]), inputs[1])
    with torch.no_grad():
        assert torch.equal(found, full(inputs[0], torch.tensor([0.25]), inputs[1])) and found.dtype == torch.float32
    assert set(wide) == {0} and len(wide) == 2 * QUICK_CONFIG.depth  # before a part's turn none is converted
    assert all(torch.equal(*pair) for pair in zip(half.parameters(), before, strict=True))


def test_a_start_is_held_to_seconds_of_the_gpu_that_they_are_meant_for():
    slow = {"cold": {"reserved_bytes": 6e9}, "warm": {"total": 60.0}}
    assert not startup.beyond_bounds({**slow, "header": {}} | {"cold": {"reserved_bytes": None}})
    assert not startup.beyond_bounds({**slow, "header": {"capability": "8.9"}})
    assert "60 s" in startup.beyond_bounds({**slow, "header": {"capability": "9.0"}})[0]
    large = {**slow, "cold": {"reserved_bytes": 8e9}, "header": {"capability": "8.9"}}
    assert "8e+09 bytes" in startup.beyond_bounds(large)[0]


def test_record_holds_every_figure(record):
    assert not record["failures"]
    [setting] = record["settings"]
    assert [row["variant"] for row in setting["rows"]] == [AUTHORS_EAGER, "exact savings", "savings, prepacked"]
    for row in setting["rows"]:
        seconds = row["seconds"]
        assert len(seconds["samples"]) == 2 and 0 < seconds["low"] <= seconds["median"]
        assert row["useful_flops_per_second"] == pytest.approx(5 * TINY.useful_flops / seconds["median"])
        assert 0 < row["relative_error"] <= 1e-5 and row["first_seconds"] > 0
        modulates = row["variant"] == AUTHORS_EAGER
        assert row["peak_bytes"] == weights_bytes(random_model(TINY.config, CPU), modulates) + 1000
    assert [row["variant"] for row in setting["calls"]] == [AUTHORS_EAGER, "task(query), eager"]
    assert all(row["relative_error"] <= 1e-5 for row in setting["calls"])
    assert [(gain["what"], gain["fast"]) for gain in setting["speedups"]] == [
        ("sampling", "savings, prepacked"),
        ("whole call", "task(query), eager"),
    ]


def test_record_becomes_a_table_and_a_picture(record):
    record = json.loads(json.dumps(record))
    text = report.render(record)
    assert "| exact savings | " in text and "| task(query), eager | " in text and "2 knots" not in text
    gain = record["settings"][0]["speedups"][0]
    assert f"{gain['times']:.2f}x ({gain['low']:.2f}–{gain['high']:.2f}) as fast as {AUTHORS_EAGER}" in text
    root = ElementTree.fromstring(waterfall(record))
    bars = [part for part in root if part.tag.endswith("rect")]
    widths = [float(bar.get("width")) for bar in bars]
    medians = [row["seconds"]["median"] for row in record["settings"][0]["rows"]]
    assert [width / max(widths) for width in widths] == pytest.approx([m / max(medians) for m in medians], abs=1e-3)
    assert all(float(bar.get("x")) + float(bar.get("width")) < float(root.get("width")) for bar in bars)
    assert [bar.get("class") for bar in bars] == ["theirs", "ours", "ours"]
    with pytest.raises(ValueError, match="no setting with times"):
        waterfall({**record, "settings": []})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda latents: latents * 1.001, "no time, error 1.0e-03, allowed 1.0e-04"),
        (lambda latents: latents * float("nan"), "no time, error inf"),
    ],
)
def test_a_wrong_result_gets_no_time(models, monkeypatch, fault, message, capsys):
    dit, vae = models
    meter = pipeline.Meter(dit, TINY, torch.float32, 1, 4, 4, 1e12, show=True)
    monkeypatch.setattr(meter, "_working_bytes", lambda *arguments: 0)
    [truth] = oracles(dit, vae, TINY, 4, whole=False)
    right = variants(dit, TINY, Baselines(dit))["exact savings"]

    def make():
        sampling = right.make()
        return lambda steps: fault(sampling(steps))

    rows = meter.rows({"right": right, "wrong": Variant(make, False)}, truth)
    assert [row["variant"] for row in rows] == ["right"]
    [failure] = meter.failures
    assert message in failure and failure.startswith("32 px, 2 pairs, sampling, wrong")
    assert "wrong   " not in capsys.readouterr().out


def test_what_does_not_run_is_named(models, monkeypatch):
    dit, vae = models
    meter = pipeline.Meter(dit, TINY, torch.float32, 1, 4, 4, 1e12, show=False)
    monkeypatch.setattr(meter, "_working_bytes", lambda *arguments: 0)

    def make():
        raise RuntimeError("no working C++ compiler\nfound")

    assert meter.rows({"compiled": Variant(make, False)}, oracles(dit, vae, TINY, 4, whole=False)[0]) == []
    assert meter.skipped == [{"what": "sampling", "variant": "compiled", "reason": "no working C++ compiler found"}]
    assert not meter.failures


def test_budget_in_16_bits_is_twice_the_authors_own_error():
    meter = pipeline.Meter(random_model(QUICK_CONFIG, CPU), TINY, torch.bfloat16, 1, 4, 4, 1e12, show=False)
    errors = {AUTHORS_EAGER: 0.01, "within": 0.02, "beyond": 0.03}
    rows = {name: {"relative_error": error} for name, error in errors.items()}
    calls = dict.fromkeys(rows)
    meter._refuse(calls, rows, "sampling")
    assert set(calls) == {AUTHORS_EAGER, "within"} and "beyond" in meter.failures[0]
    assert "allowed 2.8e-02" in meter.failures[0]


def test_captured_steps_are_counted_where_there_are_any(models):
    """On a CPU nothing is captured, and the same runs are compared."""
    figures, failures = graphs_equal_eager(*models, [TINY])
    assert figures == {"runs": 14, "unequal": 0, "evaluations": 58, "replays": 0, "captures": 0}
    assert not failures


def test_settings_of_a_device():
    assert [s.name for s in pipeline.settings(torch.device("cuda"))] == [
        *("256 px, 1 pair", "256 px, 4 pairs", "256 px, 8 pairs"),
        *("512 px, 1 pair", "512 px, 4 pairs", "512 px, 8 pairs"),
    ]
    [setting] = pipeline.settings(CPU)
    assert (setting.size, setting.pairs, setting.config) == (128, 4, CPU_CONFIG)
    [setting] = pipeline.settings(CPU, full=True)
    assert (setting.size, setting.pairs, setting.config) == (256, 4, dataclasses.replace(RELEASED, depth=2))
    assert Setting(512, 4).useful_flops / 1e12 == pytest.approx(55.82, abs=0.01)
    with torch.device("meta"):
        full = JDiT(RELEASED).to(torch.bfloat16)
    assert weights_bytes(full, modulates=False) == 2 * sum(p.numel() for p in full.parameters())


def test_like_is_held_against_like():
    """Eager against eager, compiled against compiled, and both against another engine of the same dtype; in another
    dtype, eager, against the run's own.
    """

    def row(name: str, seconds: float, **more) -> dict:
        return {"variant": name, "seconds": {"median": seconds, "samples": [seconds, 2 * seconds]}, **more}

    rows = [
        *(row(AUTHORS_EAGER, 8.0), row(AUTHORS_COMPILED, 6.0), row("savings, prepacked", 4.0)),
        *(row("savings, compiled", 3.0), row("savings, compiled, fast", 0.1, speed="fast")),
        *(row("savings, bfloat16", 1.0, dtype="bfloat16"), row("OpenVINO", 5.0, peer=True)),
        row("OpenVINO, bfloat16", 1.5, dtype="bfloat16", peer=True),
        row(f"{AUTHORS_COMPILED}, bfloat16", 2.0, dtype="bfloat16"),
        row("savings, compiled, bfloat16", 0.8, dtype="bfloat16"),
    ]
    assert {(gain["base"], gain["fast"]): gain["times"] for gain in pipeline.speedups({"rows": rows})} == {
        (AUTHORS_EAGER, "savings, prepacked"): 2.0,
        (AUTHORS_COMPILED, "savings, compiled"): 2.0,
        ("OpenVINO", "savings, prepacked"): 1.25,
        ("OpenVINO", "savings, compiled"): 5 / 3,
        ("OpenVINO, bfloat16", "savings, bfloat16"): 1.5,
        ("OpenVINO, bfloat16", "savings, compiled, bfloat16"): 1.5 / 0.8,
        (f"{AUTHORS_COMPILED}, bfloat16", "savings, compiled, bfloat16"): 2.5,
        ("savings, prepacked", "savings, bfloat16"): 4.0,
    }
    [gain] = pipeline.speedups({"calls": [row(AUTHORS_COMPILED, 6.0), row("task(query)", 2.0)]})
    assert (gain["times"], gain["low"], gain["high"]) == (3.0, 3.0, 3.0)


@pytest.mark.slow
def test_another_engine_is_a_rung(models):
    """Exported, loaded and checked as the others are; a row of it has no memory of its own to tell."""
    pytest.importorskip("openvino", reason="needs the extra openvino")
    record = pipeline.run(
        [TINY], CPU, torch.float32, 1, 4, 4, show=False, speeds=False, with_peers=True, without=WITHOUT_PEERS
    )
    [setting] = record["settings"]
    assert not record["failures"] and not setting["skipped"]
    for row in (setting["rows"][-1], setting["calls"][-1]):
        assert row["variant"] == "OpenVINO" and row["peer"] and 0 < row["relative_error"] <= 1e-5
    assert "peak_bytes" not in setting["rows"][-1] and "| OpenVINO | " in report.render(record)
    assert [gain["fast"] for gain in setting["speedups"]] == ["exact savings", "task(query), eager"]


@pytest.mark.slow
def test_command(tmp_path, capsys):
    """The whole command on a tiny model, compiled variants and memory in processes of their own included."""
    output = tmp_path / "pipeline.json"
    assert main(["bench", "pipeline", "--quick", "--device", "cpu", "-o", str(output)]) == 0
    [setting] = json.loads(output.read_text())["settings"]
    assert len(setting["rows"]) == 4 and len(setting["calls"]) == 4 and len(setting["speedups"]) == 4
    assert not setting["skipped"]
    weights = weights_bytes(random_model(QUICK_CONFIG, CPU), modulates=False)
    assert all(row["peak_bytes"] > weights + 100_000 for row in setting["rows"])
    ElementTree.fromstring(output.with_suffix(".svg").read_text())
    assert "savings, compiled" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["pipeline", "--size", "100"],
        ["pipeline", "--pairs", "0"],
        ["pipeline", "--repeats", "0"],
        ["pipeline", "--threads", "0"],
        ["pipeline", "--error-steps", "3"],
        ["pipeline", "--full", "--quick"],
        ["pipeline", "--device", "nosuch"],
        ["pipeline", "-o", "/dev/null/file.json"],
        ["startup", "--model", "huge"],
        ["startup", "--pairs", "0"],
        ["startup", "--threads", "0"],
        ["startup", "--size", "100"],
        ["startup", "--device", "nosuch"],
        ["startup", "--checkpoint", "/nosuch"],
    ],
)
def test_bad_options_are_one_line(arguments, capsys):
    assert exit_code(["bench", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert arguments[-1] in line


def test_parts_of_a_start_add_up(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(startup.time, "monotonic", lambda: now[0])

    def work(seconds):
        now[0] += seconds

    clock = Clock(90.0)
    clock.mark("interpreter")
    inner = clock.within("inner", work)
    work(1.0)
    inner(2.0)
    inner(3.0)
    work(4.0)
    clock.mark("outer")
    work(6.0)
    clock.mark("last")
    assert clock.parts == {"interpreter": 10.0, "inner": 5.0, "outer": 5.0, "last": 6.0}
    assert sum(clock.parts.values()) == now[0] - 90.0


@pytest.mark.slow
def test_start():
    """Two processes from a random checkpoint to a picture: their parts add up, and are all there."""
    options = {**startup.STANDARD, "size": 32, "pairs": 1, "device": "cpu", "threads": 1}
    record = startup.run(options, "small", repeats=1, show=False)
    for figures in (record["cold"], record["warm"]):
        assert figures["total"] == pytest.approx(sum(figures["parts"].values()))
        assert all(seconds >= 0 for seconds in figures["parts"].values())
        assert list(figures["parts"])[:5] == ["interpreter", "imports", "device", "transformer", "VAE"]
        assert {"context", "modulation table", "sampling", "decoding", "writing"} <= set(figures["parts"])
    assert "| modulation table | " in report.render(record)


def test_a_start_that_fails_says_why(tmp_path):
    given = {"checkpoint": str(tmp_path), "size": 32, "pairs": 1, "device": "cpu", "threads": 1}
    options = {**startup.STANDARD, **given, "picture": str(tmp_path / "picture.png")}
    with pytest.raises(RuntimeError, match=r"no picture: .*lavin_dit\.safetensors"):
        startup.start(options, tmp_path)


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    """All rungs at a small size, with the memory of the device counted and the graphs' bits compared."""
    small = Setting(64, 1, CPU_CONFIG, CPU_VAE)
    record = pipeline.run([small], torch.device("cuda"), torch.bfloat16, 1, 6, 6)
    assert not record["failures"] and not record["settings"][0]["skipped"]
    assert record["graphs"]["replays"] == record["graphs"]["evaluations"] > 0
    assert [row["variant"] for row in record["settings"][0]["rows"]][-1] == "CUDA graphs"
