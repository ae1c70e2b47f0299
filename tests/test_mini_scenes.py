"""Scenes, photographs and tasks of lavin-mini: exact ground truth, and nothing shared between splits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("embreex", reason="needs the extra train")
pytest.importorskip("trimesh", reason="needs the extra train")

from lavin_rt.errors import InputError
from lavin_rt.mini import tasks
from lavin_rt.mini.corpus import CLIPS_FROM, Corpus
from lavin_rt.mini.data import cached_scenes, render_arrays
from lavin_rt.mini.measures import MEASURES, measure
from lavin_rt.mini.scenes import FIELD_OF_VIEW, GROUND, SKY, SPHERE, Scene
from lavin_rt.mini.sources import PHOTOGRAPHS, SCENE_SEEDS, SPLITS, photograph, split_of
from lavin_rt.mini.tasks import CLIP_TASKS, PALETTE, PICTURE_TASKS, TASKS, Task
from lavin_rt.mini.train import PRESETS

SIZE = 32


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.make("template", SIZE, 16, 2)


def test_a_scene_is_a_function_of_its_seed():
    first, again, other = (Scene.from_seed(seed).render(SIZE) for seed in (5, 5, 6))
    for name in ("colour", "depth", "normals", "classes", "instances"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.colour, other.colour)


def view(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The camera's position and axes at moment 0, and the rays through the pixels' centres, `[SIZE, SIZE, 3]`."""
    position, axes = scene._camera(0)
    reach = np.tan(np.radians(FIELD_OF_VIEW / 2))
    x, y = np.meshgrid(*[(np.arange(SIZE) + 0.5) / SIZE * 2 - 1] * 2)
    return position, axes, np.stack([x * reach, -y * reach, -np.ones_like(x)], -1) @ axes.T


def test_depth_and_normals_of_the_ground_are_those_of_its_plane():
    """On the plane y = 0: depth times the ray's descent is the camera's height, and the normal is the world's up."""
    for seed in range(4):
        scene = Scene.from_seed(seed)
        picture = scene.render(SIZE)
        position, axes, rays = view(scene)
        ground = picture.classes == GROUND
        assert ground.mean() > 0.1
        heights = position[1] + picture.depth[ground] * rays[ground][:, 1]
        assert np.abs(heights).max() < 1e-3
        assert np.allclose(picture.normals[ground], axes[1], atol=1e-6)


def test_depth_and_normals_of_a_sphere_are_those_of_the_sphere():
    """Its facets lie within 1 % of the radius inside the sphere; normals are exact for the points hit."""
    found = 0
    for seed in range(30):
        scene = Scene.from_seed(seed, objects=1)
        [solid] = scene.solids
        if solid.kind != SPHERE:
            continue
        found += 1
        picture = scene.render(SIZE)
        position, axes, rays = view(scene)
        points = position + picture.depth[picture.mask][:, None] * rays[picture.mask]
        radius = np.linalg.norm(points - solid.position, axis=1) / solid.half[0]
        assert (radius > 0.98).all() and (radius < 1.001).all()
        in_world = picture.normals[picture.mask] @ axes.T
        assert np.allclose(in_world * solid.half[0] * radius[:, None], points - solid.position, atol=1e-3)
    assert found > 3


def test_maps_agree_with_each_other(corpus):
    for index in range(len(corpus.scenes)):
        picture = corpus.still(index, mirrored=index % 2 == 1)
        assert np.array_equal(np.isinf(picture.depth), picture.classes == SKY)
        assert np.array_equal(picture.mask, picture.classes > GROUND)
        length = np.linalg.norm(picture.normals, axis=-1)
        assert np.allclose(length[picture.classes != SKY], 1, atol=0.02) and not length[picture.classes == SKY].any()


def test_splits_share_no_seed_and_no_photograph(corpus):
    for a, b in itertools.combinations(SPLITS, 2):
        assert not set(PHOTOGRAPHS[a]) & set(PHOTOGRAPHS[b])
        assert SCENE_SEEDS[a].stop <= SCENE_SEEDS[b].start or SCENE_SEEDS[b].stop <= SCENE_SEEDS[a].start
    for split, names in PHOTOGRAPHS.items():
        for name in names:
            assert photograph(name).shape[2] == 3
        for preset in PRESETS.values():
            first = SCENE_SEEDS[split].start
            assert preset.scenes <= CLIPS_FROM
            assert split_of(first) == split_of(first + CLIPS_FROM + preset.clips) == split
    # The same photograph under two names would pass the check of names.
    pictures = {name: photograph(name) for names in PHOTOGRAPHS.values() for name in names}
    for (a, first), (b, second) in itertools.combinations(pictures.items(), 2):
        assert first.shape != second.shape or not np.array_equal(first, second), (a, b)
    with pytest.raises(InputError, match="scene seed 3000000"):
        split_of(3_000_000)


