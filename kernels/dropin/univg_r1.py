"""The reward functions of UniVG-R1: the IoU of an answer's box on the 0-1000 scale, and its format."""

import torch

from boxgrpo.kernels.rewards import ANSWER_FORMATS, GroundingRewards, grounding_rewards, pack_texts

COCO = "dataset/coco/train2014/COCO"  # in the path of a single-image example, whose prompt requests no thinking


def iou_reward(completions: list[list[dict]], solution: list, **kwargs) -> list[float]:
    """IoU of each answer's box with its gold box, 0-1, by `grounding_rewards`.

    Args:
        completions: n answers in chat form, [{"role": …, "content": text}].
        solution: n gold boxes x1 y1 x2 y2 on the 0-1000 scale.
        answer_format: "think" or "box", for all or one for each. Without it the format follows from
            `single_img_with_cot` (False: no thinking in single-image examples) and `image_path` (n lists of paths), as
            in UniVG-R1, and is "think" where either is missing.
        kwargs: other columns of the data set, ignored.

    Returns:
        n floats.

    Raises:
        ValueError: an unknown answer format, or `solution` does not hold n boxes.
    """
    try:
        gold = torch.as_tensor(solution, dtype=torch.float32).view(len(completions), 4)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"solution holds no {len(completions)} boxes ({error}); each is x1, y1, x2, y2 on the 0-1000 scale."
        ) from error
    return _rewards(completions, gold, kwargs).accuracy.tolist()


def format_reward_rec(completions: list[list[dict]], **kwargs) -> list[float]:
    """1 for each answer in the requested format, else 0; arguments and errors as `iou_reward`."""
    return _rewards(completions, torch.zeros(len(completions), 4), kwargs).format.tolist()


def _rewards(completions, gold: torch.Tensor, columns: dict) -> GroundingRewards:
    texts = [completion[0]["content"].encode(errors="replace") for completion in completions]
    names = _answer_formats(len(texts), **columns)
    if unknown := set(names) - set(ANSWER_FORMATS):
        raise ValueError(f"answer_format is {unknown.pop()!r}; it is 'think' or 'box', for all or one for each.")
    codes = torch.tensor([ANSWER_FORMATS[name] for name in names], dtype=torch.uint8)
    return grounding_rewards(*pack_texts(texts), gold, answer_format=codes)


def _answer_formats(n: int, answer_format=None, single_img_with_cot=True, image_path=None, **_) -> list[str]:
    if answer_format is not None:
        return [answer_format] * n if isinstance(answer_format, str) else list(answer_format)
    if single_img_with_cot or image_path is None:
        return ["think"] * n
    return ["box" if paths and COCO in paths[0] else "think" for paths in image_path]
