"""The discipline of captures, on a stand-in for `torch.cuda`: streams, pools, workspaces, eviction and failures."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref

import pytest
import torch
from PIL import Image
from support.cuda_stand_in import Cuda
from support.vae_shapes import SMALL as SMALL_VAE
from test_executor import REQUESTS, SMALL, answer

import lavin_rt.sampling.capture
from lavin_rt.devices import out_of_memory
from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.layout import Shape
from lavin_rt.dit.model import JDiT, randomize_
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.capture import CaptureError, Graphs
from lavin_rt.sampling.denoisers import make_network
from lavin_rt.sampling.executor import Executor
from lavin_rt.sampling.schedule import schedule
from lavin_rt.sampling.speeds import SPEEDS
from lavin_rt.vae.model import STVAE


@pytest.fixture(scope="module")
def dit() -> JDiT:
    return randomize_(JDiT(DiTConfig(hidden_size=144, depth=1, num_heads=2, kv_group=2))).eval().requires_grad_(False)


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    cuda.install(monkeypatch, lavin_rt.sampling.capture)
    with cuda:
        yield cuda


def capturing(dit: JDiT, shapes: int = 8) -> Executor:
    executor = Executor(make_network(dit, "torch"), shapes=shapes)
    executor.graphs = True
    return executor


def at_width(width: int) -> dict:
    return {"shape": Shape(1, 3, 1, 1, 4, width, True)}


def test_replays_answer_as_eager_steps_do(dit, cuda):
    executor, eager = capturing(dit), Executor(make_network(dit, "torch"))
    for request in REQUESTS:
        assert torch.equal(answer(executor, **request), answer(eager, **request)), request
    assert executor.captures == cuda.captures == 3 and executor.replays == 49


def test_more_shapes_than_are_kept_leave_the_others_whole(dit, cuda):
    """A graph that goes takes the workspaces of its stream with it; those that are left have theirs in the pool."""
    executor, eager = capturing(dit, shapes=2), Executor(make_network(dit, "torch"))
    for width in (4, 6, 8, 6, 10, 8, 4, 6, 4):
        assert torch.equal(answer(executor, **at_width(width)), answer(eager, **at_width(width)))
    assert not cuda.faults and executor.captures > 5
    others = [workspace for number, workspace in cuda.workspaces.items() if number != cuda.streams[0].number]
    assert len(others) <= 1 and all(workspace.pool is not None for workspace in others)


@pytest.mark.parametrize("speed", ["near", "fast"])
def test_a_graph_reads_nothing_that_was_let_go(dit, cuda, speed):
    """A speed's evaluations have several forms, each with row ranges and positions of its own."""
    speed = SPEEDS[speed]
    knots = speed.knots()
    request = {"shape": Shape(1, 3, 1, 1, 4, 4, True, kept=speed.keeps), "knots": knots, "speed": speed}
    executor, eager = capturing(dit), Executor(make_network(dit, "torch"))
    for _ in range(2):
        assert torch.equal(answer(executor, **request), answer(eager, **request))
    assert executor.captures == len(set(speed.forms(request["shape"], len(knots) - 1))) > 1 and not cuda.faults


def test_another_thing_that_clears_workspaces_does_no_harm(dit, cuda):
    """As `torch.compile(mode="reduce-overhead")` does, of every stream."""
    executor = capturing(dit)
    answer(executor)
    for workspace in cuda.workspaces.values():
        workspace.freed = True
    cuda.workspaces.clear()
    answer(executor), answer(executor, **at_width(8)), answer(executor)
    assert not cuda.faults


def test_a_capture_that_fails_leaves_the_thread_as_it_was(cuda):
    graphs, buffer = Graphs(), torch.zeros(3)
    stream = cuda.streams[-1]
    for error in (RuntimeError("not permitted"), torch.OutOfMemoryError("CUDA out of memory")):
        cuda.fail = [error]
        with pytest.raises(RuntimeError) as caught:
            graphs.capture(lambda: buffer.add_(1))
        assert out_of_memory(caught.value) == isinstance(error, torch.OutOfMemoryError)
        assert isinstance(caught.value, CaptureError) != out_of_memory(caught.value)
        assert cuda.streams == [stream] and not cuda.recording
    before = buffer.clone()
    replay = graphs.capture(lambda: buffer.add_(1))
    replay()
    assert torch.equal(buffer, before + 2) and cuda.streams == [stream]


def test_a_host_read_in_a_capture_is_a_failure(cuda):
    with pytest.raises(CaptureError, match="not permitted"):
        Graphs().capture(lambda: torch.ones(1).item())


def test_sampling_goes_on_without_a_graph_and_says_so_once(dit, cuda):
    executor, eager = capturing(dit), Executor(make_network(dit, "torch"))
    cuda.fail = [RuntimeError("operation not permitted when stream is capturing")] * 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for width, _ in itertools.product((6, 8), range(2)):
            assert torch.equal(answer(executor, **at_width(width)), answer(eager, **at_width(width)))
    assert len(caught) == 1 and "without it" in str(caught[0].message)
    assert executor.captures == executor.replays == 0
    assert torch.equal(answer(executor, **at_width(4)), answer(eager, **at_width(4)))
    assert executor.captures == 1


