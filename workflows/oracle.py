"""The oracle: reads a picture of the embedded world back into a scene, by geometry alone.

No part of it is learned, so no model can be tuned to please it: the background is the colour of the
rim, things are connected regions that differ from it, a thing's colour is that of its inside, and its
shape is the one whose exact drawing of equal area covers it best.
"""

import itertools
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from workflows.shapes import (
    COLOURS,
    GROUNDS,
    RADII,
    SHAPES,
    Colour,
    Ground,
    Shape,
    Size,
    cell,
    coverage,
    outline,
)

SIZE = 256
SMALLEST_AREA = 150
"""Pixels (of a 256 px picture) below which a thing has no recognisable shape."""
SPECK_AREA = 60
"""Regions of fewer pixels are ignored; from here up to SMALLEST_AREA they are things without a shape, of
which a clean picture has none."""
CONTRAST = 45.0
"""Distance in RGB from the background that makes a pixel part of a thing."""
WORST_FIT = 0.72
"""Least overlap (intersection over union) with the best shape for it to be that shape."""
WORST_COLOUR = 75.0
"""Largest distance in RGB from a named colour for it to be that colour."""
AREAS: dict[Shape, float] = {
    shape: float(np.pi) if shape == "circle" else float(cv2.contourArea(outline(shape))) for shape in SHAPES
}
"""Area of each shape at radius one."""


class Seen(NamedTuple):
    """A thing as it was read; None where no named shape or colour fits."""

    shape: Shape | None
    colour: Colour | None
    size: Size
    x: float
    y: float


class Reading(NamedTuple):
    """A picture as it was read."""

    background: Ground
    things: tuple[Seen, ...]


def read(image: NDArray[np.uint8]) -> Reading:
    """Read a picture.

    Args:
        image: [h, w, 3], RGB, square; resized to 256 px if it has another size.
    """
    if image.shape[:2] != (SIZE, SIZE):
        image = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC).astype(np.uint8)
    smooth = cv2.GaussianBlur(image, (0, 0), 1.2).astype(np.float32)
    rim = np.concatenate(
        [smooth[:6].reshape(-1, 3), smooth[-6:].reshape(-1, 3), smooth[:, :6].reshape(-1, 3)]
    )
    ground = np.median(np.concatenate([rim, smooth[:, -6:].reshape(-1, 3)]), axis=0)
    background = min(GROUNDS, key=lambda name: gap(ground, GROUNDS[name]))
    mask = (np.linalg.norm(smooth - ground, axis=-1) > CONTRAST).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    things = [
        seen(labels == label, smooth, ground, stats[label])
        for label in range(1, count)
        if stats[label][cv2.CC_STAT_AREA] >= SPECK_AREA
    ]
    return Reading(background, tuple(things))


