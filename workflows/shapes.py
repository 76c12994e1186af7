"""The embedded world: scenes of coloured shapes, drawn exactly, so that every picture can be judged.

A scene is a background and one to three things, each a shape, a colour, a size and a place.  Everything
here is a function of a seed.  workflows/grammar.py puts a scene into words, workflows/oracle.py reads a
picture back into a scene, workflows/shape_shards.py packs pictures and words as WebDataset tars.
"""

import hashlib
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Shape = Literal["circle", "square", "triangle", "diamond", "star", "cross"]
Colour = Literal["red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan"]
Ground = Literal["white", "black", "gray", "beige"]
Size = Literal["small", "big"]

SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS: dict[Colour, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (35, 150, 60),
    "blue": (40, 75, 215),
    "yellow": (250, 220, 40),
    "purple": (130, 45, 175),
    "orange": (245, 135, 25),
    "pink": (250, 130, 190),
    "cyan": (40, 200, 215),
}
GROUNDS: dict[Ground, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (125, 125, 125),
    "beige": (222, 205, 170),
}
RADII: dict[Size, tuple[float, float]] = {"small": (0.112, 0.118), "big": (0.198, 0.206)}
"""Half the extent of a thing, as a share of the side of the picture."""

STRAY = 0.005
"""How far a thing may be from its place along each axis, as a share of the side; no caption mentions it."""

UNSEEN: frozenset[tuple[Shape, Colour]] = frozenset(
    {
        ("star", "red"),
        ("triangle", "blue"),
        ("cross", "green"),
        ("square", "yellow"),
        ("circle", "purple"),
        ("diamond", "orange"),
    }
)
"""Shape-colour pairs that no training scene holds: can the model put together what it never saw together?"""

CENTRED = 0.3
"""Share of lone things put in the middle, where a caption need not say the place."""

Arrangement = Literal["alone", "beside", "stacked", "diagonal", "row", "column"]


class Thing(NamedTuple):
    """One object; places and radius as shares of the side, y downwards."""

    shape: Shape
    colour: Colour
    size: Size
    x: float
    y: float
    radius: float


class Scene(NamedTuple):
    """A picture before it is drawn; things from left to right, or from top to bottom where stacked."""

    background: Ground
    things: tuple[Thing, ...]
    arrangement: Arrangement


def cell(position: float) -> int:
    """The third of the picture a coordinate lies in: 0, 1 or 2."""
    return min(2, max(0, int(position * 3)))


def place_of(thing: Thing) -> tuple[int, int]:
    """Column and row of the nine places."""
    return cell(thing.x), cell(thing.y)


def draw_scene(rng: np.random.Generator, *, unseen: bool = False, count: int | None = None) -> Scene:
    """A scene at random.

    Args:
        rng: Decides everything.
        unseen: Whether one of the things, at random, is to be an UNSEEN pair; otherwise no thing is.
        count: Number of things; by default one, two or three in the shares of training.
    """
    count = count or int(rng.choice([1, 2, 3], p=[0.25, 0.65, 0.10]))
    arrangement, centres = arrange(rng, count)
    pairs = [pair_of(rng) for _ in range(count)]
    if unseen:
        pairs[int(rng.integers(count))] = sorted(UNSEEN)[int(rng.integers(len(UNSEEN)))]
    things = tuple(
        thing_at(rng, shape, colour, centre, small=count == 3)
        for (shape, colour), centre in zip(pairs, centres, strict=True)
    )
    return Scene(tuple(GROUNDS)[int(rng.integers(len(GROUNDS)))], things, arrangement)


def pair_of(rng: np.random.Generator) -> tuple[Shape, Colour]:
    """A shape and a colour that training may show together."""
    while True:
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        colour = tuple(COLOURS)[int(rng.integers(len(COLOURS)))]
        if (shape, colour) not in UNSEEN:
            return shape, colour


def thing_at(
    rng: np.random.Generator, shape: Shape, colour: Colour, centre: tuple[float, float], *, small: bool
) -> Thing:
    """A thing near a place, its size drawn."""
    size: Size = "small" if small or rng.random() < 0.5 else "big"
    x, y = (float(c + rng.uniform(-STRAY, STRAY)) for c in centre)
    return Thing(shape, colour, size, x, y, float(rng.uniform(*RADII[size])))


