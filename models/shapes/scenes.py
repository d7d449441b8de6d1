"""Scenes of coloured shapes, and their pictures. Everything follows from one seed and one number.

A scene knows its things exactly: kind, colour, size, place, and which pixels each covers. So questions about
it have one answer, and "does this token show an object?" is a fact. Knows no words and no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIDE: Final = 192
"""Pixels of a picture's side."""
PATCH: Final = 8
"""Pixels of a patch's side: 24 × 24 patches."""
GRID: Final = SIDE // PATCH

KINDS: Final = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS: Final = {
    "red": (214, 40, 40),
    "green": (44, 150, 60),
    "blue": (35, 70, 205),
    "yellow": (245, 215, 35),
    "orange": (242, 130, 25),
    "purple": (128, 45, 160),
    "cyan": (60, 205, 220),
    "white": (248, 248, 248),
    "pink": (248, 150, 190),
    "black": (22, 22, 22),
}
SIZES: Final = {"small": (11.0, 15.0), "large": (19.0, 26.0)}
"""Radii in pixels; the gap between them is what the words mean."""
MOST_THINGS: Final = 6

_SCALE: Final = 3
"""Pictures are drawn this much larger and shrunk, for smooth edges."""
_GAP: Final = 3.0
"""Least pixels between two things' circles."""


@dataclass(frozen=True)
class Thing:
    """One shape: `x` to the right, `y` down, `radius` of the circle around it, in pixels; `angle` radians."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """What is to be seen. `number` seeds the background and the shades."""

    things: tuple[Thing, ...]
    number: tuple[int, ...]


def scene(*number: int) -> Scene:
    """The scene of a seed and a number, always the same."""
    draw = np.random.default_rng([*number, 0])
    wanted = int(draw.integers(1, MOST_THINGS + 1))
    # half of the scenes have things in common, so that "the red one" is not enough to tell them apart
    alike = draw.random() < 0.5
    kinds = draw.choice(KINDS, 3 if alike else len(KINDS), replace=False)
    colours = draw.choice(list(COLOURS), 3 if alike else len(COLOURS), replace=False)
    things: list[Thing] = []
    for _ in range(wanted):
        size = str(draw.choice(list(SIZES)))
        radius = float(draw.uniform(*SIZES[size]))
        place = _free_place(draw, things, radius)
        if place is None:
            continue
        things.append(
            Thing(
                kind=str(draw.choice(kinds)),
                colour=str(draw.choice(colours)),
                size=size,
                x=place[0],
                y=place[1],
                radius=radius,
                angle=float(draw.uniform(-0.4, 0.4)),
            )
        )
    return Scene(tuple(things), number)


def render(scene: Scene) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The picture (SIDE, SIDE, 3), and what each pixel (SIDE, SIDE) shows: 0 no thing, 1 the first."""
    draw = np.random.default_rng([*scene.number, 1])
    side = SIDE * _SCALE
    picture = Image.fromarray(_background(draw)).resize((side, side), Image.Resampling.BILINEAR)
    owners = Image.new("L", (SIDE, SIDE), 0)
    brush, marker = ImageDraw.Draw(picture), ImageDraw.Draw(owners)
    for order, thing in enumerate(scene.things, start=1):
        shade = np.array(COLOURS[thing.colour]) + draw.uniform(-12, 12, 3)
        colour = tuple(int(value) for value in np.clip(shade, 0, 255))
        if thing.kind == "ring":  # a band, since its hole shows the background
            _ring(brush, thing, colour, _SCALE)
            _ring(marker, thing, order, 1)
        else:
            outline = _outline(thing)
            brush.polygon([(x * _SCALE, y * _SCALE) for x, y in outline], fill=colour)
            marker.polygon(outline, fill=order)
    pixels = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    noise = draw.normal(0, draw.uniform(0, 5), pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8), np.asarray(owners, dtype=np.int64)


