"""Scenes in words: templates and synonyms, so that a model must understand language to paint.

A caption does not say everything: what it says is kept beside it, and only that is judged.  As in
photographs, a lone thing whose place is not said is in the middle.
"""

import json
import string
from typing import Any, NamedTuple

import numpy as np

from workflows.shapes import Scene, Thing, draw_scene, facts_of, held_out, place_of

WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond", "diamond", "rhombus"),
    "star": ("star",),
    "cross": ("cross", "cross", "plus sign"),
    "red": ("red", "red", "crimson"),
    "green": ("green", "green", "emerald"),
    "blue": ("blue", "blue", "cobalt"),
    "yellow": ("yellow", "yellow", "golden"),
    "purple": ("purple", "purple", "violet"),
    "orange": ("orange", "orange", "tangerine"),
    "pink": ("pink",),
    "cyan": ("cyan", "cyan", "turquoise"),
    "small": ("small", "little", "tiny"),
    "big": ("big", "large"),
    "white": ("white",),
    "black": ("black",),
    "gray": ("gray", "grey"),
    "beige": ("beige", "sand-coloured"),
}
"""Word -> ways to say it; one that is listed twice is drawn twice as often."""

PLACES: dict[tuple[int, int], tuple[str, ...]] = {
    (0, 0): ("in the top left corner", "at the upper left", "in the top left"),
    (1, 0): ("at the top", "in the upper middle", "at the top centre"),
    (2, 0): ("in the top right corner", "at the upper right", "in the top right"),
    (0, 1): ("on the left", "on the left side", "at the left edge"),
    (1, 1): ("in the middle", "in the centre", "in the center"),
    (2, 1): ("on the right", "on the right side", "at the right edge"),
    (0, 2): ("in the bottom left corner", "at the lower left", "in the bottom left"),
    (1, 2): ("at the bottom", "in the lower middle", "at the bottom centre"),
    (2, 2): ("in the bottom right corner", "at the lower right", "in the bottom right"),
}

ALONE = (
    "{a}",
    "{a} {ground}",
    "{a} {place_a}",
    "{a} {place_a} {ground}",
    "{a} {ground}, {place_a}",
    "there is {a} {place_a}",
    "there is {a} {ground}",
    "a picture of {a}",
    "a picture of {a} {place_a}",
    "an image with {a} {place_a} {ground}",
    "{place_a}, {a}",
    "{place_a} there is {a} {ground}",
    "just {a} {place_a}, nothing else",
    "{a} sits {place_a} {ground}",
)
BESIDE = (
    "{a} to the left of {b}",
    "{a} left of {b} {ground}",
    "{b} to the right of {a}",
    "{b} right of {a} {ground}",
    "{b} with {a} on its left",
    "{a} with {b} on its right",
    "on the left {a}, on the right {b}",
    "{a} and, to its right, {b}",
    "{a} beside {b}, the latter on the right",
)
STACKED = (
    "{a} above {b}",
    "{a} above {b} {ground}",
    "{b} below {a}",
    "{b} under {a} {ground}",
    "{b} with {a} over it",
    "{a} on top, {b} underneath",
    "at the top {a}, at the bottom {b}",
    "{a} and, below it, {b}",
)
DIAGONAL = (
    "{a} {place_a} and {b} {place_b}",
    "{b} {place_b} and {a} {place_a}",
    "{a} {place_a}, {b} {place_b}, {ground}",
    "{place_a} {a}, {place_b} {b}",
    "there are {a} {place_a} and {b} {place_b}",
)
ROW = (
    "from left to right: {a}, {b}, {c}",
    "a row of three: {a}, {b} and {c}",
    "{a}, then {b}, then {c}, side by side",
)
COLUMN = (
    "from top to bottom: {a}, {b}, {c}",
    "a column of three: {a}, {b} and {c}",
    "{a} above {b} above {c}",
)
TEMPLATES: dict[str, tuple[str, ...]] = {
    "alone": ALONE,
    "beside": BESIDE,
    "stacked": STACKED,
    "diagonal": DIAGONAL,
    "row": ROW,
    "column": COLUMN,
}
SIZE_SAID = 0.7
"""Share of things whose size is said."""


