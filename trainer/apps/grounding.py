"""One question about some images, answered by a checkpoint: the reasoning, and the box in the image's own pixels."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from boxgrpo.kernels import grounding_rewards, pack_texts
from boxgrpo.model.batch import Prompt
from boxgrpo.model.checkpoint import load_model
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.model.generate import prefill
from boxgrpo.trainer.data.example import Example, plain_text
from boxgrpo.trainer.data.images import upright_size
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.schemas import target_image
from boxgrpo.trainer.evaluation.pictures import annotate
from boxgrpo.trainer.options import resolve_dtype
from boxgrpo.trainer.rollout.base import Vocabulary

PICTURE_HEIGHT = 420  # pixels, of each image in the picture


@dataclass(frozen=True)
class Asked:
    """A question that is ready for the model."""

    example: Example
    sizes: tuple[tuple[int, int], ...]  # width and height of each image, pixels, upright
    prompt: Prompt


@dataclass(frozen=True)
class Answer:
    """What the model said, and how its box is to be understood."""

    text: str
    reasoning: str | None  # inside <think> </think>; None: there are no such tags
    box_1000: tuple[int, ...] | None  # x1, y1, x2, y2 as written, 0-1000 of the target image; None: no box found
    box_px: tuple[float, ...] | None  # the same in pixels of the target image, upright, before any scaling
    note: str  # why there is no box, or what is wrong with it; empty: nothing


class Grounder:
    """A checkpoint that answers, greedily and through the policy's own decoder.

    Args:
        max_completion_length: tokens of an answer at most.
    """

    def __init__(self, model: Qwen2VL, processor: Processor, *, max_completion_length: int):
        self.model, self.processor = model.eval(), processor
        self.vocabulary = Vocabulary.of(processor, model.config, model.device)
        self.max_completion_length = max_completion_length

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        device: torch.device,
        *,
        dtype: str,
        min_pixels: int,
        max_pixels: int,
        max_completion_length: int,
    ) -> "Grounder":
        """The Qwen2-VL checkpoint in a folder; options as EvalOptions has them.

        Raises:
            ValueError: no checkpoint there, a broken one, or options that do not fit.
        """
        number_type = resolve_dtype(dtype, device)
        try:
            processor = Processor.from_pretrained(folder, min_pixels=min_pixels, max_pixels=max_pixels)
            model = load_model(folder, dtype=number_type, device=device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ValueError(
                f"{folder} does not fit into memory ({error}). Take a smaller model, or --dtype bfloat16."
            ) from error
        except Exception as error:  # transformers, tokenizers and safetensors fail in a dozen ways, few name the file
            raise ValueError(
                f"model is {folder}; it cannot be loaded ({error}). Name the folder of a whole Qwen2-VL checkpoint, "
                "tokenizer included, with --model."
            ) from error
        return cls(model, processor, max_completion_length=max_completion_length)

    def prepare(
        self, question: str, images: Sequence[str | os.PathLike], *, target: int = 0, answer_format: str = "think"
    ) -> Asked:
        """Read the images and put the question.

        Args:
            target: number of the image that the box lies in, counted from 1 as people do; 0: as the question's wording
                tells, else the last one.
            answer_format: "think", or "box" for a simple reference in a single image: no reasoning asked for.

        Raises:
            ValueError: no question, no image, one that cannot be read, or a target or format that does not fit.
        """
        check_question(question)
        if not images:
            raise ValueError("there are 0 images; a question needs at least 1. Add one with --image.")
        for path in images:
            if not Path(path).is_file():
                raise ValueError(f"image is {path}; there is no such file. Correct --image.")
        if not 0 <= target <= len(images):
            raise ValueError(
                f"target_image is {target} of {len(images)} images; count from 1, or leave it 0 to go by the "
                "question's wording. Change --target_image."
            )
        if answer_format not in ("think", "box"):
            raise ValueError(f"answer_format is {answer_format!r}; it must be think or box. Change --answer_format.")
        if answer_format == "box" and len(images) > 1:
            raise ValueError(
                f"answer_format is 'box' with {len(images)} images; it asks for a simple reference in a single one. "
                "Use --answer_format think."
            )
        example = Example(
            id="question",
            task="question",
            images=tuple(map(str, images)),
            question=question,
            gold=None,
            answer_format=answer_format,
            target_image=target - 1 if target else target_image({}, question, len(images)),
            source="question",
        )
        prompt = self.processor.prompt(example)
        return Asked(example, tuple(upright_size(path) for path in images), prompt)

    @torch.no_grad()
    def completion(self, asked: Asked) -> Iterator[list[int]]:
        """The answer's token ids as they come, each time all so far; close it to have no more.

        They are those of `generate` at temperature 0, which says nothing before it has ended.

        Raises:
            ValueError: the GPU's memory runs out.
        """
        greedy = {"seed": 0, "temperature": 0.0, "forbidden": self.vocabulary.forbidden}
        ends = self.vocabulary.eos_token_ids
        try:
            decoding = prefill(
                self.model,
                [asked.prompt],
                prompt_ids=[0],
                eos_token_ids=ends,
                max_completion_length=self.max_completion_length,
            )
            decoding.sample(**greedy)
            for length in range(1, self.max_completion_length + 1):
                ids = decoding.results.ids[0, :length].tolist()
                yield ids
                if ids[-1] in ends or length == self.max_completion_length:
                    return
                decoding.step(**greedy)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"memory ran out over {len(asked.prompt.input_ids)} tokens of question and images ({error}). "
                "Lower --max_pixels, or ask about fewer images."
            ) from error

    def read(self, asked: Asked, ids: Sequence[int]) -> Answer:
        """What a completion says; its box is found as the rewards find it."""
        text = self.processor.decode(ids)
        raw, example = text.encode(), asked.example
        found = grounding_rewards(*pack_texts([raw]), torch.zeros(1, 4), answer_format=example.answer_format)
        start, end, *_ = found.spans[0].tolist()
        reasoning = None if start < 0 else raw[start:end].decode().strip()
        if not found.found:
            note = "no box found in the answer"
            if ids[-1] not in self.vocabulary.eos_token_ids:
                note += f", which was cut off after {len(ids)} tokens; raise --max_completion_length"
            return Answer(text, reasoning, None, None, note)
        box = tuple(int(v) for v in found.boxes[0])
        width, height = asked.sizes[example.target_image]
        pixels = tuple(v * side / 1000 for v, side in zip(box, (width, height) * 2, strict=True))
        note = ""
        if box[0] >= box[2] or box[1] >= box[3]:
            note = "the box is inverted or empty: it encloses nothing"
        elif max(box) > 1000:
            note = "the box leaves the image"
        return Answer(text, reasoning, box, pixels, note)

    def picture(self, asked: Asked, answer: Answer, *, words: bool = True) -> Image.Image:
        """The images as the model saw them and the box on its target; with `words`, question and answer as well."""
        return annotate(
            self.processor.images_of(asked.prompt),
            gold=None,
            predicted=answer.box_1000,
            target_image=asked.example.target_image,
            question=asked.example.question if words else "",
            reasoning=answer.text if words else "",
            title=headline(asked, answer),
            image_height=PICTURE_HEIGHT,
        )


def check_question(question: str) -> None:
    if not plain_text(question):
        raise ValueError(f"the question is {question!r}; text is needed. Write one behind the flags.")
    try:
        question.encode()
    except UnicodeEncodeError as error:  # a shell hands on any bytes; no tokenizer takes half a character
        raise ValueError(f"the question is not UTF-8 text ({error}). Write it again.") from error


def headline(asked: Asked, answer: Answer) -> str:
    """The box in whole pixels of its image, or that there is none."""
    if answer.box_px is None:
        return answer.note
    x1, y1, x2, y2 = map(round, answer.box_px)
    width, height = asked.sizes[asked.example.target_image]
    where = f"image {asked.example.target_image + 1}, {width} x {height} pixels"
    return f"({x1}, {y1}), ({x2}, {y2}) in {where}" + (f"; {answer.note}" if answer.note else "")


def as_json(asked: Asked, answer: Answer) -> dict:
    """Question and answer for machines; `target_image` counts from 1, `box` is in its pixels, null where none is."""
    return {
        "question": asked.example.question,
        "target_image": asked.example.target_image + 1,
        "image_sizes": [list(size) for size in asked.sizes],
        "answer": answer.text,
        "reasoning": answer.reasoning,
        "box": answer.box_px and [round(v, 2) for v in answer.box_px],
        "box_1000": answer.box_1000 and list(answer.box_1000),
        "note": answer.note,
    }
