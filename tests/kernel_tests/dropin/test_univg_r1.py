"""boxgrpo.kernels.dropin.univg_r1's reward functions, as UniVG-R1's trainer calls them."""

import inspect

import pytest
import torch

from boxgrpo.kernels.dropin import univg_r1
from kernel_cases import assert_refused

GOLD = [0, 0, 500, 500]
ANSWERS = {  # text: (IoU, format) as a thinking answer, and as a bare box
    "<think>Here.</think><answer>(0, 0), (500, 500)</answer>": ((1.0, 1.0), (1.0, 1.0)),
    "<think>Here.</think>\n<answer>(0,0), (500, 250)</answer>": ((0.5, 1.0), (0.5, 1.0)),
    "<think>Here.</think><answer> (250, 0), (500, 500) </answer>": ((0.5, 0.0), (0.5, 1.0)),
    "<answer>(0, 0), (500, 500)</answer>": ((1.0, 0.0), (1.0, 1.0)),
    "(0, 0), (500, 500)": ((0.0, 0.0), (1.0, 1.0)),
    "<think>é, 框</think><answer>(600, 600), (900, 900)</answer>": ((0.0, 1.0), (0.0, 1.0)),
    "<think>Here.</think><answer>(500, 500), (0, 0)</answer>": ((0.0, 1.0), (0.0, 1.0)),
    "nothing": ((0.0, 0.0), (0.0, 0.0)),
    "": ((0.0, 0.0), (0.0, 0.0)),
    "\ud800<answer>(0, 0), (500, 500)</answer>": ((1.0, 0.0), (1.0, 1.0)),  # what no encoding writes
}
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ANSWERS]
SOLUTION = [GOLD] * len(ANSWERS)
COCO = [["dataset/coco/train2014/COCO_1.jpg"]] * len(ANSWERS)


@pytest.mark.parametrize(
    "columns, bare",
    [
        ({}, False),
        ({"answer_format": "box"}, True),
        ({"answer_format": ["box"] * len(ANSWERS)}, True),
        ({"single_img_with_cot": False, "image_path": COCO}, True),
        ({"single_img_with_cot": True, "image_path": COCO}, False),
        ({"single_img_with_cot": False, "image_path": [["a.jpg", "b.jpg"], None] * (len(ANSWERS) // 2)}, False),
        ({"prompts": COMPLETIONS, "image_path": COCO, "trainer_state": None}, False),
    ],
    ids=["default", "box", "each box", "COCO", "COCO with thinking", "other images", "other columns"],
)
def test_case_19_rewards_of_its_own_form(columns, bare):
    want = [values[bare] for values in ANSWERS.values()]
    accuracy = univg_r1.iou_reward(COMPLETIONS, SOLUTION, **columns)
    form = univg_r1.format_reward_rec(COMPLETIONS, solution=SOLUTION, **columns)
    assert list(zip(accuracy, form, strict=True)) == want
    assert all(type(value) is float for value in [*accuracy, *form])


def test_each_example_has_its_own_format():
    paths = [COCO[0], ["other.jpg"]]
    pair = [COMPLETIONS[4]] * 2
    for columns in ({"single_img_with_cot": False, "image_path": paths}, {"answer_format": ["box", "think"]}):
        assert univg_r1.iou_reward(pair, [GOLD] * 2, **columns) == [1.0, 0.0]
        assert univg_r1.format_reward_rec(pair, **columns) == [1.0, 0.0]


def test_boxes_in_any_container_and_none_at_all():
    for solution in (torch.tensor(SOLUTION), [tuple(map(float, GOLD))] * len(ANSWERS)):
        assert univg_r1.iou_reward(COMPLETIONS, solution)[0] == 1.0
    assert univg_r1.iou_reward([], []) == [] and univg_r1.format_reward_rec([]) == []


def test_what_is_refused():
    one = COMPLETIONS[:1]
    assert_refused(
        ("solution holds no 1 boxes", lambda: univg_r1.iou_reward(one, ["<answer>[0, 0, 5, 5]</answer>"])),
        ("solution holds no 1 boxes", lambda: univg_r1.iou_reward(one, [GOLD, GOLD])),
        ("is 'boxes'; it is 'think' or 'box'", lambda: univg_r1.iou_reward(one, [GOLD], answer_format="boxes")),
        (r"answer_format has shape \(2,\)", lambda: univg_r1.format_reward_rec(one, answer_format=["box", "box"])),
    )


def test_signatures():
    for reward, gold in ((univg_r1.iou_reward, ", solution: list"), (univg_r1.format_reward_rec, "")):
        assert str(inspect.signature(reward)).startswith(f"(completions: list[list[dict]]{gold}, **kwargs)")
