"""The denoiser's ONNX graph with our kernels as nodes: the same numbers by standard operators and by the kernels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import GOLDEN, relative_error
from kernel_checks import INTERPRETED, run_under_interpreter

from lavin_export import plugin_graph
from lavin_export.denoiser import INPUTS, Denoiser, dynamic_shapes, example_inputs, specification
from lavin_export.onnx_support import PLUGIN_DOMAIN
from lavin_export.plugin_graph import ATTRIBUTES, PluginDenoiser, add_functions
from lavin_rt.checkpoint import load_dit

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

MODELS = ["dit_c", pytest.param("dit_a", marks=pytest.mark.slow)]
SIZES = [(2, 2, 3, 4, 6), (1, 1, 9, 8, 4), (3, 1, 2, 2, 2)]
OPERATORS = ("LavinAdaRmsNorm", "LavinGatedResidualAdaRmsNorm", "LavinSwiglu", "LavinQkNormRope", "LavinKeyNormRope")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`exported("dit_c", torch.float16)`: the file, the plain denoiser and the config, made once."""
    from lavin_export.onnx_graph import on_meta, trace, write

    made = {}

    def export(name: str, dtype: torch.dtype = torch.float32):
        if (name, dtype) not in made:
            dit = load_dit(GOLDEN / f"{name}.safetensors", dtype=dtype)
            plain, config = Denoiser(dit).eval(), dit.config
            module, values = on_meta(PluginDenoiser(load_dit(GOLDEN / f"{name}.safetensors", dtype=dtype)))
            inputs = [one.to("meta") for one in example_inputs(config, dtype)]
            about = specification(config, str(dtype).removeprefix("torch."))[:2]
            graph = trace(module, inputs, dynamic_shapes(), *about)
            add_functions(graph.model, config)
            path = tmp_path_factory.mktemp(name) / "denoiser.onnx"
            write(graph, path, values.__getitem__)
            made[name, dtype] = path, plain, config
        return made[name, dtype]

    return export


if not INTERPRETED:

    @pytest.mark.parametrize("name", MODELS)
    def test_onnx_runtime_gives_the_plain_denoisers_numbers(exported, name):
        onnxruntime = pytest.importorskip("onnxruntime")
        path, plain, config = exported(name)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for sizes in SIZES:
            inputs = example_inputs(config, sizes=sizes)
            feeds = {key: value.numpy() for key, value in zip(INPUTS, inputs, strict=True)}
            velocity = torch.from_numpy(session.run(None, feeds)[0])
            with torch.no_grad():
                assert relative_error(velocity, plain(*inputs)) <= 1e-5

    @pytest.mark.slow
    def test_float16_within_the_error_budget(exported):
        """At most twice the error of the plain denoiser in float16, both against float32."""
        onnxruntime = pytest.importorskip("onnxruntime")
        path, plain, config = exported("dit_c", torch.float16)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        inputs = example_inputs(config, torch.float16, sizes=SIZES[0])
        truth = exported("dit_c")[1]
        feeds = {key: value.numpy() for key, value in zip(INPUTS, inputs, strict=True)}
        velocity = torch.from_numpy(session.run(None, feeds)[0])
        with torch.no_grad():
            true = truth(*(one.float() for one in inputs))
            assert relative_error(velocity, true) <= 2 * relative_error(plain(*inputs), true)

    def test_every_node_is_what_tensorrt_looks_for(exported):
        path, _, config = exported("dit_c")
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)
        ours = [node for node in model.graph.node if node.domain == PLUGIN_DOMAIN]
        depth = config.depth
        counted = Counter(node.op_type for node in ours)
        # The last block's cond stream ends at its keys and values.
        assert counted == dict(zip(OPERATORS, (2, 2 * (2 * depth - 1), 2 * depth - 1, depth - 1, 1), strict=True))
        for node in ours:
            attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            assert attributes["plugin_namespace"] == b"lavin" and attributes["plugin_version"] == b"1"
            assert attributes["aot"] == 1 and ATTRIBUTES.keys() <= attributes.keys()
            assert all(node.output), "TensorRT counts a plugin's outputs"
            function = next(one for one in model.functions if one.name == node.op_type)
            assert len(function.input) == len(node.input) and len(function.output) == len(node.output)
        assert {function.name for function in model.functions} == set(OPERATORS)
        standard = {node.op_type for node in model.graph.node} - set(OPERATORS)
        assert not standard & {"RMSNormalization", "Sigmoid", "Sin", "Cos"}
        assert sum(node.op_type == "Attention" for node in model.graph.node) == depth
        # The parser looks operators of its own up by name alone.
        known = {schema.name for schema in onnx.defs.get_all_schemas()}
        assert not known & set(OPERATORS)

    def test_without_the_function_or_with_a_wrong_one(exported, tmp_path):
        """ONNX Runtime does run the functions: without one it refuses the model, with a changed one numbers differ."""
        onnxruntime = pytest.importorskip("onnxruntime")
        path, plain, config = exported("dit_c")
        model = onnx.load(path)
        inputs = example_inputs(config, sizes=SIZES[2])
        feeds = {key: value.numpy() for key, value in zip(INPUTS, inputs, strict=True)}
        swiglu = next(one for one in model.functions if one.name == "LavinSwiglu")
        swiglu.node[1].op_type = "Tanh"
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        with torch.no_grad():
            assert relative_error(torch.from_numpy(session.run(None, feeds)[0]), plain(*inputs)) > 1e-2
        model.functions.remove(swiglu)
        with pytest.raises(Exception, match="LavinSwiglu"):
            onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    @pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
    def test_under_the_interpreter(marker):
        run_under_interpreter(__file__, marker)

