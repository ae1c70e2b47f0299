"""NVIDIA's own Python bindings of TensorRT, imported without TensorRT, for tests of code that is written against them.

The wheel of the bindings is fetched into a cache folder and never becomes part of the repository. Its extension wants
nine C functions of three libraries at import; small libraries that define them, compiled on the spot, make everything
importable that does not need the real ones: enums, `Dims`, `Weights`, loggers. What lives in the libraries (builder,
parser, runtime) is stood in for by `trt_stand_in`.

One process can hold one version, so the checks run in processes of their own: `python trt_scenarios.py FOLDER NAME`.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

VERSIONS = ("10.16.1.11", "11.4.0.106")
C_FUNCTIONS = {
    "nvinfer": [
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ],
    "nvinfer_plugin": ["initLibNvInferPlugins"],
    "nvonnxparser": [
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ],
}


def fetch(version: str, cache: Path) -> Path:
    """The unpacked wheel of a version, downloaded once; the test is skipped where it or gcc cannot be had."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, to stand in for TensorRT's libraries at import")
    folder = cache / version
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--timeout", "20", "--retries", "1", "--dest", str(cache / "wheels")]
        command.append(f"tensorrt-cu13-bindings=={version}")
        fetched = subprocess.run(command, capture_output=True, text=True, check=False)
        if fetched.returncode:
            reason = (fetched.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"the bindings of TensorRT {version} cannot be fetched here: {reason}")
        (wheel,) = (cache / "wheels").glob(f"*-{version}-*.whl")
        partial = cache / f"{version}.part"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        compile_libraries(partial)
        partial.rename(folder)
    return folder


def compile_libraries(folder: Path) -> None:
    """Three libraries whose functions return a null pointer, under the names that the extension links to."""
    extension = next((folder / "tensorrt_bindings").glob("tensorrt*.so"))
    major = re.search(rb"libnvinfer\.so\.(\d+)", extension.read_bytes()).group(1).decode()
    for library, functions in C_FUNCTIONS.items():
        source = "\n".join(f"void *{function}(void) {{ return 0; }}" for function in functions) + "\n"
        name = f"lib{library}.so.{major}"
        command = ["gcc", "-x", "c", "-", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run(command, input=source.encode(), check=True)


def import_bindings(folder: Path) -> ModuleType:
    """The bindings as the module `tensorrt`; only in a process that has no other version."""
    for library in sorted(folder.glob("lib*.so.*")):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    module = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = module
    return module


def dump(module: ModuleType) -> dict[str, dict]:
    """Every class of the bindings with its bases, its properties (`"r"` or `"rw"`) and the signatures of its methods.

    `{"IBuilderConfig": {"bases": [...], "members": {"flags": {"property": "rw", "signatures": [...]}, ...}}, ...}`
    """
    classes = {}
    for name, value in vars(module).items():
        if not inspect.isclass(value) or hasattr(value, "__members__"):
            continue
        members = {}
        for member, definition in vars(value).items():
            if member.startswith("_") and member != "__init__":
                continue
            if isinstance(definition, property):
                getter = (definition.fget.__doc__ or "").strip() if definition.fget else ""
                members[member] = {"property": "rw" if definition.fset else "r", "signatures": [getter]}
            elif callable(definition):
                members[member] = {"signatures": _signatures(member, definition.__doc__ or "")}
        classes[name] = {"bases": [base.__name__ for base in value.__mro__[1:-1]], "members": members}
    return classes


def _signatures(name: str, documentation: str) -> list[str]:
    """The lines of a pybind11 docstring that are signatures: `name(...) -> type`, numbered where there are several."""
    lines = re.findall(rf"^(?:\d+\. )?({re.escape(name)}\(.*\)(?: -> .*)?)$", documentation, re.MULTILINE)
    return [line for line in lines if line != f"{name}(*args, **kwargs)"]
