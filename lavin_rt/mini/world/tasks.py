"""The tasks as functions: a picture (or a clip) to an input and a target.

Tasks of pictures and of clips after those of LaVin-DiT (arXiv 2411.11505, section 4.1), and families of mappings that
only the pairs of the context tell. Every target is decided by its input, the task and, of a family, the member that
the context shows, never by chance. The names let `depth` and `normal` be short for one task each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from lavin_rt.errors import InputError
from lavin_rt.mini.world import families, moving, perception, restorations
from lavin_rt.mini.world.families import AS_IT_IS, Family, Member
from lavin_rt.mini.world.scenes import ScenePicture

CLASS_SEEN = 0.01  # share of a picture that an object to be boxed, or each class of a varied scene, covers at least


@dataclasses.dataclass(frozen=True, eq=False)
class WorldTask:
    """A task.

    Attributes:
        name: also of its template folder.
        make: `(picture, rng) -> (input, target)`, uint8 `[S, S, 3]`; for clips `(frames, rng) -> (input, target)`,
            uint8 `[5, S, S, 3]`, of the ten pictures of a clip. Of a family, the target is what members are applied to.
        source: "scene", "single" (scenes with one object), "varied" (scenes in which every class is seen), "any"
            (photographs too) or "clip".
        measure: how results are measured, a key of `measures.MEASURES`.
        weight: share among the transformer's training samples of its kind, pictures or clips; 0 for the tasks that are
            never trained.
        family: of a family, its mappings, one for a whole context: any that is trained in training, the first in
            templates and evaluation, which also asks for some that are never trained.
    """

    name: str
    make: Callable[[Any, np.random.Generator], tuple[np.ndarray, np.ndarray]]
    source: str
    measure: str
    weight: float
    family: Family | None = None

    @property
    def trained(self) -> bool:
        return self.weight > 0

    @property
    def is_clip(self) -> bool:
        return self.source == "clip"

    @property
    def members(self) -> tuple[Member, ...]:
        """The mappings that are trained; of a task that is no family the one that leaves the target as it is."""
        return (AS_IT_IS,) if self.family is None else self.family.members

    @property
    def held_out(self) -> tuple[Member, ...]:
        """Mappings of the family that are never trained."""
        return () if self.family is None else self.family.held_out

    def suits(self, picture: ScenePicture) -> bool:
        """Whether the task can be asked about a scene's picture."""
        if self.source == "single":
            return int(picture.instances.max()) == 1 and bool(picture.mask.mean() > CLASS_SEEN)
        if self.source == "varied":
            seen = np.bincount(picture.classes.ravel(), minlength=5) > CLASS_SEEN * picture.classes.size
            return bool(seen.all())
        return True

    def apply(
        self, picture: Any, rng: np.random.Generator, member: Member | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Input and target as `make`'s, the target by a member of the family, the first if none is given."""
        shown, target = self.make(picture, rng)
        return shown, (member or self.members[0])(picture, shown, target)

    def targets(self, picture: Any, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
        """The input, and the target of every trained member."""
        shown, target = self.make(picture, rng)
        return shown, [member(picture, shown, target) for member in self.members]


TASKS = {
    task.name: task
    for task in (
        WorldTask("depth_estimation", perception.depth, "scene", "depth", 1.8),
        WorldTask("normal_estimation", perception.normals, "scene", "normals", 1.5),
        WorldTask("foreground_segmentation", perception.foreground, "scene", "mask", 1.6),
        WorldTask("panoptic_segmentation", perception.panoptic, "scene", "segments", 1.6),
        WorldTask("object_detection", perception.detection, "single", "box", 1.2),
        WorldTask("instance_contours", perception.contours, "scene", "contours", 1.0),
        WorldTask("shadow_detection", perception.shadows, "scene", "mask", 0.8),
        WorldTask("edge_detection", perception.edges, "any", "restoration", 3.0),
        WorldTask("keypoint_detection", perception.keypoints, "any", "joints", 1.4),
        WorldTask("figure_from_keypoints", perception.figure_from_keypoints, "any", "restoration", 0.7),
        WorldTask("image_from_depth", perception.image_from_depth, "scene", "restoration", 0.8),
        WorldTask("image_from_normals", perception.image_from_normals, "scene", "restoration", 0.0),
        WorldTask("inpainting", restorations.inpainting, "any", "restoration", 1.8),
        WorldTask("colorization", restorations.colorization, "any", "colour", 1.0),
        WorldTask("deblurring", restorations.deblurring, "any", "restoration", 1.0),
        WorldTask("super_resolution", restorations.super_resolution, "any", "restoration", 0.8),
        WorldTask("deraining", restorations.deraining, "any", "restoration", 0.0),
        WorldTask("desnowing", restorations.desnowing, "any", "restoration", 0.8),
        WorldTask("denoising", restorations.denoising, "any", "restoration", 1.0),
        WorldTask("low_light", restorations.low_light, "any", "restoration", 0.8),
        WorldTask("dehazing", restorations.dehazing, "scene", "restoration", 0.8),
        WorldTask("shadow_removal", restorations.shadow_removal, "scene", "restoration", 0.8),
        WorldTask("frame_prediction", moving.frame_prediction, "clip", "restoration", 1.5),
        WorldTask("frame_interpolation", moving.frame_interpolation, "clip", "restoration", 1.0),
        WorldTask("video_depth_estimation", moving.video_depth, "clip", "depth", 1.0),
        WorldTask("video_normal_estimation", moving.video_normals, "clip", "normals", 1.0),
        WorldTask("video_segmentation", moving.video_segmentation, "clip", "mask", 1.0),
        WorldTask("optical_flow", moving.optical_flow, "clip", "flow", 2.0),
        WorldTask("negative", families.negative, "any", "restoration", 1.5, families.POLARITY),
        WorldTask("hue", families.hue, "any", "restoration", 2.0, families.HUE),
        WorldTask("channel_order", families.channel_order, "any", "restoration", 2.0, families.CHANNELS),
        WorldTask("orientation", families.orientation, "any", "restoration", 1.5, families.ORIENTATION),
        WorldTask("class_mask", families.class_mask, "varied", "mask", 2.0, families.CLASS_MASK),
        WorldTask("class_colours", families.class_mask, "varied", "restoration", 2.0, families.CLASS_COLOURS),
        WorldTask("mask_colours", families.class_mask, "scene", "restoration", 1.5, families.MASK_COLOURS),
    )
}
PICTURE_TASKS = tuple(task for task in TASKS.values() if not task.is_clip)
CLIP_TASKS = tuple(task for task in TASKS.values() if task.is_clip)


def find_task(name: str) -> WorldTask:
    """The task of that name.

    Raises:
        InputError: no such task.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name]
