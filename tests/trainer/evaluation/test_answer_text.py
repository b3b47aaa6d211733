"""Reading an answer's text: the letter it chooses, or none; the boxes it lists."""

import time

import pytest

from boxgrpo.trainer.evaluation.answer_text import answer_part, chosen_letter, listed_boxes

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
    odd = '{"bbox": [NaN, 1, 2, 3]} {"bbox": [1, 2, 3]} {"bbox": "1, 2, 3, 4"} {"bbox": [true, 1, 2, 3]} {1: 2}'
    assert listed_boxes(odd) == []
    assert listed_boxes('{"bbox": [1, 2, 3, 4], "confidence": 7}') == [((1, 2, 3, 4), None)]


@pytest.mark.parametrize(
    "piece", ["(", "[ ", "{", "A ", "answer is ", "(1, 2), ", '{"bbox": [', "(1,          ", "not "]
)
def test_long_nonsense_takes_no_time(piece):
    text = piece * (20_000 // len(piece))
    started = time.perf_counter()
    chosen_letter(text, IMAGES)
    listed_boxes(text)
    assert time.perf_counter() - started < 5
