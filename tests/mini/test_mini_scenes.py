"""Scenes, photographs and tasks of lavin-mini: exact ground truth, and nothing shared between splits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("embreex", reason="needs the extra train")
pytest.importorskip("trimesh", reason="needs the extra train")

from lavin_rt.errors import InputError
from lavin_rt.mini.world import encodings, families, figures, perception, tasks
from lavin_rt.mini.world.corpus import Corpus
from lavin_rt.mini.world.data import CLIP_MOMENTS
from lavin_rt.mini.world.encodings import PALETTE
from lavin_rt.mini.world.measures import MEASURES, measure
from lavin_rt.mini.world.scenes import FIELD_OF_VIEW, GROUND, SKY, SPHERE, VARIED, Scene
from lavin_rt.mini.world.sources import CLIPS_FROM, PHOTOGRAPHS, SCENE_SEEDS, SPLITS, photograph, split_of
from lavin_rt.mini.world.tasks import CLIP_TASKS, PICTURE_TASKS, TASKS, WorldTask

SIZE = 32
MAPS = ("colour", "depth", "normals", "classes", "instances", "unshadowed", "flow")
FAMILIES = [task for task in TASKS.values() if task.family]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.make("template", SIZE, 40, 2)


def test_a_scene_is_a_function_of_its_seed():
    first, again, other = (Scene.from_seed(seed).render(SIZE) for seed in (5, 5, 6))
    for name in MAPS:
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
        first = SCENE_SEEDS[split].start
        assert split_of(first) == split_of(first + 2 * CLIPS_FROM - 1) == split
    # The same photograph under two names would pass the check of names.
    pictures = {name: photograph(name) for names in PHOTOGRAPHS.values() for name in names}
    for (a, first), (b, second) in itertools.combinations(pictures.items(), 2):
        assert first.shape != second.shape or not np.array_equal(first, second), (a, b)
    with pytest.raises(InputError, match="scene seed 3000000"):
        split_of(3_000_000)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_task_makes_pairs(task: WorldTask, corpus: Corpus):
    frames = 5 if task.is_clip else 1
    pairs = [corpus.draw(task, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3)]
    for pair in pairs:
        assert pair.dtype == np.uint8 and pair.shape == (2, frames, SIZE, SIZE, 3)
        assert not np.array_equal(pair[0], pair[1])
    assert np.array_equal(pairs[0], pairs[1])
    assert not all(np.array_equal(pairs[0], pair) for pair in pairs[2:])


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_perfect_result_measures_perfect_and_the_input_does_not(task: WorldTask, corpus: Corpus):
    perfect = {"PSNR": 100}
    for seed in range(3):
        given, target = corpus.draw(task, np.random.default_rng(seed))
        if not task.is_clip:
            given, target = given[0], target[0]
        best, copied = measure(task, target, target), measure(task, given, target)
        for of_task in MEASURES[task.measure]:
            expected = perfect.get(of_task.name, float(of_task.higher_is_better))
            assert best[of_task.name] == pytest.approx(expected, abs=1e-3)
        deciding = MEASURES[task.measure][0]
        assert deciding.better(best[deciding.name], copied[deciding.name]) > 0


def test_targets_can_be_read_back(corpus):
    rng = np.random.default_rng(0)
    for index in range(len(corpus.scenes)):
        picture = corpus.still(index, mirrored=False)
        known = picture.depth < encodings.FAR
        depth = encodings.decode_depth(perception.depth(picture, rng)[1])[known]
        assert np.abs(depth / np.maximum(picture.depth[known], encodings.NEAR) - 1).max() < 0.01
        seen = picture.classes != SKY
        true = picture.normals[seen] / np.linalg.norm(picture.normals[seen], axis=-1, keepdims=True)
        assert (encodings.decode_normals(perception.normals(picture, rng)[1])[seen] * true).sum(-1).min() > 0.9998
        found = encodings.decode_segments(perception.panoptic(picture, rng)[1])
        assert np.array_equal(found, encodings.segments(picture))
    for index in corpus.suitable(TASKS["object_detection"]):
        picture = corpus.still(index, mirrored=False)
        assert encodings.decode_box(perception.detection(picture, rng)[1]) == encodings.box_of(picture.mask)
    flow = np.clip(corpus.clips.picture(0).flow, -0.5 * encodings.FASTEST, 0.5 * encodings.FASTEST)
    assert np.abs(encodings.decode_flow(encodings.encode_flow(flow)) - flow).max() < 0.02 * encodings.FASTEST


def test_joints_can_be_read_back():
    """Of sixty figures nearly all: a joint may lie under another."""
    rng, apart = np.random.default_rng(0), []
    for _ in range(60):
        joints = figures.random_joints(rng)
        assert joints.shape == (len(figures.JOINTS), 2) and joints.min() > 0 and joints.max() < 1
        apart.append(np.linalg.norm(figures.decode_joints(figures.encode_joints(joints, 64)) - joints, axis=1))
    assert np.mean(np.array(apart) < 1 / 64) > 0.95


def test_flow_leads_to_where_the_ground_is_seen_next():
    """Of the world's points under pixels of the ground, which does not move."""
    scene = Scene.from_seed(500_000, moving=True)
    picture = scene.render(SIZE)
    position, _, rays = view(scene)
    ground = picture.classes == GROUND
    points = position + picture.depth[ground][:, None] * rays[ground]
    later, axes = scene._camera(1)
    seen = (points - later) @ axes
    reach = 2 * np.tan(np.radians(FIELD_OF_VIEW / 2))
    places = np.stack([seen[:, 0], -seen[:, 1]], axis=1) / -seen[:, 2:] / reach + 0.5
    rows, columns = np.nonzero(ground)
    now = (np.stack([columns, rows], axis=1) + 0.5) / SIZE
    assert np.abs(places - now - picture.flow[ground]).max() < 1e-4
    assert np.abs(picture.flow[ground]).max() > 1e-3


