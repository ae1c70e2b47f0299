"""Scenes with exact ground truth: spheres, boxes and cylinders on a ground, ray-cast by embree, shaded here.

World axes: x right, y up, z towards the viewer; the ground is y = 0. A scene is a function of its seed; a clip is the
same scene at moments 0, 1, 2, ... while objects slide and the camera orbits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lavin_rt.errors import missing_extra
from lavin_rt.mini.world.sources import photograph_crop, split_of

SKY, GROUND, SPHERE, BOX, CYLINDER = range(5)
FIELD_OF_VIEW = 50.0  # degrees
TEXTURE_SIZE = 128
FLOW_SIGNS = np.array([-1, 1], np.float32)  # from what is divided by minus the depth to right and down
VARIED = 8  # one seed in so many has a sphere, a box and a cylinder, and a camera so low that there is sky


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture: `colour` uint8 `[H, W, 3]`."""

    colour: np.ndarray

    def mirrored(self) -> Picture:
        """The picture seen in a mirror: columns reversed."""
        return Picture(np.ascontiguousarray(self.colour[:, ::-1]))


@dataclasses.dataclass(frozen=True, eq=False)
class ScenePicture(Picture):
    """A picture of a scene and what is known about every pixel (from the ray through its centre).

    Attributes:
        depth: float32 `[H, W]`, along the viewing axis in world units; infinite where there is only sky.
        normals: float32 `[H, W, 3]`, unit vectors in camera axes (right, up, towards the camera); 0 for sky.
        classes: uint8 `[H, W]`, `SKY`, `GROUND`, `SPHERE`, `BOX` or `CYLINDER`.
        instances: uint8 `[H, W]`, 0 for sky and ground, objects from 1.
        unshadowed: uint8 `[H, W, 3]`, the colour were there no cast shadows.
        flow: float32 `[H, W, 2]`, the way to where the point is seen a moment later, right and down, as shares of the
            picture's side; 0 for sky.
    """

    depth: np.ndarray
    normals: np.ndarray
    classes: np.ndarray
    instances: np.ndarray
    unshadowed: np.ndarray
    flow: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """bool `[H, W]`: the silhouettes of the objects."""
        return np.greater(self.instances, 0)

    def mirrored(self) -> ScenePicture:
        """The picture seen in a mirror: columns reversed, normals too."""
        flipped = {f.name: np.ascontiguousarray(getattr(self, f.name)[:, ::-1]) for f in dataclasses.fields(self)}
        flipped["normals"] = flipped["normals"] * np.array([-1, 1, 1], np.float32)
        flipped["flow"] = flipped["flow"] * np.array([-1, 1], np.float32)
        return ScenePicture(**flipped)


