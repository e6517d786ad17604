"""Skull-like shells with defects, for want of clinical data: NIfTI files, generated, always the same.

A shell is a bumpy ellipsoid of varying thickness without a base, of its own size, place and orientation. A
defect is what is cut out of it: a round patch in the upper half ("round"), or a larger rectangular window low
in the front or at a side ("window").
"""

from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Volume = npt.NDArray[np.bool_]

SIZE = 64
_CENTRES = (np.arange(SIZE) + 0.5) * 2 / SIZE - 1  # of the voxels, in a cube of half width 1
GRID: Floats = np.stack(np.meshgrid(_CENTRES, _CENTRES, _CENTRES, indexing="ij"), axis=-1)
SIDE, FRONT, UP = range(3)  # the coordinates


def write(folder: Path, defect: str, count: int, seed: int) -> None:
    """Write shells as ``complete/*.nii.gz``, and what a defect leaves of them as ``defective/*.nii.gz``."""
    for kind in ("complete", "defective"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        complete, defective = pair(defect, np.random.default_rng((seed, number)))
        _save(complete, folder / "complete" / f"{number:03}.nii.gz")
        _save(defective, folder / "defective" / f"{number:03}.nii.gz")


def pair(defect: str, random: np.random.Generator) -> tuple[Volume, Volume]:
    """Return a random shell and the same shell with a defect, each ``(64, 64, 64)``."""
    axes = random.uniform((0.58, 0.74, 0.64), (0.66, 0.84, 0.72))
    points = (GRID - random.uniform(-0.03, 0.03, 3)) @ _rotation(random, 0.06)  # in the shell's own frame
    complete = _shell(points, axes, random)
    removed = {"round": _round, "window": _window}[defect](points, axes, random)
    return complete, complete & ~removed


def _shell(points: Floats, axes: Floats, random: np.random.Generator) -> Volume:
    directions = points / np.linalg.norm(points, axis=-1, keepdims=True)
    radius = np.linalg.norm(points / axes, axis=-1) - 0.07 * _waves(directions, random)  # 1 on the surface
    thickness = random.uniform(0.12, 0.18) * (1 + 0.4 * _waves(directions, random))
    base = random.uniform(-0.4, -0.3) + random.uniform(-0.2, 0.2) * points[..., FRONT]
    bone: Volume = (points[..., UP] > base) & (radius < 1) & (radius > 1 - thickness)
    return bone


def _round(points: Floats, axes: Floats, random: np.random.Generator) -> Volume:
    """A ball around a point of the upper half."""
    azimuth, elevation = random.uniform(0, 2 * np.pi), random.uniform(np.pi / 8, np.pi / 2)
    centre = _on_surface(azimuth, elevation, axes)
    distance: Floats = np.linalg.norm(points - centre, axis=-1)
    return distance < random.uniform(0.25, 0.4)


def _window(points: Floats, axes: Floats, random: np.random.Generator) -> Volume:
    """A box, turned at random, around a low point of the front or of a side."""
    azimuth = random.choice((0, np.pi / 2, np.pi)) + random.uniform(-0.3, 0.3)
    centre = _on_surface(azimuth, random.uniform(-0.2, 0.3), axes)
    offsets = np.abs((points - centre) @ _rotation(random, 0.3))
    inside: Volume = np.all(offsets < random.uniform(0.35, 0.5, 3), axis=-1)
    return inside


def _on_surface(azimuth: float, elevation: float, axes: Floats) -> Floats:
    """Where the ellipsoid is met in a direction; azimuth pi/2 is the front, elevation pi/2 the top."""
    across = np.cos(elevation)
    direction = np.array((across * np.cos(azimuth), across * np.sin(azimuth), np.sin(elevation)))
    point: Floats = direction / np.linalg.norm(direction / axes)
    return point


def _waves(directions: Floats, random: np.random.Generator) -> Floats:
    """A random smooth function of the direction, between -1 and 1: the mean of a few plane waves."""
    frequencies, phases = random.normal(0, 2, (3, 6)), random.uniform(0, 2 * np.pi, 6)
    waves: Floats = np.cos(directions @ frequencies + phases).mean(-1)
    return waves


def _rotation(random: np.random.Generator, scale: float) -> Floats:
    """The orthogonal matrix nearest to the identity plus noise: a small turn about a random axis."""
    left, _, right = np.linalg.svd(np.eye(3) + random.normal(0, scale, (3, 3)))
    rotation: Floats = left @ right
    return rotation


def _save(volume: Volume, path: Path) -> None:
    image = nibabel.Nifti1Image(volume.astype(np.uint8), np.eye(4))  # type: ignore[no-untyped-call]
    nibabel.save(image, path)
