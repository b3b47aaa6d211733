"""The drawn scenes: pixels, boxes, questions and reasoning agree, for every task at every level."""

import hashlib
import itertools
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from boxgrpo.trainer.world.scenes import IMAGES, OTHERS, TASKS, box_text, draw_scene
from boxgrpo.trainer.world.shapes import COLOURS, FRAME, SHAPES, Kind, Layout, Thing, add_rulers, paint

SEEDS = range(12)
SCENES = [(task, level) for task in TASKS for level in (0, 1, 2)]
every_scene = pytest.mark.parametrize(("task", "level"), SCENES)


def scenes(task, level):
    return [draw_scene(task, seed, level=level) for seed in SEEDS]


def pixels(box, size):
    return [v * size // 1000 for v in box]


def extent(mask):
    """x1, y1, x2, y2 of the True pixels, upper corners excluded."""
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def painted(image, colour):
    return (np.asarray(image) == COLOURS[colour]).all(-1)


def kinds(layout):
    return Counter(thing.kind for thing in layout.things)


def gold_thing(scene):
    (thing,) = (t for t in scene.layouts[scene.target_image].things if t.box == scene.gold)
    return thing


@every_scene
def test_gold_boxes_images_and_texts_have_learnable_sizes(task, level):
    for scene in scenes(task, level):
        x1, y1, x2, y2 = scene.gold
        assert all(v in range(0, 1001, 125) for v in scene.gold)
        assert {x2 - x1, y2 - y1} <= ({250, 500} if level == 0 else {250, 375, 500})
        fixed = task in ("diff", "view_diff", "correspondence")
        low, high = (2, 2) if fixed else IMAGES[level]
        assert low <= len(scene.images) <= high and 0 <= scene.target_image < len(scene.images)
        assert all(image.size == (112, 112) and image.mode == "RGB" for image in scene.images)
        assert 8 <= len(scene.chain.split()) <= 17 and len(scene.question.split()) <= 20
        if task not in ("group_grounding", "diff", "reasoning"):  # here the image is part of the answer
            assert f"image {scene.target_image + 1}" in scene.question


@every_scene
def test_the_pixels_of_a_colour_fill_exactly_the_boxes_of_its_things(task, level):
    for scene in scenes(task, level):
        for layout, image in ((layout, paint(layout, scene.size)) for layout in scene.layouts):
            assert len(kinds(layout)) == len(layout.things), "two objects of one kind in one image"
            covered = np.zeros((112, 112), bool)
            for thing in layout.things:
                x1, y1, x2, y2 = pixels(thing.box, 112)
                mask = np.zeros_like(covered)
                mask[y1:y2, x1:x2] = painted(image, thing.kind.colour)[y1:y2, x1:x2]
                assert extent(mask) == [x1, y1, x2, y2]
                assert not covered[y1:y2, x1:x2].any(), "boxes overlap"
                covered[y1:y2, x1:x2] = True
            background = (np.asarray(image) == layout.tint).all(-1) | (np.asarray(image) == FRAME).all(-1)
            assert background[~covered].all() and all(100 <= v <= 130 for v in layout.tint)


def test_a_seed_names_one_scene_on_every_machine():
    """Texts, boxes, kinds and tints; recorded results are of these scenes."""
    drawn = [(s.question, s.chain, s.gold, s.target_image, s.layouts) for one in SCENES for s in scenes(*one)]
    assert hashlib.sha256(repr(drawn).encode()).hexdigest().startswith("d548911631cc7e6a")


@pytest.mark.parametrize("size", [56, 168, 224])
def test_the_size_changes_the_pixels_alone(size):
    for task in TASKS:
        small, scene = draw_scene(task, 3), draw_scene(task, 3, size=size)
        assert (scene.gold, scene.chain, scene.layouts) == (small.gold, small.chain, small.layouts)
        x1, y1, x2, y2 = pixels(scene.gold, size)
        mask = painted(paint(scene.layouts[scene.target_image], scene.size), gold_thing(scene).kind.colour)
        assert extent(mask[y1:y2, x1:x2]) == [0, 0, x2 - x1, y2 - y1]


def test_every_shape_has_its_area_and_looks_like_no_other():
    star = 5 * 0.45 * np.sin(np.pi / 5) / (2 * np.sin(2 * np.pi / 5) * (1 + np.cos(np.pi / 5)))  # inner radius 0.45
    share = {"circle": np.pi / 4, "square": 1, "triangle": 0.5, "cross": 5 / 9, "diamond": 0.5, "star": star}
    masks = {}
    for shape in SHAPES:
        image = paint(Layout((Thing(Kind("red", shape), (0, 0, 1000, 1000)),), (240, 240, 240)), 560)
        masks[shape] = painted(image, "red")
        assert masks[shape].mean() == pytest.approx(share[shape], abs=0.01)
        assert (masks[shape] == masks[shape][:, ::-1]).mean() > 0.99, "lopsided"
    for a, b in itertools.combinations(SHAPES, 2):
        assert (masks[a] != masks[b]).mean() > 0.12


@pytest.mark.parametrize("level", [0, 1, 2])
def test_wrong_objects_are_as_many_and_as_similar_as_the_level_has_them(level):
    for scene in scenes("group_grounding", level):
        subject = gold_thing(scene).kind
        for k, layout in enumerate(scene.layouts):
            others = [thing.kind for thing in layout.things if thing.kind != subject]
            low, high = OTHERS[level]
            assert low <= len(others) <= high and len(layout.things) == len(others) + (k == scene.target_image)
            shared = [(kind.colour == subject.colour) + (kind.shape == subject.shape) for kind in others]
            assert not shared or max(shared) == {0: 0, 2: 1}.get(level, max(shared))


@pytest.mark.parametrize("level", [0, 1, 2])
class TestTheQuestionHasOneAnswer:
    """Each task's meaning, checked against the layouts; gold must be the only object that fits."""

    def test_common_object(self, level):
        for scene in scenes("common_object", level):
            common = set.intersection(*(set(kinds(layout)) for layout in scene.layouts))
            assert common == {gold_thing(scene).kind}

    def test_refer_grounding(self, level):
        for scene in scenes("refer_grounding", level):
            (shown,) = scene.layouts[0].things
            assert shown.kind == gold_thing(scene).kind and shown.box == (125, 125, 875, 875)
            assert sum((kinds(layout) for layout in scene.layouts[1:]), Counter())[shown.kind] == 1

    def test_group_grounding(self, level):
        for scene in scenes("group_grounding", level):
            colour, shape = re.search(r"the (\w+) (\w+)[.?]$", scene.question).groups()
            assert gold_thing(scene).kind == (colour, shape)
            assert sum(map(kinds, scene.layouts), Counter())[colour, shape] == 1

    def test_diff(self, level):
        changes = set()
        for scene in scenes("diff", level):
            first, second = (np.asarray(paint(layout, scene.size)) for layout in scene.layouts)
            different = (first != second).any(-1)
            x1, y1, x2, y2 = pixels(scene.gold, 112)
            assert different[y1:y2, x1:x2].any()
            different[y1:y2, x1:x2] = False
            assert not different.any(), "the images differ outside the gold box"
            gold = gold_thing(scene)
            there = [t.kind for t in scene.layouts[1 - scene.target_image].things if t.box == scene.gold]
            if not there:
                changes.add("removed" if scene.target_image == 0 else "added")
            else:
                (former,) = there
                assert (former.colour == gold.kind.colour) != (former.shape == gold.kind.shape)
                changes.add("reshaped" if former.colour == gold.kind.colour else "recoloured")
        assert changes >= {"added", "removed"}

    def test_view_diff(self, level):
        for scene in scenes("view_diff", level):
            before, after = ({thing.box: thing.kind for thing in layout.things} for layout in scene.layouts)
            assert after.pop(scene.gold) == gold_thing(scene).kind and scene.target_image == 1
            fitting = []
            for dx, dy in itertools.product((-125, 0, 125), repeat=2):
                moved = {(x1 + dx, y1 + dy, x2 + dx, y2 + dy): kind for (x1, y1, x2, y2), kind in before.items()}
                former = moved.pop(scene.gold, None)
                if moved == after and former != gold_thing(scene).kind:
                    fitting.append((dx, dy))
            assert fitting and fitting != [(0, 0)], "image 2 is not image 1 moved, plus the gold object"

    def test_object_tracking(self, level):
        for scene in scenes("object_tracking", level):
            subject = scene.layouts[0].framed.kind
            assert subject == gold_thing(scene).kind
            path = [next(t.box for t in layout.things if t.kind == subject) for layout in scene.layouts]
            steps = {tuple(b - a for a, b in zip(one, two)) for one, two in itertools.pairwise(path)}
            ((dx, dy, *far),) = steps
            assert far == [dx, dy], "the object changed its size"
            still = {frozenset(t for t in layout.things if t.kind != subject) for layout in scene.layouts}
            assert len(still) == 1, "something else moved"

    def test_multi_view(self, level):
        for scene in scenes("multi_view", level):
            assert scene.layouts[0].framed.kind == gold_thing(scene).kind and scene.target_image > 0
            assert len({frozenset(kinds(layout)) for layout in scene.layouts}) == 1, "the views show different objects"

    def test_region(self, level):
        for scene in scenes("region", level):
            number = int(re.search(r"[iI]mage (\d) (?:in|was)", scene.question)[1])
            (cut_out,) = scene.layouts[number - 1].things
            assert cut_out == (gold_thing(scene).kind, (0, 0, 1000, 1000)) and scene.target_image == 0
            assert kinds(scene.layouts[0])[cut_out.kind] == 1

    def test_reasoning(self, level):
        for scene in scenes("reasoning", level):
            everything = [kind for layout in scene.layouts for kind in kinds(layout).elements()]
            odd = []
            for kind, field in itertools.product(everything, Kind._fields):
                others = {getattr(other, field) for other in everything if other != kind}
                if len(others) == 1 and getattr(kind, field) not in others:
                    odd.append(kind)
            assert odd == [gold_thing(scene).kind]


def test_rulers_change_only_their_lines_and_mark_the_position_of_every_patch():
    scene = draw_scene("diff", 3, level=1)
    plain, image = (np.asarray(i) for i in (paint(scene.layouts[0], 112), scene.images[0]))
    lines = np.zeros((112, 112), bool)
    lines[::14] = lines[:, ::14] = True
    assert (plain == image)[~lines].all()
    patches = [image[y : y + 14, x : x + 14] for y in range(0, 112, 14) for x in range(0, 112, 14)]
    assert len({patch[:, 0].tobytes() + patch[0].tobytes() for patch in patches}) == 64
    assert add_rulers(Image.fromarray(plain)).tobytes() == scene.images[0].tobytes()


@every_scene
def test_other_questions_are_about_every_other_object(task, level):
    for scene in scenes(task, level):
        everything = {
            (f"Where is the {t.kind} in image {k}?", box_text(t.box))
            for k, layout in enumerate(scene.layouts, 1)
            for t in layout.things
        }
        asked = f"Where is the {gold_thing(scene).kind} in image {scene.target_image + 1}?"
        assert everything - set(scene.other_questions) == {(asked, box_text(scene.gold))}
        assert len(scene.other_questions) == len(everything) - 1