@dataclasses.dataclass(frozen=True, eq=False)
class _Texture:
    """Albedo over a surface: one of "plain", "checker", "stripes", "photograph"."""

    kind: str
    colours: np.ndarray  # [2, 3]
    scale: float
    turn: float
    pixels: np.ndarray | None = None  # uint8 [S, S, 3]

    def albedo(self, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """Albedo `[N, 3]` at points in the object's own axes, projected along the axis that the surface faces most."""
        facing = np.abs(normals).argmax(1)
        u = np.where(facing == 0, points[:, 2], points[:, 0])
        v = np.where(facing == 1, points[:, 2], points[:, 1])
        u, v = np.cos(self.turn) * u - np.sin(self.turn) * v, np.sin(self.turn) * u + np.cos(self.turn) * v
        u, v = u * self.scale, v * self.scale
        if self.kind == "photograph":
            assert self.pixels is not None
            size = len(self.pixels)
            # Mirrored repetition: no seams.
            column, row = ((np.abs((w * 0.5) % 2 - 1) * (size - 1)).astype(int) for w in (u, v))
            return self.pixels[row, column] * ((0.35 + 0.65 * self.colours[0]) / 255)
        if self.kind == "plain":
            return np.broadcast_to(self.colours[0], (len(points), 3))
        cells = np.floor(u) if self.kind == "stripes" else np.floor(u) + np.floor(v)
        return self.colours[(cells % 2).astype(int)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Solid:
    kind: int
    half: np.ndarray  # [3]: half extents; a sphere's radius three times; a cylinder's axis is its own y
    rotation: np.ndarray  # [3, 3], own axes to world
    position: np.ndarray  # [3]
    velocity: np.ndarray  # [3], per moment
    texture: _Texture
    shine: float

    def own_normals(self, points: np.ndarray) -> np.ndarray:
        """Exact unit normals `[N, 3]` at points `[N, 3]`, both in the object's own axes, float32."""
        if self.kind == SPHERE:
            return points / np.sqrt((points * points).sum(1, keepdims=True))
        normals = np.zeros_like(points)
        if self.kind == BOX:
            axis, rows = (np.abs(points) / self.half).argmax(1), np.arange(len(points))
            normals[rows, axis] = np.sign(points[rows, axis])
            return normals
        radius = np.hypot(points[:, 0], points[:, 2])
        cap = np.abs(points[:, 1]) / self.half[1] > radius / self.half[0]
        normals[:, 1] = np.where(cap, np.sign(points[:, 1]), 0)
        side = ~cap / np.maximum(radius, 1e-9)
        normals[:, 0], normals[:, 2] = points[:, 0] * side, points[:, 2] * side
        return normals


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """A scene, described; `render` makes pictures of it."""

    solids: tuple[_Solid, ...]
    ground: _Texture
    sky: np.ndarray  # [2, 3], at the horizon and overhead
    light: np.ndarray  # [3], unit, towards the light
    ambient: float
    camera: tuple[float, float, float]  # azimuth, elevation (radians), distance
    orbit: float  # radians per moment
    target: np.ndarray  # [3]

    @classmethod
    def from_seed(cls, seed: int, objects: int | None = None, moving: bool = False) -> Scene:
        """The scene of a seed, whose range decides the photographs among its textures.

        Args:
            seed: of one of `sources.SCENE_SEEDS`.
            objects: how many; from 1 to 4 by the seed if not given. Every eighth seed has all kinds under some sky.
            moving: for a clip: plainer, and its objects slide faster, so that what comes next can be told.
        """
        rng, split = np.random.default_rng([seed, 64]), split_of(seed)
        count = objects or int(rng.choice([1, 2, 3, 4], p=[0.35, 0.25, 0.25, 0.15]))
        varied = objects is None and seed % VARIED == VARIED - 1
        count = max(count, 3) if varied else count
        size = rng.uniform(0.75, 1.15) * (1.15 if count == 1 else 1.0)
        solids: list[_Solid] = []
        for _ in range(200):
            if len(solids) == count:
                break
            kind = SPHERE + len(solids) if varied and len(solids) < 3 else int(rng.choice([SPHERE, BOX, CYLINDER]))
            solid = _random_solid(rng, kind, split, size, 0.8 if count == 1 else 1.4, moving)
            reach = np.linalg.norm(solid.half[[0, 2]])
            apart = [np.linalg.norm((s.position - solid.position)[[0, 2]]) for s in solids]
            reaches = [np.linalg.norm(s.half[[0, 2]]) for s in solids]
            if all(d > 0.8 * (reach + r) for d, r in zip(apart, reaches, strict=True)):
                solids.append(solid)
        azimuth = rng.uniform(-np.pi, np.pi)
        light = np.array([rng.normal(), rng.uniform(0.8, 2.0), rng.normal()])
        light = light + 0.7 * np.array([np.sin(azimuth), 0, np.cos(azimuth)])  # rather from behind the camera
        warm = rng.random()
        sky = np.array([[0.75, 0.85, 0.95], [0.35, 0.55, 0.9]]) * (1 - warm * 0.3) + warm * 0.3 * np.array(
            [[0.95, 0.8, 0.6], [0.5, 0.5, 0.6]]
        )
        return cls(
            solids=tuple(solids),
            ground=_random_ground(rng, split, moving),
            sky=np.clip(sky * rng.uniform(0.85, 1.05), 0, 1),
            light=light / np.linalg.norm(light),
            ambient=rng.uniform(0.3, 0.5),
            camera=(azimuth, rng.uniform(0.18, 0.36 if varied else 0.75), rng.uniform(3.6, 5.2)),
            orbit=rng.uniform(-0.03, 0.03),
            target=np.array([rng.normal(0, 0.2), rng.uniform(0.3, 0.7), rng.normal(0, 0.2)]),
        )

    def render(self, size: int = 64, moment: float = 0.0) -> ScenePicture:
        """The picture at a moment: colours from four rays a pixel with shadows, everything else from the centre's."""
        position, axes = self._camera(moment)
        moved = [s.position + moment * s.velocity for s in self.solids]
        caster = _caster([_Placed(s.kind, s.half, s.rotation, at) for s, at in zip(self.solids, moved, strict=True)])
        position32, axes32 = position.astype(np.float32), axes.astype(np.float32)
        rays = _rays(size) @ axes32.T  # [5 * size * size, 3], rows of `axes` as columns: right, up, back
        found = caster.run(np.broadcast_to(position32, rays.shape), rays, query="INTERSECT", output=True)
        owner, distance = found["geomID"], found["tfar"]  # of objects, the ground first; -1 where there is only sky
        points = position32 + np.where(owner >= 0, distance, 0)[:, None] * rays

        pixels = size * size
        normals = np.zeros_like(points)
        albedo = np.zeros((4 * pixels, 3), np.float32)
        shine = np.zeros(4 * pixels, np.float32)
        for i in range(1 + len(self.solids)):
            here = np.flatnonzero(owner == i)
            first = np.searchsorted(here, pixels)  # from here on samples of colour
            samples = here[first:] - pixels
            if i == 0:
                normals[here, 1] = 1
                albedo[samples] = self.ground.albedo(points[here[first:]], normals[here[first:]])
                continue
            solid = self.solids[i - 1]
            rotation = solid.rotation.astype(np.float32)
            own = (points[here] - moved[i - 1].astype(np.float32)) @ rotation
            own_normals = solid.own_normals(own)
            normals[here] = own_normals @ rotation.T
            scaled = own[first:] / np.float32(solid.half.max())
            albedo[samples] = solid.texture.albedo(scaled, own_normals[first:])
            shine[samples] = solid.shine
        dark, light = self._shaded(caster, rays[pixels:], points[pixels:], normals[pixels:], albedo, shine)
        # Haze: the ground's edge fades into the horizon.
        far = np.where(owner[pixels:] < 0, 1, np.clip((distance[pixels:] - 9) / 14, 0, 1))
        hazy = np.flatnonzero(far)
        far, sky = far[hazy, None], self._sky(rays[pixels:][hazy])

        def seen(lit: np.ndarray) -> np.ndarray:
            """Shaded samples over the sky, four a pixel, to uint8 `[size, size, 3]`."""
            lit[hazy] += (sky - lit[hazy]) * far
            return (np.clip(lit.reshape(4, size, size, 3).mean(0), 0, 1) * 255 + 0.5).astype(np.uint8)

        owner = owner[:pixels]
        of_owner = np.array([GROUND] + [s.kind for s in self.solids] + [SKY], np.uint8)  # the last is that of -1
        depth = np.where(owner >= 0, distance[:pixels], np.float32(np.inf))  # rays have length 1 along the viewing axis
        shape = (size, size)
        return ScenePicture(
            seen(dark),
            depth.reshape(shape),
            (normals[:pixels] @ axes32).reshape(*shape, 3),
            of_owner[owner].reshape(shape),
            np.maximum(owner, 0).astype(np.uint8).reshape(shape),
            seen(light),
            self._flow(points[:pixels], owner, moment).reshape(*shape, 2),
        )

    def _shaded(
        self,
        caster: Any,
        rays: np.ndarray,
        points: np.ndarray,
        normals: np.ndarray,
        albedo: np.ndarray,
        shine: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Colours `[N, 3]` float32 of points with shadows, and without."""
        light = self.light.astype(np.float32)
        lambert = np.maximum(normals @ light, 0)
        facing = np.flatnonzero(lambert > 0)
        origins = points[facing] + np.float32(1e-3) * normals[facing]
        reached = np.zeros(len(points), np.float32)
        reached[facing] = caster.run(origins, np.broadcast_to(light, origins.shape), query="OCCLUDED") < 0
        glossy = np.flatnonzero(shine * lambert > 0)
        away = rays[glossy]
        half = light - away / np.sqrt((away * away).sum(1, keepdims=True))
        half /= np.sqrt((half * half).sum(1, keepdims=True))
        direct = albedo * (np.float32(1.1 - self.ambient) * lambert)[:, None]
        direct[glossy] += (shine[glossy] * np.maximum((normals[glossy] * half).sum(1), 0) ** 30)[:, None]
        ambient = albedo * np.float32(self.ambient)
        return ambient + direct * reached[:, None], ambient + direct

    def _sky(self, rays: np.ndarray) -> np.ndarray:
        """Colours `[N, 3]` float32 of the sky along rays `[N, 3]`."""
        up = np.maximum(rays[:, 1] / np.sqrt((rays * rays).sum(1)), 0)[:, None] ** np.float32(0.7)
        horizon, above = self.sky.astype(np.float32)
        return horizon + (above - horizon) * up

    def _flow(self, points: np.ndarray, owner: np.ndarray, moment: float) -> np.ndarray:
        """Where points `[N, 3]` of the objects `owner` are seen a moment later, less where they are now: float32
        `[N, 2]`, right and down, as shares of the picture's side; 0 for sky.
        """
        velocities = np.array([[0] * 3] + [s.velocity for s in self.solids] + [[0] * 3], np.float32)
        places = []
        for later in (0, 1):
            position, axes = (part.astype(np.float32) for part in self._camera(moment + later))
            seen = (points + later * velocities[owner] - position) @ axes
            places.append(seen[:, :2] / np.minimum(seen[:, 2:], np.float32(-1e-3)))
        flow = (places[1] - places[0]) * np.float32(0.5 / np.tan(np.radians(FIELD_OF_VIEW / 2))) * FLOW_SIGNS
        flow[owner < 0] = 0
        return flow

    def _camera(self, moment: float) -> tuple[np.ndarray, np.ndarray]:
        """Position `[3]` and axes `[3, 3]`, whose columns are right, up and back."""
        azimuth, elevation, distance = self.camera
        azimuth = azimuth + moment * self.orbit
        sa, ca, se, ce = np.sin(azimuth), np.cos(azimuth), np.sin(elevation), np.cos(elevation)
        axes = np.array([[ca, -se * sa, ce * sa], [0, ce, se], [-sa, -se * ca, ce * ca]])
        return self.target + distance * axes[:, 2], axes


class _Placed(NamedTuple):
    """A solid where it stands at a moment; see `_Solid`."""

    kind: int
    half: np.ndarray
    rotation: np.ndarray
    position: np.ndarray


@functools.cache
def _unit_mesh(kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertices float64 `[V, 3]` and faces int32 `[F, 3]` of a solid whose half extents are 1, or of the ground."""
    import trimesh

    if kind == GROUND:
        corners = 60.0 * np.array([[-1, 0, -1], [-1, 0, 1], [1, 0, 1], [1, 0, -1]])
        return corners, np.array([[0, 1, 2], [0, 2, 3]], np.int32)
    if kind == SPHERE:
        shape = trimesh.creation.icosphere(subdivisions=3)
    elif kind == BOX:
        shape = trimesh.creation.box(extents=[2, 2, 2])
    else:
        shape = trimesh.creation.cylinder(radius=1, height=2, sections=48)
        shape.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0]))
    return np.array(shape.vertices), np.array(shape.faces, np.int32)


