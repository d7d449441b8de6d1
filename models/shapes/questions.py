"""Questions about a scene, each with its one answer and the things it speaks of. Knows no picture."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Final

import numpy as np

from models.shapes.scenes import COLOURS, KINDS, SIDE, SIZES, Scene, Thing

TYPES: Final = ("colour", "shape", "size", "count", "exist", "relation", "where")
SEVERAL: Final = "several"
"""Questions of the type count of which the answer is more than one and less than all, for training alone."""

_APART: Final = 28.0
"""Least pixels by which one thing is left of, or above, another for a question to ask."""
_CLEAR: Final = 7.0
"""Least pixels between a thing's middle and a border of the nine places for a question to ask."""


@dataclass(frozen=True)
class Question:
    """`about` are numbers of things, from 0: those whose tokens an answer needs."""

    type: str
    text: str
    answer: str
    about: tuple[int, ...]


@dataclass(frozen=True)
class Phrase:
    """Words that describe things, as "small red star": `end` is the last one's place among the words of the
    text, `fits` are numbers of things, from 0."""

    end: int
    fits: tuple[int, ...]


def question(scene: Scene, kind: str, draw: np.random.Generator) -> Question | None:
    """A question of a type, or None where the scene allows none."""
    return _MAKERS[kind](scene, draw)


def questions(
    scene: Scene, number: int, draw: np.random.Generator, types: tuple[str, ...] = TYPES
) -> list[Question]:
    """Questions of such types in turn; fewer where the scene allows fewer."""
    made = (question(scene, types[order % len(types)], draw) for order in range(number))
    return [each for each in made if each is not None]


def phrases(scene: Scene, text: str) -> list[Phrase]:
    """What a text speaks of, in its order, whether the scene has it or not."""
    found = []
    for match in _PHRASE.finditer(text):
        size, colour, coloured, plain = match.groups()
        noun = coloured or plain or "shape"
        fits = tuple(
            order
            for order, each in enumerate(scene.things)
            if size in (None, each.size)
            and colour in (None, each.colour)
            and noun in ("shape", "shapes", each.kind, plural(each.kind))
        )
        found.append(Phrase(len(text[: match.end()].split()) - 1, fits))
    return found


def caption(scene: Scene, draw: np.random.Generator) -> str:
    """Every thing by name, in any order: what contrasts one picture with another."""
    things = [scene.things[order] for order in draw.permutation(len(scene.things))]
    return " and ".join(f"a {each.size} {each.colour} {each.kind}" for each in things)


def _names(scene: Scene) -> list[list[str]]:
    """For each thing the descriptions that fit no other, with the article."""
    by_kind = Counter(each.kind for each in scene.things)
    by_both = Counter((each.colour, each.kind) for each in scene.things)
    by_all = Counter((each.size, each.colour, each.kind) for each in scene.things)
    found = []
    for each in scene.things:
        names = []
        if by_kind[each.kind] == 1:
            names.append(f"the {each.kind}")
        if by_both[each.colour, each.kind] == 1:
            names.append(f"the {each.colour} {each.kind}")
        if by_all[each.size, each.colour, each.kind] == 1:
            names.append(f"the {each.size} {each.colour} {each.kind}")
        found.append(names)
    return found


def _pick(draw: np.random.Generator, *choices: str) -> str:
    return choices[int(draw.integers(len(choices)))]


def _colour(scene: Scene, draw: np.random.Generator) -> Question | None:
    texts = ("which colour is the {} ?", "what colour is the {} ?", "what color is the {} ?")
    return _property(scene, draw, "colour", "kind", "colour", *texts)


def _shape(scene: Scene, draw: np.random.Generator) -> Question | None:
    texts = ("which shape is {} ?", "what shape is {} ?", "what is the {} shape ?")
    return _property(scene, draw, "shape", "colour", "kind", *texts)


def _property(
    scene: Scene, draw: np.random.Generator, type_: str, given: str, asked: str, *texts: str
) -> Question | None:
    """Asks for one attribute of a thing by another, which no other thing has alike."""
    values = [getattr(each, given) for each in scene.things]
    able = [order for order, value in enumerate(values) if values.count(value) == 1]
    if not able:
        return None
    order = int(draw.choice(able))
    return Question(
        type_, _pick(draw, *texts).format(values[order]), getattr(scene.things[order], asked), (order,)
    )


def _size(scene: Scene, draw: np.random.Generator) -> Question | None:
    names = [[each for each in some if "small" not in each and "large" not in each] for some in _names(scene)]
    able = [order for order, some in enumerate(names) if some]
    if not able:
        return None
    order = int(draw.choice(able))
    text = _pick(draw, "is {} large or small ?", "is {} small or large ?")
    return Question("size", text.format(_pick(draw, *names[order])), scene.things[order].size, (order,))


