"""Plain questions: their answers are true of the images, held-out arrangements are others, no question is a task's."""

import json
import re

import pytest

from boxgrpo.trainer.data.example import BOX_PREFIX, THINK_SUFFIX
from boxgrpo.trainer.data.images import load_image
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.world import plain
from boxgrpo.trainer.world.digits import WORLDS, find_scans
from boxgrpo.trainer.world.plain import PlainScenes, to_record
from boxgrpo.trainer.world.scenes import draw_scene, place_name, tasks_of
from boxgrpo.trainer.world.shapes import add_rulers, paint

CORNERS = r"\((\d+), (\d+)\), \((\d+), (\d+)\)"


@pytest.fixture
def drawn(monkeypatch):
    """drawn(example): its layouts, in the order of its images."""
    kept = []

    def draw(*choices):
        kept.append(plain_draw(*choices))
        return kept[-1]

    plain_draw = plain._draw_layouts
    monkeypatch.setattr(plain, "_draw_layouts", draw)
    return lambda: kept[-1]


def holds(question: str, answer: str, layouts) -> str:
    """The form of the question, if the answer is true; else an empty text."""
    numbers = [int(n) for n in re.findall(r"in image (\d)", question)]
    (things, _, framed) = layouts[numbers[0] - 1]
    boxes = {str(thing.kind): thing.box for thing in things}
    corners = [tuple(map(int, found)) for found in re.findall(CORNERS, answer)]
    if question.startswith("List the objects"):
        order = sorted(things, key=lambda thing: (thing.box[1], thing.box[0]))
        return "list" if answer == ", ".join(str(thing.kind) for thing in order) else ""
    if question.startswith("Which object is at"):
        return "what" if boxes[answer] == tuple(map(int, re.search(CORNERS, question).groups())) else ""
    if "the framed object" in question:
        return "framed" if corners == [framed.box] else ""
    kind = re.search(r"Where is the (.+) in image", question)[1]
    true = corners == [boxes[kind]]
    if question.endswith(THINK_SUFFIX):
        chain = f"<think>The {kind} is in image {numbers[0]} at the {place_name(boxes[kind])}.</think><answer>"
        return "chain" if true and answer.startswith(chain) else ""
    return "where" if true and question.startswith(BOX_PREFIX) and answer[0] == "(" else ""


@pytest.mark.parametrize("world", WORLDS)
def test_every_answer_is_true_and_every_form_is_asked(drawn, world):
    scenes, forms = PlainScenes(150, seed=3, world=world), set()
    for example in scenes:
        layouts = drawn()
        assert len(layouts) == len(example.images) in (2, 3) and len(example.turns) <= 12
        for (_, question), (_, answer) in zip(example.turns[::2], example.turns[1::2], strict=True):
            forms.add(holds(question, answer, layouts))
        assert example.gold in [t.box for t in layouts[example.target_image].things]
    assert forms == {"where", "chain", "list", "what", "framed"}


def test_an_example_is_the_same_whenever_it_is_read_and_shows_its_layouts(drawn):
    scenes = PlainScenes(5, seed=1, levels=[2])
    first, layouts = scenes[4], drawn()
    for image, layout in zip(first.images, layouts, strict=True):
        assert load_image(image).tobytes() == add_rulers(paint(layout, 112)).tobytes()
    assert PlainScenes(5, seed=1, levels=[2])[4] == first != scenes[3] != PlainScenes(5, seed=2, levels=[2])[3]
    with pytest.raises(IndexError, match="index is 5 of 5 scenes"):
        scenes[5]


def test_no_arrangement_is_both_trained_on_and_held_out(drawn):
    def arrangements(**options):
        return {repr([layout[::2] for layout in drawn()]) for _ in PlainScenes(400, 0, levels=[0], size=56, **options)}

    held_out = arrangements(held_out=True)
    assert len(held_out) > 300 and not held_out & arrangements()


def test_a_held_out_sequence_of_digits_has_scans_of_its_own(drawn):
    for held_out in (False, True):
        for _ in PlainScenes(100, 0, size=56, world="digits", held_out=held_out):
            kinds = [thing.kind for layout in drawn() for thing in layout.things]
            assert all(kind.scan in find_scans(kind.digit, held_out) for kind in kinds)


@pytest.mark.parametrize("world", WORLDS)
def test_no_question_is_one_of_the_tasks(drawn, world):
    sketch = WORLDS[world][False]
    asked = {draw_scene(t, seed, level=0, sketch=sketch).question for t in tasks_of(sketch) for seed in range(50)}
    plain_questions = {text for example in PlainScenes(100, 5, size=56, world=world) for _, text in example.turns[::2]}
    assert not asked & {text.removeprefix(BOX_PREFIX).removesuffix(THINK_SUFFIX) for text in plain_questions}


def test_a_record_asks_the_first_question(tmp_path):
    examples = list(PlainScenes(6, 8, held_out=True))
    (tmp_path / "held_out.json").write_text(json.dumps([to_record(example) for example in examples]))
    read, faults = read_examples(tmp_path / "held_out.json")
    assert not faults
    for ours, theirs in zip(examples, read, strict=True):
        same = ("id", "task", "question", "gold", "target_image", "answer_format")
        assert all(getattr(ours, name) == getattr(theirs, name) for name in same)
        assert [image.content for image in ours.images] == [image.content for image in theirs.images]
