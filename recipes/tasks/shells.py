"""Generates skull-like shells with defects, in place of clinical data.

A shell is a bumpy ellipsoid without a base. Its thickness varies, and it has a size, place and orientation of
its own. A defect is a part that is cut out of it: a round patch in the upper half ("round"), or a larger
rectangular window low in the front or at a side ("window").
The spreads below were chosen so that the autoencoder overfits without FAM, as the paper's does.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Volume = npt.NDArray[np.bool_]

SIDE, FRONT, UP = range(3)  # the coordinates
AXES = np.array((0.62, 0.79, 0.68))  # half axes of the mean ellipsoid, in a cube of half width 1
AXES_SPREAD = np.array((0.08, 0.1, 0.08))
PLACE_SPREAD = 0.06
TURN = 0.12  # standard deviation of the entries of a random turn
BUMPS = 0.14  # largest height on the surface, relative to its radius


def shell(random: np.random.Generator, size: int, defects: Mapping[str, str]) -> dict[str, Volume]:
    """Returns a random shell, "complete" and with each named defect, each a volume ``(size, size, size)``."""
    centres = (np.arange(size) + 0.5) * 2 / size - 1  # of the voxels
    grid: Floats = np.stack(np.meshgrid(centres, centres, centres, indexing="ij"), axis=-1)
    axes = random.uniform(AXES - AXES_SPREAD, AXES + AXES_SPREAD)
    place = random.uniform(-PLACE_SPREAD, PLACE_SPREAD, 3)
    points = (grid - place) @ _rotation(random, TURN)  # in the shell's own frame
    complete = _complete(points, axes, random)
    removed = {name: DEFECTS[defect](points, axes, random) for name, defect in defects.items()}
    return {"complete": complete, **{name: complete & ~hole for name, hole in removed.items()}}


def _complete(points: Floats, axes: Floats, random: np.random.Generator) -> Volume:
    directions = points / np.linalg.norm(points, axis=-1, keepdims=True)
    radius = np.linalg.norm(points / axes, axis=-1) - BUMPS * _waves(directions, random)  # 1 on the surface
    thickness = random.uniform(0.12, 0.18) * (1 + 0.4 * _waves(directions, random))
    base = random.uniform(-0.45, -0.25) + random.uniform(-0.4, 0.4) * points[..., FRONT]
    bone: Volume = (points[..., UP] > base) & (radius < 1) & (radius > 1 - thickness)
    return bone


def _round(points: Floats, axes: Floats, random: np.random.Generator) -> Volume:
    """Returns a ball around a random point of the upper half."""
    azimuth, elevation = random.uniform(0, 2 * np.pi), random.uniform(np.pi / 8, np.pi / 2)
    centre = _on_surface(azimuth, elevation, axes)
    distance: Floats = np.linalg.norm(points - centre, axis=-1)
    return distance < random.uniform(0.25, 0.4)


def _window(points: Floats, axes: Floats, random: np.random.Generator) -> Volume:
    """Returns a box, turned at random, around a low point of the front or of a side."""
    azimuth = random.choice((0, np.pi / 2, np.pi)) + random.uniform(-0.3, 0.3)
    centre = _on_surface(azimuth, random.uniform(-0.2, 0.3), axes)
    offsets = np.abs((points - centre) @ _rotation(random, 0.3))
    inside: Volume = np.all(offsets < random.uniform(0.35, 0.5, 3), axis=-1)
    return inside


DEFECTS = {"round": _round, "window": _window}


def _on_surface(azimuth: float, elevation: float, axes: Floats) -> Floats:
    """Returns where a ray leaves the ellipsoid; azimuth pi/2 is the front, elevation pi/2 the top."""
    across = np.cos(elevation)
    direction = np.array((across * np.cos(azimuth), across * np.sin(azimuth), np.sin(elevation)))
    point: Floats = direction / np.linalg.norm(direction / axes)
    return point


def _waves(directions: Floats, random: np.random.Generator) -> Floats:
    """Returns a random smooth function of the direction between -1 and 1, the mean of six plane waves."""
    frequencies, phases = random.normal(0, 2, (3, 6)), random.uniform(0, 2 * np.pi, 6)
    waves: Floats = np.cos(directions @ frequencies + phases).mean(-1)
    return waves


def _rotation(random: np.random.Generator, scale: float) -> Floats:
    """Returns a small turn about a random axis: the orthogonal matrix nearest to identity plus noise."""
    left, _, right = np.linalg.svd(np.eye(3) + random.normal(0, scale, (3, 3)))
    rotation: Floats = left @ right
    return rotation
