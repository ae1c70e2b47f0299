"""Pictures and clips: read as uint8 frames, resized as the model expects, written whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from lavin_rt.errors import InputError, one_line
from lavin_rt.files import check_writable, is_vacant, written_whole
from lavin_rt.pictures import colours
from lavin_rt.scalars import whole

# What counts as a picture inside a folder; a file given by its own name may have any suffix.
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
# Several pictures in a file of another format are pages or (MPO, as phones write) depth maps, not frames.
_ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
# Format, largest side and the encoder's options. Masks and depth maps are data: lossless where the format can be.
_OUTPUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    ".png": ("PNG", 2**31 - 1, {}),
    ".jpg": ("JPEG", 65500, {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", 65500, {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", 16383, {"lossless": True}),
    ".gif": ("GIF", 65535, {}),
}
_FRAME_MS = 100
MARGIN = 4  # pixels between a grid's cells and around them
# Encoders of GIF and WebP merge repeated frames into one shown longer; with this mark a file is read frame by frame.
_CLIP_MARK = f"lavin-rt clip of %d frames, {_FRAME_MS} ms each"
_DESCRIPTION_TAG, _ORIENTATION_TAG = 0x010E, 0x0112
# What undoes the EXIF orientations 2 to 8.
_TURNS = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]


def load_picture(source: Any) -> torch.Tensor:
    """One picture as RGB.

    Orientation by EXIF or XMP is applied. Transparency is composited on white: what lies beneath transparent pixels is
    arbitrary and nobody sees it (the original drops alpha, which gives the same values for opaque pictures). 16-bit
    greyscale becomes `round(x / 257)`; 16-bit colour keeps its high byte, all that Pillow reads of it. Colours are
    converted to sRGB from the profile that a file embeds, unless that is sRGB; without one, other modes (greyscale,
    palette, CMYK) become what Pillow's `convert("RGB")` makes of them. PNG's gAMA and cHRM are ignored.

    Args:
        source: a path, a PIL image, or a uint8 array or tensor `[H, W, 3]`. Of an animation, the first frame (of an
            open PIL image, the current one).

    Returns:
        uint8 `[3, H, W]`, in memory of its own.

    Raises:
        InputError: no such file, not a picture, truncated, decompression bomb, or 32-bit values of unknown range.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return _array_frames(source, "[H, W, 3]")[0]
    with _reading(source) as image:
        return _rgb(image, source_name(source))


class TooManyFrames(InputError):
    """A clip of more frames than the caller takes."""


def load_clip(source: Any, frames: int | None = None, most: int | None = None) -> torch.Tensor:
    """A clip as RGB frames, each as `load_picture` reads it; a single picture is a clip of one frame.

    Args:
        source: a folder of frames (see `frame_files`), an animated GIF, WebP, PNG or AVIF, a uint8 array or tensor
            `[T, H, W, 3]`, a list of pictures, or whatever `load_picture` takes.
        frames: how many to take of a longer clip, its first ones; None takes all.
        most: of an animated file, the number of frames beyond which it is refused before they are put together. A few
            bytes can stand for many frames: files that we wrote say how often a frame repeats.

    Returns:
        uint8 `[T, 3, H, W]`.

    Raises:
        InputError: unreadable, frames of different sizes, or a number of frames that is not `1 + 4 k`.
        TooManyFrames: more than `most`.
    """
    name = source_name(source)
    if frames is not None and (
        isinstance(frames, bool) or not isinstance(frames, int) or frames < 1 or frames % 4 != 1
    ):
        raise InputError(f"frames is {frames!r}; expected 1 + 4k: 1, 5, 9, ...")
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
        source = frame_files(source)
    if isinstance(source, np.ndarray | torch.Tensor):
        clip = list(_array_frames(source, "[H, W, 3]", "[T, H, W, 3]"))[:frames]
    elif isinstance(source, list | tuple):
        check_clip_frames(len(source[:frames]), name)
        clip = [load_picture(frame) for frame in source[:frames]]
    else:
        with _reading(source) as image:
            wanted = most + 1 if frames is None and most is not None else frames
            clip = list(itertools.islice(_animation(image, name), wanted))
        if most is not None and len(clip) > most:
            raise TooManyFrames(f"{name}: more than {most} frames; expected {most} at most")
    check_clip_frames(len(clip), name)
    for i, frame in enumerate(clip):
        if frame.shape != clip[0].shape:
            (h, w), (first_h, first_w) = frame.shape[-2:], clip[0].shape[-2:]
            which = source_name(source[i]) if isinstance(source, list | tuple) else f"frame {i}"
            raise InputError(f"{name}: {which} is {h}x{w}, expected {first_h}x{first_w} as the clip's first frame")
    return torch.stack(clip)


