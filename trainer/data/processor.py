"""Examples become token ids, patches and positions (DESIGN section 3, Qwen2-VL's chat format)."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from boxgrpo.model.checkpoint import read_config
from boxgrpo.model.packing import Conversation, Prompt
from boxgrpo.model.rope import mrope_position_ids

from .example import box_text
from .images import MIN_SIDE, load_image
from .readers import Example, plain_text
from .vocabulary import SPECIAL_TOKENS, SYSTEM_PROMPT

# DESIGN section 3, as in the paper's code.
THINK_SUFFIX = (
    " First output the thinking process in <think> </think> tags"
    " and then output the bounding box in <answer> </answer> tags."
)
BOX_PREFIX = "This is a single image grounding task with simple reference. "

_VISION_TOKENS = [token for token in SPECIAL_TOKENS if "vision" in token or "_pad" in token]


class Processor:
    """Tokenizer and image processor in one: `prompt` for GRPO and evaluation, `conversation` for SFT.

    Args:
        tokenizer: a fast tokenizer with Qwen2-VL's special tokens.
        image_processor: a Qwen2-VL image processor; its size limits become the ones given here.
        min_pixels, max_pixels: an image is scaled to an area between these, in pixels, sides in multiples of 28.
        max_prompt_tokens: longest prompt, or longest whole conversation, in tokens with the images'; None: any length.

    Raises:
        ValueError: a special token is missing, or the pixel limits are not 0 < min_pixels <= max_pixels.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        *,
        min_pixels: int,
        max_pixels: int,
        max_prompt_tokens: int | None = None,
    ):
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
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_processor.size = SizeDict(shortest_edge=min_pixels, longest_edge=max_pixels)
        self.max_prompt_tokens = max_prompt_tokens

        self.image_token_id = vocabulary["<|image_pad|>"]
        self.vision_ids = [vocabulary[token] for token in _VISION_TOKENS]  # never to be sampled: the next forward fails
        self.eos_ids = [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]]
        self._reserved = {*self.vision_ids, *self.eos_ids, vocabulary["<|im_start|>"]}  # may not stand inside a text
        self._image_marks = vocabulary["<|vision_start|>"], vocabulary["<|vision_end|>"]
        self._head = self._encode(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n")
        self._to_assistant = self._encode("<|im_end|>\n<|im_start|>assistant\n")
        self._to_user = self._encode("\n<|im_start|>user\n")  # after the answer's <|im_end|>, which is learned

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, *, min_pixels: int, max_pixels: int, max_prompt_tokens: int | None = None
    ) -> "Processor":
        """The tokenizer and image processor of a Qwen2-VL checkpoint folder, Hugging Face's or ours.

        Raises:
            ValueError: there is no such folder, or it holds another model; nothing is asked of the network.
        """
        read_config(folder)
        return cls(
            AutoTokenizer.from_pretrained(folder),
            Qwen2VLImageProcessorPil.from_pretrained(folder),
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            max_prompt_tokens=max_prompt_tokens,
        )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write both in Hugging Face's format."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def prompt(self, example: Example) -> Prompt:
        """All images, the question, and the start of the answer's turn: the prefix of the example's `conversation`.

        Raises:
            ValueError: an image cannot be loaded, the prompt is over `max_prompt_tokens`, or a text holds a token such
                as `<|image_pad|>` that delimits turns or images.
        """
        pixel_values, grids = self._images(example)
        ids, _ = self._tokens(example, grids, self._turns(example)[:1])
        return Prompt(*self._tensors(example, ids, pixel_values, grids))

    def prompt_tokens(self, example: Example, sizes: Sequence[tuple[int, int]]) -> int:
        """Length of the example's `prompt` with images of these (width, height) in pixels; none is opened."""
        p, grids = self.image_processor, []
        for width, height in sizes:
            enlarged = max(1.0, MIN_SIDE / min(width, height))  # as load_image does
            height, width = smart_resize(
                max(MIN_SIDE, round(height * enlarged)),
                max(MIN_SIDE, round(width * enlarged)),
                factor=p.patch_size * p.merge_size,
                min_pixels=p.size["shortest_edge"],
                max_pixels=p.size["longest_edge"],
            )
            grids.append([1, height // p.patch_size, width // p.patch_size])
        return len(self._tokens(example, torch.tensor(grids).view(-1, 3), self._turns(example)[:1])[0])

    def conversation(self, example: Example) -> Conversation:
        """Every turn of an example. Learned are the texts of its answers and the `<|im_end|>` that closes each.

        Raises:
            ValueError: as `prompt`, or the example has no answer.
        """
        if not example.can_be_learned:
            raise ValueError(
                f"{example.source}: the record has no answer to learn; SFT needs chats. Pass stage-1 records."
            )
        pixel_values, grids = self._images(example)
        ids, learned = self._tokens(example, grids, self._turns(example))
        return Conversation(
            *self._tensors(example, ids, pixel_values, grids), loss_mask=torch.tensor(learned, dtype=torch.bool)
        )

    def images_of(self, prompt: Prompt) -> list[Image.Image]:
        """A prompt's images in the very pixels that its patches hold, at the size they were scaled to."""
        p, images, row = self.image_processor, [], 0
        for _, height, width in prompt.image_grid_thw.tolist():  # in patches
            patches = prompt.pixel_values[row : row + height * width].numpy()
            row += height * width
            m, side = p.merge_size, p.patch_size
            blocks = patches.reshape(height // m, width // m, m, m, 3, p.temporal_patch_size, side, side)
            pixels = blocks[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4).reshape(height * side, width * side, 3)
            values = (pixels * np.float32(p.image_std) + np.float32(p.image_mean)) / p.rescale_factor  # 0-255
            images.append(Image.fromarray(values.round().astype(np.uint8)))
        return images

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Text of completion ids, box marks kept, end of text and padding left out."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        return self.tokenizer.decode([i for i in ids if i not in self.eos_ids], clean_up_tokenization_spaces=False)

    def _turns(self, example: Example) -> tuple[tuple[str, str], ...]:
        if example.turns:  # a chat's questions already ask for what its answers give
            return example.turns
        question = plain_text(example.question)
        if example.answer_format == "think":
            return (("user", question + THINK_SUFFIX),)
        answer = (("assistant", box_text(example.gold)),) if example.gold is not None else ()
        return ("user", BOX_PREFIX + question), *answer

    def _images(self, example: Example) -> tuple[Tensor | None, Tensor]:
        """(p, 1176) fp32 patches, or None without images, and (I, 3) int64 patches per image."""
        if not example.images:
            return None, torch.zeros(0, 3, dtype=torch.int64)
        # One after the other: of many large ones, only one is there in full.
        features = [self.image_processor(images=[load_image(path)], return_tensors="np") for path in example.images]
        pixel_values = np.concatenate([f["pixel_values"] for f in features]).astype(np.float32, copy=False)
        return torch.from_numpy(pixel_values), torch.from_numpy(np.concatenate([f["image_grid_thw"] for f in features]))

    def _tokens(
        self, example: Example, grids: Tensor, turns: tuple[tuple[str, str], ...]
    ) -> tuple[list[int], list[bool]]:
        """Ids of the chat through its last answer, or up to where the next one starts; which of them are learned."""
        ids = list(self._head)
        start, end = self._image_marks
        for image_tokens in (grids.prod(1) // self.image_processor.merge_size**2).tolist():
            ids += [start, *[self.image_token_id] * image_tokens, end]
        learned = [False] * len(ids)
        for index, (role, text) in enumerate(turns):
            text_ids = self._encode(plain_text(text))
            for reserved in self._reserved.intersection(text_ids):
                raise ValueError(
                    f"{example.source}: the {role}'s text holds {self.tokenizer.convert_ids_to_tokens(reserved)}, "
                    "which delimits turns or images. Remove it from the record."
                )
            if role == "user":
                opening = self._to_user if index else []
                piece = opening + text_ids + self._to_assistant
            else:
                piece = [*text_ids, self.eos_ids[0]]
            ids += piece
            learned += [role == "assistant"] * len(piece)
        return ids, learned

    def _tensors(
        self, example: Example, ids: list[int], pixel_values: Tensor | None, grids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            of_images = f"{ids.count(self.image_token_id)} of them for {len(grids)} images"
            raise ValueError(
                f"{example.source}: {len(ids)} tokens, {of_images}, are over the budget of {self.max_prompt_tokens}. "
                "Raise it, or lower --max_pixels."
            )
        input_ids = torch.tensor(ids, dtype=torch.int64)
        positions = mrope_position_ids(
            input_ids,
            grids,
            image_token_id=self.image_token_id,
            spatial_merge_size=self.image_processor.merge_size,
        )
        return input_ids, positions, pixel_values, grids

    def _encode(self, text: str) -> list[int]:
        # The Rust tokenizer itself: transformers' wrapper costs several times the encoding.
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