class Case(NamedTuple):
    """A caption to be judged, and all that it says."""

    group: str
    """one_object, two_object, three_object; the unseen pairs in a group of their own, `unseen`."""
    caption: str
    says: dict[str, Any]
    meta: str = "{}"
    """The json that would come with its picture in a training shard."""


def described(rng: np.random.Generator, scene: Scene) -> tuple[str, dict[str, Any]]:
    """A caption of a scene and what it says: the background, each thing's facts, the arrangement."""
    templates = TEMPLATES[scene.arrangement]
    if scene.arrangement == "alone" and place_of(scene.things[0]) != (1, 1):
        templates = tuple(template for template in templates if "{place_a}" in template)
    template = templates[int(rng.integers(len(templates)))]
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name}
    words: dict[str, str] = {"ground": ground_phrase(rng, scene.background)}
    things = []
    for name, thing in zip("abc", scene.things, strict=False):
        sized = bool(rng.random() < SIZE_SAID)
        words[name] = noun_phrase(rng, thing, sized=sized)
        words[f"place_{name}"] = one_of(rng, PLACES[place_of(thing)])
        said: dict[str, Any] = {"shape": thing.shape, "colour": thing.colour}
        said |= {"size": thing.size} if sized else {}
        said |= {"place": list(place_of(thing))} if f"place_{name}" in fields else {}
        things.append(said)
    says: dict[str, Any] = {"things": things, "arrangement": scene.arrangement}
    says |= {"background": scene.background} if "ground" in fields else {}
    return template.format(**words), says


def noun_phrase(rng: np.random.Generator, thing: Thing, *, sized: bool) -> str:
    """Such as: a small crimson disc."""
    adjectives = [one_of(rng, WORDS[thing.size])] if sized else []
    phrase = " ".join([*adjectives, one_of(rng, WORDS[thing.colour]), one_of(rng, WORDS[thing.shape])])
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def ground_phrase(rng: np.random.Generator, ground: str) -> str:
    """Such as: on a white background."""
    word = one_of(rng, WORDS[ground])
    return one_of(rng, (f"on a {word} background", f"on {word}", f"against a {word} background"))


def one_of(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    """One of the choices, each as likely."""
    return choices[int(rng.integers(len(choices)))]


def statement(says: dict[str, Any]) -> str:
    """What a caption says, whatever its words: equal for synonyms, and whichever thing is named first."""
    things = [" ".join(str(value) for value in thing.values()) for thing in says["things"]]
    return f"{says['arrangement']}|{'|'.join(things)}|{says.get('background', '')}"


def training_caption(rng: np.random.Generator) -> tuple[Scene, str, dict[str, Any]]:
    """A scene and a caption that training may show: no unseen pair, no held-out statement."""
    while True:
        scene = draw_scene(rng)
        caption, says = described(rng, scene)
        if not held_out(statement(says)):
            return scene, caption, says


def cases(counts: dict[str, int], *, seed: int) -> list[Case]:
    """Captions for judging: each says something that no training caption of any seed says.

    Args:
        counts: Group -> how many; groups are one_object, two_object, three_object and unseen (one and
            two things, among them a shape-colour pair of shapes.UNSEEN).
        seed: Of the choice.
    """
    number = {"one_object": 1, "two_object": 2, "three_object": 3}
    found = []
    for stream, (group, count) in enumerate(counts.items()):
        rng = np.random.default_rng((seed, 2**31, stream))
        taken: set[str] = set()
        while len(taken) < count:
            things = number.get(group) or 1 + len(taken) % 2
            scene = draw_scene(rng, unseen=group == "unseen", count=things)
            caption, says = described(rng, scene)
            new = caption not in taken and (group == "unseen" or held_out(statement(says)))
            if new:
                taken.add(caption)
                found.append(Case(group, caption, says, json.dumps(facts_of(scene))))
    return found