def frame_files(folder: str | os.PathLike) -> list[Path]:
    """The pictures of a folder in natural order; hidden files and those without a picture's suffix are left out."""
    try:
        files = [f for f in Path(folder).iterdir() if f.suffix.lower() in PICTURE_SUFFIXES and f.name[0] != "."]
    except OSError as error:
        raise InputError(f"{source_name(folder)}: cannot be read as a folder of frames ({error.strerror})") from error
    return sorted(files, key=lambda f: natural_key(f.name))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorting key under which `frame2` comes before `frame10`."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), part) if part[0] in "0123456789" else (1, 0, part) for part in parts]


def check_clip_frames(frames: int, source: str = "clip") -> None:
    """Checks that a clip has `1 + 4 k` frames, which the VAE turns into `1 + k` latent frames."""
    if frames < 1:
        raise InputError(f"{source}: no frames found; a clip has 1 + 4k frames: 1, 5, 9, ...")
    if frames % 4 != 1:
        below = frames - (frames - 1) % 4
        raise InputError(
            f"{source}: {frames} frames; a clip has 1 + 4k frames, frames={below} (--frames {below}) cuts it, "
            f"the next are {below} and {below + 4}"
        )


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of `1 + 4 k` frames."""
    return 1 + (frames - 1) // 4


def parse_size(size: str | int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from `"512"`, `"384x640"` (height x width), 512 or `(384, 640)`: positive multiples of 16."""
    try:
        if isinstance(size, str):
            match = re.fullmatch(r"\s*([0-9]{1,6})(?:\s*[xX×]\s*([0-9]{1,6}))?\s*", size)
            values = [int(value) for value in match.groups() if value] if match else []
        else:
            # An array, a tensor and torch.Size too; those without a dimension are not iterable, though they say so.
            given: list[Any] = list(size) if getattr(size, "ndim", 1) and isinstance(size, Iterable) else [size]
            values = [operator.index(whole(value)) for value in given]  # type: ignore[arg-type]  # None is refused below
        height, width = values * 2 if len(values) == 1 else values
    except (TypeError, ValueError):
        raise InputError(f"size {size!r}: expected multiples of 16, as 512 or as 384x640 (height x width)") from None
    for side, value in (("height", height), ("width", width)):
        if value < 16 or value % 16:
            nearest = f"{value // 16 * 16} or {value // 16 * 16 + 16}" if value > 16 else "16 or more"
            raise InputError(f"size {height}x{width}: {side} {value} is not a positive multiple of 16; use {nearest}")
    return height, width


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic antialiased resampling on uint8 values, as the original does; aspect ratio is ignored.

    Args:
        frames: uint8 `[..., 3, H, W]`.
        size: (height, width); frames that have it already are returned as they are.

    Returns:
        uint8 `[..., 3, height, width]`.
    """
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    batch = frames.reshape(-1, *frames.shape[-3:]).contiguous()
    return F.interpolate(batch, size=size, mode="bicubic", antialias=True).reshape(*frames.shape[:-2], *size)


def to_pixels(frames: torch.Tensor) -> torch.Tensor:
    """uint8 values to the VAE's float32 ones, `x / 127.5 - 1`, same shape."""
    return frames.to(torch.float32).div_(127.5).sub_(1)


def from_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """The VAE's values to uint8, `clamp(x / 2 + 0.5, 0, 1) * 255` truncated as the original does, same shape."""
    return (pixels.to(torch.float32) / 2 + 0.5).clamp_(0, 1).mul_(255).to(torch.uint8)


def flagged_frames(pixels: torch.Tensor) -> torch.Tensor:
    """The VAE's values `[N, 3, T, H, W]` to `[N * T, 3 * H * W + 1]` uint8: of every frame its pixels (`from_pixels`),
    and behind them 1 where all values were finite, or 0, which clamping hides.
    """
    frames = pixels.to(torch.float32).transpose(1, 2).flatten(0, 1)
    finite = frames.isfinite().flatten(1).all(dim=1, keepdim=True)
    return torch.cat([from_pixels(frames).flatten(1), finite.to(torch.uint8)], dim=1)


def to_pil(frame: torch.Tensor) -> Image.Image:
    """uint8 `[3, H, W]` as an RGB PIL image."""
    return Image.fromarray(np.ascontiguousarray(frame.cpu().permute(1, 2, 0).numpy()))


def is_folder_output(path: str | os.PathLike) -> bool:
    """Whether `save_picture` writes a folder of frames: a slash at the end, no suffix, or a folder that exists."""
    return os.fspath(path).endswith("/") or not Path(path).suffix or os.path.isdir(path)


