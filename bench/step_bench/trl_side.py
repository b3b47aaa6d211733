"""A GRPO step by TRL's `GRPOTrainer`."""

import tempfile
from pathlib import Path

import torch

from boxgrpo.kernels.dropin.univg_r1 import format_reward_rec, iou_reward
from boxgrpo.trainer.data.processor import THINK_SUFFIX
from boxgrpo.trainer.data.readers import read_examples

from . import sides
from .cases import StepCase
from .sides import Measurement, Side

# Tried too, and slower: a static cache, half a group in a batch (in less memory), a loader process, huge pages.
TRL = {"dataloader_num_workers": 0}


def trl(case: StepCase, folder: Path, steps: int) -> Side:
    """TRL's `GRPOTrainer` with transformers' generate, a group's completions in one batch."""
    from transformers import TrainerCallback

    m = Measurement()
    model = sides.load_peer(case, folder, m)

    class Steps(TrainerCallback):
        def on_train_begin(self, *_, **__):
            m.begin_step()

        on_step_end = on_train_begin

    # A group in one batch; all groups are generated together, whatever the batches.
    settings = {"per_device_train_batch_size": case.generations, "gradient_accumulation_steps": case.prompts} | TRL
    settings["gradient_checkpointing"] = case.model in sides.CHECKPOINTED
    with tempfile.TemporaryDirectory() as out:
        trainer = _trl_trainer(case, folder, model, Steps(), output_dir=out, max_steps=steps, **settings)
        trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    # It counts a prompt once for each completion.
    tokens = sides.prompt_tokens_logged(logged, case) / case.generations - case.tokens
    masters = case.dtype == "float32"  # else it updates bf16 weights
    return m.side(tokens, **settings, masters=masters, attn_implementation=sides.ATTENTION)


def _trl_trainer(case: StepCase, folder: Path, model, callback, **settings):
    from datasets import Dataset, Image, List
    from transformers import AutoTokenizer, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from trl import GRPOConfig, GRPOTrainer

    class ImageProcessor(Qwen2VLProcessor):
        """Without the video processor, which needs torchvision."""

        def __init__(self, image_processor, tokenizer):
            super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)

    def reward(completions, completion_ids, solution, **_):
        rule = zip(iou_reward(completions, solution), format_reward_rec(completions), strict=True)
        return [iou + well + sides.stand_in(ids) for (iou, well), ids in zip(rule, completion_ids, strict=True)]

    def record(example) -> dict:
        prompt = [{"role": "user", "content": example.question + THINK_SUFFIX}]
        return {"prompt": prompt, "images": list(example.images), "solution": list(example.gold)}

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    processor = ImageProcessor(Qwen2VLImageProcessorPil.from_pretrained(folder / "model"), tokenizer)
    ours, examples = sides.load_processor(folder), read_examples(folder / "records.json")[0]
    config = GRPOConfig(
        num_generations=case.generations,
        max_completion_length=case.tokens,
        generation_kwargs={"suppress_tokens": [*ours.vision_ids, *ours.eos_ids]},
        beta=sides.BETA,
        loss_type="grpo",
        learning_rate=sides.LEARNING_RATE,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=case.dtype == "bfloat16",
        **settings,
    )
    data = Dataset.from_list([record(example) for example in examples]).cast_column("images", List(Image()))
    return GRPOTrainer(model, reward, config, train_dataset=data, processing_class=processor, callbacks=[callback])
