"""Drawn scenes for the demo: coloured shapes over several small images, with MIG-Bench's ten kinds of question.

A scene is planned first (objects, question, reasoning) and drawn when its pixels are needed. All
boxes are snapped to eighths of the image, so gold coordinates are multiples of 125 on the 0-1000 scale. There is no
perspective, texture, occlusion or noise, because a model of a million parameters must learn the tasks in minutes.

The three levels differ in images per scene, objects per image, kinds of object, how similar the other objects are, and
the grid that boxes are snapped to:

    level 0   2 images   0 or 1 other objects   4 shapes in 4 colours   others differ in colour and in shape    quarters
    level 1   2 or 3     1 or 2                 5 in 5                  others differ in at least one of them   eighths
    level 2   3          2 or 3                 6 in 6                  one other shares the colour or shape    eighths

`diff`, `view_diff` and `correspondence` compare two images at every level. A shape fills its box, so a "circle" may
be an ellipse and a "square" a rectangle: width and height are drawn independently.
"""

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from boxgrpo.trainer.data.example import box_text

from .shapes import COLOURS, SHAPES, Box, Kind, Layout, Thing, add_rulers, paint

IMAGES = ((2, 2), (2, 3), (3, 3))  # fewest and most images, by level
KINDS = (4, 5, 6)  # colours in use, and as many shapes, by level
OTHERS = ((0, 1), (1, 2), (2, 3))  # fewest and most objects beside the one in question, by level
CELL = 125  # an eighth of the image
STEP = (2, 1, 1)  # cells of which sizes and positions of objects are multiples, by level
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")


@dataclass(frozen=True)
class Scene:
    """A question about drawn images. Its gold box is on `images[target_image]`, 0-1000, continuous coordinates."""

    size: int  # pixels, the side of every image
    layouts: tuple[Layout, ...]
    question: str
    gold: Box
    target_image: int  # counted from 0; texts count from 1
    chain: str

    @functools.cached_property
    def images(self) -> tuple[Image.Image, ...]:
        """The RGB images, drawn at first use."""
        return tuple(add_rulers(paint(layout, self.size)) for layout in self.layouts)

    @property
    def completion(self) -> str:
        """The ideal answer in the trainer's format."""
        return f"<think>{self.chain}</think><answer>{box_text(self.gold)}</answer>"

    @property
    def objects(self) -> list[tuple[int, Thing]]:
        """Every object, with the number of its image from 1."""
        return [(number, thing) for number, layout in enumerate(self.layouts, 1) for thing in layout.things]

    @property
    def other_questions(self) -> list[tuple[str, str]]:
        """Plain questions about the scene's other objects, each with its box: further training text for its images."""
        gold = self.target_image + 1, self.gold
        return [(question_about(n, thing), box_text(thing.box)) for n, thing in self.objects if (n, thing.box) != gold]


def question_about(number: int, thing: Thing) -> str:
    """The plain question about one object of one image."""
    return f"Where is the {thing.kind} in image {number}?"


