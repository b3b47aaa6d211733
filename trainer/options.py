"""Options of the training loops and the evaluation: the only place of their defaults, and checks of their values."""

import os
import re
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from boxgrpo.kernels import ANSWER_FORMATS, LOSS_TYPES, LossOptions
from boxgrpo.kernels.loss_options import LEVELS
from boxgrpo.trainer.arguments import check_choice, check_options, option
from boxgrpo.trainer.presence import check_presence

BENCHES = ("mig", "refcoco", "lisa", "llmseg", "reasonvos", "revos", "mmiu", "odinw")
BOX_FORMATS = ("auto", *ANSWER_FORMATS, "pixels", "resized_pixels", "tagged")  # the kernels parse ANSWER_FORMATS only
BOX_UNITS = ("fractions", "percent", "thousandths", "pixels")
SCHEMAS = tuple("mgrounding ms_swift univg_stage1 mig_bench univg_stage2 refcoco lisa llmseg reasonvos revos".split())
# Schedules of transformers that need no further arguments.
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
SCHEDULES = (*SCHEDULES, "inverse_sqrt", "warmup_stable_decay")
# Allowed values by option name, for every dataclass that has the option.
CHOICES = {
    **dict.fromkeys(("schema", "eval_schema"), ("auto", *SCHEMAS)),
    **dict.fromkeys(("box_unit", "eval_box_unit"), ("auto", *BOX_UNITS)),
    "dtype": ("auto", "float32", "bfloat16"),
    "engine": ("ddp", "deepspeed"),
    "zero_stage": (1, 2, 3),
    "optimizer": ("adamw", "cpu_adam", "apex"),
    "lr_scheduler_type": SCHEDULES,
    "loss_type": LOSS_TYPES,
    "importance_sampling_level": LEVELS,
    "scale_rewards": ("group", "batch", "none"),
    "difficulty": ("exp", "power", "log", "none"),
    "rollout": ("local", "vllm", "replay"),
    "bench": ("", *BENCHES),
    "answer_format": BOX_FORMATS,
}
COUNT, ANY_COUNT = "[1, 2147483647]", "[0, 2147483647]"  # the largest int32
# Allowed numbers by option name, as `arguments.check_options` reads them.
RANGES = {
    "num_generations": "[2, 2147483647]",
    **dict.fromkeys(("num_iterations", "tokens_per_pass", "logging_steps", "cutoff_len"), COUNT),
    **dict.fromkeys(("max_completion_length", "eval_max_completion_length"), "[1, 131072]"),  # Qwen2's longest context
    **dict.fromkeys(("prompts_per_step", "gradient_accumulation_steps", "train_batch_size", "eval_batch_size"), COUNT),
    "max_prompt_length": COUNT,
    **dict.fromkeys(("save_steps", "save_total_limit", "max_skipped", "max_refills", "eval_every"), ANY_COUNT),
    **dict.fromkeys(("limit", "resamples", "pictures", "cases", "seed", "top_k", "log_completions"), ANY_COUNT),
    **dict.fromkeys(("lora_rank", "lora_alpha", "min_pixels", "max_pixels"), ANY_COUNT),
    "dataloader_num_workers": "[0, 1024]",
    "max_steps": "[-2147483648, 2147483647]",
    "num_train_epochs": "(0, 1e6]",
    "learning_rate": "[0, 1]",
    "weight_decay": "[0, 10]",
    "max_grad_norm": "[0, 1e9]",
    "peak_tflops": "[0, 1e6]",
    "timeout": "(0, 1e7]",  # seconds
    "temperature": "(0, 100]",
    "beta": "[0, 1e3]",
    "epsilon": "[0, 1]",
    "epsilon_high": "[0, 1e3]",
    "delta": "(1, 1e3]",
    "adam_beta2": "[0, 1)",
    "warmup_ratio": "[0, 1]",
    **dict.fromkeys(("top_p", "vllm_gpu_memory_utilization"), "(0, 1]"),
    "vllm_importance_sampling_clip_max": "[1, 1e9]",
}


