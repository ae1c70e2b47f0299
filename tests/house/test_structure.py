"""The house's walls: what may import what, between packages and between the rooms of one. Lazy imports count."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from support.golden import ROOT

FOLDERS = {"lavin_kernels": "kernels", "lavin_rt": ".", "lavin_export": "export", "lavin_bench": "benchmarks"}
# From the ground up: a room imports those of the lines above its own alone; those of one line do not know each other.
FLOORS = """
lavin_kernels.static_case lavin_kernels.table lavin_kernels.tuning lavin_kernels.branches
lavin_kernels.reference lavin_kernels.launch
lavin_kernels.validate
lavin_kernels.ops
lavin_kernels.static
lavin_kernels.machine_code
lavin_kernels

lavin_rt.errors lavin_rt.container lavin_rt.host_state lavin_rt.mini
lavin_rt.files lavin_rt.scalars lavin_rt.process lavin_rt.devices
lavin_rt.console lavin_rt.compiling
lavin_rt.dit lavin_rt.vae lavin_rt.mini.world
lavin_rt.checkpoint lavin_rt.sampling lavin_rt.pictures
lavin_rt.kept_keys
lavin_rt.artifact lavin_rt.engine lavin_rt.memory lavin_rt.estimate
lavin_rt.find
lavin_rt.task
lavin_rt.packs lavin_rt.pipeline
lavin_rt.serve lavin_rt.mini.train
lavin_rt.cli
lavin_rt.__main__ lavin_rt

lavin_export.errors lavin_export.options
lavin_export.networks lavin_export.writer
lavin_export.verify
lavin_export.to_onnx lavin_export.to_aoti
lavin_export.to_tensorrt lavin_export.to_openvino
lavin_export.cli
lavin_export

lavin_bench.timing lavin_bench.markdown lavin_bench.record lavin_bench.svg lavin_bench.programs
lavin_bench.ceilings
lavin_bench.kernels
lavin_bench.pipeline
lavin_bench.quality lavin_bench.engines lavin_bench.export_size lavin_bench.serve_load lavin_bench.soak
lavin_bench.report lavin_bench.gpu_summary
lavin_bench.gpu_check
lavin_bench.cli
lavin_bench
"""
FLOOR = {room: floor for floor, line in enumerate(FLOORS.splitlines()) for room in line.split()}


def module_name(path: Path, base: Path) -> str:
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path, ROOT / folder): path
    for package, folder in FOLDERS.items()
    for path in sorted((ROOT / folder / package).rglob("*.py"))
}


def imports(source: str, modules=MODULES) -> set[tuple[str, str]]:
    """(module, name) of everything that a source imports from the house, wherever in it, and of the private names that
    it takes of an imported module; "" for a module itself. Texts `module:name` are imports too, of commands.
    """
    tree, found, bound = ast.parse(source), set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name in modules}
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add((inner, "") if inner in modules else (node.module, alias.name))
                if inner in modules:
                    bound[alias.asname or alias.name] = inner
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module, _, name = node.value.partition(":")
            found |= {(module, name)} if name.isidentifier() and module in modules else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            found |= {(bound[node.value.id], node.attr)} if node.attr.startswith("_") else set()
    return found


def room(module: str) -> str:
    """The longest name with a floor that a module is in, or is."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in FLOOR and (name == module or name not in FOLDERS)), module)


def arrows(modules=MODULES) -> dict[str, set[str]]:
    return {
        name: {module for module, _ in imports(path.read_text(), modules)} - {name} for name, path in modules.items()
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""

    def reached(start: str) -> set[str]:
        seen, ahead = set(), list(graph[start])
        while ahead:
            if (module := ahead.pop()) not in seen:
                seen.add(module)
                ahead += graph.get(module, ())
        return seen

    reach = {module: reached(module) for module in graph}
    groups = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in graph if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def faults(module: str, targets: set[tuple[str, str]]) -> list[str]:
    """What of a module's imports breaks the rule."""
    here, found = room(module), []
    for target, name in sorted(targets):
        there = room(target)
        if there != here and FLOOR[there] >= FLOOR[here]:
            found.append(f"{module} imports {target}: {there} is not below {here}")
        if name.startswith("_") and not name.startswith("__"):
            found.append(f"{module} imports {target}.{name}, which is private")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    assert room(module) in FLOOR, f"{module} stands in no room that FLOORS knows"
    assert not faults(module, imports(MODULES[module].read_text()))


def test_no_circles():
    assert not circles(arrows())


def test_the_rule_sees_what_it_forbids():
    lazy = "def f():\n    from lavin_rt.pipeline import Pipeline"
    assert "not below" in faults("lavin_rt.dit.model", imports(lazy))[0]
    assert "not below" in faults("lavin_rt.dit.model", imports("import lavin_rt.vae.layers"))[0]
    assert "private" in faults("lavin_rt.task", imports("from lavin_rt.errors import _hidden"))[0]
    assert "not below" in faults("lavin_rt.serve.app", imports("run('lavin_rt.cli.run:run')"))[0]
    taken = "from lavin_rt.pictures import images\nimages._hidden()"
    assert "private" in faults("lavin_rt.task", imports(taken))[0]
    assert "not below" in faults("lavin_rt.cli.main", imports("from lavin_bench.kernels import bench"))[0]
    assert not faults("lavin_rt.task", imports("from lavin_rt.dit import layout"))
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    assert len(MODULES) > 100
