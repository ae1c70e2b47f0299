"""Pictures of clients: decoded within bounds, encoded into bytes."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from lavin_rt.pictures import images
from lavin_rt.serve.limits import Limits, Refused, public_line

if TYPE_CHECKING:
    import torch

# The decoders that are meant, and no other of Pillow's forty.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif"}


def decode(files: Sequence[bytes], limits: Limits, name: str = "query") -> torch.Tensor:
    """A picture, an animation, or a clip of several pictures.

    Args:
        files: encoded pictures; several are the frames of a clip.
        limits: `pixels` and `frames`, held against the headers before anything is decoded.
        name: what the client calls it, for messages.

    Returns:
        uint8 `[T, 3, H, W]`.

    Raises:
        Refused: 413 for too many pixels or frames, 415 for another format, 422 for what cannot be read.
    """
    if not files:
        raise Refused(422, f"{name}: no picture; expected one, or the frames of a clip", "input")
    if len(files) > limits.frames:
        raise Refused(413, f"{name}: {len(files)} frames; expected {limits.frames} at most", "size")
    try:
        with _opened(files[0], limits, name, len(files)) as first:
            if len(files) == 1:
                width, height = first.size
                return images.load_clip(first, most=min(limits.frames, limits.pixels // (width * height)))
            frames = [images.load_picture(first)]
        for i, content in enumerate(files[1:], 1):
            with _opened(content, limits, f"{name} {i}", len(files)) as image:
                frames.append(images.load_picture(image))
        return images.load_clip([frame.permute(1, 2, 0) for frame in frames])
    except images.TooManyFrames as error:
        raise Refused(413, f"{name}: {_without_source(error)}", "size") from error
    except images.InputError as error:
        raise Refused(422, f"{name}: {_without_source(error)}", "input") from error


def _without_source(error: Exception) -> str:
    """The message of `images` without its own name for the source, which says nothing to a client."""
    source, _, rest = str(error).partition(": ")
    return rest if rest and ("PIL image" in source or "frames" in source or source == "array") else str(error)


def _opened(content: bytes, limits: Limits, name: str, others: int) -> Image.Image:
    """A picture whose header is within the bounds; nothing is decoded but an animation's earlier frames."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        frames = getattr(image, "n_frames", 1) if image.format in ("GIF", "WEBP", "PNG") else 1
        if frames > limits.frames:
            raise Refused(413, f"{name}: {frames} frames; expected {limits.frames} at most", "size")
        _check_pixels(image, max(frames, others), limits, name)
        for i in range(1, frames):
            # A later frame of a GIF may be larger than its screen.
            image.seek(i)
            _check_pixels(image, frames, limits, name)
        if frames > 1:
            image.seek(0)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        return image
    except Refused:
        raise
    except UnidentifiedImageError:
        raise Refused(415, f"{name}: not a picture that is read here; send {', '.join(FORMATS)}", "input") from None
    except Image.DecompressionBombError:
        raise Refused(413, f"{name}: too many pixels; expected {limits.pixels} at most", "size") from None
    except Exception as error:  # damaged headers make decoders raise all sorts
        reason = public_line(str(error)) or type(error).__name__
        raise Refused(422, f"{name}: cannot be read as a picture ({reason}); send a sound file", "input") from error


def _check_pixels(image: Image.Image, frames: int, limits: Limits, name: str) -> None:
    width, height = image.size
    if width * height * frames > limits.pixels:
        shape = f"{height}x{width}" + (f", {frames} frames" if frames > 1 else "")
        raise Refused(413, f"{name}: {shape} are too many pixels; expected {limits.pixels} at most", "size")


def encode(frames: torch.Tensor, kind: str) -> bytes:
    """A picture or an animation as a file's bytes.

    Args:
        frames: uint8 `[T, 3, H, W]`.
        kind: of `MEDIA_TYPES`; JPEG holds one picture.
    """
    with tempfile.TemporaryDirectory(prefix="lavin-rt-") as folder:
        path = Path(folder) / f"result.{kind}"
        images.save_picture(frames if len(frames) > 1 else frames[0], path)
        return path.read_bytes()


def check_kind(kind: str, frames: int) -> None:
    """Refuses a format that does not exist or does not hold so many frames."""
    if kind not in MEDIA_TYPES:
        raise Refused(422, f"format is {kind!r}; expected one of {', '.join(MEDIA_TYPES)}", "input")
    if kind == "jpeg" and frames > 1:
        raise Refused(422, f"format jpeg holds one picture, not {frames} frames; ask for webp, png or gif", "input")