@dataclass
class InputOptions:
    """Options that every command has."""

    choices: ClassVar = CHOICES
    ranges: ClassVar = RANGES
    model: str = option("", "Folder with a Qwen2-VL or Qwen3-VL checkpoint in Hugging Face form, tokenizer included.")
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "JSON, JSONL, Parquet or datasets folders; file.json#7000 takes 7000 records, by the seed."},
    )
    schema: str = option("auto", f"Format of the records: auto, {', '.join(SCHEMAS)}.")
    box_unit: str = option("auto", f"Unit of the records' gold boxes: auto (by the file), {', '.join(BOX_UNITS)}.")
    image_root: str = option("", "Folder to which image paths are relative; empty: the data file's folder.")
    min_pixels: int = option(0, "Images are enlarged to at least this many pixels; 0: 4 of the model's image tokens.")
    max_pixels: int = option(0, "Images are reduced to at most this many pixels; 0: 512 of the model's image tokens.")
    dtype: str = option("auto", "float32 or bfloat16; auto: bfloat16 on a GPU, float32 elsewhere.")
    dataloader_num_workers: int = option(2, "Processes that read and prepare images ahead of the step; 0: none.")

    def __post_init__(self):
        if isinstance(self.data, str):
            self.data = [self.data] if self.data else []


@dataclass
class DataOptions(InputOptions):
    """Options that both training loops have."""

    output_dir: str = option("out/run", "Folder for checkpoints, metrics.jsonl and TensorBoard files.")
    overwrite_output_dir: bool = option(False, "Write into an output_dir that already holds a run.")
    max_steps: int = option(0, "Optimizer steps; 0 or less: as many as num_train_epochs needs.")
    num_train_epochs: float = option(1.0, "Passes over the data when max_steps is 0.")
    seed: int = option(42, "Seed of data order, sampling and initial weights.")
    freeze_vision: bool = option(True, "Do not train the vision tower, merger included.")
    lora_rank: int = option(0, "Train LoRA adapters of this rank on the decoder's linear layers; 0: train its weights.")
    lora_alpha: int = option(0, "Scale the adapters' output by lora_alpha / lora_rank; 0: by 2.")
    gradient_checkpointing: bool = option(
        False, "Recompute the decoder's layers in the backward pass: less memory, more time."
    )
    max_grad_norm: float = option(1.0, "Clip the gradient's norm to this; 0: never.")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay.")
    adam_beta2: float = option(0.999, "AdamW's decay of squared gradients.")
    engine: str = option("ddp", "ddp: every rank holds the whole model; deepspeed: ZeRO shards it.")
    zero_stage: int = option(2, "What DeepSpeed shards: 1: optimizer state; 2: also gradients; 3: also weights.")
    offload_optimizer: bool = option(False, "DeepSpeed keeps optimizer state and fp32 weights in host memory.")
    optimizer: str = option("adamw", "adamw: torch's fused one; cpu_adam: DeepSpeed's; apex: NVIDIA's FusedAdam.")
    logging_steps: int = option(1, "Steps between two lines of metrics.")
    save_steps: int = option(0, "Steps between two checkpoints to resume from; 0: none, only the weights at the end.")
    save_total_limit: int = option(0, "Checkpoints to keep, the newest; 0: all.")
    resume: str = option("", "Resume from a checkpoint: its folder, or auto: the newest complete one, if any.")
    timeout: float = option(1800.0, "Seconds until a collective times out; a lost rank is detected in a tenth of that.")
    max_skipped: int = option(100, "Stop when more updates than this were skipped for NaN or infinity.")
    eval_every: int = option(0, "Steps between evaluations on eval_data, which also follow the last step; 0: never.")
    eval_data: str = option("", "Records with gold boxes to score on; the best checkpoint is kept in output_dir/best.")
    eval_image_root: str = option("", "Folder to which eval_data's image paths are relative; empty: the file's.")
    eval_schema: str = option("auto", "As schema, of eval_data.")
    eval_box_unit: str = option("auto", "As box_unit, of eval_data.")
    eval_batch_size: int = option(64, "Prompts of eval_data that a rank decodes together.")
    eval_max_completion_length: int = option(256, "Tokens generated at most for a record of eval_data.")
    profile_steps: str = option("", "Profile these steps into output_dir/profile: 10:13 for steps 10, 11 and 12.")
    memory_snapshot: bool = option(False, "GPU memory snapshots: after the profiled steps and when memory runs out.")
    peak_tflops: float = option(0.0, "The device's peak TFLOP/s, for perf/mfu; 0: the published value, if known.")