def test_kept_scenes_are_what_was_rendered(tmp_path):
    seeds = range(7, 10)
    kept = cached_scenes(tmp_path, seeds, SIZE)
    again = cached_scenes(tmp_path, seeds, SIZE)
    fresh = render_arrays(seeds, SIZE)
    for arrays in (kept, again):
        for name in ("colour", "depth", "normals", "classes", "instances"):
            assert np.array_equal(getattr(arrays, name), getattr(fresh, name))
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged piece"):
        cached_scenes(tmp_path, seeds, SIZE)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_task_makes_pairs(task: Task, corpus: Corpus):
    frames = 5 if task.is_clip else 1
    pairs = [corpus.draw(task, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3)]
    for pair in pairs:
        assert pair.dtype == np.uint8 and pair.shape == (2, frames, SIZE, SIZE, 3)
        assert not np.array_equal(pair[0], pair[1])
    assert np.array_equal(pairs[0], pairs[1])
    assert not all(np.array_equal(pairs[0], pair) for pair in pairs[2:])


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_perfect_result_measures_perfect_and_the_input_does_not(task: Task, corpus: Corpus):
    perfect = {"AbsRel": 0, "mean angle": 0, "MSE": 0, "PSNR": 100}
    for seed in range(3):
        given, target = corpus.draw(task, np.random.default_rng(seed))
        if not task.is_clip:
            given, target = given[0], target[0]
        best, copied = measure(task, target, target), measure(task, given, target)
        for of_task in MEASURES[task.measure]:
            assert best[of_task.name] == pytest.approx(perfect.get(of_task.name, 1), abs=1e-3)
        deciding = MEASURES[task.measure][0]
        assert deciding.better(best[deciding.name], copied[deciding.name]) > 0


def test_targets_can_be_read_back(corpus):
    rng = np.random.default_rng(0)
    for index in range(len(corpus.scenes)):
        picture = corpus.still(index, mirrored=False)
        known = picture.depth < tasks.FAR
        depth = tasks.decode_depth(tasks.depth(picture, rng)[1])[known]
        assert np.abs(depth / np.maximum(picture.depth[known], tasks.NEAR) - 1).max() < 0.01
        seen = picture.classes != SKY
        true = picture.normals[seen] / np.linalg.norm(picture.normals[seen], axis=-1, keepdims=True)
        assert (tasks.decode_normals(tasks.normals(picture, rng)[1])[seen] * true).sum(-1).min() > 0.9998
        assert np.array_equal(tasks.decode_segments(tasks.panoptic(picture, rng)[1]), tasks.segments(picture))
    for index in corpus.single:
        picture = corpus.still(index, mirrored=False)
        assert tasks.decode_box(tasks.detection(picture, rng)[1]) == tasks.box_of(picture.mask)


def test_segments_tell_the_sides_of_a_mirror():
    """Mirrored, every object changes sides, and sky and ground do not."""
    for seed in range(8):
        picture = Scene.from_seed(seed, objects=1).render(SIZE)
        if not picture.mask.any():
            continue
        there, back = tasks.segments(picture), tasks.segments(picture.mirrored())[:, ::-1]
        assert np.array_equal(there[~picture.mask], back[~picture.mask])
        assert (there[picture.mask] // 2 == back[picture.mask] // 2).all()
        columns = np.nonzero(picture.mask)[1].mean()
        if abs(columns - (SIZE - 1) / 2) > 0.5:
            assert (there[picture.mask] != back[picture.mask]).all()


def test_two_tasks_are_never_trained():
    assert {task.name for task in TASKS.values() if not task.trained} == {"deraining", "image_from_normals"}
    assert len(PICTURE_TASKS) == 14 and len(CLIP_TASKS) == 2 and len(np.unique(PALETTE, axis=0)) == len(PALETTE)


def test_only_the_pairs_tell_a_negative_from_a_copy(corpus):
    """The target is the input's negative; of the inputs, too, four in ten are negatives."""
    task, rng, own = TASKS["negative"], np.random.default_rng(0), 0
    assert len(task.variants) == 2
    for i in range(600):
        picture = corpus.still(i % len(corpus.scenes), False)
        given, target = task.apply(picture, rng)
        assert np.array_equal(target, 255 - given)
        own += np.array_equal(given, picture.colour)
        assert np.array_equal(given, picture.colour) or np.array_equal(target, picture.colour)
    assert 0.54 < own / 600 < 0.66


def test_a_task_that_is_not_there():
    with pytest.raises(InputError, match="unknown task 'cooking'"):
        tasks.find_task("cooking")
