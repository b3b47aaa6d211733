"""Our ops under the names and signatures that other repositories call (ARCHITECTURE.md, section "Drop-ins").

A module for each repository; none imports the repository, and `import boxgrpo.kernels` imports none of them. Options
that our ops do not support raise ValueError.
"""

from . import univg_r1
from .liger import LigerFusedLinearGRPOLoss, liger_fused_linear_grpo, triton_grpo_loss
from .trl import ChunkedLogProbFunction, selective_log_softmax, selective_log_softmax_and_entropy
from .verl import compute_grpo_outcome_advantage, linear_cross_entropy, logprobs_from_logits
from .vlm_r1 import format_reward_rec, iou_reward

_ChunkedLogProbFunction = ChunkedLogProbFunction  # its name in trl.trainer.utils

__all__ = [
    "ChunkedLogProbFunction",
    "LigerFusedLinearGRPOLoss",
    "_ChunkedLogProbFunction",
    "compute_grpo_outcome_advantage",
    "format_reward_rec",
    "iou_reward",
    "liger_fused_linear_grpo",
    "linear_cross_entropy",
    "logprobs_from_logits",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "triton_grpo_loss",
    "univg_r1",
]
