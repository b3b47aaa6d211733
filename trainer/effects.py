"""Which options have no effect, because of the values of others."""

CLIPPED = ("grpo", "bnpo", "dapo", "dr_grpo", "luspo")
NO_BOXES = ("mmiu", "odinw")  # benchmarks with modules of their own


def _writes(o) -> bool:
    return bool(o.output_dir) or not getattr(o, "predictions", "")


def _updates_again(o) -> bool:
    return o.num_iterations > 1 or o.loss_type == "cispo"  # in a rollout's first update all ratios are 1


# Options; another option that decides whether they have an effect; whether they do. A command that lacks the other
# option skips the row.
RULES = (
    ("num_train_epochs", "max_steps", lambda o: o.max_steps <= 0),
    ("warmup_ratio", "lr_scheduler_type", lambda o: o.lr_scheduler_type != "constant"),
    ("zero_stage ds3_gather_for_generation", "engine", lambda o: o.engine != "ddp"),
    ("ds3_gather_for_generation", "zero_stage", lambda o: o.zero_stage == 3),
    ("save_total_limit", "save_steps", lambda o: o.save_steps),
    ("eval_image_root eval_schema eval_box_unit eval_batch_size", "eval_data", lambda o: o.eval_data),
    ("eval_max_completion_length", "eval_data", lambda o: o.eval_data),
    ("epsilon", "loss_type", lambda o: o.loss_type in CLIPPED),
    ("epsilon_high", "loss_type", lambda o: o.loss_type in (*CLIPPED, "cispo")),
    ("epsilon epsilon_high delta", "num_iterations", _updates_again),
    ("importance_sampling_level", "num_iterations", lambda o: o.num_iterations > 1 or o.rollout == "vllm"),
    ("max_refills", "dynamic_sampling", lambda o: o.dynamic_sampling),
    ("top_k top_p", "rollout", lambda o: o.rollout != "replay"),
    ("gradient_accumulation_steps", "rollout", lambda o: o.rollout == "local"),
    ("vllm_gpu_memory_utilization vllm_importance_sampling_clip_max", "rollout", lambda o: o.rollout == "vllm"),
    # The evaluation.
    (
        "dtype dataloader_num_workers eval_batch_size max_completion_length",
        "predictions",
        lambda o: not o.predictions,
    ),
    ("min_pixels max_pixels", "predictions", lambda o: not o.predictions or o.answer_format == "resized_pixels"),
    ("pictures cases overwrite_output_dir", "output_dir", _writes),
    ("schema box_unit resamples seed pictures cases", "bench", lambda o: o.bench not in NO_BOXES),
    # Apps and chains.
    ("target_image answer_format output json", "serve", lambda o: not o.serve),
    ("host port", "serve", lambda o: o.serve),
    (
        "base_url judge_base_url concurrency requests_per_minute backoff timeout max_failures",
        "ask",
        lambda o: o.ask,
    ),
    ("output_dir share seed", "answers", lambda o: not o.answers),
    ("json", "answers", lambda o: o.answers),
)


def without_effect(options, typed: set[str]) -> list[str]:
    """The options that are typed, or not their default, and have no effect: "--zero_stage with --engine ddp"."""
    found, defaults = {}, vars(type(options)())
    for names, other, has_effect in RULES:
        if other not in defaults or has_effect(options):
            continue
        value = getattr(options, other)
        reason = f"without --{other}" if value == "" or value is False else f"with --{other} {value}"
        for name in names.split():
            if name in defaults and (name in typed or getattr(options, name) != defaults[name]):
                found.setdefault(name, f"--{name} {reason}")
    return [*found.values()]