def _caster(solids: Sequence[_Placed]) -> Any:
    """Embree's scene of the ground (geometry 0) and the solids (from 1 on)."""
    try:
        import trimesh  # noqa: F401
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene
    except ImportError as error:
        raise missing_extra(getattr(error, "name", None) or "embreex", "train", "rendering scenes") from None
    scene = EmbreeScene()
    TriangleMesh(scene, *_unit_mesh(GROUND))
    for solid in solids:
        vertices, faces = _unit_mesh(solid.kind)
        TriangleMesh(scene, (vertices * solid.half) @ solid.rotation.T + solid.position, faces)
    return scene


@functools.cache
def _rays(size: int) -> np.ndarray:
    """Rays in camera axes, float32 `[5 * size * size, 3]`: all pixels' centres, then four more sets of points in the
    pixels.
    """
    reach = np.tan(np.radians(FIELD_OF_VIEW / 2))
    sets = []
    for dx, dy in [(0, 0), (-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25)]:
        at = (np.arange(size) + 0.5) / size * 2 - 1
        x, y = np.meshgrid(at + 2 * dx / size, -(at + 2 * dy / size))
        sets.append(np.stack([x * reach, y * reach, -np.ones_like(x)], axis=-1).reshape(-1, 3))
    return np.concatenate(sets).astype(np.float32)