def seen(
    mask: NDArray[np.bool_],
    smooth: NDArray[np.float32],
    ground: NDArray[np.float32],
    stats: NDArray[np.int32],
) -> Seen:
    """One region of a picture as a thing."""
    x0, y0, width, height = (int(stats[i]) for i in range(4))
    window = (max(0, x0 - 4), min(SIZE, x0 + width + 4), max(0, y0 - 4), min(SIZE, y0 + height + 4))
    region = mask[window[2] : window[3], window[0] : window[1]]
    pixels = smooth[window[2] : window[3], window[0] : window[1]]
    inside = cv2.erode(region.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    colour = np.median(pixels[inside if inside.sum() >= 12 else region], axis=0)
    share = np.linalg.norm(pixels - ground, axis=-1) / max(1.0, float(np.linalg.norm(colour - ground)))
    inked = np.clip(np.where(cv2.dilate(region.astype(np.uint8), np.ones((3, 3), np.uint8)), share, 0), 0, 1)
    rows, columns = np.nonzero(region)
    centre = ((window[0] + float(columns.mean()) + 0.5), (window[2] + float(rows.mean()) + 0.5))
    area = float(inked.sum())
    fits = {shape: fit(shape, inked > 0.5, window, centre, area) for shape in SHAPES}
    best = max(fits, key=lambda shape: fits[shape])
    named = min(COLOURS, key=lambda name: gap(colour, COLOURS[name]))
    radius = float(np.sqrt(area / AREAS[best])) / SIZE
    known = area >= SMALLEST_AREA and fits[best] >= WORST_FIT
    return Seen(
        shape=best if known else None,
        colour=named if gap(colour, COLOURS[named]) <= WORST_COLOUR else None,
        size="big" if radius > (RADII["small"][1] + RADII["big"][0]) / 2 else "small",
        x=centre[0] / SIZE,
        y=centre[1] / SIZE,
    )


def fit(
    shape: Shape,
    region: NDArray[np.bool_],
    window: tuple[int, int, int, int],
    centre: tuple[float, float],
    area: float,
) -> float:
    """Intersection over union of a region and a shape of the same area and centre of mass."""
    radius = float(np.sqrt(area / AREAS[shape]))
    shift = centroid(shape) * radius
    ideal = coverage(shape, window, (centre[0] - shift[0], centre[1] - shift[1]), radius) > 0.5
    return float((ideal & region).sum() / max(1, (ideal | region).sum()))


def centroid(shape: Shape) -> NDArray[np.float64]:
    """Centre of mass of a shape of radius one."""
    if shape == "circle":
        return np.zeros(2)
    moments = cv2.moments(outline(shape))
    return np.array([moments["m10"], moments["m01"]]) / moments["m00"]


def gap(one: Any, other: Any) -> float:
    """Distance of two colours in RGB, 0 to 442."""
    return float(np.linalg.norm(np.asarray(one, np.float32) - np.asarray(other, np.float32)))


def judged(image: NDArray[np.uint8], says: dict[str, Any]) -> dict[str, bool]:
    """Which statements of a caption are true of a picture.

    Args:
        image: [h, w, 3], RGB.
        says: From workflows.grammar: things, arrangement, perhaps the background.

    Returns:
        colour, shape, place (with the arrangement) and, where the caption says them, size and background
        -> right for every thing; count -> as many things as said; all -> everything.  Things are matched
        to words in the way that makes most of it true.
    """
    reading = read(image)
    truth: dict[str, bool] = {"count": len(reading.things) == len(says["things"])}
    if "background" in says:
        truth["background"] = reading.background == says["background"]
    if truth["count"]:
        readings = [compared(order, says) for order in itertools.permutations(reading.things)]
        best = max(readings, key=lambda found: sum(found.values()))
        truth |= best
    else:
        truth |= {"colour": False, "shape": False, "place": False} | (
            {"size": False} if any("size" in thing for thing in says["things"]) else {}
        )
    return truth | {"all": all(truth.values())}


def compared(things: tuple[Seen, ...], says: dict[str, Any]) -> dict[str, bool]:
    """Which statements are true if the things, in this order, are those of the caption."""
    pairs = list(zip(things, says["things"], strict=True))
    truth = {
        "colour": all(thing.colour == said["colour"] for thing, said in pairs),
        "shape": all(thing.shape == said["shape"] for thing, said in pairs),
        "place": placed(things, says)
        and all([cell(thing.x), cell(thing.y)] == said["place"] for thing, said in pairs if "place" in said),
    }
    if any("size" in said for said in says["things"]):
        truth["size"] = all(thing.size == said["size"] for thing, said in pairs if "size" in said)
    return truth


def placed(things: tuple[Seen, ...], says: dict[str, Any]) -> bool:
    """Whether things stand as the caption arranges them."""
    match says["arrangement"]:
        case "beside" | "row":
            along = [(thing.x, thing.y) for thing in things]
        case "stacked" | "column":
            along = [(thing.y, thing.x) for thing in things]
        case _:
            return True
    return all(b[0] - a[0] > max(0.1, abs(b[1] - a[1])) for a, b in itertools.pairwise(along))
