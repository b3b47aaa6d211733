"""Pictures of what a run did: predictions drawn over their images, sheets of them, and the curves of a run."""

import json
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from boxgrpo.kernels import box_iou

GOLD = (0, 150, 60)
PREDICTED = (225, 30, 30)
INK = (30, 30, 30)
FAINT = (110, 110, 110)
PAPER = (255, 255, 255)
MARGIN = 12  # pixels, as are the sizes below
IMAGE_HEIGHT = 240
TEXT_SIZE = 15
LINE = 20
LEAST_WIDTH = 420  # room for the legend under a single narrow image


def annotate(
    images: Sequence[Image.Image],
    *,
    gold: Sequence[float] | None,
    predicted: Sequence[float] | None,
    target_image: int,
    question: str,
    reasoning: str,
    title: str | None = None,
    answered: bool = True,
    image_height: int = IMAGE_HEIGHT,
) -> Image.Image:
    """Draws the images side by side with the gold box (green) and the predicted box (red) on the target image.

    The images are `image_height` pixels high, or lower where they are wider than three times that.
    Boxes are x1, y1, x2, y2 on the 0-1000 scale of `images[target_image]` (counted from 0); None draws none. A
    predicted box that is inverted or leaves the image is drawn as far as it can be seen, and gets the IoU it deserves.
    Underneath stand the legend with the IoU, the question and the reasoning, wrapped; characters that the font lacks
    show as boxes. `answered` false: nobody was asked, so no box is missed. Returns an RGB image. Raises ValueError for
    a target image that is not there.
    """
    if not 0 <= target_image < len(images):
        raise ValueError(f"target_image is {target_image} of {len(images)} images; count from 0 to the last one.")
    shown = [_fit(image, image_height) for image in images]
    width = max(sum(image.width for image in shown) + MARGIN * (len(shown) + 1), LEAST_WIDTH)
    large, regular, small = (ImageFont.load_default(TEXT_SIZE + step) for step in (3, 0, -2))
    heading, asked, thought = (
        _wrap(text, font, width - 2 * MARGIN)
        for text, font in ((title or "", large), (question, regular), (reasoning, regular))
    )
    top = MARGIN + len(heading) * LINE + (8 if heading else 0)
    captions = top + max(image.height for image in shown) + 6
    legend = captions + LINE
    text = legend + LINE + 6
    page = Image.new("RGB", (width, text + LINE * (len(asked) + len(thought)) + 4 + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    pen.multiline_text((MARGIN, MARGIN - 4), "\n".join(heading), INK, large, spacing=LINE - TEXT_SIZE)

    x = MARGIN
    for k, image in enumerate(shown):
        page.paste(image, (x, top))
        pen.rectangle([x - 1, top - 1, x + image.width, top + image.height], outline=(200, 200, 200))
        pen.text((x, captions), f"image {k + 1}", INK if k == target_image else FAINT, small)
        if k == target_image:
            corner = (x, top)
        x += image.width + MARGIN
    target = shown[target_image]
    if gold is not None:  # outwards from the box's edge, and the prediction inwards: equal boxes show both
        _outline(pen, gold, target, corner, GOLD, outwards=3)
    if predicted is not None:
        _outline(pen, predicted, target, corner, PREDICTED, outwards=0)

    x = MARGIN
    for name, colour, box in (("gold", GOLD, gold), ("predicted", PREDICTED, predicted)):
        if box is not None:
            pen.rectangle([x, legend + 4, x + 12, legend + 14], outline=colour, width=3)
            pen.text((x + 18, legend), name, INK, regular)
            x += 34 + round(regular.getlength(name))
    if gold is not None and answered:
        found = "no box found"
        if predicted is not None:
            one, other = (torch.tensor([box], dtype=torch.float64) for box in (gold, predicted))
            found = f"IoU {box_iou(one, other).item():.2f}"
        pen.text((x, legend), found, INK, regular)
    for k, line in enumerate(asked):
        pen.text((MARGIN, text + k * LINE), line, INK, regular)
    for k, line in enumerate(thought, len(asked)):
        pen.text((MARGIN, text + 4 + k * LINE), line, FAINT, regular)
    return page


def contact_sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lays pictures of any sizes out in rows of `columns`; a row is as high as its highest picture. Returns RGB."""
    if not pictures or columns < 1:
        raise ValueError(
            f"a sheet of {len(pictures)} pictures in {columns} columns is empty; give at least one of each."
        )
    rows = [pictures[k : k + columns] for k in range(0, len(pictures), columns)]
    widths = [max(picture.width for picture in pictures[k::columns]) for k in range(min(columns, len(pictures)))]
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (sum(widths) + MARGIN * (len(widths) + 1), sum(heights) + MARGIN * (len(rows) + 1)))
    sheet.paste((225, 225, 225), (0, 0, *sheet.size))
    y = MARGIN
    for row, height in zip(rows, heights):
        x = MARGIN
        for picture, width in zip(row, widths):
            sheet.paste(PAPER, (x, y, x + width, y + height))
            sheet.paste(picture, (x, y))
            x += width + MARGIN
        y += height + MARGIN
    return sheet


def _fit(image: Image.Image, image_height: int) -> Image.Image:
    """An RGB copy at the display height; very wide images are held to three heights of width."""
    scale = min(image_height / image.height, 3 * image_height / image.width)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _outline(
    pen, box, image: Image.Image, corner: tuple[int, int], colour: tuple[int, int, int], outwards: int
) -> None:
    """Draws `box` (0-1000 of `image`, which stands at `corner`) with a white seam: a red box shows on a red object."""
    x1, x2 = sorted(corner[0] + round(min(max(v / 1000, 0), 1) * image.width) for v in (box[0], box[2]))
    y1, y2 = sorted(corner[1] + round(min(max(v / 1000, 0), 1) * image.height) for v in (box[1], box[3]))
    # Pillow's corners are inclusive and its lines grow inwards; a box seen edge-on still gets a line.
    x1, y1, x2, y2 = x1 - outwards, y1 - outwards, max(x2 - 1, x1) + outwards, max(y2 - 1, y1) + outwards
    width = outwards or 2
    seam = (x1 - 1, y1 - 1, x2 + 1, y2 + 1) if outwards else (x1, y1, x2, y2)
    pen.rectangle(seam, outline=PAPER, width=width + 1)
    pen.rectangle((x1, y1, x2, y2), outline=colour, width=width)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks `text` into lines of at most `width` pixels: between words, and inside one that alone is too long."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines[1:]


REWARDS = (("rewards/accuracy/mean", "IoU", "#1f6fd6"), ("rewards/format/mean", "format", "#8a8a8a"))
DIFFICULTY = (
    ("difficulty/easy", "easy (mIoU > 0.7)", "#009e60"),
    ("difficulty/medium", "medium", "#e69f00"),
    ("difficulty/hard", "hard (mIoU < 0.3)", "#d62728"),
)


def plot_run(metrics_jsonl_path: str | os.PathLike, out_png: str | os.PathLike, title: str | None = None) -> None:
    """Plots a run's rewards and its shares of easy, medium and hard groups (the paper's Figure 3) by step.

    Reads one JSON object a line; a line without `step` or without a key is passed over for that curve, and of a step
    written twice (a resumed run) the later line counts. Thin lines are the raw values, thick ones their running mean.
    Raises ValueError for a line that is not JSON and for a file without any of the curves.
    """
    records = []
    with open(metrics_jsonl_path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{metrics_jsonl_path}, line {number} is not JSON ({error}). Remove that line."
                ) from error

    figure = Figure(figsize=(10, 3.8), layout="constrained")  # no pyplot: no global state, no window
    drawn = 0
    for axes, panel, curves in zip(figure.subplots(1, 2), ("mean reward", "share of groups"), (REWARDS, DIFFICULTY)):
        for key, label, colour in curves:
            steps, values = _curve(records, key)
            if not steps:
                continue
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(steps, _running_mean(values), color=colour, linewidth=2, label=label)
            drawn += 1
        axes.set(xlabel="step", ylabel=panel, ylim=(-0.02, 1.02))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, loc="best")
    if not drawn:
        known = ", ".join(key for key, *_ in REWARDS + DIFFICULTY)
        raise ValueError(f"{metrics_jsonl_path} holds none of {known}. Give the metrics file of a GRPO run.")
    if title:
        figure.suptitle(title)
    figure.savefig(out_png, dpi=130)


def _curve(records: Sequence[dict], key: str) -> tuple[list[int], np.ndarray]:
    points = {r["step"]: r[key] for r in records if "step" in r and r.get(key) is not None and math.isfinite(r[key])}
    steps = sorted(points)
    return steps, np.array([points[step] for step in steps])


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean over a window of an eighth of the run around each value; the window shrinks at the ends."""
    half = max(len(values) // 16, 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    low, high = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
