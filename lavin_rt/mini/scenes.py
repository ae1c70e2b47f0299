"""Scenes with exact ground truth: spheres, boxes and cylinders on a ground, ray-cast by embree, shaded here.

World axes: x right, y up, z towards the viewer; the ground is y = 0. A scene is a function of its seed; a clip is the
same scene at moments 0, 1, 2, ... while objects slide and the camera orbits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lavin_rt.errors import missing_extra
from lavin_rt.mini.sources import photograph_crop, split_of

SKY, GROUND, SPHERE, BOX, CYLINDER = range(5)
FIELD_OF_VIEW = 50.0  # degrees
TEXTURE_SIZE = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture and, where it is a scene, what is known about every pixel (from the ray through its centre).

    Attributes:
        colour: uint8 `[H, W, 3]`.
        depth: float32 `[H, W]`, along the viewing axis in world units; infinite where there is only sky.
        normals: float32 `[H, W, 3]`, unit vectors in camera axes (right, up, towards the camera); 0 for sky.
        classes: uint8 `[H, W]`, `SKY`, `GROUND`, `SPHERE`, `BOX` or `CYLINDER`.
        instances: uint8 `[H, W]`, 0 for sky and ground, objects from 1.
    """

    colour: np.ndarray
    depth: np.ndarray | None = None
    normals: np.ndarray | None = None
    classes: np.ndarray | None = None
    instances: np.ndarray | None = None

    @property
    def is_scene(self) -> bool:
        return self.depth is not None

    @property
    def mask(self) -> np.ndarray:
        """bool `[H, W]`: the silhouettes of the objects."""
        return self.instances > 0

    def mirrored(self) -> Picture:
        """The picture seen in a mirror: columns reversed, normals too."""
        flipped = {
            field.name: None if value is None else np.ascontiguousarray(value[:, ::-1])
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }
        if self.is_scene:
            flipped["normals"] = flipped["normals"] * np.array([-1, 1, 1], np.float32)
        return Picture(**flipped)


