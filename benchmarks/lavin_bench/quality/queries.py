"""Held-out queries of lavin-mini's tasks with a context each, and the yardsticks that need no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from lavin_rt.mini.world.data import CLIP_MOMENTS, SceneArrays, render_arrays
from lavin_rt.mini.world.families import Member
from lavin_rt.mini.world.scenes import VARIED, Picture, Scene
from lavin_rt.mini.world.sources import CLIPS_FROM, PHOTOGRAPHS_SHARE, SCENE_SEEDS, photograph_crop
from lavin_rt.mini.world.tasks import TASKS, WorldTask

SPLIT = "evaluation"
# The scenes of contexts begin here within the split, so that no query's scene is in a context.
CONTEXTS_FROM = 100_000
# Members of a family that are asked for: of those that are trained, among them the first, and of the others.
MEMBERS = 4
# Pairs that contexts are chosen from, by whether the task is of clips: each is encoded once, whatever the queries.
POOL = {False: 32, True: 16}
CROPS_PER_SCENE = 0.125  # photographs on top of the scenes, for tasks that photographs serve for as well


@dataclasses.dataclass(frozen=True, eq=False)
class TaskQueries:
    """Queries of one task and the pairs that show it, all of scenes and photographs that training never saw.

    Attributes:
        task: the task.
        pool: uint8 `[pairs in the pool, 2, T, S, S, 3]`, inputs and targets.
        picks: int64 `[N, most pairs]`, rows of the pool that are each query's context; fewer pairs are the beginning
            of more, and no row comes twice in a context.
        queries, targets: uint8 `[N, T, S, S, 3]`.
        scenes: how many of the queries are pictures of scenes, each of another one; crops of photographs follow.
        members: of a family, the mappings asked for, query by query in turn; as many blocks of the pool.
        held_out: whether these are members that are never trained.
    """

    task: WorldTask
    pool: np.ndarray
    picks: np.ndarray
    queries: np.ndarray
    targets: np.ndarray
    scenes: int
    members: tuple[Member, ...] = ()
    held_out: bool = False

    @property
    def name(self) -> str:
        """The task's, and whether members that are never trained are meant."""
        return f"{self.task.name}, held out" if self.held_out else self.task.name

    def __len__(self) -> int:
        return len(self.queries)

    def partner(self, rows: Any) -> Any:
        """The rows of the pool, half of the member's block further on, whose targets stand beside these rows' inputs in
        shuffled contexts. Exchanged within a context instead, a model that pools over its pairs would see the same as
        before.
        """
        block = len(self.pool) // max(len(self.members), 1)
        return rows // block * block + (rows + block // 2) % block

    def context_means(self, pairs: int) -> np.ndarray:
        """The mean of the targets of each query's context, uint8 `[N, T, S, S, 3]`."""
        return np.stack([np.uint8(self.pool[row, 1].mean(0) + 0.5) for row in self.picks[:, :pairs]])


@dataclasses.dataclass(eq=False)
class Scenery:
    """A split's scenes at one size, each rendered once."""

    size: int
    show: bool = True
    split: str = SPLIT

    def __post_init__(self):
        self._kept: dict[tuple[int, int], SceneArrays] = {}

    def render(self, seeds: Sequence[int], moments: int = 1) -> list[SceneArrays]:
        """The scenes of seeds within the split, one by one."""
        first = SCENE_SEEDS[self.split].start
        todo = [seed for seed in seeds if (seed, moments) not in self._kept]
        what = f"rendering {'clips' if moments > 1 else 'scenes'}"
        for seed in tqdm(todo, what, leave=False, disable=None if self.show else True):
            self._kept[seed, moments] = render_arrays([first + seed], self.size, moments)
        return [self._kept[seed, moments] for seed in seeds]

    def pictures(self, task: WorldTask, first: int, count: int) -> list[Any]:
        """What a task's function takes, of `count` scenes from the seed `first` on that suit the task."""
        if task.is_clip:
            seeds = range(CLIPS_FROM + first, CLIPS_FROM + first + count)
            return [[arrays.picture(0, t) for t in range(CLIP_MOMENTS)] for arrays in self.render(seeds, CLIP_MOMENTS)]
        if task.source not in ("single", "varied"):
            return [arrays.picture(0) for arrays in self.render(range(first, first + count))]
        found: list[Picture] = []
        seed = first
        while len(found) < count:
            if self._likely(task, SCENE_SEEDS[self.split].start + seed):
                picture = self.render([seed])[0].picture(0)
                found += [picture] if task.suits(picture) else []
            seed += 1
        return found

    @staticmethod
    def _likely(task: WorldTask, seed: int) -> bool:
        """Whether it is worth rendering a scene to see if it suits the task."""
        return len(Scene.from_seed(seed).solids) == 1 if task.source == "single" else seed % VARIED == VARIED - 1