@dataclass
class SftOptions(DataOptions):
    """Cold start: supervised fine-tuning on reasoning chains (paper section 3.2)."""

    learning_rate: float = option(5e-6, "Peak learning rate.")
    lr_scheduler_type: str = option("cosine", "Schedule, by transformers' name: cosine, linear, warmup_stable_decay.")
    warmup_ratio: float = option(0.015, "Share of the steps with learning-rate warm-up.")
    train_batch_size: int = option(24, "Examples per optimizer step, over all ranks.")
    cutoff_len: int = option(6000, "Maximum tokens of an example; longer ones are skipped.")
    tokens_per_pass: int = option(8192, "Token budget of one packed forward and backward pass.")


@dataclass
class GrpoOptions(DataOptions):
    """GRPO with IoU and format rewards and difficulty-aware weights (paper sections 3.3 and 3.4)."""

    learning_rate: float = option(1e-6, "Peak learning rate.")
    lr_scheduler_type: str = option("linear", "Schedule, by transformers' name: linear, cosine, warmup_stable_decay.")
    warmup_ratio: float = option(0.0, "Share of the steps with learning-rate warm-up.")
    prompts_per_step: int = option(16, "Prompts per optimizer step, over all ranks.")
    gradient_accumulation_steps: int = option(1, "Rounds of sampling per step; more rounds need a smaller KV cache.")
    num_generations: int = option(8, "Completions per prompt, the group size.")
    num_iterations: int = option(1, "Optimizer steps on each rollout.")
    max_completion_length: int = option(256, "Maximum tokens of a completion.")
    max_prompt_length: int = option(16384, "Maximum tokens of a prompt, images included; longer ones are skipped.")
    tokens_per_pass: int = option(16384, "Token budget of one packed forward and backward pass.")
    temperature: float = option(1.0, "Sampling temperature; the loss uses the same.")
    top_k: int = option(0, "Sample among the k likeliest tokens; 0: all.")
    top_p: float = option(1.0, "Sample among the likeliest tokens that reach this probability; 1: all.")
    beta: float = option(0.04, "Weight of the KL to the starting model; 0: no reference model.")
    epsilon: float = option(0.2, "Lower clip of the ratio, and upper unless epsilon_high is given.")
    epsilon_high: float | None = option(None, "Upper clip of the ratio; cispo: its absolute bound.")
    delta: float | None = option(None, "Upper bound of the unclipped ratio, above 1 + epsilon_high.")
    loss_type: str = option("grpo", f"One of {', '.join(LOSS_TYPES)}.")
    importance_sampling_level: str = option("token", "token, or sequence (GSPO).")
    scale_rewards: str = option("group", "Divide advantages by the std of the group or of the batch; none: do not.")
    difficulty: str = option("exp", "Difficulty weight of a group by its mean IoU m: exp, power, log or none.")
    rollout: str = option("local", "local: sample here; vllm: with vLLM; replay: completions stored by an earlier run.")
    rollout_file: str = option("", "File of completions: replay reads it; local writes it if one is given.")
    dynamic_sampling: bool = option(False, "Replace groups whose rewards are all equal by groups of further prompts.")
    max_refills: int = option(4, "Rounds of further prompts per step at most, with dynamic_sampling.")
    ds3_gather_for_generation: bool = option(
        True, "ZeRO-3 samples with all weights on every rank; false: each layer is gathered again for every token."
    )
    vllm_gpu_memory_utilization: float = option(0.3, "Share of the GPU that vLLM may take while it samples.")
    vllm_importance_sampling_clip_max: float = option(2.0, "Cap of the importance ratio exp(old - sampler) with vLLM.")
    log_completions: int = option(0, "Steps between two tables of sampled completions; 0: never.")


