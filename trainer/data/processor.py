"""Converts examples to token ids, patches and positions in the chat format of the model's family."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from boxgrpo.model.batch import FRAMES, Conversation, Pixels, Prompt
from boxgrpo.model.checkpoint import read_config
from boxgrpo.model.decoder import mrope_position_ids
from boxgrpo.model.families import family_of

from .example import BOX_PREFIX, MARK, THINK_SUFFIX, Example, asked, box_text
from .images import enlarged, load_image
from .vocabulary import SPECIAL_TOKENS, SYSTEM_PROMPT

_VISION_TOKENS = [token for token in SPECIAL_TOKENS if "vision" in token or "_pad" in token]
_RESERVED = re.compile("|".join(map(re.escape, (*_VISION_TOKENS, *SPECIAL_TOKENS[:3]))))  # must not occur in a text
# The ids around a turn's text. An answer is encoded without its header: it begins where a completion does.
_HEADER = "<|im_start|>assistant\n"
_BEFORE = {"system": "<|im_start|>system\n", "user": "\n<|im_start|>user\n", "assistant": ""}
_AFTER = {"system": "<|im_end|>", "user": f"<|im_end|>\n{_HEADER}", "assistant": "<|im_end|>"}


class ChatFormat(NamedTuple):
    """What a family's chats have of their own. Sizes and values of its patches are in preprocessor_config.json."""

    default_system: str | None  # the system's text of a record that has none; None: then it has no system's turn
    coordinates: str  # in which the model writes boxes: "thousandths" of the image, or "resized_pixels"


CHAT_FORMATS = {
    "qwen2_vl": ChatFormat(SYSTEM_PROMPT, "thousandths"),
    "qwen2_5_vl": ChatFormat(SYSTEM_PROMPT, "resized_pixels"),
    "qwen3_vl": ChatFormat(None, "thousandths"),
}


MIN_TOKENS, MAX_TOKENS = 4, 512  # of an image, where no limit in pixels is given


def resized(size: tuple[int, int], min_pixels: int, max_pixels: int, side: int = 28) -> tuple[int, int]:
    """Width and height in pixels at which a model is given an image of this width and height; see `Processor`.

    `side`: of an image token, in pixels.
    """
    width, height = enlarged(size)
    limits = min_pixels or MIN_TOKENS * side**2, max_pixels or MAX_TOKENS * side**2
    return smart_resize(height, width, side, *limits)[::-1]


def token_side(folder: str | os.PathLike) -> int:
    """Side of an image token of the checkpoint in the folder, in pixels."""
    vision = read_config(folder).vision_config
    return vision.patch_size * vision.spatial_merge_size


def _one_frame(p: Qwen2VLImageProcessorPil, image: Image.Image, **options) -> tuple[np.ndarray, np.ndarray]:
    """What the image processor makes of an image: patches (p, 3, side²) fp32 of one frame, and grid_thw (1, 3)."""
    features = p(images=[image], return_tensors="np", **options)
    patches = features["pixel_values"]
    return patches.reshape(len(patches), 3, FRAMES, -1)[:, :, 0], features["image_grid_thw"]


# A processor's two parts, by the files in a checkpoint's folder that they are read from.
_PARTS = {"tokenizer.json or its config": AutoTokenizer, "preprocessor_config.json": Qwen2VLImageProcessorPil}
AS_COLOURS = {"do_rescale": False, "do_normalize": False}  # 0-255


def _value_table(p: Qwen2VLImageProcessorPil) -> Tensor:
    """(3, 256) fp32: the image processor's value of each 8-bit colour, by channel, read off an image of all colours."""
    side = p.patch_size * p.merge_size
    ramp = Image.fromarray(np.resize(np.arange(256, dtype=np.uint8), (side, side, 1)).repeat(3, 2))
    colours, values = (_one_frame(p, ramp, do_resize=False, **how)[0] for how in (AS_COLOURS, {}))
    table = np.zeros((3, 256), dtype=np.float32)
    table[np.arange(3)[:, None], colours.astype(np.uint8)] = values
    return torch.from_numpy(table)