else:
    import lavin_export.trt_kernels as kernels

    EPS = 1e-6

    def ada_rms_norm(rows, scale):
        width, out = rows.shape[-1], torch.full_like(rows, torch.nan)
        constants = kernels.norm_constants(width, EPS)
        kernels.lavin_ada_rms_norm[(rows.numel() // width,)](rows, scale, out, **constants)
        return out

    def gated_residual_ada_rms_norm(residual, update, gate, scale):
        width, out = residual.shape[-1], [torch.full_like(residual, torch.nan) for _ in range(2)]
        constants = kernels.norm_constants(width, EPS)
        grid = (residual.numel() // width,)
        kernels.lavin_gated_residual_ada_rms_norm[grid](residual, update, gate, scale, *out, **constants)
        return tuple(out)

    def swiglu(gate_up):
        *leading, joined = gate_up.shape
        out, block = torch.full((*leading, joined // 2), torch.nan), 64
        grid = (gate_up.numel() // joined * -(-(joined // 2) // block),)
        kernels.lavin_swiglu[grid](gate_up, out, INNER=joined // 2, BLOCK=block)
        return out

    def qk_norm_rope(cond, x, branch_rows, positions, cos, sin, q_weight, k_weight, head_size):
        batch, length, with_queries = x.shape[0], cond.shape[1] + x.shape[1], cond.shape[2] == x.shape[2]
        heads, kv_heads = q_weight.shape[1] // head_size, k_weight.shape[1] // head_size
        q = torch.full((batch, length if with_queries else x.shape[1], heads, head_size), torch.nan)
        k, v = (torch.full((batch, length, kv_heads, head_size), torch.nan) for _ in range(2))
        constants = kernels.qk_constants(heads, kv_heads, head_size, cos.shape[0], with_queries, 4, EPS)
        inputs = (cond, x, branch_rows, positions, cos, sin, q_weight, k_weight)
        split = cond.shape[0] * cond.shape[1]
        kernels.lavin_qk_norm_rope[(batch * length,)](*inputs, split, q, k, v, **constants)
        return q, k, v

    @pytest.mark.parametrize("name", MODELS)
    def test_kernels_give_the_plain_denoisers_numbers(monkeypatch, name):
        """Every node replaced by its kernel, with the arguments that TensorRT passes; outputs are NaN before."""
        for function in (ada_rms_norm, gated_residual_ada_rms_norm, swiglu, qk_norm_rope):
            monkeypatch.setattr(plugin_graph, function.__name__, lambda *given, run=function: run(*map(dense, given)))
        dit = load_dit(GOLDEN / f"{name}.safetensors", dtype=torch.float32)
        inputs = example_inputs(dit.config, sizes=(2, 1, 2, 4, 2))
        with torch.no_grad():
            truth = Denoiser(dit).eval()(*inputs)
            assert relative_error(PluginDenoiser(dit).eval()(*inputs), truth) <= 1e-5

    def dense(value):
        return value.contiguous() if isinstance(value, torch.Tensor) else value
