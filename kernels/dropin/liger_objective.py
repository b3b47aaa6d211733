"""The options of Liger's two signatures, and the loss of a token with them."""

from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from boxgrpo.kernels.dispatch import check_choice
from boxgrpo.kernels.loss import TokenTerms, token_objective, vespo_log_weight
from boxgrpo.kernels.loss_options import AVERAGED, LEVELS, LOG_RATIO_BOUNDS, LossOptions


class Objective(NamedTuple):
    """The options of both signatures, and the loss of a token (ARCHITECTURE.md, section "The mathematics").

    `share` (B, L) fp32 is the mask as numbers: a token's weight. `scored` (B, L) bool: whose values are read at all.
    """

    options: LossOptions  # without tensors
    max_completion_length: int | None
    use_bias_correction_kl: bool

    @classmethod
    def checked(cls, options: dict, level: str, max_completion_length, use_bias_correction_kl) -> Self:
        """Raise ValueError for options that Liger rejects; `options` are those of `LossOptions` except the level."""
        check_choice("importance_sampling_level", level, LEVELS)
        o = LossOptions(**options)
        if level == "sequence" and o.kind != "clip":
            raise ValueError(
                f"Sequence-level importance sampling is not supported for loss_type={o.loss_type!r}. Use 'token'."
            )
        return cls(o._replace(importance_sampling_level=level), max_completion_length, use_bias_correction_kl)

    def denominator(self, share: Tensor, num_items_in_batch) -> Tensor:
        """The divisor of the sum over tokens, 0-dim fp32; for `grpo` that of the sum over the means of completions."""
        loss_type, (batch, length) = self.options.loss_type, share.shape
        if loss_type in AVERAGED:
            return share.new_tensor(batch)
        if loss_type in ("dr_grpo", "luspo"):
            return share.new_tensor(batch * (length if loss_type == "luspo" else self.max_completion_length))
        tokens = share.sum()
        if loss_type == "bnpo":
            return tokens.clamp(min=1)
        # The tokens of the step over all ranks, per rank. Without num_items_in_batch they are the tokens of this call.
        distributed = dist.is_available() and dist.is_initialized()
        if num_items_in_batch is not None:
            tokens = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=share.device)
        elif distributed:
            dist.all_reduce(tokens)
        return (tokens / (dist.get_world_size() if distributed else 1)).clamp(min=1)

    def token_losses(
        self, logps: Tensor, old: Tensor | None, ref: Tensor | None, ratio: Tensor | None, advantages, share, scored
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's loss (differentiable in logps), KL and clip indicator, (B, L) each, 0 where it is not scored.

        Computed in torch on (B, L) tensors: the ops return neither a loss per token nor a KL weighted by the ratio.
        `ratio`: vllm_is_ratio, (B, L) or (B, 1).
        """
        o, share = self.options, share.to(logps.dtype)
        # Positions that are not scored may hold NaN.
        logps, old, ref = (None if x is None else x.to(logps.dtype).masked_fill(~scored, 0) for x in (logps, old, ref))
        log_ratio = logps - (logps.detach() if old is None else old)
        if o.importance_sampling_level == "sequence":
            mean = (log_ratio * share).sum(1, keepdim=True) / share.sum(1, keepdim=True).clamp(min=1)
            log_ratio = mean.expand_as(log_ratio)
        advantage = advantages.to(logps.dtype).unsqueeze(1)
        of_policy = log_ratio.detach() if o.kind == "cispo" else log_ratio
        if o.loss_type == "vespo":
            log_w = (of_policy.double().clamp(-20, 20) * share).sum(1, keepdim=True)
            if ratio is not None:
                log_w = log_w + ratio.double().log().clamp(*LOG_RATIO_BOUNDS).sum(1, keepdim=True)
            of_policy = vespo_log_weight(log_w, advantage, o.vespo_gamma).to(logps.dtype).expand_as(logps)
        gain = 1.0 if ratio is None or o.loss_type == "vespo" else ratio.expand_as(scored).masked_fill(~scored, 0)
        terms = TokenTerms(advantage, gain, kl_gain=0.0, old_logps=None, ref_logps=None)  # the KL is added below
        token = token_objective(logps, of_policy, terms, o)
        loss, kl = token.loss, torch.zeros_like(token.loss)
        if ref is not None and o.beta:
            kl = torch.expm1(ref - logps) - (ref - logps)
            if self.use_bias_correction_kl:
                kl = kl * log_ratio.exp()
            loss = loss + o.beta * kl
        clipped = (token.clip_low | token.clip_high).to(logps.dtype)
        return tuple(x.masked_fill(~scored, 0) for x in (loss, kl.detach(), clipped))

    def reduced(self, losses: tuple[Tensor, ...], share: Tensor, num_items_in_batch) -> tuple[Tensor, list[Tensor]]:
        """The loss and its metrics: the mean KL (only if beta is not 0) and the clipped share of the tokens."""
        loss, kl, clipped = losses
        lengths = share.sum(1, keepdim=True)
        loss = loss * (lengths if self.options.loss_type == "luspo" else share)
        if self.options.loss_type in AVERAGED:
            loss = loss / lengths.clamp(min=1)
        tokens = share.sum().clamp(min=1)
        metrics = [(kl * share).sum() / tokens] if self.options.beta else []
        return loss.sum() / self.denominator(share, num_items_in_batch), [*metrics, (clipped * share).sum() / tokens]
