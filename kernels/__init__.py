"""The tensor operations of a GRPO step for visual grounding.

An op x has two modules: x.py with its public function, its registration and its torch twin, `<op>_torch`; and
x_triton.py. The twin runs on a CPU, the tests compare Triton with it, and it is the benchmarks' baseline. Each public
function takes `backend` = "auto" | "triton" | "torch". The rewards and `box_iou` are computed by csrc/, which is
compiled for CPUs too: their backend is "auto" | "extension" | "torch". The public functions call functional custom ops
under `torch.ops.boxgrpo`, which torch.compile traces without a graph break.
"""

# By their full names: in a clone's folder, transformers imports this one as Hugging Face's package `kernels`, and an op
# that is defined a second time frees the first.
from boxgrpo.kernels.advantages import group_advantages
from boxgrpo.kernels.boxes import box_iou
from boxgrpo.kernels.decode import add_rms_norm, merge_attention, rotate_into_cache, silu_mul
from boxgrpo.kernels.head import fused_grpo_loss, fused_grpo_loss_from_logits
from boxgrpo.kernels.logps import token_logps, token_logps_from_logits
from boxgrpo.kernels.loss import GrpoStats, grpo_loss
from boxgrpo.kernels.loss_options import LOSS_TYPES, LossOptions
from boxgrpo.kernels.rewards import (
    ANSWER_FORMATS,
    GroundingRewards,
    grounding_rewards,
    grounding_rewards_from_ids,
    pack_texts,
)
from boxgrpo.kernels.sample import sample_tokens
from boxgrpo.kernels.shared_keys import gather_keys
from boxgrpo.kernels.vision import quick_gelu, rotate_qk
from boxgrpo.kernels.vocabulary import VocabularyBytes

__all__ = [
    "ANSWER_FORMATS",
    "LOSS_TYPES",
    "GroundingRewards",
    "GrpoStats",
    "LossOptions",
    "VocabularyBytes",
    "add_rms_norm",
    "box_iou",
    "fused_grpo_loss",
    "fused_grpo_loss_from_logits",
    "gather_keys",
    "grounding_rewards",
    "grounding_rewards_from_ids",
    "group_advantages",
    "grpo_loss",
    "merge_attention",
    "pack_texts",
    "quick_gelu",
    "rotate_into_cache",
    "rotate_qk",
    "sample_tokens",
    "silu_mul",
    "token_logps",
    "token_logps_from_logits",
]