def test_out_of_memory_in_a_capture_makes_room_and_tries_again(dit, cuda):
    executor, eager = capturing(dit), Executor(make_network(dit, "torch"))
    answer(executor, **at_width(8))
    cuda.fail = [torch.OutOfMemoryError("CUDA out of memory")]
    assert torch.equal(answer(executor, shape=SMALL), answer(eager, shape=SMALL))
    assert executor.captures == 2 and len(executor._plans) == 1


@pytest.fixture
def pipe(dit) -> Pipeline:
    vae = STVAE(SMALL_VAE).requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return Pipeline(dit, vae, impl="torch")


def test_the_autoencoder_is_replayed_from_its_third_call_on(pipe, cuda):
    """To the same bits, and in the pool of the steps' graphs; changed or new weights are captured anew."""
    clips, latents = torch.rand(4, 1, 3, 1, 16, 16), torch.randn(4, 1, 16, 1, 2, 2)

    def results() -> list[torch.Tensor]:
        answers = [pipe.decode(one) for one in latents] + [pipe.encode([clip])[0] for clip in clips]
        return [*answers, *pipe.encode(list(clips))]

    expected = results()
    assert torch.equal(torch.cat(expected[4:8]), torch.cat(expected[8:]))
    pipe.executor.graphs = True
    assert all(map(torch.equal, results(), expected)) and cuda.captures == 0  # the steps' graphs come first
    pipe.executor.prepare(SMALL, schedule(4))
    assert all(map(torch.equal, results(), expected)) and cuda.captures == 3
    assert all(map(torch.equal, results(), expected)) and cuda.captures == 3
    assert {graph.pool for graph in cuda.graphs} == {(0, 1)}
    pipe.vae.decoder.conv_out.conv.bias += 0.3
    pipe.vae.encoder.conv_in.conv.weight = torch.nn.Parameter(pipe.vae.encoder.conv_in.conv.weight * 2, False)
    changed = results()
    pipe.executor.graphs = False
    assert all(map(torch.equal, results(), changed)) and not torch.equal(changed[0], expected[0])
    assert cuda.captures == 5 and len(cuda.graphs) == 3
    pipe.executor.release()
    assert not cuda.graphs and not cuda.faults
    pipe.executor.graphs = True
    assert all(map(torch.equal, results(), changed)) and cuda.captures == 5


def test_a_pipeline_with_graphs_goes_with_its_last_reference(dit, cuda):
    """A replay holds the function that was captured, which must not hold the pipeline."""
    vae = STVAE(SMALL_VAE).requires_grad_(False)
    pipe = Pipeline(dit, vae, impl="torch")
    pipe.executor.graphs = True
    pipe.executor.prepare(SMALL, schedule(4))
    for _ in range(3):
        pipe.decode(torch.zeros(1, 16, 1, 2, 2)), pipe.encode([torch.zeros(1, 3, 1, 16, 16)])
    assert cuda.captures == 3
    alone = weakref.ref(pipe)
    gc.disable()
    try:
        del pipe
        assert alone() is None and not cuda.graphs
    finally:
        gc.enable()


def test_graphs_outlive_a_capture_that_fails(cuda):
    """The pool of a failed capture takes no other one; what was captured before goes on in it."""
    graphs, buffer = Graphs(), torch.zeros(3)
    first = graphs.capture(lambda: buffer.add_(1))
    cuda.fail = [RuntimeError("not permitted")]
    with pytest.raises(CaptureError):
        graphs.capture(lambda: buffer.add_(10))
    second = graphs.capture(lambda: buffer.add_(100))
    buffer.zero_()
    first(), second(), first()
    assert buffer.tolist() == [102.0] * 3 and not cuda.faults
    assert len({graph.pool for graph in cuda.graphs}) == 2


def test_an_autoencoder_that_cannot_be_captured_runs_as_it_is(pipe, cuda):
    latents = torch.randn(1, 16, 1, 2, 2)
    expected = pipe.decode(latents)
    pipe.executor.graphs = True
    pipe.executor.prepare(SMALL, schedule(4))
    cuda.fail = [RuntimeError("operation not permitted when stream is capturing")]
    with pytest.warns(UserWarning, match="decode.*without it"):
        assert all(torch.equal(pipe.decode(latents), expected) for _ in range(4))
    assert cuda.captures == 1


def test_the_decoder_has_run_before_a_step_is_captured(pipe, cuda, monkeypatch):
    """So that it never runs beside the steps' graphs but in their memory."""
    ran = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda latents, **how: ran.append(cuda.captures) or decode(latents, **how))
    pipe.executor.graphs = True
    task = pipe.task([(Image.new("RGB", (16, 16)), Image.new("RGB", (16, 16), "red"))], size=16)
    query = Image.new("RGB", (16, 16), "blue")
    results = [task.run([query], steps=4)[0].frames for _ in range(3)]
    assert ran == [0, 1] and cuda.captures == 3, "once as it is, once captured"
    pipe.executor.graphs = False
    assert all(
        torch.equal(frames, task.run([Image.new("RGB", (16, 16), "blue")], steps=4)[0].frames) for frames in results
    )


def test_small_pictures_are_encoded_together_where_that_fills_a_device(pipe, monkeypatch):
    passes, clips = [], list(torch.rand(5, 1, 3, 1, 16, 16))
    expected = torch.cat(pipe.encode(clips))
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda pixels, **how: passes.append(len(pixels)) or encode(pixels, **how))
    monkeypatch.setattr(Pipeline, "_frames_together", lambda self, clip: 2)
    torch.testing.assert_close(torch.cat(pipe.encode(clips)), expected)
    assert passes == [2, 2, 1]
