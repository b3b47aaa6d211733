"""Reading an answer's text: the letter it chooses, or none; the boxes it lists."""

import random
import re
import time

import pytest

from boxgrpo.trainer.evaluation import answer_text
from boxgrpo.trainer.evaluation.answer_text import (
    ANY_BOX,
    LIST_BOX,
    TAGGED_BOX,
    answer_part,
    chosen_letter,
    first_box,
    listed_boxes,
)

IMAGES = {"A": "the first image", "B": "the second image", "C": "the third image", "D": "the fourth image"}
YES_NO = {"A": "No", "B": "Yes"}
NUMBERS = {"A": "5", "B": "2", "C": "10", "D": "8"}
NESTED = {"A": "stronger", "B": "much stronger", "C": "the same", "D": "the same"}
EIGHT = {letter: f"The {n}th image" for n, letter in enumerate("ABCDEFGHI", 9)}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("<think>A.</think> <answer> B </answer>", " B "),
        ("<think>A.</think> C", " C"),
        ("D", "D"),
        ("<think>A.</think><answer>B", "B"),  # cut off
        ("<think>It is A", ""),  # cut off before the answer
        ("It is A.</think>B", "B"),  # the prompt opened the reasoning
        ("<answer>B</answer><answer>C</answer>", "B"),
    ],
)
def test_the_answer_part_excludes_the_reasoning(text, part):
    assert answer_part(text) == part


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # a bare letter
        ("B", "B"),
        (" b. ", "B"),
        (r"\boxed{C}", "C"),
        # the tags
        ("<think>A or B? A!</think><answer>D</answer>", "D"),
        # an announced answer, the last one
        ("**Answer:** B", "B"),
        ('{"answer": "B"}', "B"),
        ("A looks blurred, so the answer is C", "C"),
        (r"The final answer is $\boxed{C}$", "C"),
        ("Answer: A ... no, wait. Answer: B", "B"),
        ("The answer is not A, it is B.", "B"),
        ("answer: a", "A"),
        ("Answer is: (a) the first image", "A"),
        # at the beginning or on the last line
        ("B. the second image, since A and C look false", "B"),
        ("A) the first", "A"),
        ("B - the second", "B"),
        ("B\n\nBecause A is wrong", "B"),
        ("A and C are blurred.\n\nD", "D"),
        # the only one in brackets, the only one named, the only capital
        ("It must be (B): A and C are blurred", "B"),
        ("Option C fits best; image A is blurred", "C"),
        ("I would go with D, not A", "D"),
        ("I think it is B", "B"),
        ("A is correct", "A"),
        # the article, the pronoun, and what only looks like a letter
        ("A dog is in the third image.", "C"),
        ("The answer is a dog", None),
        ("Answer: A dog and a cat in the fourth image", "D"),
        ("An A-frame house", None),
        ("It's A's turn", None),
        ("i.e. an e.g. a thing", None),
        # none, or more than one
        ("", None),
        ("It could be A or B", None),
        ("(A) is wrong, (B) is right", None),
        ("Image A shows a dog; image B a cat", None),
        ("Not A.", None),
        ("neither A nor B", None),
        # the option's own text
        ("the second image", "B"),
        ("It is the second image, I am sure", "B"),
        ("the first image and the second image", None),
    ],
)
def test_the_letter_of_an_answer(text, letter):
    assert chosen_letter(text, IMAGES) == letter


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        ("Yes, there is no noise", YES_NO, "B"),
        ("No", YES_NO, "A"),
        ("I see no dog", YES_NO, None),  # a short word counts at the beginning only
        ("There are 10 of them", NUMBERS, "C"),
        ("2.5", NUMBERS, None),
        ("It is much stronger", NESTED, "B"),  # and not "stronger" within it
        ("Stronger", NESTED, "A"),
        ("The same", NESTED, None),  # the text of two options; MMIU has such records
        ("I think so", EIGHT, None),
        ("I", EIGHT, "I"),
        ("The answer is I.", EIGHT, "I"),
        ("The 16th image", EIGHT, "H"),
    ],
)
def test_the_options_own_texts(text, options, letter):
    assert chosen_letter(text, options) == letter


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("<answer>(125, 250), (500, 750)</answer>", [(125, 250, 500, 750)]),
        (
            "<think>(9, 9), (10, 10)</think><answer>(1, 2), (3, 4) and (5,6),(7,8)</answer>",
            [(1, 2, 3, 4), (5, 6, 7, 8)],
        ),
        ("(1,2),(3,4),(5,6),(7,8)", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        (
            "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|><|box_start|>(5,6),(7,8)<|box_end|>",
            [(1, 2, 3, 4), (5, 6, 7, 8)],
        ),
        ("[1, 2, 3.5, 4], [5,6,7,8]", [(1, 2, 3.5, 4), (5, 6, 7, 8)]),
        ("<answer>(1, 2), (3, 4), (5, 6), (7,", [(1, 2, 3, 4)]),  # cut off
        ("<think>(1, 2), (3, 4)", []),
        ("(12345, 1), (2, 3)", []),
        ("(1, 2), (3)", []),
        ("There is none.", []),
    ],
)
def test_boxes_without_scores(text, boxes):
    assert listed_boxes(text) == [(box, None) for box in boxes]