def draw(
    size: int,
    scenes: int,
    pairs: int,
    tasks: Sequence[WorldTask],
    seed: int = 0,
    show: bool = True,
    split: str = SPLIT,
) -> list[TaskQueries]:
    """Queries of every task, and of a family also those about members that are never trained; tasks of the same kind
    of scene are asked about the same scenes, in the same order.

    Args:
        size: of pictures, pixels a side.
        scenes: queries a task, besides crops of photographs.
        pairs: the most in a context.
        tasks: any of `lavin_rt.mini.world.tasks.TASKS`.
        seed: of degradations, crops and the choice of contexts; the scenes are always the split's first.
        show: print as it goes.
        split: "evaluation", which nothing is chosen by; or "train", to choose by.
    """
    scenery, drawn = Scenery(size, show, split), []
    for task in tasks:
        some = task.members[:: -(-len(task.members) // MEMBERS)]
        drawn.append(_drawn(scenery, task, some, scenes, pairs, seed))
        if task.held_out:
            others = _drawn(scenery, task, task.held_out[:MEMBERS], scenes, pairs, seed)
            drawn.append(dataclasses.replace(others, held_out=True))
    return drawn


def _drawn(
    scenery: Scenery, task: WorldTask, members: Sequence[Member], scenes: int, pairs: int, seed: int
) -> TaskQueries:
    index = list(TASKS).index(task.name)
    photographs = round(CROPS_PER_SCENE * scenes) if task.source == "any" else 0
    # A few queries need no large pool.
    pool = min(POOL[task.is_clip], max(2 * pairs, 4 * scenes))
    crops = round(PHOTOGRAPHS_SHARE * pool) if task.source == "any" else 0

    def pictures(role: int, first: int, count: int, crops: int) -> list[tuple[Any, np.random.Generator]]:
        """Pictures, and what their degradations are drawn from."""
        rngs = [np.random.default_rng([seed, index, role, item]) for item in range(count + crops)]
        found = scenery.pictures(task, first, count)
        found += [Picture(photograph_crop(scenery.split, rng, scenery.size)) for rng in rngs[count:]]
        return list(zip(found, rngs, strict=True))

    def stacked(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """uint8 `[N, 2, T, S, S, 3]`."""
        both = np.stack([np.stack(pair) for pair in pairs])
        return both if task.is_clip else both[:, :, None]

    asked = pictures(0, 0, scenes, photographs)
    both = stacked([task.apply(*one, members[item % len(members)]) for item, one in enumerate(asked)])
    rng = np.random.default_rng([seed, index, 2])
    picks = np.stack([rng.choice(pool, pairs, replace=False) + pool * (i % len(members)) for i in range(len(both))])
    made = [(picture, *task.make(picture, rng)) for picture, rng in pictures(1, CONTEXTS_FROM, pool - crops, crops)]
    shown = stacked([(one[1], member(*one)) for member in members for one in made])
    return TaskQueries(task, shown, picks, both[:, 0], both[:, 1], scenes, tuple(members))


def alike(drawn: Sequence[TaskQueries]) -> list[TaskQueries]:
    """The largest group of tasks of pictures, but for families, that ask about the same pictures, in order."""
    groups: dict[bytes, list[TaskQueries]] = {}
    for one in drawn:
        if not one.task.is_clip and one.task.family is None:
            groups.setdefault(one.queries[: one.scenes].tobytes(), []).append(one)
    return max(groups.values(), key=len, default=[])