@dataclass
class EvalOptions(InputOptions):
    """Score a checkpoint on a benchmark by greedy decoding, or score answers from a file."""

    bench: str = option("", f"{', '.join(BENCHES)}; empty: any records with gold boxes.")
    predictions: str = option("", "JSON list of answers in the records' order, to be scored without a model.")
    answer_format: str = option(
        "auto",
        f"Form of boxes in questions and answers: {', '.join(BOX_FORMATS)}; auto: by the record.",
    )
    output_dir: str = option("", "Folder for answers, results and page; empty: out/eval, or none with --predictions.")
    overwrite_output_dir: bool = option(False, "Start anew in a folder that holds another evaluation's answers.")
    json: str = option("", "File for the scores as JSON; - prints them, and nothing else.")
    limit: int = option(0, "Score only this many records, the first ones; 0: all.")
    eval_batch_size: int = option(64, "Prompts decoded together.")
    max_completion_length: int = option(256, "Tokens generated at most.")
    resamples: int = option(2000, "Bootstrap resamples behind the confidence intervals; 0: no intervals.")
    seed: int = option(0, "Seed of the resamples and of the random cases.")
    pictures: int = option(8, "Number of annotated pictures to draw.")
    cases: int = option(8, "Number of worst, of best and of random cases on the page.")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`float32`, `bfloat16`, or for `auto` bfloat16 on a GPU and float32 elsewhere."""
    check_choice("dtype", name, CHOICES["dtype"])
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and device.type == "cuda") else torch.float32


def _check_run(o: DataOptions) -> None:
    """Raise ValueError for options that neither training loop supports."""
    check_options(o)
    check_pixels(o)
    if not str(o.output_dir):
        raise ValueError("output_dir is ''; a run needs a folder of its own. Name one with --output_dir.")
    if o.offload_optimizer and o.engine != "deepspeed":
        raise ValueError(f"offload_optimizer is true with engine {o.engine!r}; add --engine deepspeed.")
    if o.optimizer == "cpu_adam" and torch.cuda.is_available() and not o.offload_optimizer:
        raise ValueError(
            "optimizer is 'cpu_adam' and the weights are on a GPU; it updates weights in host memory. Add "
            "--engine deepspeed --offload_optimizer true, or use --optimizer adamw."
        )
    if bool(o.eval_every) != bool(o.eval_data):
        raise ValueError(f"eval_every is {o.eval_every} and eval_data {o.eval_data!r}. Give both, or leave both out.")
    if o.lr_scheduler_type == "polynomial" and o.learning_rate <= 1e-7:
        raise ValueError(
            f"learning_rate is {o.learning_rate:g}; lr_scheduler_type 'polynomial' ends at 1e-7 and must begin above. "
            "Raise --learning_rate, or use --lr_scheduler_type linear."
        )
    if o.lora_rank and not o.freeze_vision:
        raise ValueError(
            f"freeze_vision is False and lora_rank {o.lora_rank}; adapters train the decoder alone. "
            "Use --freeze_vision true, or --lora_rank 0."
        )
    if o.lora_alpha and not o.lora_rank:
        raise ValueError(f"lora_alpha is {o.lora_alpha} and lora_rank 0; there is nothing to scale. Give --lora_rank.")
    window = profile_window(o.profile_steps)
    if window and 0 < o.max_steps < window.start:
        raise ValueError(profile_is_too_late(o.profile_steps, o.max_steps))
    if o.memory_snapshot and not torch.cuda.is_available():
        raise ValueError("memory_snapshot is True and there is no GPU. Leave it out.")


def check_pixels(o) -> None:
    if 0 < o.max_pixels < o.min_pixels:
        raise ValueError(
            f"min_pixels is {o.min_pixels} and max_pixels {o.max_pixels}; the first must not be the larger. "
            "Lower --min_pixels, or raise --max_pixels."
        )


def validate_grpo(o: GrpoOptions, world_size: int) -> LossOptions:
    """Refuse options that cannot be trained with, before anything is loaded; return those of the loss."""
    _check_run(o)
    parts = world_size * o.gradient_accumulation_steps
    if o.prompts_per_step % parts:
        raise ValueError(
            f"prompts_per_step is {o.prompts_per_step}; it must divide into {world_size} ranks x "
            f"{o.gradient_accumulation_steps} gradient_accumulation_steps. Use a multiple of {parts}."
        )
    settings = LossOptions(**{name: value for name, value in vars(o).items() if name in LossOptions._fields})
    if o.delta is not None and o.delta <= (most := 1 + settings.epsilon_high):
        raise ValueError(f"delta is {o.delta}; it bounds unclipped ratios, above 1 + epsilon_high = {most}. Raise it.")
    if o.rollout == "replay" and not o.rollout_file:
        raise ValueError("rollout is 'replay' but no file is named. Give --rollout_file.")
    if o.dynamic_sampling and o.engine == "deepspeed" and o.zero_stage == 3 and not o.ds3_gather_for_generation:
        raise ValueError(
            "dynamic_sampling is True with ds3_gather_for_generation False, where ranks sample in lockstep; in a "
            "refill a rank may have no prompt. Leave one of the two out."
        )
    if o.rollout == "vllm":
        _check_vllm(o)
    return settings


def _check_vllm(o: GrpoOptions) -> None:
    if not o.ds3_gather_for_generation:
        raise ValueError(
            "ds3_gather_for_generation is False with rollout 'vllm', which needs unsharded weights. Leave it true, or "
            "use --rollout local."
        )
    if o.rollout_file:
        raise ValueError(f"rollout_file is {o.rollout_file}; vLLM's completions are not stored. Leave it out.")
    if o.temperature != 1 and (o.top_k or o.top_p < 1):
        raise ValueError(
            f"temperature is {o.temperature} with top_k {o.top_k} and top_p {o.top_p}; at another temperature than 1 "
            "vLLM normalises log-probabilities over the tokens left, not over all. Use --temperature 1, or --top_k 0 "
            "and --top_p 1."
        )


def validate_sft(o: SftOptions, world_size: int) -> None:
    """Refuse options that cannot be trained with, before anything is loaded."""
    _check_run(o)
    if o.train_batch_size % world_size:
        raise ValueError(
            f"train_batch_size is {o.train_batch_size}; it must divide by {world_size} ranks. "
            f"Use a multiple of {world_size}."
        )


def check_command(o: SftOptions | GrpoOptions, ranks: int | None = None) -> None:
    """Refuse options, paths and packages with which `ranks` processes cannot train; None: as torchrun says."""
    validate = validate_grpo if isinstance(o, GrpoOptions) else validate_sft
    validate(o, ranks or int(os.environ.get("WORLD_SIZE", 1)))
    if not ranks and "RANK" not in os.environ and getattr(o, "rollout", "") == "vllm":
        raise ValueError(
            "rollout is 'vllm' and RANK is not set; its engines join the processes that torchrun starts. "
            "Start with torchrun or boxgrpo grpo, for a single GPU too."
        )
    check_presence(o)


def validate_evaluator(o: EvalOptions) -> None:
    """Refuse options that cannot be evaluated, before anything is loaded."""
    check_options(o)
    check_pixels(o)
    if bool(o.model) == bool(o.predictions):
        raise ValueError(
            f"model is {o.model!r} and predictions {o.predictions!r}; answers come from one of them. Name either a "
            "checkpoint folder with --model, or a file of answers with --predictions."
        )
    check_presence(o)


def profile_window(text: str) -> range:
    """The steps of `first:end`, `end` excluded; an empty range for an empty text.

    Raises:
        ValueError: the text is not such a pair, or the range is empty.
    """
    if not text:
        return range(0)
    pair = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if not pair:
        raise ValueError(f"profile_steps is {text!r}; it must be two numbers, such as 10:13. Correct --profile_steps.")
    window = range(int(pair[1]), int(pair[2]))
    if not window or window.start < 1:
        raise ValueError(
            f"profile_steps is {text}; steps count from 1, and the second number, the first step not to be profiled, "
            "must be the larger. Correct --profile_steps."
        )
    return window


def profile_is_too_late(steps: str, last: int) -> str:
    return f"profile_steps is {steps}; the run ends with step {last}. Choose earlier ones, or raise --max_steps."