def _check_template(folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the chat template puts more than its header before an answer."""
    older = Path(folder) / "chat_template.json"  # where many checkpoints have it
    asked = [{"role": "user", "content": "Where?"}]
    try:
        template = tokenizer.chat_template or json.loads(older.read_text())["chat_template"]
        text = tokenizer.apply_chat_template(asked, chat_template=template, tokenize=False, add_generation_prompt=True)
    except Exception:  # none, or a broken one, which is not used here: any type of error
        return
    if not text.endswith(_HEADER):
        raise ValueError(
            f"{folder}: its chat template ends a question with {text[-40:]!r}; an answer must begin after {_HEADER!r}. "
            "Thinking checkpoints cannot be trained: use an Instruct checkpoint."
        )


def _written_turns(example: Example, default_system: str | None, *, answered: bool) -> list[tuple[str, str]]:
    """(role, text) of the system's turn, the question and, if `answered`, all later turns; a mark for each image."""
    turns = example.turns
    if not turns and example.answer_format == "think":  # a chat's questions already name the answer's format
        turns = (("user", asked(example.question, suffix=THINK_SUFFIX)),)
    elif not turns:
        answer = (("assistant", box_text(example.gold)),) if example.gold is not None else ()
        turns = (("user", asked(example.question, prefix=BOX_PREFIX)), *answer)
    system = default_system if example.system is None else example.system
    before = [] if system is None else [("system", system)]
    if not any(MARK in text for _, text in (*before, *turns)):
        turns = [("user", MARK * len(example.images) + turns[0][1]), *turns[1:]]
    return [*before, *(turns if answered else turns[:1])]


class Processor:
    """Tokenizer and image processor in one: `prompt` for GRPO and evaluation, `conversation` for SFT.

    Args:
        tokenizer: a fast tokenizer with Qwen2-VL's special tokens.
        image_processor: a Qwen2-VL image processor, of all families; its size limits are replaced by those given here.
        min_pixels, max_pixels: an image is scaled to an area between these, in pixels, sides in multiples of an image
            token's; 0: the area of `MIN_TOKENS`, of `MAX_TOKENS`.
        max_prompt_tokens: longest prompt or conversation in tokens, those of images included; None: any length.
        family: model_type of the config, a key of `CHAT_FORMATS`.

    Raises:
        ValueError: a special token is missing, or the pixel limits are not 0 < min_pixels <= max_pixels.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        *,
        min_pixels: int = 0,
        max_pixels: int = 0,
        max_prompt_tokens: int | None = None,
        family: str = "qwen2_vl",
    ):
        area = (image_processor.patch_size * image_processor.merge_size) ** 2
        min_pixels, max_pixels = min_pixels or MIN_TOKENS * area, max_pixels or MAX_TOKENS * area
        if not 0 < min_pixels <= max_pixels:
            raise ValueError(
                f"min_pixels is {min_pixels} and max_pixels {max_pixels}; 0 < min_pixels <= max_pixels must hold. "
                "Correct --min_pixels or --max_pixels."
            )
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in SPECIAL_TOKENS if token not in vocabulary]:
            raise ValueError(
                f"the tokenizer has no {missing[0]}; Qwen2-VL's special tokens are needed. Use its tokenizer."
            )
        self.chat_format = CHAT_FORMATS[family]
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_processor.size = SizeDict(shortest_edge=min_pixels, longest_edge=max_pixels)
        self._pixel_table = _value_table(image_processor)
        self.max_prompt_tokens = max_prompt_tokens

        self.image_token_id = vocabulary["<|image_pad|>"]
        self.vision_ids = [vocabulary[token] for token in _VISION_TOKENS]  # never to be sampled: the next forward fails
        self.eos_ids = [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]]
        self._image_marks = vocabulary["<|vision_start|>"], vocabulary["<|vision_end|>"]

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **limits: int | None) -> "Processor":
        """The tokenizer and image processor of a checkpoint folder, Hugging Face's or ours.

        Args:
            limits: min_pixels, max_pixels and max_prompt_tokens, as above.

        Raises:
            ValueError: there is no such folder, it holds another model, or a file is missing, broken or of another
                model; the network is not used.
        """
        config = read_config(folder)
        family, vision = family_of(config).family, config.vision_config
        if (unit := CHAT_FORMATS[config.model_type].coordinates) != "thousandths":
            raise ValueError(f"{folder} is a {family}; boxes in {unit} cannot be trained. Use a Qwen2-VL or Qwen3-VL.")
        parts = []
        for files, kind in _PARTS.items():
            try:
                parts.append(kind.from_pretrained(folder))
            except Exception as error:  # tokenizers raises a bare Exception, transformers many types
                fault = " ".join(str(error).split())
                raise ValueError(
                    f"{folder}: {files} is missing or cannot be read ({fault:.150}). Copy it again from the model from "
                    "which the weights were trained."
                ) from error
        tokenizer, images = parts
        _check_template(folder, tokenizer)
        side, merge = vision.patch_size, vision.spatial_merge_size
        for name, value in {"patch_size": side, "merge_size": merge, "temporal_patch_size": FRAMES}.items():
            if (found := getattr(images, name)) != value:
                raise ValueError(
                    f"{folder}: preprocessor_config.json has {name} {found}; this {family} has {value}. Copy it again "
                    "from the model from which the weights were trained."
                )
        return cls(tokenizer, images, family=config.model_type, **limits)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write tokenizer and image processor in Hugging Face's format."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def prompt(self, example: Example) -> Prompt:
        """The prompt: the system's turn, if any, the question with its images and the header of the answer's turn.

        It is a prefix of `conversation`, without the images of later turns.

        Raises:
            ValueError: an image cannot be loaded, the prompt is over `max_prompt_tokens`, or a text holds a token such
                as `<|image_pad|>` that delimits turns or images.
        """
        tensors, _ = self._tensors(example, answered=False)
        return Prompt(*tensors)

    def prompt_tokens(self, example: Example, sizes: Sequence[tuple[int, int]]) -> int:
        """Number of tokens of the example's `prompt` for images of these (width, height) in pixels; opens none."""
        p = self.image_processor
        counts = [p.get_number_of_image_patches(*enlarged(size)[::-1]) // p.merge_size**2 for size in sizes]
        turns = _written_turns(example, self.chat_format.default_system, answered=False)
        return len(self._tokens(turns, counts, example.source)[0])

    def conversation(self, example: Example) -> Conversation:
        """All turns of an example. The loss covers the texts of its answers and the `<|im_end|>` that closes each.

        Raises:
            ValueError: as `prompt`, or the example has no answer.
        """
        if not example.can_be_learned:
            raise ValueError(
                f"{example.source}: the record has no answer to train on; SFT needs chats. Pass stage-1 records."
            )
        tensors, loss_mask = self._tensors(example, answered=True)
        return Conversation(*tensors, loss_mask=torch.tensor(loss_mask, dtype=torch.bool))

    def images_of(self, prompt: Prompt) -> list[Image.Image]:
        """A prompt's images at the size they were scaled to."""
        p, images, row = self.image_processor, [], 0
        for _, height, width in prompt.image_grid_thw.tolist():  # in patches
            patches = prompt.pixels.patches[row : row + height * width].numpy()
            row += height * width
            m, side = p.merge_size, p.patch_size
            blocks = patches.reshape(height // m, width // m, m, m, 3, side, side)
            colours = blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height * side, width * side, 3)
            images.append(Image.fromarray(colours))
        return images

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Text of completion ids, box marks kept, end of text and padding left out."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        return self.tokenizer.decode([i for i in ids if i not in self.eos_ids], clean_up_tokenization_spaces=False)

    def _tensors(self, example: Example, *, answered: bool):
        """The fields of a `Prompt`, or if `answered` of the whole chat, and by token whether the loss covers it."""
        pixels, grids = None, torch.zeros(0, 3, dtype=torch.int64)
        turns = _written_turns(example, self.chat_format.default_system, answered=answered)
        if shown := example.images[: sum(text.count(MARK) for _, text in turns)]:
            # One by one, so that only one image at a time is in memory in full size.
            parts = []
            for path in shown:
                colours, grid = _one_frame(self.image_processor, load_image(path), **AS_COLOURS)
                parts.append((colours.astype(np.uint8), grid))
            patches, sizes = map(np.concatenate, zip(*parts, strict=True))
            pixels = Pixels(torch.from_numpy(patches).flatten(1), self._pixel_table)  # (p, 3 * side²)
            grids = torch.from_numpy(sizes)  # (I, 3) patches
        merge = self.image_processor.merge_size
        ids, loss_mask = self._tokens(turns, (grids.prod(1) // merge**2).tolist(), example.source)
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            of_images = f"{ids.count(self.image_token_id)} of them for {len(grids)} images"
            raise ValueError(
                f"{example.source}: {len(ids)} tokens, {of_images}, are over the budget of {self.max_prompt_tokens}. "
                f"Raise --{'cutoff_len' if answered else 'max_prompt_length'}, or lower --max_pixels."
            )
        input_ids = torch.tensor(ids, dtype=torch.int64)
        positions = mrope_position_ids(input_ids, grids, image_token_id=self.image_token_id, spatial_merge_size=merge)
        return (input_ids, positions, pixels, grids), loss_mask

    def _tokens(self, turns: Sequence[tuple[str, str]], image_tokens: Sequence[int], source: str):
        """Ids of the turns, whose marks become images of so many tokens, and for each whether the loss covers it."""
        ids, loss_mask, counts = [], [], iter(image_tokens)
        start, end = self._image_marks
        encode = self.tokenizer.backend_tokenizer.encode  # several times as fast as transformers' wrapper
        for role, text in turns:
            if reserved := _RESERVED.search(text):
                raise ValueError(
                    f"{source}: the {role}'s text holds {reserved[0]}, which delimits turns or images. "
                    "Remove it from the record."
                )
            before = _BEFORE[role] if ids else _BEFORE[role].lstrip()
            for index, part in enumerate((before + text + _AFTER[role]).split(MARK)):
                if index:
                    ids += [start, *[self.image_token_id] * next(counts), end]
                ids += encode(part, add_special_tokens=False).ids
            loss_mask += [role == "assistant"] * (len(ids) - len(loss_mask))
        return ids, loss_mask
