"""Fuzzers of what Python reads: `python tests/fuzz/readers.py READER [options of libFuzzer] [corpus ...]`.

Hostile bytes are read, or refused with an `InputError` of one line; any other exception is a crash.
"""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lavin_rt", "PIL", "tarfile", "safetensors"], enable_loader_override=False):
    import torch
    from PIL import Image, PngImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401, so that they are instrumented

    from lavin_rt import archives, checkpoint, checkpoint_header, context, images, manifest, packs, part_sizes
    from lavin_rt.errors import InputError
    from lavin_rt.official_layout import official_layout
    from lavin_rt.safetensors_io import SafetensorsFile

PNG = b"\x89PNG\r\n\x1a\n"
PIXELS = 128 * 128


def safetensors(data: bytes) -> bytes:
    """A file of a header and tensors' bytes, parted by a zero, whose length stands before it.

    What begins with a zero is the file itself. (So a fuzzer changes the header, not its length alone.)
    """
    if data[:1] == b"\0":
        return data[1:]
    header, _, tensors = data[1:].partition(b"\0")
    return len(header).to_bytes(8, "little") + header + tensors


def read_checkpoint(data: bytes, folder: Path) -> None:
    path = folder / "lavin_dit.safetensors"
    path.write_bytes(safetensors(data))
    file = SafetensorsFile.open(path)
    config = checkpoint_header.dit_config(file)
    checkpoint_header.picture_size(file)
    checkpoint_header.check_tensors(file, config, official_layout(config))


def read_vae(data: bytes, folder: Path) -> None:
    """The pickle that a published VAE is, and the same as safetensors."""
    (folder / "stvae.pt").write_bytes(data)
    (folder / "stvae.safetensors").write_bytes(safetensors(data))
    try:
        checkpoint.load_vae(folder / "stvae.pt")
    finally:
        checkpoint.load_vae(folder / "stvae.safetensors")


def read_manifest(data: bytes, folder: Path) -> None:
    (folder / manifest.NAME).write_bytes(data)
    read = manifest.Manifest.read(folder)
    read.record()
    read.check_device(torch.device("cpu"))
    part_sizes.bind_sizes(read.parts["denoiser"], [[1, 16, 1, 4, 4], [1, 16, 2, 4, 4], [1, 2, 4, 24], [24]])
    read.check_files()


def read_context(data: bytes, folder: Path) -> None:
    path = folder / "context.safetensors"
    path.write_bytes(safetensors(data))
    try:
        context.EncodedContext.load(path)
    finally:
        packs.TaskPack.load(path)


def read_archive(data: bytes, folder: Path) -> None:
    """Most of it inside the compression, which is of no interest: the first byte says."""
    path = folder / "weights.tar.gz"
    path.write_bytes(data[1:] if data[:1] == b"\0" else gzip.compress(data[1:], 1))
    archives.unpack(path, folder / "unpacked")
    for root, _, files in os.walk(folder / "unpacked"):
        for name in files:
            inside = os.path.realpath(os.path.join(root, name))
            assert inside.startswith(f"{os.path.realpath(folder)}/unpacked/"), inside


def read_template(data: bytes, folder: Path) -> None:
    """File names, one a line; a slash at the end makes a folder."""
    for name in data.split(b"\n")[:12]:
        path = os.path.join(os.fsencode(folder), name.replace(b"\0", b"")[:200].strip(b"/") or b"x")
        try:
            if name.endswith(b"/"):
                os.makedirs(path)
            else:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "xb"):
                    pass
        except (OSError, ValueError):
            continue
    context.find_task(os.fsdecode(data[:12].replace(b"\0", b"")), [folder, folder / "nowhere"])
    pairs = context.read_template(folder)
    context.choose_pairs(pairs, max(1, len(pairs) // 2), len(data))
    context.choose_pairs(pairs, 3, -1, repeats=True)


def read_picture(data: bytes, folder: Path) -> None:
    path = folder / "picture"
    path.write_bytes(data)
    try:
        images.load_picture(path)
    finally:
        images.load_clip(path)


READERS: dict[str, Callable[[bytes, Path], None]] = {
    "checkpoint": read_checkpoint,
    "vae": read_vae,
    "manifest": read_manifest,
    "context": read_context,
    "archive": read_archive,
    "template": read_template,
    "picture": read_picture,
}


def mend_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the right checksums: nothing behind a wrong one is read."""
    made, at = bytearray(data), len(PNG)
    while at + 12 <= len(made):
        (length,) = struct.unpack_from(">I", made, at)
        if length > len(made) - at - 12:
            break
        struct.pack_into(">I", made, at + 8 + length, zlib.crc32(made[at + 4 : at + 8 + length]))
        at += length + 12
    return bytes(made)


def mutate_picture(data: bytes, most: int, seed: int) -> bytes:
    changed = atheris.Mutate(data, most)
    return mend_checksums(changed) if seed % 8 and changed.startswith(PNG) else changed


def mend_tar(data: bytes, most: int, seed: int) -> bytes:
    """A tar whose members' headers have the right checksums."""
    changed = bytearray(atheris.Mutate(data, most))
    if seed % 8 and len(changed) > 512:
        at = 1
        while at + 512 <= len(changed):
            header = changed[at : at + 512]
            if any(header):
                header[148:156] = b" " * 8
                changed[at + 148 : at + 156] = b"%06o\0 " % sum(header)
            try:
                size = int(bytes(header[124:136]).rstrip(b"\0 ") or b"0", 8)
            except ValueError:
                size = 0
            at += 512 + -(-max(size, 0) // 512) * 512
    return bytes(changed)


def main() -> None:
    name = sys.argv.pop(1)
    read = READERS[name]
    Image.MAX_IMAGE_PIXELS = PIXELS
    warnings.simplefilter("ignore")
    root = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    folder = root / "case"

    def one(data: bytes) -> None:
        folder.mkdir()
        try:
            read(data, folder)
        except InputError as error:
            assert str(error) and len(str(error).splitlines()) == 1, f"not one line: {error!r}"
        finally:
            shutil.rmtree(folder)

    mutators = {"picture": mutate_picture, "archive": mend_tar}
    atheris.Setup(sys.argv, one, **({"custom_mutator": mutators[name]} if name in mutators else {}))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