def _colour(rng: np.random.Generator, saturation: tuple[float, float] = (0.25, 0.95)) -> np.ndarray:
    import colorsys

    return np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(0.45, 1.0)))


def _random_texture(rng: np.random.Generator, split: str, colours: np.ndarray, plain: float) -> _Texture:
    rest = 1 - plain
    kind = rng.choice(["plain", "checker", "stripes", "photograph"], p=[plain, rest / 4, rest / 4, rest / 2])
    pixels = photograph_crop(split, rng, TEXTURE_SIZE) if kind == "photograph" else None
    scale = rng.uniform(0.7, 1.6) if kind == "photograph" else rng.uniform(1.2, 3.0)
    return _Texture(str(kind), colours, scale, rng.uniform(0, np.pi), pixels)


def _random_ground(rng: np.random.Generator, split: str, moving: bool) -> _Texture:
    tints = np.array([[0.55, 0.45, 0.3], [0.35, 0.5, 0.25], [0.6, 0.6, 0.58], [0.75, 0.68, 0.5]])
    first = tints[rng.integers(len(tints))] * rng.uniform(0.8, 1.25)
    colours = np.clip(np.stack([first, first * rng.uniform(0.6, 0.85)]), 0, 1)
    return dataclasses.replace(
        _random_texture(rng, split, colours, 0.8 if moving else 0.4), scale=rng.uniform(0.4, 1.0)
    )


def _random_solid(rng: np.random.Generator, kind: int, split: str, size: float, spread: float, moving: bool) -> _Solid:
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
    if kind == SPHERE:
        half = np.full(3, rng.uniform(0.4, 0.8))
    elif kind == BOX:
        half = rng.uniform(0.3, 0.75, 3)
    else:
        radius = rng.uniform(0.25, 0.6)
        half = np.array([radius, rng.uniform(0.35, 0.8), radius])
    half = half * size
    height = half[1]
    if kind == CYLINDER and rng.random() < 0.3:  # lying
        rotation = rotation @ np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])
        height = half[0]
    place = rng.uniform(-spread, spread, 2)
    slide = rng.normal(0, 0.08 if moving else 0.04, 2)
    colours = np.stack([_colour(rng), _colour(rng)])
    return _Solid(
        kind,
        half,
        rotation,
        np.array([place[0], height, place[1]]),
        np.array([slide[0], 0, slide[1]]),
        _random_texture(rng, split, colours, 0.8 if moving else 0.45),
        rng.uniform(0, 0.5) if rng.random() < 0.5 else 0.0,
    )