def arrange(rng: np.random.Generator, count: int) -> tuple[Arrangement, list[tuple[float, float]]]:
    """Where the things of a scene lie."""
    near, mid, far = 0.25, 0.5, 0.75
    if count == 1:
        column, row = (1, 1) if rng.random() < CENTRED else (int(rng.integers(3)) for _ in range(2))
        return "alone", [((near, mid, far)[column], (near, mid, far)[row])]
    if count == 3:
        line = (0.18, 0.5, 0.82)
        if rng.random() < 0.5:
            return "row", [(at, mid) for at in line]
        return "column", [(mid, at) for at in line]
    kind = int(rng.integers(3))
    if kind == 0:
        return "beside", [(near, mid), (far, mid)]
    if kind == 1:
        return "stacked", [(mid, near), (mid, far)]
    return "diagonal", [(near, near), (far, far)] if rng.random() < 0.5 else [(near, far), (far, near)]


def drawn(scene: Scene, size: int = 256) -> NDArray[np.uint8]:
    """The picture of a scene, [size, size, 3], edges anti-aliased by exact distance."""
    image = np.empty((size, size, 3), np.uint8)
    image[0] = GROUNDS[scene.background]
    image[1:] = image[0]  # by rows: three bytes at a time take ten times as long
    for thing in scene.things:
        reach = thing.radius * size + 2
        left, right = span(thing.x * size, reach, size)
        top, bottom = span(thing.y * size, reach, size)
        inside = coverage(
            thing.shape, (left, right, top, bottom), (thing.x * size, thing.y * size), thing.radius * size
        )
        part = image[top:bottom, left:right].astype(np.float32)
        part += inside[..., None] * (np.array(COLOURS[thing.colour], np.float32) - part)
        image[top:bottom, left:right] = np.rint(part)
    return image


def span(centre: float, reach: float, size: int) -> tuple[int, int]:
    """The pixels that a thing may touch along one axis."""
    return max(0, int(centre - reach)), min(size, int(centre + reach) + 1)


def coverage(
    shape: Shape, window: tuple[int, int, int, int], centre: tuple[float, float], radius: float
) -> NDArray[np.float32]:
    """Share of each pixel of a window (left, right, top, bottom) that a shape covers, in [0, 1]."""
    left, right, top, bottom = window
    x = np.arange(left, right, dtype=np.float32)[None, :] + 0.5 - centre[0]
    y = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - centre[1]
    inside: NDArray[np.float32] = np.clip(0.5 - distance(shape, x, y, radius), 0, 1)
    return inside


def distance(
    shape: Shape, x: NDArray[np.float32], y: NDArray[np.float32], radius: float
) -> NDArray[np.float32]:
    """Signed distance in pixels to the edge of a shape, negative inside; `radius` is half its extent."""
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - radius)
    return polygon_distance(outline(shape) * radius, x, y)


def outline(shape: Shape) -> NDArray[np.float32]:
    """Corners of a shape of extent 2 around the origin, y downwards."""
    match shape:
        case "square":
            corners = [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
        case "triangle":
            corners = [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)]
        case "diamond":
            corners = [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)]
        case "star":
            turns = np.arange(10) * np.pi / 5
            reach = np.where(np.arange(10) % 2 == 0, 1.05, 0.45)
            corners = list(zip(reach * np.sin(turns), -reach * np.cos(turns), strict=True))
        case "cross":
            a, b = 0.34, 1.0
            corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
            corners += [(-x, -y) for x, y in corners]
        case "circle":
            raise ValueError("a circle has no corners")
    return np.array(corners, np.float32)


def polygon_distance(
    corners: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Signed distance to a polygon: the nearest edge, negative where a ray crosses an odd number of edges."""
    nearest = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, np.float32)  # squared
    odd = np.zeros(nearest.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        right, down = x - ax, y - ay
        along = np.clip((right * ex + down * ey) / (ex * ex + ey * ey), 0, 1)
        np.minimum(nearest, (right - along * ex) ** 2 + (down - along * ey) ** 2, out=nearest)
        if ey != 0:
            odd ^= ((y < ay) != (y < by)) & (x < ax + down * ex / ey)
    nearest = np.sqrt(nearest)
    return np.where(odd, -nearest, nearest)


def facts_of(scene: Scene) -> dict[str, Any]:
    """A scene for the json beside its picture."""
    return {
        "background": scene.background,
        "arrangement": scene.arrangement,
        "objects": [thing._asdict() | {"place": place_of(thing)} for thing in scene.things],
    }


def scene_rng(seed: int, number: int) -> np.random.Generator:
    """The source of everything about one pair."""
    return np.random.default_rng((seed, number))


def held_out(saying: str) -> bool:
    """Whether a statement about a scene is kept for judging: one in eight, by its sha256."""
    return hashlib.sha256(saying.encode()).digest()[0] % 8 == 0
