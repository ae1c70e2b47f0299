"""What has to hold on a GPU beside the times: graphs change no bit, and the standard run fits into 7.0 GB."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lavin_bench.pipeline import startup
from lavin_bench.pipeline.variants import GUIDANCE, Setting
from lavin_rt.checkpoint.load import save_dit, save_vae
from lavin_rt.dit.model import JDiT
from lavin_rt.sampling.denoisers import make_network
from lavin_rt.sampling.executor import Executor
from lavin_rt.sampling.schedule import schedule
from lavin_rt.sampling.speeds import SPEEDS, Speed
from lavin_rt.vae.model import STVAE

# Refreshed, reused and held, refreshed alone, reused alone: with the two exact shapes, six graphs.
EVERY_FORM = Speed(evaluations=5, refresh={0, 3}, guided={0, 1})
GRAPHS = 6


def graphs_equal_eager(dit: JDiT, vae: STVAE, chosen: Sequence[Setting]) -> tuple[dict[str, Any], list[str]]:
    """Whether captured steps give the bits of eager ones: contexts A, B, A by two schedules at two sizes, the sizes in
    turn, so that buffers and graphs of one are met after the other's; then contexts A, B at a speed that refreshes,
    reuses and holds. Returns the figures and what failed.
    """
    small = Setting(max(chosen[0].size // 2 // 16 * 16, 16), chosen[0].pairs, chosen[0].config)
    captured, eager = (Executor(make_network(dit), graphs=graphs) for graphs in (True, False))
    runs, unequal, evaluations = 0, 0, 0
    exact = [(steps, seed, setting) for steps in (6, 4) for seed in (0, 1, 0) for setting in (chosen[0], small)]
    for knots, context_seed, setting, speed in [
        *((schedule(steps), seed, setting, SPEEDS["exact"]) for steps, seed, setting in exact),
        *((EVERY_FORM.knots(), seed, chosen[0], EVERY_FORM) for seed in (0, 1)),
    ]:
        cond, noise = setting.latents(dit.device, context_seed)
        shape = dataclasses.replace(setting.shape, kept=speed.keeps)
        results = []
        for executor in (captured, eager):
            context, query = executor.embed(cond[:, :, :-1]), executor.embed(cond[:, :, -1:])
            results.append(executor.sample(shape, context, query, noise, knots, GUIDANCE, speed=speed))
        runs += 1
        unequal += not torch.equal(*results)
        evaluations += len(knots) - 1
    figures = {
        "runs": runs,
        "unequal": unequal,
        "evaluations": evaluations,
        "replays": captured.replays,
        "captures": captured.captures,
    }
    failures = [f"graphs: {unequal} of {runs} runs differ from eager ones"] if unequal else []
    wanted = evaluations if captured.graphs else 0
    if captured.replays != wanted or captured.captures != GRAPHS * captured.graphs:
        failures.append(f"graphs: {figures}; expected {wanted} replays of {GRAPHS} graphs")
    return figures, failures


def memory_of_the_standard_run(dit: JDiT, vae: STVAE, chosen: Sequence[Setting]) -> tuple[dict[str, Any], list[str]]:
    """GPU memory that a process reserves from the checkpoint's files to the first picture, context and VAE included;
    at 512 px and 4 pairs where they are among the settings.
    """
    setting = next((s for s in chosen if (s.size, s.pairs) == (512, 4)), chosen[-1])
    with tempfile.TemporaryDirectory(prefix="lavin-pipeline-") as work:
        save_dit(dit, Path(work) / "lavin_dit.safetensors")
        save_vae(vae, Path(work) / "stvae.safetensors")
        given = {"checkpoint": work, "size": setting.size, "pairs": setting.pairs, "device": str(dit.device)}
        record = startup.run({**startup.STANDARD, **given}, "given", repeats=1, show=False)
    figures = {"setting": setting.name, "reserved_bytes": record["warm"]["reserved_bytes"]}
    figures["start_seconds"] = {kind: record[kind]["total"] for kind in ("cold", "warm")}
    if (setting.size, setting.pairs) == (512, 4):
        figures["allowed_bytes"] = startup.RESERVED_AT_MOST
        if figures["reserved_bytes"] > startup.RESERVED_AT_MOST:
            return figures, [f"memory: {figures}"]
    return figures, []