def place_name(box: Box) -> str:
    """Where the middle of `box` (0-1000) lies on a 3x3 grid, one of `PLACES`."""
    column, row = ((low + high) * 3 // 2000 for low, high in ((box[0], box[2]), (box[1], box[3])))
    return PLACES[3 * row + column]


class NoRoom(Exception):
    """The random layout cannot be completed; the scene is planned again."""


class Sketch:
    """The random choices of one scene. `take` returns no kind twice, so a kind recurs only where a task repeats it."""

    noun = "object"  # for any kind, in questions
    without: tuple[str, ...] = ()  # tasks that these kinds cannot have

    def __init__(self, rng: random.Random, level: int):
        self.rng, self.level = rng, level
        self.colours, self.shapes = (list(words)[: KINDS[level]] for words in (COLOURS, SHAPES))
        self.kinds = [Kind(*pair) for pair in itertools.product(self.colours, self.shapes)]
        rng.shuffle(self.kinds)

    def image_count(self) -> int:
        return self.rng.randint(*IMAGES[self.level])

    def take(self, accept: Callable[[Kind], bool] = lambda kind: True) -> Kind:
        kind = next(filter(accept, self.kinds))
        self.kinds.remove(kind)
        return kind

    def others(self, subject: Kind, accept: Callable[[Kind], bool] = lambda kind: True) -> list[Kind]:
        """Kinds of the objects beside `subject`, as similar to it as the level requires."""
        kinds = []
        for k in range(self.rng.randint(*OTHERS[self.level])):
            shared = (0,) if self.level == 0 else (1,) if self.level == 2 and k == 0 else (0, 1)
            kinds.append(self.take(lambda kind: accept(kind) and _count_shared(kind, subject) in shared))  # noqa: B023
        return kinds

    def place(self, kinds: Sequence[Kind], taken: Sequence[Thing] = ()) -> list[Thing]:
        """Gives each kind, in order, a box 2-4 cells wide and high that overlaps neither `taken` nor another one."""
        things, step = [], STEP[self.level]
        for kind in map(self.show, kinds):
            for _ in range(100):
                width, height = self.sides()
                x, y = (self.rng.randrange(0, 9 - side, step) for side in (width, height))
                thing = Thing(kind, (x * CELL, y * CELL, (x + width) * CELL, (y + height) * CELL))
                if not any(_clash(thing, other) for other in (*taken, *things)):
                    break
            else:
                raise NoRoom
            things.append(thing)
        return things

    def sides(self) -> tuple[int, int]:
        """Width and height of a box in cells."""
        return tuple(self.rng.randrange(2, 5, STEP[self.level]) for _ in range(2))

    def show(self, kind: Kind) -> Kind:
        """The kind as one image shows it; equal to `kind`."""
        return kind

    def vary(self, subject: Kind) -> Kind:
        """Another kind, which differs in colour or in shape."""
        return self.take(lambda kind: _count_shared(kind, subject) == 1)

    def layout(self, kinds: Sequence[Kind]) -> Layout:
        return Layout(tuple(self.place(kinds)), self.tint())

    def tint(self) -> tuple[int, int, int]:
        return tuple(self.rng.randint(100, 130) for _ in range(3))


def _count_shared(a: Kind, b: Kind) -> int:
    return (a.colour == b.colour) + (a.shape == b.shape)


def _clash(a: Thing, b: Thing) -> bool:
    gap = CELL * (a.kind.colour == b.kind.colour)  # adjacent objects of one colour would look like one
    return all(a.box[k] < b.box[k + 2] + gap and b.box[k] < a.box[k + 2] + gap for k in (0, 1))


def _shifted(thing: Thing, dx: int, dy: int) -> Thing:
    box = tuple(v + d for v, d in zip(thing.box, (dx, dy, dx, dy)))
    if min(box) < 0 or max(box) > 1000:
        raise NoRoom
    return thing._replace(box=box)


class _Plan(NamedTuple):
    layouts: Sequence[Layout]
    target_image: int
    subject: Kind  # of the object in question, which is in the target image once
    questions: tuple[str, ...]  # wordings of the same question
    finding: str  # the chain up to "in image k at the <place>."


def _common_object(s: Sketch) -> _Plan:
    subject, count = s.take(), s.image_count()
    layouts = [s.layout([subject, *s.others(subject)]) for _ in range(count)]
    target = s.rng.randrange(count)
    questions = (
        f"Which {s.noun} is in all images? Find it in image {target + 1}.",
        f"The images share one {s.noun}. Locate it in image {target + 1}.",
    )
    return _Plan(layouts, target, subject, questions, f"The {subject} is in {'both' if count == 2 else 'all'} images,")


def _refer_grounding(s: Sketch) -> _Plan:
    subject, count = s.take(), s.image_count()
    target = s.rng.randrange(1, count)
    shown = Layout((Thing(s.show(subject), (CELL, CELL, 7 * CELL, 7 * CELL)),), s.tint())
    layouts = [shown, *(s.layout([subject] * (k == target) + s.others(subject)) for k in range(1, count))]
    questions = (
        f"Find the {s.noun} of image 1 in image {target + 1}.",
        f"Where is the {s.noun} of image 1 in image {target + 1}?",
    )
    return _Plan(layouts, target, subject, questions, f"Image 1 shows the {subject}. It is")


def _group_grounding(s: Sketch) -> _Plan:
    subject, count = s.take(), s.image_count()
    target = s.rng.randrange(count)
    layouts = [s.layout([subject] * (k == target) + s.others(subject)) for k in range(count)]
    questions = (f"Find the {subject}.", f"Where is the {subject}?")
    return _Plan(layouts, target, subject, questions, f"The {subject} is")


def _diff(s: Sketch, changes: Sequence[str] = ("added", "removed", "changed")) -> _Plan:
    subject = s.take()
    whole = s.layout([subject, *s.others(subject)])
    gold, *rest = whole.things
    change = s.rng.choice(changes)
    finding = f"The {subject} is only"
    less = whole._replace(things=tuple(rest))
    if change == "changed":
        former = s.show(s.vary(subject))
        less = whole._replace(things=(gold._replace(kind=former), *rest))
        finding = f"The {former} became the {subject}"
    layouts, target = ([whole, less], 0) if change == "removed" else ([less, whole], 1)
    questions = ("Compare the images and find the difference.", "What differs between the images? Locate it.")
    return _Plan(layouts, target, subject, questions, finding)


def _view_diff(s: Sketch) -> _Plan:
    plan = _diff(s, changes=("added", "changed"))
    steps = [(dx * CELL, dy * CELL) for dx, dy in itertools.product((-1, 0, 1), repeat=2) if dx or dy]
    dx, dy = s.rng.choice(steps)
    before, after = plan.layouts
    before = Layout(tuple(_shifted(thing, dx, dy) for thing in before.things), s.tint())
    questions = (
        "The view moved. Find the real difference in image 2.",
        "Seen from two places, what really changed? Locate it in image 2.",
    )
    return plan._replace(layouts=[before, after], questions=questions)


def _object_tracking(s: Sketch) -> _Plan:
    subject, count = s.take(), s.image_count()
    (start,) = s.place([subject])
    way, dx, dy = s.rng.choice((("left", -CELL, 0), ("right", CELL, 0), ("up", 0, -CELL), ("down", 0, CELL)))
    stride = s.rng.randint(1, 2)
    path = [_shifted(start, k * stride * dx, k * stride * dy) for k in range(count)]
    others, tint = s.place(s.others(subject), taken=path), s.tint()
    layouts = [Layout((thing, *others), tint) for thing in path]
    layouts[0] = layouts[0]._replace(framed=start)
    target = s.rng.randrange(1, count)
    questions = (
        f"The framed {s.noun} of image 1 moves. Find it in image {target + 1}.",
        f"Track the framed {s.noun} of image 1. Where is it in image {target + 1}?",
    )
    return _Plan(layouts, target, subject, questions, f"The {subject} moves {way}. It is")


def _multi_view(s: Sketch) -> _Plan:
    subject, count = s.take(), s.image_count()
    first = s.layout([subject, *s.others(subject)])
    layouts = [first._replace(framed=first.things[0])]
    for flip_x, flip_y in s.rng.sample(((True, False), (False, True), (True, True)), count - 1):
        things = []
        for kind, (x1, y1, x2, y2) in first.things:
            x1, x2 = (1000 - x2, 1000 - x1) if flip_x else (x1, x2)
            y1, y2 = (1000 - y2, 1000 - y1) if flip_y else (y1, y2)
            things.append(Thing(kind, (x1, y1, x2, y2)))
        layouts.append(Layout(tuple(things), s.tint()))
    target = s.rng.randrange(1, count)
    questions = (
        f"The images show one scene from several sides. Find the framed {s.noun} of image 1 in image {target + 1}.",
        f"Where is the framed {s.noun} of image 1 in the view of image {target + 1}?",
    )
    return _Plan(layouts, target, subject, questions, f"The framed {subject} is")


def _region(s: Sketch) -> _Plan:
    subject, count = s.take(), s.image_count()
    source = s.layout([subject, *s.others(subject)])
    cut_out = s.rng.sample(source.things, count - 1)
    layouts = [source] + [Layout((thing._replace(box=(0, 0, 1000, 1000)),), source.tint) for thing in cut_out]
    shown = s.rng.randrange(1, count)
    subject = cut_out[shown - 1].kind
    questions = (
        f"Find the region of image {shown + 1} in image 1.",
        f"Image {shown + 1} was cut out of image 1. Where?",
    )
    return _Plan(layouts, 0, subject, questions, f"Image {shown + 1} shows the {subject}. It is")


def _reasoning(s: Sketch) -> _Plan:
    subject, count = s.take(), s.image_count()
    rule = s.rng.choice(Kind._fields)  # the property that all others share
    free = Kind._fields[rule == "colour"]  # different in all objects, else there would be a second odd one out
    shared = getattr(s.take(lambda kind: _count_shared(kind, subject) == 0), rule)
    kinds = [subject]
    for _ in range(3 + s.level):
        seen = {getattr(kind, free) for kind in kinds}
        value = s.rng.choice([v for v in (s.colours if free == "colour" else s.shapes) if v not in seen])
        kinds.append(Kind(**{rule: shared, free: value}))
    s.rng.shuffle(kinds)
    layouts = [s.layout(kinds[k::count]) for k in range(count)]
    target = kinds.index(subject) % count
    questions = ("All objects but one have something in common. Find the odd one.", "Which object is the odd one out?")
    if rule == "shape":
        shared += "es" if shared == "cross" else "s"
    return _Plan(layouts, target, subject, questions, f"All others are {shared}. The {subject} is")


def _correspondence(s: Sketch) -> _Plan:
    framed = s.take()
    subject = s.take(lambda kind: kind.shape == framed.shape)
    first = s.layout([framed, *s.others(framed)])
    second = s.layout([subject, *s.others(framed, accept=lambda kind: kind.shape != framed.shape)])
    questions = (
        "Which object of image 2 corresponds to the framed object of image 1?",
        "Find in image 2 what the framed object of image 1 is in image 1.",
    )
    layouts = [first._replace(framed=first.things[0]), second]
    return _Plan(layouts, 1, subject, questions, f"The {framed} corresponds to the {subject}")


_PLANS = (_diff, _view_diff, _common_object, _object_tracking, _multi_view, _region, _refer_grounding, _group_grounding)
TASKS = {plan.__name__[1:]: plan for plan in (*_PLANS, _reasoning, _correspondence)}


def check_level_and_size(level: int, size: int) -> None:
    """Raise ValueError for a level that the world does not have, or images that are not whole patches."""
    if level not in range(len(IMAGES)):
        raise ValueError(f"level is {level!r}; the world has levels 0 (plain), 1 and 2 (confusable). Name one.")
    if size <= 0 or size % 56:
        raise ValueError(f"size is {size}; an image side must be a multiple of 56 pixels. Use 112.")


def tasks_of(sketch: type[Sketch]) -> list[str]:
    """Those of `TASKS` that a world has."""
    return [task for task in TASKS if task not in sketch.without]


def draw_scene(task: str, seed: int, *, level: int = 1, size: int = 112, sketch: type[Sketch] = Sketch) -> Scene:
    """Draws the scene of (task, seed, level, sketch), which is the same on every machine and at every size.

    `task` is one of MIG-Bench's ten (`TASKS`); `level` is 0, 1 or 2 (see the module's table); `size` is the side of the
    images in pixels, a multiple of 56: Qwen2-VL reads 28x28 pixels as one vision token, and boxes snap to eighths.
    Raises ValueError for anything else.
    """
    if task not in tasks_of(sketch):
        raise ValueError(f"task is {task!r}; the world draws {', '.join(tasks_of(sketch))}. Name one of these.")
    check_level_and_size(level, size)
    rng = random.Random(f"{task} {level} {seed}")
    plan = None
    while plan is None:
        with contextlib.suppress(NoRoom):
            plan = TASKS[task](sketch(rng, level))
    (gold,) = (thing.box for thing in plan.layouts[plan.target_image].things if thing.kind == plan.subject)
    chain = f"{plan.finding} in image {plan.target_image + 1} at the {place_name(gold)}."
    return Scene(size, tuple(plan.layouts), rng.choice(plan.questions), gold, plan.target_image, chain)
