"""The released model's size, exported to ONNX from random weights: peak memory, time and size on disk.

    python -m lavin_bench.export_size --folder /some/large/disk --dtype bfloat16

Makes a checkpoint of the released shapes (6.8 GB, and 0.86 GB for the VAE) where there is none yet, exports it in a
process of its own, and prints one JSON record. `--verify` also runs the result in ONNX Runtime beside PyTorch
(bfloat16 weights in float32 arithmetic), again in a process of its own. `--depth` makes a shallower model of the same
widths.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from lavin_bench.programs import at_least, program
from lavin_bench.timing import resident_bytes
from lavin_rt.checkpoint.load import save_vae
from lavin_rt.checkpoint.names import official_layout
from lavin_rt.checkpoint.tensors import write_safetensors
from lavin_rt.devices import DTYPES
from lavin_rt.dit.config import PRESETS, DiTConfig
from lavin_rt.find.model import DIT, find_checkpoint
from lavin_rt.pictures.images import check_writable
from lavin_rt.vae.config import VAEConfig
from lavin_rt.vae.model import STVAE


def write_random_checkpoint(folder: Path, config: DiTConfig, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a checkpoint of random weights, one tensor at a time: activations keep to unit scale, nothing is zero."""
    folder.mkdir(parents=True, exist_ok=True)
    places = official_layout(config)
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[torch.Tensor]:
        for place in places:
            if place.official.endswith(("norm.weight", "embedder.1.weight")):
                mean, deviation = 1.0, 0.1
            else:
                mean, deviation = 0.0, 0.1 if len(place.shape) == 1 else place.shape[-1] ** -0.5
            yield torch.empty(place.shape).normal_(mean, deviation, generator=generator).to(dtype)

    layout = [(place.official, dtype, place.shape) for place in places]
    write_safetensors(folder / DIT, layout, tensors(), {"format": "pt", "config": config.to_json()})
    torch.manual_seed(0)
    save_vae(STVAE(VAEConfig()), folder / "stvae.safetensors")


def measured(job: str, arguments: argparse.Namespace) -> dict:
    """Runs this module for one job in a process of its own."""
    command = [sys.executable, "-m", "lavin_bench.export_size", "--job", job]
    for name in ("folder", "dtype", "depth"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_job(job: str, checkpoint: Path, output: Path, dtype: torch.dtype) -> dict:
    """One job, in this process: its record with seconds, peak memory, and memory with everything imported."""
    from lavin_export.to_onnx.export import export_onnx
    from lavin_export.verify.artifact import verify_artifact

    imported, began = resident_bytes("VmHWM"), time.perf_counter()
    record: dict = {}
    if job == "export":
        manifest = export_onnx(find_checkpoint(checkpoint), output, dtype=dtype, verify=False)
        record["bytes on disk"] = sum(entry["bytes"] for entry in manifest.files.values())
        record["operators"] = manifest.parts["denoiser"]["needs"]["operators"]
    else:
        record["verification"] = verify_artifact(output, find_checkpoint(checkpoint))
    record |= {
        "seconds": round(time.perf_counter() - began, 1),
        "peak bytes": resident_bytes("VmHWM"),
        "imports": imported,
    }
    return record


@program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint and the artifact go")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument(
        "--depth", type=int, default=PRESETS["lavin-dit-3.4b"].depth, help="blocks (default: %(default)s)"
    )
    parser.add_argument("--verify", action="store_true", help="run the artifact beside PyTorch, too")
    parser.add_argument("-o", "--output", type=Path, help="write the record to this JSON file")
    parser.add_argument("--job", choices=["export", "verify"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    at_least(arguments, depth=1)
    if arguments.output:
        check_writable(arguments.output)
    config = dataclasses.replace(PRESETS["lavin-dit-3.4b"], depth=arguments.depth)
    checkpoint = arguments.folder / f"random-{arguments.depth}"
    output = arguments.folder / f"onnx-{arguments.dtype}-{arguments.depth}"
    if arguments.job:
        print(json.dumps(run_job(arguments.job, checkpoint, output, DTYPES[arguments.dtype])))
        return
    if not (checkpoint / "stvae.safetensors").is_file():
        print(f"writing a random checkpoint to {checkpoint}", file=sys.stderr)
        write_random_checkpoint(checkpoint, config)
    record = {"config": dataclasses.asdict(config), "dtype": arguments.dtype, "torch": torch.__version__}
    record["checkpoint bytes"] = (checkpoint / DIT).stat().st_size
    print(f"exporting to {output}", file=sys.stderr)
    record["export"] = measured("export", arguments)
    if arguments.verify:
        print("verifying", file=sys.stderr)
        record["verify"] = measured("verify", arguments)
    text = json.dumps(record, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
