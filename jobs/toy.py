"""`ddiff toy`: the first example, trained in seconds, and the film of it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dd_core import toy

SIDE, SPAN = 320, 3.0
"""Of a frame in pixels; of the plane, from -SPAN to SPAN."""


def make_toy(out: Path, *, steps: int, points: int, seed: int) -> dict[str, Any]:
    """Train the DDPM of the S and film it: points drown in noise (left), noise becomes points (right).

    Args:
        out: Directory of toy.gif; made if missing.
        steps: Of training.
        points: In the film.
        seed: Decides everything.

    Returns:
        Where the film is, seconds of training, and how good the points are: error of the predicted noise
        beyond that of the best possible denoiser, median distance from the S.
    """
    began = time.monotonic()
    *_, last = toy.train_points(steps=steps, seed=seed)
    seconds = time.monotonic() - began
    drowning = toy.forward_frames(points, seed=seed)
    with torch.no_grad():
        rising = toy.reverse_frames(last.denoise, points, seed=seed)
    rising = rising[:, torch.cdist(rising[-1].double(), toy.fine()).argmin(1).argsort()]  # by where they end
    out.mkdir(parents=True, exist_ok=True)
    path = out / "toy.gif"
    save_film(drowning, rising, path)
    return {
        "gif": str(path),
        "seconds": round(seconds, 1),
        "loss": round(last.loss, 4),
        "excess": round(toy.excess(last.denoise), 4),
        "distance": round(float(toy.distance_to_curve(rising[-1]).median()), 4),
    }


def save_film(drowning: Tensor, rising: Tensor, path: Path, *, every: int = 2) -> None:
    """Both ways beside each other, as a GIF that stands still for two seconds at its end."""
    count = len(drowning)
    shown = [*range(0, count, every), count - 1]
    frames = [frame([drowning[place], rising[place]], f"step {place}") for place in shown]
    draft = path.with_name(f".{path.name}")
    frames[0].save(
        draft,
        "GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[60] * (len(frames) - 1) + [2000],
        loop=0,
        disposal=1,
    )
    draft.replace(path)


def frame(panels: Sequence[Tensor], caption: str) -> Image.Image:
    """The plane once for each set of points, each point in the colour of its place in the set."""
    sheet = Image.new("RGB", (SIDE * len(panels), SIDE), "white")
    draw = ImageDraw.Draw(sheet)
    for panel, points in enumerate(panels):
        pixels = (points / SPAN + 1) / 2 * SIDE
        for place, (x, y) in enumerate(pixels.tolist()):
            if 0 <= x < SIDE and 0 <= y < SIDE:
                red = round(230 * place / max(1, len(points) - 1))
                left, top = panel * SIDE + x, SIDE - 1 - y
                draw.ellipse((left - 1.5, top - 1.5, left + 1.5, top + 1.5), (red, 60, 230 - red))
    draw.line((SIDE, 0, SIDE, SIDE), "lightgrey")
    draw.text((6, 4), f"forward, {caption}", "black")
    draw.text((SIDE + 6, 4), f"reverse, {caption}", "black")
    return sheet