def _count(scene: Scene, draw: np.random.Generator) -> Question:
    way = int(draw.integers(3))
    if way == 0:
        about = tuple(range(len(scene.things)))
        text = _pick(
            draw, "how many shapes are there ?", "how many shapes are in the image ?", "count the shapes ."
        )
        return Question("count", text, str(len(about)), about)
    if way == 1:
        colour = _likely(draw, [each.colour for each in scene.things], list(COLOURS))
        about = tuple(order for order, each in enumerate(scene.things) if each.colour == colour)
        return _how_many(f"{colour} shapes", about)
    kind = _likely(draw, [each.kind for each in scene.things], list(KINDS))
    about = tuple(order for order, each in enumerate(scene.things) if each.kind == kind)
    return _how_many(plural(kind), about)


def _several(scene: Scene, draw: np.random.Generator) -> Question | None:
    """Counts of which the answer is more than one and less than all: seldom asked by `_count`, and hard."""
    groups: dict[str, list[int]] = defaultdict(list)
    for order, each in enumerate(scene.things):
        groups[f"{each.colour} shapes"].append(order)
        groups[plural(each.kind)].append(order)
    able = [(words, about) for words, about in groups.items() if 1 < len(about) < len(scene.things)]
    if not able:
        return None
    words, about = able[int(draw.integers(len(able)))]
    return _how_many(words, tuple(about))


def _how_many(words: str, about: tuple[int, ...]) -> Question:
    return Question("count", f"how many {words} are there ?", str(len(about)), about)


def _exist(scene: Scene, draw: np.random.Generator) -> Question:
    text = _pick(draw, "is there a {} {} ?", "do you see a {} {} ?")
    there = {(each.colour, each.kind) for each in scene.things}
    if draw.random() < 0.5:
        order = int(draw.integers(len(scene.things)))
        thing = scene.things[order]
        return Question("exist", text.format(thing.colour, thing.kind), "yes", (order,))
    colours = [each.colour for each in scene.things]
    kinds = [each.kind for each in scene.things]
    # half of the answers "no" have the colour or the shape there, on other things
    for _ in range(20):
        colour = _likely(draw, colours, list(COLOURS))
        kind = _likely(draw, kinds, list(KINDS))
        if (colour, kind) not in there:
            about = tuple(
                order for order, each in enumerate(scene.things) if each.colour == colour or each.kind == kind
            )
            return Question("exist", text.format(colour, kind), "no", about)
    missing = next((c, k) for c in COLOURS for k in KINDS if (c, k) not in there)
    return Question("exist", text.format(*missing), "no", ())


def _relation(scene: Scene, draw: np.random.Generator) -> Question | None:
    names = _names(scene)
    able = [order for order, some in enumerate(names) if some]
    pairs = [(one, other) for one in able for other in able if one != other]
    draw.shuffle(pairs)
    for one, other in pairs:
        first, second = scene.things[one], scene.things[other]
        across, down = first.x - second.x, first.y - second.y
        sides = []
        if abs(across) >= _APART:
            sides.append(("left of", "right of", across < 0))
        if abs(down) >= _APART:
            sides.append(("above", "below", down < 0))
        if not sides:
            continue
        nearer, further, is_nearer = sides[int(draw.integers(len(sides)))]
        a, b = _pick(draw, *names[one]), _pick(draw, *names[other])
        if draw.random() < 0.5:
            asked_nearer = draw.random() < 0.5
            word = nearer if asked_nearer else further
            answer = "yes" if asked_nearer == is_nearer else "no"
            return Question("relation", f"is {a} {word} {b} ?", answer, (one, other))
        answer = (nearer if is_nearer else further).removesuffix(" of")
        # "left or right of", "above or below"
        text = f"is {a} {nearer.removesuffix(' of')} or {further} {b} ?"
        return Question("relation", text, answer, (one, other))
    return None


def _where(scene: Scene, draw: np.random.Generator) -> Question | None:
    names = _names(scene)
    able = [
        order
        for order, each in enumerate(scene.things)
        if names[order] and all(abs(at - edge) >= _CLEAR for at in (each.x, each.y) for edge in _EDGES)
    ]
    if not able:
        return None
    order = int(draw.choice(able))
    return Question("where", f"where is {_pick(draw, *names[order])} ?", place(scene.things[order]), (order,))


_EDGES: Final = (SIDE / 3, SIDE * 2 / 3)


def place(thing: Thing) -> str:
    """One of nine places: `top left`, …, `middle middle`, …, `bottom right`."""
    row = ("top", "middle", "bottom")[sum(thing.y >= edge for edge in _EDGES)]
    column = ("left", "middle", "right")[sum(thing.x >= edge for edge in _EDGES)]
    return f"{row} {column}"


def plural(kind: str) -> str:
    """`crosses` of `cross`."""
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def _likely(draw: np.random.Generator, there: list[str], every: list[str]) -> str:
    """Three times out of four one that is there."""
    return str(draw.choice(there if draw.random() < 0.75 else every))


_NOUN: Final = "|".join(["shapes?", *KINDS, *(plural(kind) for kind in KINDS)])
_COLOUR: Final = "|".join(COLOURS)
_PHRASE: Final = re.compile(rf"\b(?:({'|'.join(SIZES)}) )?(?:({_COLOUR})(?: ({_NOUN}))?|({_NOUN}))\b")

_MAKERS: Final = {
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "count": _count,
    SEVERAL: _several,
    "exist": _exist,
    "relation": _relation,
    "where": _where,
}
