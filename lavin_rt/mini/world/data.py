"""Scenes rendered once and kept in a folder, so that every training run after the first begins at once."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import multiprocessing
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lavin_rt.errors import InputError
from lavin_rt.files import written_whole
from lavin_rt.mini.world.scenes import Scene, ScenePicture

CHUNK = 100  # scenes a piece
CLIP_MOMENTS = 10  # a clip of five frames, and the five that follow
# Bumped when scenes of the same seed come out otherwise, so that a kept folder is not taken for them.
SCENES_VERSION = 2


@dataclasses.dataclass(frozen=True, eq=False)
class SceneArrays:
    """Many pictures of scenes in arrays: `colour` uint8 `[N, T, S, S, 3]`, `depth` float16, `normals` int8 (times 127),
    `classes`, `instances` and `unshadowed` uint8, `flow` int8 (times 1024), all `[N, T, S, S, ...]`; T is 1, or the
    moments of a clip.
    """

    colour: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    classes: np.ndarray
    instances: np.ndarray
    unshadowed: np.ndarray
    flow: np.ndarray

    def __len__(self) -> int:
        return len(self.colour)

    def picture(self, index: int, moment: int = 0) -> ScenePicture:
        at = (index, moment)
        return ScenePicture(
            self.colour[at],
            self.depth[at].astype(np.float32),
            self.normals[at].astype(np.float32) / 127,
            self.classes[at],
            self.instances[at],
            self.unshadowed[at],
            self.flow[at].astype(np.float32) / 1024,
        )

    @classmethod
    def joined(cls, parts: Sequence[SceneArrays]) -> SceneArrays:
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def render_arrays(seeds: Sequence[int], size: int, moments: int = 1) -> SceneArrays:
    """Renders scenes at moments 0 to `moments - 1`, in this process."""
    clips = []
    for seed in seeds:
        scene = Scene.from_seed(seed, moving=moments > 1)
        clips.append([scene.render(size, moment) for moment in range(moments)])

    def gathered(name: str, dtype: type) -> np.ndarray:
        return np.array([[getattr(picture, name) for picture in clip] for clip in clips], dtype)

    return SceneArrays(
        gathered("colour", np.uint8),
        gathered("depth", np.float16),
        np.array([[np.round(picture.normals * 127) for picture in clip] for clip in clips], np.int8),
        gathered("classes", np.uint8),
        gathered("instances", np.uint8),
        gathered("unshadowed", np.uint8),
        np.array([[np.clip(np.round(picture.flow * 1024), -127, 127) for picture in clip] for clip in clips], np.int8),
    )


def cached_scenes(
    folder: str | os.PathLike, seeds: range, size: int, moments: int = 1, workers: int = 1
) -> SceneArrays:
    """The scenes of `seeds`, rendered in `workers` processes and kept in `folder` in pieces; kept ones are read.

    Raises:
        InputError: the folder cannot be written, or a kept piece is damaged.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
    pieces = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    files = [folder / f"scenes-v{SCENES_VERSION}-{size}px-{moments}x{len(piece)}-{piece.start}.npz" for piece in pieces]
    todo = [(file, piece, size, moments) for file, piece in zip(files, pieces, strict=True) if not file.is_file()]
    if todo:
        # A fresh interpreter each: embree and torch hold threads that do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(max(workers, 1), mp_context=context) as pool:
            running = [pool.submit(_render_piece, *work) for work in todo]
            finished = concurrent.futures.as_completed(running)
            for done in tqdm(finished, f"rendering {size} px scenes", len(todo), unit="piece"):
                done.result()
    return SceneArrays.joined([_read_piece(file) for file in files])


def _render_piece(file: Path, seeds: range, size: int, moments: int) -> None:
    arrays = render_arrays(seeds, size, moments)
    content = io.BytesIO()
    np.savez_compressed(content, **{f.name: getattr(arrays, f.name) for f in dataclasses.fields(arrays)})
    with written_whole(file) as partial:
        partial.write_bytes(content.getvalue())


def _read_piece(file: Path) -> SceneArrays:
    try:
        with np.load(file) as content:
            return SceneArrays(**{f.name: content[f.name] for f in dataclasses.fields(SceneArrays)})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{file}: a damaged piece of kept scenes; remove it and run again") from error
