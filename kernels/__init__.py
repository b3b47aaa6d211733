"""The tensor operations of a GRPO step for visual grounding.

An op x has two modules: x.py with its public function, its registration and its torch twin, `<op>_torch`; and
x_triton.py. The twin runs on a CPU, the tests compare Triton with it, and it is the benchmarks' baseline. Each public
function takes `backend` = "auto" | "triton" | "torch". The rewards and `box_iou` are computed by csrc/, which is
compiled for CPUs too: their backend is "auto" | "extension" | "torch". The public functions call functional custom ops
under `torch.ops.boxgrpo`, which torch.compile traces without a graph break.
"""

from .advantages import group_advantages
from .boxes import box_iou
from .decode import add_rms_norm, merge_attention, rotate_into_cache, silu_mul
from .head import fused_grpo_loss, fused_grpo_loss_from_logits
from .logps import token_logps, token_logps_from_logits
from .loss import GrpoStats, grpo_loss
from .loss_options import LOSS_TYPES, LossOptions
from .rewards import ANSWER_FORMATS, GroundingRewards, grounding_rewards, grounding_rewards_from_ids, pack_texts
from .sample import sample_tokens
from .shared_keys import gather_keys
from .vision import quick_gelu, rotate_qk
from .vocabulary import VocabularyBytes

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