def patches(pixels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(SIDE, SIDE) by patch, row-major: (GRID², PATCH²)."""
    return pixels.reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(GRID * GRID, PATCH * PATCH)


def patch_owners(owners: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each patch (GRID, GRID) the thing that covers most of it: 0 where none covers a quarter."""
    covered = np.stack([(patches(owners) == order).mean(-1) for order in range(1, MOST_THINGS + 1)])
    return np.where(covered.max(0) >= 0.25, covered.argmax(0) + 1, 0).reshape(GRID, GRID)


def _free_place(draw: np.random.Generator, things: list[Thing], radius: float) -> tuple[float, float] | None:
    for _ in range(60):
        x, y = (float(value) for value in draw.uniform(radius + 2, SIDE - radius - 2, 2))
        if all(math.hypot(x - each.x, y - each.y) > radius + each.radius + _GAP for each in things):
            return x, y
    return None


def _background(draw: np.random.Generator) -> npt.NDArray[np.uint8]:
    """(SIDE, SIDE, 3), muted, so that every colour of COLOURS stands out."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    angle = draw.uniform(0, 2 * np.pi)
    along = rows * np.sin(angle) + columns * np.cos(angle)
    style = draw.choice(["gradient", "stripes", "checks", "clouds", "plain"])
    mix: npt.NDArray[np.float64]
    if style == "gradient":
        mix = (along - along.min()) / np.ptp(along)
    elif style == "stripes":
        mix = (np.sin(along * draw.uniform(15, 60)) > 0).astype(float)
    elif style == "checks":
        number = draw.integers(4, 16)
        mix = (((rows * number).astype(int) + (columns * number).astype(int)) % 2).astype(float)
    elif style == "clouds":
        coarse = Image.fromarray((draw.random((9, 9)) * 255).astype(np.uint8))
        mix = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
    else:
        mix = np.zeros((SIDE, SIDE))
    one, other = _muted(draw), _muted(draw)
    return (one + mix[..., None] * (other - one)).astype(np.uint8)


def _muted(draw: np.random.Generator) -> npt.NDArray[np.float64]:
    grey = draw.uniform(85, 185)
    return np.asarray(grey + draw.uniform(-18, 18, 3), dtype=np.float64)


def _outline(thing: Thing) -> list[tuple[float, float]]:
    """Corners of a thing that is no ring, in pixels."""
    corners = _CORNERS[thing.kind]()
    cosine, sine = math.cos(thing.angle), math.sin(thing.angle)
    return [
        (
            thing.x + thing.radius * (x * cosine - y * sine),
            thing.y + thing.radius * (x * sine + y * cosine),
        )
        for x, y in corners
    ]


def _circle() -> list[tuple[float, float]]:
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


def _star() -> list[tuple[float, float]]:
    radii = [1.0, 0.42] * 5
    return [
        (radius * math.sin(index * math.pi / 5), -radius * math.cos(index * math.pi / 5))
        for index, radius in enumerate(radii)
    ]


def _cross() -> list[tuple[float, float]]:
    arm = 0.32
    quarter = [(-arm, -0.98), (arm, -0.98), (arm, -arm)]
    points = []
    for turn in range(4):
        for x, y in quarter:
            for _ in range(turn):
                x, y = -y, x  # noqa: PLW2901
            points.append((x, y))
    return points


def _heart() -> list[tuple[float, float]]:
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(angles) ** 3
    y = -(13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles))
    return [(float(each) / 17, float(other) / 17) for each, other in zip(x, y, strict=True)]


_CORNERS: Final = {
    "circle": _circle,
    "square": lambda: [(-0.74, -0.74), (0.74, -0.74), (0.74, 0.74), (-0.74, 0.74)],
    "triangle": lambda: [(0.0, -1.0), (0.87, 0.5), (-0.87, 0.5)],
    "star": _star,
    "cross": _cross,
    "diamond": lambda: [(0.0, -1.0), (0.62, 0.0), (0.0, 1.0), (-0.62, 0.0)],
    "heart": _heart,
}
"""Outlines of the kinds in a circle of radius 1, y down."""


def _ring(brush: ImageDraw.ImageDraw, thing: Thing, colour: object, scale: int) -> None:
    box = [
        (thing.x - thing.radius) * scale,
        (thing.y - thing.radius) * scale,
        (thing.x + thing.radius) * scale,
        (thing.y + thing.radius) * scale,
    ]
    brush.ellipse(box, outline=colour, width=max(1, round(thing.radius * 0.38 * scale)))  # type: ignore[arg-type]