def test_json_boxes_and_their_scores():
    text = (
        '```json\n[{"bbox_2d": [1, 2, 3.5, 4], "label": "dog"}, {"bbox": [5, 6, 7, 8], "score": 0.25}, {"bbox_2d": [5'
    )
    assert listed_boxes(text) == [((1, 2, 3.5, 4), None), ((5, 6, 7, 8), 0.25)]  # the last one is cut off
    odd = '{"bbox": [NaN, 1, 2, 3]} {"bbox": [1, 2, 3]} {"bbox": "1, 2, 3"} {"bbox": [true, 1, 2, 3]} {1: 2}'
    assert listed_boxes(odd) == []
    assert listed_boxes('{"bbox": [1, 2, 3, 4], "confidence": 7}') == [((1, 2, 3, 4), None)]
    named = '{"x1": 1, "y1": "2", "x2": 3e1, "y2": 4.5, "score": 0.5} {"box": [-1, 2, 3, 4]} {"box": [1, 2, 3, 10001]}'
    assert listed_boxes(named) == [((1, 2, 30, 4.5), 0.5)]


BOX = (12.5, 30.0, 200.0, 150.0)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[12.333333333333334, 30, 200, 150]", (12.333333333333334, 30, 200, 150)),
        ("[1.25e1, 30.0E+0, 2e2, 1500e-1]", BOX),
        ("[-12.5, -0, 200, 1.5e2]", (-12.5, 0, 200, 150)),
        ("[16384, 1, 20000, 30000]", (16384, 1, 20000, 30000)),
        ("[1e999, 1, -1e999, 9]", (2**31 - 1, 1, 1 - 2**31, 9)),
        ("[12.5 ,\n\n      30,\t200 , 150 ]", BOX),
        ("( 12.5,30 ) , (200, 150)", BOX),
        ("(12.5, 30, 200, 150)", BOX),
        # in quotes: numbers, lists, JSON in JSON
        ('["12.5", "30", "200", "150"]', BOX),
        ("['12.5', '30', '200', '150']", BOX),
        ('{"bbox_2d": "[12.5, 30, 200, 150]"}', BOX),
        (r'"{\"bbox_2d\": [12.5, 30, 200, 150]}"', BOX),
        # objects
        ('```json\n[\n\t{"bbox_2d": [12.5, 30, 200, 150], "label": "cup"}\n]\n```', BOX),
        ('{"label": "[1, 2, 3, 4]", "bbox": ["12.5", "30", 200, 150]}', BOX),
        ('{"x1": 12.5, "y1": 30, "x2": 2e2, "y2": 150}', BOX),
        ('{"y2": 150, "x2": 200, "y1": 30, "x1": "12.5", "label": "cup"}', BOX),
        ('{"xmin": 12.5, "ymin": 30, "xmax": 200, "ymax": 150}', BOX),
        ('{"x_min": 12.5, "y_min": 30, "x_max": 200, "y_max": 150}', BOX),
        ('{"Left": 12.5, "Top": 30, "Right": 200, "Bottom": 150}', BOX),
        ('[{"name": "cup", "box": {"xmin": 12.5, "ymin": 30, "xmax": 200, "ymax": 150}}]', BOX),
        ("{'box': [12.5, 30, 200, 150]}", BOX),
        ("{[12.5, 30, 200, 150]}", BOX),
        # in one text, or in two pairs
        ('{"bbox": "12.5, 30,200,150 "}', BOX),
        ('{"bbox": "12.5, 30, 200, 150"} or [1, 2, 3, 4]', BOX),
        ("[[12.5, 30], [200, 150]]", BOX),
        ("[ [12.5,30] ,\n['200', 150] ]", BOX),
        ('{"bbox_2d": [[12.5, 30], [200, 150]]}, {"bbox_2d": [1, 2, 3, 4]}', BOX),
        ("[[1, 2], [3, 4], [5, 6]], [12.5, 30, 200, 150]", BOX),
        ('{"bbox": "1, 2, 3"}, {"bbox": "a, 2, 3, 4"}', None),
        # the first of several
        ("[[12.5, 30, 200, 150], [1, 2, 3, 4]]", BOX),
        ('{"box": [12.5, 30, 200, 150]}, {"x1": 1, "y1": 2, "x2": 3, "y2": 4}', BOX),
        ('{"x1": 12.5, "y1": 30, "x2": 200, "y2": 150} or [1, 2, 3, 4]', BOX),
        ('[12.5, 30, 200, 150] or {"x1": 1, "y1": 2, "x2": 3, "y2": 4}', BOX),
        ('{"point_2d": [1, 2]}, {"bbox_2d": [12.5, 30, 200, 150]}', BOX),
        ('{"bbox_2d": [12.5, 30, 200, 150]}, {"bbox_2d": [1, 2', BOX),
        # none
        ("[NaN, 1, 2, 3]", None),
        ("[.5, 1, 2, 3]", None),
        ("[1, 2, 3]", None),
        ("[1, 2, 3, 4, 5]", None),
        ("[true, 1, 2, 3]", None),
        ('{"bbox_2d": [Infinity, 1, 2, 3]}', None),
        ('{"x1": 1, "y1": 2, "x2": 3}', None),
        ('{"x1": 1, "y1": 2, "x2": 3, "y2": null}', None),
        ("There is none.", None),
        ("From [[1, 2], [3, 4]] on: [12.5, 30, 200, 150]", BOX),
        ('{"size": [[640, 480], [1, 1]]} {"bbox_2d": [[12.5, 30], [200, 150]]}', BOX),
    ],
)
def test_case_07_a_box_of_any_json_numbers_quoted_or_named_is_read(text, box):
    """The first of the text. Numbers too large for any image are read as the kernels' limit."""
    assert first_box(text, ANY_BOX) == box
    assert first_box(f"The {{box}}: {text}.", ANY_BOX) == box


