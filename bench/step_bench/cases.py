"""What the step benchmark trains: a model of random weights, and records with their images."""

import json
from argparse import ArgumentParser
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from boxgrpo.model.checkpoint import save_model
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer.data.processor import THINK_SUFFIX, Processor
from boxgrpo.trainer.data.vocabulary import SPECIAL_TOKENS
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.world.tiny import tiny_config

RECORDS = 8  # each with images of its own
QUESTION = "Which of these images shows the object that stands alone, and where in the first of them is it?"
TEXTS = (QUESTION + THINK_SUFFIX, "<think>Here.</think><answer>(0, 0), (500, 500)</answer>")  # what is tokenized
MERGE = 2 * 14  # pixels of a vision token's side
SELECTORS = ("model", "images", "prompts")  # flags that name a row


# Rows of the head (None: as many as the tokenizer has tokens), width of the MLP, tied head; then as `tiny_config`.
SIZES = ("vocabulary", "intermediate", "tied", "hidden_size", "layers", "heads", "kv_heads")
SIZES += ("vision_width", "vision_depth", "vision_heads", "initializer_range")
MODELS = {
    "tiny": (None, 128, True, 64, 2, 4, 2, 64, 2, 4, 0.08),
    "44M": (151_936, 1024, True, 256, 4, 4, 2, 128, 4, 4, 0.08),
    "2B": (151_936, 8960, True, 1536, 28, 12, 2, 1280, 32, 16, 0.02),  # as published
    "7B": (152_064, 18_944, False, 3584, 28, 28, 4, 1280, 32, 16, 0.02),  # as published
}


@dataclass(frozen=True)
class StepCase:
    """One shape of a step: `prompts` prompts of `images` images each, `generations` completions of `tokens` tokens."""

    model: str = "44M"
    prompts: int = 1
    images: int = 4
    side: tuple[int, int] = (224, 224)  # pixels, multiples of 28
    generations: int = 8
    tokens: int = 64
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return (
            f"{self.model}, {self.prompts} x {self.images} images of {self.side[0]} x {self.side[1]}, "
            f"{self.generations} x {self.tokens} tokens, {self.dtype}{'' if self.masters else ', no fp32 masters'}"
        )

    @property
    def masters(self) -> bool:
        """Whether updates go to fp32 copies: the 7B's, with moments and gradients, take 138 GB, and leave no room."""
        return self.model != "7B"

    @property
    def grids(self) -> torch.Tensor:
        """Time, height and width in patches of all images, (prompts · images, 3); a token merges 2 x 2 patches."""
        grid = [1, 2 * self.side[1] // MERGE, 2 * self.side[0] // MERGE]
        return torch.tensor([grid] * (self.prompts * self.images))


TINY_STEP = StepCase("tiny", images=2, side=(56, 84), generations=4, tokens=6)


def step_cases(gpu: bool) -> list[StepCase]:
    """The rows of results/: a small model for two cores, and the published models for a GPU."""
    if not gpu:
        return [StepCase(images=n) for n in (4, 1, 6)] + [StepCase(prompts=4)]
    published = {"side": (448, 896), "tokens": 256, "dtype": "bfloat16"}  # 401,408 pixels, the default max_pixels
    return [StepCase(model, images=n, **published) for model in ("2B", "7B") for n in (4, 1, 6)]


def add_selectors(parser: ArgumentParser) -> None:
    """The flags of a command that measures one case."""
    parser.add_argument("--model", choices=[name for name in MODELS if name != "tiny"], help="one row, of this size")
    parser.add_argument("--images", type=int, help="one row, with this many images a prompt")
    parser.add_argument("--prompts", type=int, help="one row, with this many prompts a step")
    parser.add_argument("--merges", help="a Qwen2 tokenizer's merges.txt")
    parser.add_argument("--quick", action="store_true", help="one row of a tiny size, to see that it runs")


def choose_cases(args, gpu: bool) -> list[StepCase]:
    """All rows; with flags of SELECTORS one, the first with what they change; of a tiny size with --quick.

    Raises:
        ValueError: a published model, and no GPU.
    """
    if args.quick:
        return [TINY_STEP]
    every, given = step_cases(gpu), {key: value for key in SELECTORS if (value := getattr(args, key)) is not None}
    chosen = [replace(every[0], **given)] if given else every
    if chosen[0].model in ("2B", "7B") and not gpu:
        raise ValueError(f"model is {chosen[0].model}; it runs on a GPU, and none is here. Drop --model.")
    return chosen


def make_config(sizes: tuple, tokenizer: PreTrainedTokenizerBase) -> Qwen2VLConfig:
    special = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    own = dict(zip(SIZES, sizes, strict=True))
    vocabulary, intermediate, tied = (own.pop(name) for name in ("vocabulary", "intermediate", "tied"))
    config = tiny_config(vocabulary or len(tokenizer), special, theta=1e6, **own)
    config.text_config.intermediate_size, config.text_config.max_position_embeddings = intermediate, 32_768
    config.vision_config.mlp_ratio, config.tie_word_embeddings = 4, tied
    return config


def prepare(case: StepCase, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write `folder`/model, a checkpoint that both sides load, and `folder`/records.json with its images."""
    if not (folder / "model").exists():
        config = make_config(MODELS[case.model], tokenizer)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.device("meta"):
            model = Qwen2VL(config).to(getattr(torch, case.dtype))
        model.to_empty(device=device).init_weights(torch.Generator(device).manual_seed(0))
        save_model(model, folder / "model")
        o = GrpoOptions()
        images = Qwen2VLImageProcessorPil()
        Processor(tokenizer, images, min_pixels=o.min_pixels, max_pixels=o.max_pixels).save_pretrained(folder / "model")
    records = []
    for i in range(RECORDS):
        names = [f"{case.side[0]}x{case.side[1]}-{i}-{n}.png" for n in range(case.images)]
        for n, name in enumerate(names):
            if not (folder / name).exists():
                _picture(case.side, seed=100 * i + n).save(folder / name)
        records.append({"images": names, "question": QUESTION, "answer": [100, 200, 600, 700]})
    (folder / "records.json").write_text(json.dumps(records))


def _picture(side: tuple[int, int], seed: int) -> Image.Image:
    """Soft blotches: a photograph's size on disk, more or less, where noise would be all and one colour nothing."""
    blotches = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(blotches).resize(side, Image.Resampling.BICUBIC)