@dataclasses.dataclass(frozen=True, eq=False)
class _Texture:
    """Albedo over a surface: one of "plain", "checker", "stripes", "photograph"."""

    kind: str
    colours: np.ndarray  # [2, 3]
    scale: float
    turn: float
    pixels: np.ndarray | None = None

    def albedo(self, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """Albedo `[N, 3]` at points in the object's own axes, projected along the axis that the surface faces most."""
        facing = np.abs(normals).argmax(1)
        u = np.where(facing == 0, points[:, 2], points[:, 0])
        v = np.where(facing == 1, points[:, 2], points[:, 1])
        u, v = np.cos(self.turn) * u - np.sin(self.turn) * v, np.sin(self.turn) * u + np.cos(self.turn) * v
        u, v = u * self.scale, v * self.scale
        if self.kind == "photograph":
            size = len(self.pixels)
            # Mirrored repetition: no seams.
            column, row = (np.abs((w * 0.5) % 2 - 1) * (size - 1) for w in (u, v))
            return self.pixels[row.astype(int), column.astype(int)] * (0.35 + 0.65 * self.colours[0])
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

    def mesh(self) -> Any:
        import trimesh

        if self.kind == SPHERE:
            shape = trimesh.creation.icosphere(subdivisions=3, radius=self.half[0])
        elif self.kind == BOX:
            shape = trimesh.creation.box(extents=2 * self.half)
        else:
            shape = trimesh.creation.cylinder(radius=self.half[0], height=2 * self.half[1], sections=48)
            shape.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0]))
        return shape

    def own_normals(self, points: np.ndarray) -> np.ndarray:
        """Exact unit normals `[N, 3]` at points `[N, 3]`, both in the object's own axes."""
        if self.kind == SPHERE:
            return points / np.linalg.norm(points, axis=1, keepdims=True)
        normals = np.zeros_like(points)
        if self.kind == BOX:
            axis = (np.abs(points) / self.half).argmax(1)
            normals[np.arange(len(points)), axis] = np.sign(points[np.arange(len(points)), axis])
            return normals
        radial = points * [1, 0, 1]
        radius = np.linalg.norm(radial, axis=1, keepdims=True)
        cap = np.abs(points[:, 1:2]) / self.half[1] > radius / self.half[0]
        return np.where(cap, np.sign(points) * [0, 1, 0], radial / np.maximum(radius, 1e-9))


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
    def from_seed(cls, seed: int, objects: int | None = None) -> Scene:
        """The scene of a seed, whose range decides the photographs among its textures.

        Args:
            seed: of one of `sources.SCENE_SEEDS`.
            objects: how many; from 1 to 4 by the seed if not given.
        """
        rng, split = np.random.default_rng([seed, 64]), split_of(seed)
        count = objects or int(rng.choice([1, 2, 3, 4], p=[0.35, 0.25, 0.25, 0.15]))
        size = rng.uniform(0.75, 1.15) * (1.15 if count == 1 else 1.0)
        solids: list[_Solid] = []
        for _ in range(200):
            if len(solids) == count:
                break
            solid = _random_solid(rng, split, size, spread=0.8 if count == 1 else 1.4)
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
            ground=_random_ground(rng, split),
            sky=np.clip(sky * rng.uniform(0.85, 1.05), 0, 1),
            light=light / np.linalg.norm(light),
            ambient=rng.uniform(0.3, 0.5),
            camera=(azimuth, rng.uniform(0.18, 0.75), rng.uniform(3.6, 5.2)),
            orbit=rng.uniform(-0.035, 0.035),
            target=np.array([rng.normal(0, 0.2), rng.uniform(0.3, 0.7), rng.normal(0, 0.2)]),
        )

    def render(self, size: int = 64, moment: float = 0.0) -> Picture:
        """The picture at a moment: colours from four rays a pixel with shadows, everything else from the centre's."""
        try:
            import trimesh
            from trimesh.ray.ray_pyembree import RayMeshIntersector
        except ImportError as error:
            raise missing_extra(getattr(error, "name", None) or "embreex", "train", "rendering scenes") from None
        position, axes = self._camera(moment)
        solids = [dataclasses.replace(s, position=s.position + moment * s.velocity) for s in self.solids]
        meshes = [_plane(trimesh)] + [s.mesh() for s in solids]
        for solid, mesh in zip(solids, meshes[1:], strict=True):
            transform = np.eye(4)
            transform[:3, :3], transform[:3, 3] = solid.rotation, solid.position
            mesh.apply_transform(transform)
        owner = np.repeat(np.arange(len(meshes)), [len(mesh.faces) for mesh in meshes])
        whole = trimesh.util.concatenate(meshes)
        caster = RayMeshIntersector(whole)

        rays = _rays(size) @ axes.T  # [5 * size * size, 3], rows of `axes` as columns: right, up, back
        origins = np.broadcast_to(position, rays.shape)
        face = caster.intersects_first(origins, rays)
        hit = face >= 0
        corner, normal = whole.triangles[face[hit], 0], whole.face_normals[face[hit]]
        distance = ((corner - position) * normal).sum(1) / (rays[hit] * normal).sum(1)
        points = position + distance[:, None] * rays[hit]
        index = owner[face[hit]]
        normals, albedo, shine = np.zeros_like(points), np.zeros_like(points), np.zeros(len(points))
        for i in range(len(meshes)):
            here = index == i
            if not here.any():
                continue
            if i == 0:
                normals[here] = [0, 1, 0]
                albedo[here] = self.ground.albedo(points[here], normals[here])
                continue
            solid = solids[i - 1]
            own = (points[here] - solid.position) @ solid.rotation
            own_normals = solid.own_normals(own)
            normals[here] = own_normals @ solid.rotation.T
            albedo[here] = solid.texture.albedo(own / solid.half.max(), own_normals)
            shine[here] = solid.shine
        shadowed = caster.intersects_any(points + 1e-3 * normals, np.broadcast_to(self.light, points.shape))
        lambert = np.maximum((normals * self.light).sum(1), 0) * ~shadowed
        half = self.light - rays[hit] / np.linalg.norm(rays[hit], axis=1, keepdims=True)
        half /= np.linalg.norm(half, axis=1, keepdims=True)
        gloss = shine * np.maximum((normals * half).sum(1), 0) ** 30 * ~shadowed
        up = np.clip(rays[:, 1] / np.linalg.norm(rays, axis=1), 0, 1)[:, None] ** 0.7
        sky = self.sky[0] * (1 - up) + self.sky[1] * up
        colour = sky.copy()
        lit = albedo * (self.ambient + (1.1 - self.ambient) * lambert)[:, None] + gloss[:, None]
        far = np.clip((distance - 9) / 14, 0, 1)[:, None]  # haze: the ground's edge fades into the horizon
        colour[hit] = lit * (1 - far) + sky[hit] * far

        samples = np.clip(colour.reshape(5, size, size, 3)[1:].mean(0), 0, 1)
        centre = slice(0, size * size)
        of_centre = hit[centre]
        count = int(of_centre.sum())
        depth = np.full(size * size, np.inf, np.float32)
        depth[of_centre] = distance[:count]  # rays have length 1 along the viewing axis
        in_camera = np.zeros((size * size, 3), np.float32)
        in_camera[of_centre] = normals[:count] @ axes
        instances, classes = np.zeros(size * size, np.uint8), np.full(size * size, SKY, np.uint8)
        instances[of_centre] = index[:count]
        classes[of_centre] = np.array([GROUND] + [s.kind for s in solids], np.uint8)[index[:count]]
        shape = (size, size)
        return Picture(
            np.uint8(samples * 255 + 0.5),
            depth.reshape(shape),
            in_camera.reshape(*shape, 3),
            classes.reshape(shape),
            instances.reshape(shape),
        )

    def _camera(self, moment: float) -> tuple[np.ndarray, np.ndarray]:
        """Position `[3]` and axes `[3, 3]`, whose columns are right, up and back."""
        azimuth, elevation, distance = self.camera
        azimuth = azimuth + moment * self.orbit
        back = np.array([np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
        position = self.target + distance * back
        right = np.cross([0, 1, 0], back)
        right /= np.linalg.norm(right)
        return position, np.stack([right, np.cross(back, right), back], axis=1)


def _plane(trimesh: Any) -> Any:
    corners = 60.0 * np.array([[-1, 0, -1], [-1, 0, 1], [1, 0, 1], [1, 0, -1]])
    return trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False)


def _rays(size: int) -> np.ndarray:
    """Rays in camera axes `[5 * size * size, 3]`: all pixels' centres, then four more sets of points in the pixels."""
    reach = np.tan(np.radians(FIELD_OF_VIEW / 2))
    sets = []
    for dx, dy in [(0, 0), (-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25)]:
        at = (np.arange(size) + 0.5) / size * 2 - 1
        x, y = np.meshgrid(at + 2 * dx / size, -(at + 2 * dy / size))
        sets.append(np.stack([x * reach, y * reach, -np.ones_like(x)], axis=-1).reshape(-1, 3))
    return np.concatenate(sets)


def _colour(rng: np.random.Generator, saturation: tuple[float, float] = (0.25, 0.95)) -> np.ndarray:
    import colorsys

    return np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(0.45, 1.0)))


