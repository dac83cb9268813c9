"""What a scene of the demo says: objects, their number, color and position, as one caption and back.

A scene holds one or two groups of equal objects: "two red apples left of a cat, flat". Some combinations are held out:
the teacher never sees them in training, so a prompt of them asks whether it composes what it learnt apart.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

OBJECTS = (
    *("apple", "banana", "pear", "lemon", "strawberry", "pineapple", "carrot", "mushroom", "cookie", "pizza", "hamburger"),
    *("doughnut", "cake", "cat", "dog", "rabbit", "pig", "cow", "horse", "elephant", "giraffe", "camel", "panda", "fox"),
    *("lion", "frog", "owl", "duck", "penguin", "turtle", "snail", "crab", "octopus", "whale", "fish", "butterfly"),
    *("spider", "bee", "tree", "cactus", "tulip", "sunflower", "house", "castle", "car", "bus", "train", "airplane"),
    *("rocket", "boat", "helicopter", "tractor", "star", "cloud", "umbrella", "balloon", "key", "bell", "lamp", "book"),
    *("gift", "crown", "guitar", "drum"),
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
STYLES = ("flat", "shaded")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("a", "two", "three")
IRREGULAR_PLURALS = {"strawberry": "strawberries", "butterfly": "butterflies", "bus": "buses", "fox": "foxes", "fish": "fish"}
IRREGULAR_PLURALS |= {"octopus": "octopuses", "cactus": "cactuses"}

HELD_OUT_EVERY = 8
"""One in so many combinations of object and color, object and number, and of two objects is never trained on."""


@dataclass(frozen=True)
class Group:
    """``count`` equal objects, in their own colors if ``color`` is None."""

    object: str
    count: int = 1
    color: str | None = None

    def __str__(self) -> str:
        noun = self.object if self.count == 1 else plural(self.object)
        words = [self.color, noun] if self.color else [noun]
        number = NUMBERS[self.count - 1]
        if number == "a" and words[0][0] in "aeiou":
            number = "an"
        return " ".join([number, *words])


@dataclass(frozen=True)
class Scene:
    """One group, or two with the position of the first seen from the second; drawn in ``style``, any if it is None."""

    first: Group
    relation: str | None = None
    second: Group | None = None
    style: str | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def caption(self) -> str:
        scene = str(self.first) if self.second is None else f"{self.first} {self.relation} {self.second}"
        return scene if self.style is None else f"{scene}, {self.style}"

    @property
    def placed(self) -> tuple[str, tuple[Group, ...]]:
        """How the groups stand, and the groups from the left or the top: "left of" and "right of" draw the same image."""
        arrangement = {None: "alone", "left of": "in a row", "right of": "in a row"}.get(self.relation, "in a column")
        return arrangement, self.groups[::-1] if self.relation in ("right of", "below") else self.groups

    @property
    def held_out(self) -> bool:
        """Whether it holds a combination that the teacher was never trained on."""
        first, second = self.first, self.second
        return (
            any(is_held_out(group.object, group.color) for group in self.groups if group.color)
            or any(is_held_out(group.object, group.count) for group in self.groups if group.count > 1)
            or (second is not None and is_held_out(*sorted((first.object, second.object))))
        )


def plural(noun: str) -> str:
    return IRREGULAR_PLURALS.get(noun, noun + "s")


def is_held_out(noun: str, other: str | int) -> bool:
    """Whether an object and a color, number or second object never meet in training."""
    place, others = OBJECTS.index(noun), (*COLORS, 2, 3, *OBJECTS)
    return (3 * place + 5 * others.index(other)) % HELD_OUT_EVERY == 0


# --- scenes at random -----------------------------------------------------------------------------------------------

SHARE_OF_TWO_GROUPS, SHARE_IN_COLOR = 0.6, 0.6
COUNT_WEIGHTS = {"alone": (0.4, 0.3, 0.3), "first": (0.6, 0.4), "second": (1.0,)}
"""How often a group has one, two, three objects, by its role."""


def random_scene(rng: random.Random) -> Scene:
    """Any scene, held out or not."""

    def group(role: str) -> Group:
        weights = COUNT_WEIGHTS[role]
        (count,) = rng.choices(range(1, len(weights) + 1), weights)
        return Group(rng.choice(OBJECTS), count, rng.choice(COLORS) if rng.random() < SHARE_IN_COLOR else None)

    style = rng.choice(STYLES)
    if rng.random() > SHARE_OF_TWO_GROUPS:
        return Scene(group("alone"), style=style)
    first, second = group("first"), group("second")
    while second.object == first.object:
        second = group("second")
    return Scene(first, rng.choice(RELATIONS), second, style)


def random_scenes(num_scenes: int, seed: int, *, held_out: bool | None = False) -> list[Scene]:
    """Scenes that are trained on; those held out, if ``held_out``; both, if it is None."""
    rng = random.Random(seed)
    return list(_first(num_scenes, (random_scene(rng) for _ in itertools.count()), held_out))


def _first(num_scenes: int, scenes: Iterator[Scene], held_out: bool | None) -> Iterator[Scene]:
    return itertools.islice((scene for scene in scenes if held_out is None or scene.held_out == held_out), num_scenes)


# --- prompts to judge by --------------------------------------------------------------------------------------------


def _one(rng: random.Random, *, count: int = 1, in_color: bool = False) -> Group:
    return Group(rng.choice(OBJECTS), count, rng.choice(COLORS) if in_color else None)


def _two(rng: random.Random, *, in_color: bool = False) -> Scene:
    (first, second), colors = rng.sample(OBJECTS, 2), rng.sample(COLORS, 2) if in_color else (None, None)
    return Scene(Group(first, 1, colors[0]), rng.choice(RELATIONS), Group(second, 1, colors[1]), rng.choice(STYLES))


CATEGORIES: dict[str, Callable[[random.Random], Scene]] = {
    "object": lambda rng: Scene(_one(rng), style=rng.choice(STYLES)),
    "count": lambda rng: Scene(_one(rng, count=rng.choice((2, 3))), style=rng.choice(STYLES)),
    "color": lambda rng: Scene(_one(rng, in_color=True), style=rng.choice(STYLES)),
    "position": _two,
    "binding": partial(_two, in_color=True),
}
"""What a prompt asks for, after GenEval (Ghosh et al. 2023, arXiv 2310.11513): one object, several, one in a color, two at
their places, two at their places each in its color."""


def prompts(category: str, num_prompts: int, seed: int, *, held_out: bool) -> list[Scene]:
    """Scenes of a category, all trained on or all held out; ``ValueError`` for ``object`` held out, as every object is known."""
    if held_out and category == "object":
        raise ValueError("no single object is held out")
    rng = random.Random(f"{category} {seed}")
    return list(_first(num_prompts, (CATEGORIES[category](rng) for _ in itertools.count()), held_out))


# --- words ----------------------------------------------------------------------------------------------------------

NUM_TOKENS = 10
WORDS = ("", "<unknown>", "a", "two", "three", "left", "right", "of", "above", "below", *STYLES, *COLORS, *OBJECTS)
TOKEN_IDS = {word: i for i, word in enumerate(WORDS)} | {plural(noun): WORDS.index(noun) for noun in OBJECTS}
TOKEN_IDS |= {word: WORDS.index("a") for word in ("an", "one")}


def token_ids(caption: str) -> list[int]:
    """Ids of the words of a caption; a plural has its singular's, and the number tells how many."""
    return [TOKEN_IDS.get(word, 1) for word in re.findall(r"[a-z0-9]+", caption.lower())]


def tokenize(caption: str) -> list[int]:
    """Word ids of a caption, padded or truncated to `NUM_TOKENS`; the empty caption (the null prompt) is only padding."""
    ids = token_ids(caption)[:NUM_TOKENS]
    return ids + [0] * (NUM_TOKENS - len(ids))
