"""The drawn scenes' reasoning chains are true: every sentence is parsed and compared with the scene's layouts.

The parser uses no task and none of the planner's choices, only layouts: kinds, boxes, frames. A chain is true when
every sentence can be parsed and all of them hold.
"""

import itertools
import re

import pytest

from boxgrpo.trainer.world.scenes import PLACES, TASKS, draw_scene
from boxgrpo.trainer.world.shapes import COLOURS, SHAPES, Kind

SEEDS = range(40)
KIND = rf"((?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}))"
PLACE = rf"({'|'.join(sorted(PLACES, key=len, reverse=True))})"
AT = rf"in image (\d) at the {PLACE}"
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def of(kind):
    return Kind(*kind.split())


def things(scene, number):
    """The objects of an image, counted from 1; none for an image that is not there."""
    return scene.layouts[int(number) - 1].things if int(number) <= len(scene.layouts) else ()


def found(scene, kind, number):
    return [t.box for t in things(scene, number) if t.kind == of(kind)]


def middle(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def lies(box, words):
    """Whether the middle of the box is in that ninth of the image."""
    x, y = middle(box)
    across = "left" if x < 1000 / 3 else "right" if x >= 2000 / 3 else ""
    down = "top" if y < 1000 / 3 else "bottom" if y >= 2000 / 3 else ""
    return words == (f"{down} {across}".strip() or "centre")


def is_at(scene, kind, number, words):
    return any(lies(box, words) for box in found(scene, kind, number))


def numbers(scene):
    return range(1, len(scene.layouts) + 1)


def shows(scene, number, kind):
    """The image holds nothing else."""
    return [t.kind for t in things(scene, number)] == [of(kind)]


def everywhere(scene, kind, word, number, words):
    right_word = word == ("both" if len(scene.layouts) == 2 else "all")
    return right_word and all(found(scene, kind, n) for n in numbers(scene)) and is_at(scene, kind, number, words)


def only(scene, kind, number, words):
    """It is in this one of two images, and not in the other."""
    (other,) = set(numbers(scene)) - {int(number)}
    return is_at(scene, kind, number, words) and not found(scene, kind, other)


def became(scene, former, kind, number, words):
    """One was in the other image and no longer is, the other one was not and now is."""
    (other,) = set(numbers(scene)) - {int(number)}
    gone = found(scene, former, other) and not found(scene, former, number)
    return gone and not found(scene, kind, other) and is_at(scene, kind, number, words)


def moves(scene, kind, way):
    path = [middle(box) for n in numbers(scene) for box in found(scene, kind, n)]
    steps = [(bx - ax, by - ay) for (ax, ay), (bx, by) in itertools.pairwise(path)]
    return len(path) == len(scene.layouts) and all(
        (dx > 0) - (dx < 0) == WAYS[way][0] and (dy > 0) - (dy < 0) == WAYS[way][1] for dx, dy in steps
    )


def framed(scene, kind):
    return scene.layouts[0].framed.kind == of(kind)


def corresponds(scene, kind, other, number, words):
    """The framed object, and the one of the other image that has its shape."""
    alike = [t for t in things(scene, number) if t.kind.shape == of(kind).shape]
    return framed(scene, kind) and [t.kind for t in alike] == [of(other)] and is_at(scene, other, number, words)


def odd(scene, shared, kind):
    """All objects but that one share the colour or the shape, and it does not."""
    word = shared.removesuffix("es") if shared.removesuffix("es") in SHAPES else shared.removesuffix("s")
    word = word if word in SHAPES else shared
    kinds = [t.kind for layout in scene.layouts for t in layout.things]
    return all((word in k) == (k != of(kind)) for k in kinds) and kinds.count(of(kind)) == 1


SENTENCES = {  # of a chain, and when each holds; "it" is the object named before
    rf"Image (\d) shows the {KIND}\.": lambda scene, it, n, kind: shows(scene, n, kind),
    rf"The {KIND} is in (both|all) images, {AT}\.": lambda scene, it, *parts: everywhere(scene, *parts),
    rf"The {KIND} is only {AT}\.": lambda scene, it, *parts: only(scene, *parts),
    rf"The {KIND} became the {KIND} {AT}\.": lambda scene, it, *parts: became(scene, *parts),
    rf"The {KIND} moves (left|right|up|down)\.": lambda scene, it, *parts: moves(scene, *parts),
    rf"The framed {KIND} is {AT}\.": lambda scene, it, kind, *at: framed(scene, kind) and is_at(scene, kind, *at),
    rf"The {KIND} corresponds to the {KIND} {AT}\.": lambda scene, it, *parts: corresponds(scene, *parts),
    r"All others are (\w+)\.": lambda scene, it, shared: True,  # checked with the next sentence: `odd` below
    rf"The {KIND} is {AT}\.": lambda scene, it, *parts: is_at(scene, *parts),
    rf"It is {AT}\.": lambda scene, it, *at: is_at(scene, it, *at),
}


def true(scene, chain):
    """Whether every sentence of the chain is parsed and holds, and the last one names the gold object."""
    it = shared = None
    for sentence in re.findall(r"[^.]+\.", chain):
        read = [(m, holds) for form, holds in SENTENCES.items() if (m := re.fullmatch(form, sentence.strip()))]
        if len(read) != 1:
            return False
        ((match, holds),) = read
        if not holds(scene, it, *match.groups()):
            return False
        kinds = re.findall(KIND, sentence)
        if shared and not odd(scene, shared, kinds[0]):
            return False
        it, shared = (kinds or [it])[-1], (re.match(r"All others are (\w+)", sentence) or [None, None])[1]
    gold = [t.kind for t in scene.layouts[scene.target_image].things if t.box == scene.gold]
    last = re.search(rf"{AT}\.$", chain)
    return (
        gold == [of(it)]
        and int(last[1]) == scene.target_image + 1
        and lies(scene.gold, last[2])
        and shared is None
        and found(scene, it, last[1]) == [scene.gold]
    )


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_every_chain_is_true_of_its_scene_and_false_of_almost_all_others(task, level):
    scenes = [draw_scene(task, seed, level=level) for seed in SEEDS]
    assert [s.chain for s in scenes if not true(s, s.chain)] == []
    others = [(s, o.chain) for s, o in itertools.permutations(scenes, 2) if s.chain != o.chain]
    believed = [(s, chain) for s, chain in others if true(s, chain)]
    assert len(believed) < 0.01 * len(others)