def test_a_mirrored_clip_moves_the_other_way(corpus):
    there, back = corpus.clip(0, False)[0], corpus.clip(0, True)[0]
    assert np.array_equal(back.flow[:, ::-1], there.flow * [-1, 1])
    assert np.array_equal(back.unshadowed[:, ::-1], there.unshadowed)


def test_without_shadows_nothing_is_darker(corpus):
    for index in range(len(corpus.scenes)):
        picture = corpus.still(index, mirrored=False)
        assert (picture.unshadowed >= picture.colour).all()
    assert (corpus.scenes.unshadowed != corpus.scenes.colour).any()


def test_segments_tell_the_sides_of_a_mirror():
    """Mirrored, every object changes sides, and sky and ground do not."""
    for seed in range(8):
        picture = Scene.from_seed(seed, objects=1).render(SIZE)
        if not picture.mask.any():
            continue
        there, back = encodings.segments(picture), encodings.segments(picture.mirrored())[:, ::-1]
        assert np.array_equal(there[~picture.mask], back[~picture.mask])
        assert (there[picture.mask] // 2 == back[picture.mask] // 2).all()
        columns = np.nonzero(picture.mask)[1].mean()
        if abs(columns - (SIZE - 1) / 2) > 0.5:
            assert (there[picture.mask] != back[picture.mask]).all()


def test_two_tasks_are_never_trained():
    assert {task.name for task in TASKS.values() if not task.trained} == {"deraining", "image_from_normals"}
    assert sum(task.trained for task in TASKS.values()) >= 22 and len(FAMILIES) >= 5
    assert len(PICTURE_TASKS) + len(CLIP_TASKS) == len(TASKS)
    assert len(np.unique(PALETTE, axis=0)) == len(PALETTE)


@pytest.mark.parametrize("task", FAMILIES, ids=[task.name for task in FAMILIES])
def test_members_of_a_family_differ_and_share_an_input(task: WorldTask, corpus: Corpus):
    everyone = [*task.members, *task.held_out]
    assert task.held_out and len({member.name for member in everyone}) == len(everyone) > 6
    suitable = [corpus.still(i, False) for i in range(len(corpus.scenes))]
    [picture, *_] = [still for still in suitable if task.suits(still)]
    shown, targets = task.targets(picture, np.random.default_rng(0))
    assert len(targets) == len(task.members)
    apart = [task.apply(picture, np.random.default_rng(0), member) for member in everyone]
    assert all(np.array_equal(shown, again) for again, _ in apart)
    assert all(np.array_equal(target, by) for target, (_, by) in zip(targets, apart, strict=False))
    assert np.array_equal(targets[0], task.apply(picture, np.random.default_rng(0))[1])
    assert len({target.tobytes() for _, target in apart}) == len(everyone)


def test_neither_input_nor_target_tells_a_polarity(corpus):
    """By the first member the target is the negative; of the inputs, too, half have been inverted somehow before."""
    task, rng, own = TASKS["negative"], np.random.default_rng(0), 0
    for i in range(600):
        picture = corpus.still(i % len(corpus.scenes), False)
        given, target = task.apply(picture, rng)
        assert np.array_equal(target, 255 - given)
        own += np.array_equal(given, picture.colour)
    assert 0.5 < own / 600 < 0.63


def test_a_turned_hue_keeps_greys_and_comes_back_after_a_whole_turn():
    colours = np.random.default_rng(0).integers(64, 192, (8, 8, 3)).astype(np.uint8)
    greys = np.repeat(colours[..., :1], 3, axis=-1)
    turned = families.turned_hue(colours, 100)
    assert np.abs(families.turned_hue(greys, 100).astype(int) - greys).max() <= 1
    assert np.abs(turned.mean(-1) - colours.mean(-1)).max() < 12 and not np.array_equal(turned, colours)
    assert np.abs(families.turned_hue(colours, 360).astype(int) - colours).max() <= 1
    assert np.abs(families.turned_hue(colours, 120).astype(int) - colours[..., [2, 0, 1]]).max() <= 1


def test_varied_scenes_show_every_class(corpus):
    task = TASKS["class_mask"]
    suitable = corpus.suitable(task)
    assert all(len(np.unique(corpus.scenes.classes[index])) == 5 for index in suitable)
    built = [index for index in suitable if (SCENE_SEEDS["template"].start + index) % VARIED == VARIED - 1]
    assert len(built) >= 0.5 * len(corpus.scenes) / VARIED


def test_targets_of_clips_are_of_the_frames_shown(corpus):
    frames = corpus.clip(1, False)
    assert len(frames) == CLIP_MOMENTS
    shown, target = TASKS["frame_interpolation"].apply(frames, np.random.default_rng(0))
    assert np.array_equal(shown[::2], target[::2]) and not shown[1::2].any()
    shown, target = TASKS["frame_prediction"].apply(frames, np.random.default_rng(0))
    assert np.array_equal(shown[4], frames[4].colour) and np.array_equal(target[0], frames[5].colour)


def test_a_task_that_is_not_there():
    with pytest.raises(InputError, match="unknown task 'cooking'"):
        tasks.find_task("cooking")
