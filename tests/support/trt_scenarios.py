"""Checks in a process of their own, one version of TensorRT's bindings in each: `-m support.trt_scenarios FOLDER NAME`.

Prints one JSON object with what was found; fails with a traceback.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from support import trt_bindings


def main(folder: str, name: str, *arguments: str) -> None:
    trt = trt_bindings.import_bindings(Path(folder))
    module = importlib.import_module(f"support.trt_{name}")
    print(json.dumps(module.scenario(trt, *arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