def _random_texture(rng: np.random.Generator, split: str, colours: np.ndarray, plain: float) -> _Texture:
    rest = 1 - plain
    kind = rng.choice(["plain", "checker", "stripes", "photograph"], p=[plain, rest / 4, rest / 4, rest / 2])
    pixels = photograph_crop(split, rng, TEXTURE_SIZE) / 255.0 if kind == "photograph" else None
    scale = rng.uniform(0.7, 1.6) if kind == "photograph" else rng.uniform(1.2, 3.0)
    return _Texture(str(kind), colours, scale, rng.uniform(0, np.pi), pixels)


def _random_ground(rng: np.random.Generator, split: str) -> _Texture:
    tints = np.array([[0.55, 0.45, 0.3], [0.35, 0.5, 0.25], [0.6, 0.6, 0.58], [0.75, 0.68, 0.5]])
    first = tints[rng.integers(len(tints))] * rng.uniform(0.8, 1.25)
    colours = np.clip(np.stack([first, first * rng.uniform(0.6, 0.85)]), 0, 1)
    return dataclasses.replace(_random_texture(rng, split, colours, plain=0.4), scale=rng.uniform(0.4, 1.0))


def _random_solid(rng: np.random.Generator, split: str, size: float, spread: float) -> _Solid:
    kind = int(rng.choice([SPHERE, BOX, CYLINDER]))
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
    slide = rng.normal(0, 0.04, 2)
    colours = np.stack([_colour(rng), _colour(rng)])
    return _Solid(
        kind,
        half,
        rotation,
        np.array([place[0], height, place[1]]),
        np.array([slide[0], 0, slide[1]]),
        _random_texture(rng, split, colours, plain=0.45),
        rng.uniform(0, 0.5) if rng.random() < 0.5 else 0.0,
    )