def check_output(path: str | os.PathLike, frames: int = 1, size: tuple[int, int] | None = None) -> None:
    """Checks that `save_picture` can write there, before any work is done; makes nothing.

    Args:
        path: a name ending in .png, .jpg, .jpeg, .webp or .gif, or a new or empty folder (see `is_folder_output`).
        frames: how many there will be; JPEG holds one.
        size: (height, width) of the frames, for formats with a limit.

    Raises:
        InputError: unknown suffix, a format that cannot hold it, a folder with something in it, no way to write there.
    """
    name, suffix, known = source_name(path), Path(path).suffix.lower(), ", ".join(_OUTPUTS)
    file_format, limit, _ = _OUTPUTS.get(suffix, ("", 0, {}))
    if not name:
        raise InputError(f"output has an empty name; expected one ending in {known}, or a folder for frames")
    if is_folder_output(path):
        if os.path.isfile(path):
            raise InputError(f"{name}: is a file, expected a folder for frames; give a name ending in {known}")
        with contextlib.suppress(OSError):  # which `check_writable` names
            if os.path.isdir(path) and not is_vacant(path):
                raise InputError(f"{name}: the folder for frames is not empty; give another name or empty it first")
    elif not file_format:
        raise InputError(f"{name}: cannot write {suffix}; expected {known}, or a / at the end for a folder of frames")
    elif frames > 1 and file_format == "JPEG":
        raise InputError(f"{name}: JPEG holds one picture, not {frames} frames; use .webp, .png, .gif or a folder")
    elif size is not None and max(size) > limit:
        raise InputError(f"{name}: {suffix} holds {limit} pixels a side at most, not {size[0]}x{size[1]}; use .png")
    check_writable(path, folder=is_folder_output(path))


def save_picture(frames: torch.Tensor, path: str | os.PathLike) -> None:
    """Writes a picture or a clip; it appears under its name when it is complete, and not at all otherwise.

    PNG and WebP are lossless, JPEG has quality 95 without chroma subsampling, GIF 256 colours a frame. Clips are
    animated WebP, PNG or GIF, 100 ms a frame, or a folder of frames 0000.png, 0001.png, ... (see `is_folder_output`).

    Args:
        frames: uint8 `[3, H, W]` or `[T, 3, H, W]`.
        path: as for `check_output`.

    Raises:
        InputError: see `check_output`, or the disk is full.
    """
    clip = frames[None] if frames.ndim == 3 else frames
    if clip.ndim != 4 or clip.shape[1] != 3 or clip.dtype != torch.uint8 or not clip.numel():
        raise InputError(f"frames are {clip.dtype} {list(frames.shape)}, expected uint8 [3, H, W] or [T, 3, H, W]")
    check_output(path, len(clip), (clip.shape[2], clip.shape[3]))
    images = [to_pil(frame) for frame in clip]
    if is_folder_output(path):
        with written_whole(path, folder=True) as folder:
            for i, image in enumerate(images):
                image.save(folder / f"{i:04d}.png")
        return
    file_format, _, options = _OUTPUTS[Path(path).suffix.lower()]
    if len(images) > 1:
        options = options | {"save_all": True, "append_images": images[1:], "duration": _FRAME_MS, "loop": 0}
        mark, exif = _CLIP_MARK % len(images), Image.Exif()
        exif[_DESCRIPTION_TAG] = mark
        # Pillow merges a repeated PNG frame only if it blends like the one before, which opaque frames do not show.
        blend = [i % 2 for i in range(len(images))]
        marked: dict[str, dict[str, Any]] = {"PNG": {"blend": blend}, "GIF": {"comment": mark}, "WEBP": {"exif": exif}}
        options |= marked[file_format]
    with written_whole(path) as partial, open(partial, "wb") as file:
        images[0].save(file, file_format, **options)


def grid_size(rows: int, columns: int, size: tuple[int, int], margin: int = MARGIN) -> tuple[int, int]:
    """(height, width) of the `grid` of so many cells of (height, width)."""
    return rows * (size[0] + margin) + margin, columns * (size[1] + margin) + margin


def grid(
    rows: Sequence[Sequence[torch.Tensor | None]], size: tuple[int, int] | None = None, margin: int = MARGIN
) -> torch.Tensor:
    """Frames side by side on white: for `--grid`, context inputs and query above, their targets and the result below.

    Args:
        rows: cells, uint8 `[3, H, W]` or `[T, 3, H, W]`, or None for an empty place; short rows end in empty places.
        size: (height, width) that all cells are resized to; the first cell's by default.
        margin: pixels between the cells and around them.

    Returns:
        uint8 `[T, 3, H, W]`, T of the longest cell: clips move, shorter ones hold their last frame. `[0]` is still.
    """
    clips = [[cell[None] if cell is not None and cell.ndim == 3 else cell for cell in row] for row in rows]
    cells = [clip for row in clips for clip in row if clip is not None]
    if not cells:
        raise InputError("grid: no pictures; expected at least one")
    height, width = size or cells[0].shape[-2:]
    length, columns = max(len(clip) for clip in cells), max(len(row) for row in clips)
    shape = grid_size(len(clips), columns, (height, width), margin)
    sheet = torch.full((length, 3, *shape), 255, dtype=torch.uint8)
    for i, row in enumerate(clips):
        for j, clip in enumerate(row):
            if clip is not None:
                top, left = margin + i * (height + margin), margin + j * (width + margin)
                held = torch.arange(length).clamp_(max=len(clip) - 1)
                sheet[:, :, top : top + height, left : left + width] = resize(clip.cpu(), (height, width))[held]
    return sheet