def test_tagged_boxes_have_any_json_number():
    assert first_box("<box> 1.25e1  30\n200 150</box>", TAGGED_BOX) == BOX
    assert first_box("<box>1 2 3</box> [1, 2, 3, 4]", TAGGED_BOX) is None


_NUMBER = r"\s{0,4}([0-9]{1,4}(?:\.[0-9]{1,9})?)\s{0,4}"
_PAIRS = rf"\({_NUMBER},{_NUMBER}\)\s{{0,4}},?\s{{0,4}}\({_NUMBER},{_NUMBER}\)"
_FOUR = ",".join([_NUMBER] * 4)
NARROW = {  # by pattern: what is read where numbers are plain and short
    LIST_BOX: re.compile(rf"\[{_FOUR}\]"),
    answer_text.PAIRS_OR_LIST: re.compile(rf"{_PAIRS}|\[{_FOUR}\]"),
    ANY_BOX: re.compile(rf"{_PAIRS}|[\[(]{_FOUR}[\])]"),
    TAGGED_BOX: re.compile(rf"<box>{_NUMBER} {_NUMBER} {_NUMBER} {_NUMBER}</box>"),
}


def test_plain_short_numbers_are_read_as_by_a_narrow_pattern():
    """5,000 soups of boxes and what is nearly a box: the same first box, and the same list of all."""
    draw, found = random.Random(0), 0
    signs = (*"()[]", "(", "[", ",", ", ", " ,", " ", "  ", "\n", "<box>", "</box>", "a", "<box>1 2 3 4</box>")
    numbers = ("0", "7", "007", "42.5", "0.123456789", "9999")
    for _ in range(5_000):
        # A sign stands between two numbers, so that they do not become one that is longer.
        text = "".join(draw.choice(signs) + draw.choice(("", *numbers)) for _ in range(draw.randrange(3, 9)))
        a, b, c, d = (draw.choice(numbers) for _ in range(4))
        box = draw.choice(
            (f"({a}, {b}), ({c},{d})", f"[{a},{b}, {c} ,{d}]", f"({a}, {b}, {c}, {d})", f"<box>{a} {b} {c}  {d}</box>")
        )
        text = f"{text}{box}{text[::-1]}" if draw.random() < 0.7 else text
        for pattern, narrow in NARROW.items():
            all_of = [tuple(float(n) for n in m.groups() if n is not None) for m in narrow.finditer(text)]
            assert first_box(text, pattern) == (all_of[0] if all_of else None), text
            if pattern is answer_text.PAIRS_OR_LIST:
                assert listed_boxes(text) == [(each, None) for each in all_of], text
            found += len(all_of)
    assert found > 5_000


NONSENSE = [
    "(", "[ ", "{", "A ", "answer is ", "(1, 2), ", "[[1, 2], ", '{"bbox": [', "(1,          ", "not ", '["', "{[", "1e"
]  # fmt: skip


@pytest.mark.parametrize("piece", NONSENSE)
def test_long_nonsense_takes_no_time(piece):
    text = piece * (20_000 // len(piece))
    started = time.perf_counter()
    chosen_letter(text, IMAGES)
    listed_boxes(text)
    for pattern in NARROW:
        first_box(text, pattern)
    assert time.perf_counter() - started < 5
