"""Tensors in, tensors out: the operations of a GRPO step for visual grounding.

Every door takes `backend` = "auto" | "triton" | "torch" and has a torch twin, `<door>_torch`, in its own module. The
twin is the CPU path, the oracle of the tests and the baseline of the benchmarks. The box parser's doors have
"extension", which is csrc/ compiled, for "triton", and it is their CPU path, too. The ops beneath are functional custom
ops under `torch.ops.boxgrpo`, which torch.compile takes as they are.
"""

from .advantages import group_advantages
from .boxes import box_iou
from .fused import fused_grpo_loss, fused_grpo_loss_from_logits
from .logps import token_logps, token_logps_from_logits
from .loss import GrpoStats, LossOptions, grpo_loss
from .rewards import ANSWER_FORMATS, GroundingRewards, grounding_rewards, grounding_rewards_from_ids, pack_texts
from .sample import sample_tokens
from .vocabulary import VocabularyBytes

__all__ = [
    "ANSWER_FORMATS",
    "GroundingRewards",
    "GrpoStats",
    "LossOptions",
    "VocabularyBytes",
    "box_iou",
    "fused_grpo_loss",
    "fused_grpo_loss_from_logits",
    "grounding_rewards",
    "grounding_rewards_from_ids",
    "group_advantages",
    "grpo_loss",
    "pack_texts",
    "sample_tokens",
    "token_logps",
    "token_logps_from_logits",
]