@contextlib.contextmanager
def _reading(source: Any) -> Iterator[Image.Image]:
    """Opens a picture; what Pillow raises while the block reads it becomes an `InputError`."""
    name = source_name(source)
    if not isinstance(source, str | os.PathLike | Image.Image):
        raise InputError(f"{name}: expected a path, a PIL image or a uint8 array [H, W, 3]")
    try:
        with contextlib.nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
            yield image
    except (InputError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: no such picture; check the name") from None
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name}: larger than pictures are read without asking ({one_line(error)}); if it is meant to be, "
            "--allow-huge (PIL.Image.MAX_IMAGE_PIXELS = None) reads it"
        ) from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: not a picture that can be read; expected PNG, JPEG, WebP, ...") from None
    except Exception as error:  # Damaged files make decoders raise all sorts: SyntaxError, EOFError, struct.error, ...
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{name}: cannot be read as a picture ({reason}); give a sound file") from error


def _animation(image: Image.Image, name: str) -> Iterator[torch.Tensor]:
    """The frames of an animated image, or the one picture, each `[3, H, W]`."""
    count = getattr(image, "n_frames", 1) if image.format in _ANIMATED_FORMATS else 1
    marks = f"{_exif(image, _DESCRIPTION_TAG)} {image.info.get('comment')}"
    mark = re.search(re.escape(_CLIP_MARK).replace("%d", "([0-9]{1,5})"), marks)
    if count == 1:
        yield from itertools.repeat(_rgb(image, name), int(mark[1]) if mark else 1)
        return
    position = image.tell()
    if position:
        # Pillow loses its place in a PNG that is rewound from the middle, but not from the end.
        image.seek(count - 1)
        image.load()
    # An animated PNG may begin with a still for viewers that know no animation.
    for i in range(1 if getattr(image, "default_image", False) else 0, count):
        image.seek(i)
        frame = _rgb(image, name)
        yield from itertools.repeat(frame, max(1, round(image.info["duration"] / _FRAME_MS)) if mark else 1)
    image.seek(position)


def _rgb(image: Image.Image, name: str) -> torch.Tensor:
    """The current frame of a Pillow image as uint8 `[3, H, W]`."""
    # First of all, since TIFF turns itself while it loads, and PNG may carry EXIF behind the pixels.
    keyed = colours.load(image)
    pixels, orientation = colours.to_rgb(image, keyed, name), _exif(image, _ORIENTATION_TAG)
    if isinstance(orientation, int) and 2 <= orientation <= 8:
        pixels = np.asarray(Image.fromarray(pixels).transpose(Image.Transpose[_TURNS[orientation - 2]]))
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def _exif(image: Image.Image, tag: int) -> Any:
    """A tag of the picture's EXIF data; None where that is missing or damaged, for which no picture is refused."""
    try:
        return image.getexif().get(tag)
    # A damaged tag raises whatever Pillow's reader meets: struct.error, ValueError, OSError, SyntaxError, ...
    except Exception:
        return None


def _array_frames(array: np.ndarray | torch.Tensor, *expected: str) -> torch.Tensor:
    """A uint8 array of one of the `expected` shapes as `[T, 3, H, W]`, copied."""
    dtype, shape = str(array.dtype).removeprefix("torch."), list(array.shape)
    if dtype != "uint8" or len(shape) not in [e.count(",") + 1 for e in expected] or shape[-1] != 3 or 0 in shape[-3:]:
        raise InputError(f"array is {dtype} {shape}, expected uint8 {' or '.join(expected)}; convert or transpose it")
    values = (array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array).reshape(-1, *shape[-3:])
    return torch.from_numpy(np.array(np.moveaxis(values, -1, 1), order="C"))


def source_name(source: Any) -> str:
    """What a source is called in messages."""
    if isinstance(source, str | os.PathLike):
        return one_line(os.fspath(source))
    if isinstance(source, Image.Image):
        return one_line(getattr(source, "filename", "")) or f"{source.mode} PIL image"
    if isinstance(source, list | tuple):
        return f"list of {len(source)} frames"
    return "array" if isinstance(source, np.ndarray | torch.Tensor) else type(source).__name__
