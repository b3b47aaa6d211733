"""Plain questions about the scenes of a world: what the base model is trained on (trainer/base.py).

The images hold what the tasks' images hold: objects of all three levels, frames, large single objects. Each question is
about one image, so that the model which learns from them has seen none of the tasks, which compare images.
"""

import base64
import contextlib
import io
import itertools
import random
import zlib
from collections.abc import Iterator, Sequence

from boxgrpo.trainer.data.example import BOX_PREFIX, THINK_SUFFIX, Example, box_text
from boxgrpo.trainer.data.images import Embedded

from .digits import WORLDS
from .scenes import CELL, IMAGES, OTHERS, NoRoom, Sketch, check_level_and_size, place_name, question_about
from .shapes import Layout, Thing, add_rulers, paint

MOST_TURNS = 6
# Boxes of an object that is alone in its image, as the tasks' first images or cut-outs show one.
LARGE = ((0, 0, 1000, 1000), (CELL, CELL, 7 * CELL, 7 * CELL))


class PlainScenes(Sequence):
    """`count` chats of up to six plain questions about a drawn scene, each drawn when it is read.

    No arrangement of objects is both in a `held_out` sequence and in another.

    Args:
        seed: of all scenes; two scenes of one seed are independent.
        levels: difficulties to draw from, 0 to 2 (scenes.py).
        size: side of the images in pixels.
        world: one of `WORLDS`.
    """

    max_images = max(most for _, most in IMAGES)

    def __init__(self, count: int, seed: int, *, levels=(0, 1, 2), size=112, held_out=False, world="drawn"):
        for level in levels:
            check_level_and_size(level, size)
        self.count, self.seed, self.levels, self.size, self.held_out = count, seed, levels, size, held_out
        self.sketch = WORLDS[world][held_out]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(f"index is {index} of {self.count} scenes")  # ends an iteration
        rng = random.Random(f"plain {self.seed} {index}")
        while True:
            layouts = _draw_layouts(self.sketch, rng, rng.choice(self.levels))
            arrangement = repr([(layout.things, layout.framed) for layout in layouts])
            if (zlib.crc32(arrangement.encode()) % 8 == 0) == self.held_out:
                break
        asked = list(_questions(layouts, rng))[:MOST_TURNS]
        number, thing = asked[0][0]
        pairs = ((("user", question), ("assistant", answer)) for _, question, answer in asked)
        return Example(
            id=f"plain-{index}",
            task="plain",
            images=tuple(Embedded(f"{index}_{n}.png", self._png(layout)) for n, layout in enumerate(layouts, 1)),
            question=question_about(number, thing),
            gold=thing.box,
            turns=tuple(itertools.chain.from_iterable(pairs)),
            answer_format="box",
            target_image=number - 1,
            source=f"plain#{index}",
        )

    def _png(self, layout: Layout) -> bytes:
        file = io.BytesIO()
        add_rulers(paint(layout, self.size)).save(file, "png", compress_level=1)
        return file.getvalue()


def to_record(example: Example) -> dict:
    """The example's first question as a record of a file, with its images as base64."""
    images = ["data:image/png;base64," + base64.b64encode(image.content).decode() for image in example.images]
    record = {"id": example.id, "task": example.task, "images": images, "target_image": example.target_image}
    return record | {"question": example.question, "answer": list(example.gold), "answer_format": "box"}


def plain_texts(world: str = "drawn", count: int = 200) -> list[str]:
    """Texts of plain questions and answers, from which the tokenizer is made."""
    return [text for example in PlainScenes(count, -1, size=56, world=world) for _, text in example.turns]


def _draw_layouts(kind: type[Sketch], rng: random.Random, level: int) -> list[Layout]:
    """As many images as the level's tasks have, objects as similar as they like."""
    while True:
        with contextlib.suppress(NoRoom):
            sketch = kind(rng, level)
            return [_draw_layout(sketch) for _ in range(sketch.image_count())]


def _draw_layout(sketch: Sketch) -> Layout:
    rng = sketch.rng
    if rng.random() < 1 / 8:
        return Layout((Thing(sketch.show(rng.choice(sketch.kinds)), rng.choice(LARGE)),), sketch.tint())
    kinds = rng.sample(sketch.kinds, 1 + rng.randint(OTHERS[sketch.level][0], OTHERS[sketch.level][1] + 1))
    layout = sketch.layout(kinds)
    return layout._replace(framed=layout.things[0]) if rng.random() < 1 / 8 else layout


def _questions(layouts: Sequence[Layout], rng: random.Random) -> Iterator[tuple[tuple[int, Thing], str, str]]:
    """(object with the number of its image, question, answer): first where an object is, then of every kind."""
    things = [(n, thing) for n, layout in enumerate(layouts, 1) for thing in layout.things]
    rng.shuffle(things)
    chain, listed = rng.randrange(1, 6), rng.randrange(1, 12)
    for k, (n, thing) in enumerate(things):
        layout, where, box = layouts[n - 1], question_about(n, thing), box_text(thing.box)
        if k == chain:
            text = f"The {thing.kind} is in image {n} at the {place_name(thing.box)}."
            yield (n, thing), where + THINK_SUFFIX, f"<think>{text}</think><answer>{box}</answer>"
        elif k == listed:
            kinds = [str(other.kind) for other in sorted(layout.things, key=lambda other: other.box[1::-1])]
            yield (n, thing), f"List the objects in image {n}.", ", ".join(kinds)
        elif k and rng.random() < 1 / 6:
            yield (n, thing), f"Which object is at {box} in image {n}?", str(thing.kind)
        elif layout.framed is thing:
            yield (n, thing), f"{BOX_PREFIX}Where is the framed object in image {n}?", box
        else:
            yield (n, thing), BOX_PREFIX + where, box
