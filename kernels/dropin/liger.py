"""Replacements for Liger 0.8.5's `liger_kernel.transformers.grpo_loss.triton_grpo_loss` and
`liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`.

Both take B completions of up to L tokens and raise ValueError where a shape, a dtype or an option does not fit. Their
common arguments:

    advantages: (B) float.
    temperature: above 0.
    beta, lower and upper epsilon: for `cispo` the upper one bounds the ratio itself.
    delta: upper bound of the unclipped ratio, above 1 + upper epsilon.
    loss_type: grpo, bnpo, dapo, dr_grpo or cispo. Liger's sapo, luspo and vespo raise ValueError; the arguments
        sapo_… and vespo_… are ignored.
    max_completion_length: `dr_grpo` divides by B times it.
    use_bias_correction_kl: multiply the KL by the ratio.
    vllm_is_ratio: (B, L), (B, 1) or (B) float >= 0, a factor of the policy term.
    num_items_in_batch: scored tokens of the step over all ranks, for `dapo` and `cispo`; None: they are counted here.
"""

from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from boxgrpo.kernels.dispatch import FLOATS, check_tensor
from boxgrpo.kernels.head import fused_grpo_loss
from boxgrpo.kernels.logps import token_logps_from_logits
from boxgrpo.kernels.loss import TokenTerms, token_objective
from boxgrpo.kernels.loss_options import LOSS_TYPES, LossOptions

from .head import LogitMap, head_logps


class _Objective(NamedTuple):
    """The options of both signatures, and the loss of a token (ARCHITECTURE.md, section "The mathematics")."""

    options: LossOptions  # without tensors
    max_completion_length: int | None
    use_bias_correction_kl: bool

    @classmethod
    def checked(
        cls, beta, epsilon, epsilon_high, delta, loss_type, level, max_completion_length, use_bias_correction_kl
    ) -> Self:
        """Raise ValueError for options that Liger rejects and for loss types that our ops do not have."""
        if loss_type not in LOSS_TYPES:
            raise ValueError(
                f"loss_type is {loss_type!r}; here it is one of {', '.join(LOSS_TYPES)}. Call liger_kernel's own."
            )
        if loss_type == "cispo" and level == "sequence":
            raise ValueError("importance_sampling_level is 'sequence'; 'cispo' takes 'token' only, as in Liger.")
        options = LossOptions(
            beta=beta,
            epsilon=epsilon,
            epsilon_high=epsilon_high,
            delta=delta,
            loss_type=loss_type,
            importance_sampling_level=level,
        )
        return cls(options, max_completion_length, use_bias_correction_kl)

    def denominator(self, mask: Tensor, num_items_in_batch) -> Tensor:
        """The divisor of the sum over tokens, 0-dim fp32; for `grpo` that of the sum over the means of completions."""
        loss_type = self.options.loss_type
        if loss_type == "grpo":
            return mask.new_tensor(mask.shape[0], dtype=torch.float32)
        if loss_type == "dr_grpo":
            return mask.new_tensor(mask.shape[0] * self.max_completion_length, dtype=torch.float32)
        tokens = mask.sum(dtype=torch.float32)
        if loss_type == "bnpo":
            return tokens.clamp(min=1)
        # The tokens of the step over all ranks, per rank. Without num_items_in_batch they are the tokens of this call.
        distributed = dist.is_available() and dist.is_initialized()
        if num_items_in_batch is not None:
            tokens = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
        elif distributed:
            dist.all_reduce(tokens)
        return (tokens / (dist.get_world_size() if distributed else 1)).clamp(min=1)

    def token_losses(
        self, logps: Tensor, old: Tensor | None, ref: Tensor | None, factor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's loss (differentiable in logps), KL and clip indicator, (B, L) each, 0 where `mask` is false.

        Computed in torch on (B, L) tensors: the ops return neither a loss per token nor a KL weighted by the ratio.
        """
        o = self.options
        # Positions that are not scored may hold NaN.
        logps, old, ref = (None if x is None else x.to(logps.dtype).masked_fill(~mask, 0) for x in (logps, old, ref))
        log_ratio = logps - (logps.detach() if old is None else old)
        if o.importance_sampling_level == "sequence":
            mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
            log_ratio = mean.expand_as(log_ratio)
        advantage, gain = advantages.to(logps.dtype).unsqueeze(1), 1.0 if factor is None else factor
        terms = TokenTerms(advantage, gain, kl_gain=0.0, old_logps=None, ref_logps=None)  # the KL is added below
        token = token_objective(logps, log_ratio.detach() if o.loss_type == "cispo" else log_ratio, terms, o)
        loss, kl = token.loss, torch.zeros_like(token.loss)
        if ref is not None and o.beta:
            kl = torch.expm1(ref - logps) - (ref - logps)
            if self.use_bias_correction_kl:
                kl = kl * (log_ratio.exp() if o.loss_type == "cispo" else token.ratio)
            loss = loss + o.beta * kl
        clipped = (token.clip_low | token.clip_high).to(logps.dtype)
        return tuple(x.masked_fill(~mask, 0) for x in (loss, kl.detach(), clipped))

    def reduced(self, losses: tuple[Tensor, ...], mask: Tensor, num_items_in_batch) -> tuple[Tensor, list[Tensor]]:
        """The loss and its metrics: the mean KL (only if beta is not 0) and the clipped share of the tokens."""
        loss, kl, clipped = losses
        if self.options.loss_type == "grpo":
            loss = loss / mask.sum(1, keepdim=True).clamp(min=1)
        tokens = mask.sum().clamp(min=1)
        metrics = [kl.sum() / tokens] if self.options.beta else []
        return loss.sum() / self.denominator(mask, num_items_in_batch), [*metrics, clipped.sum() / tokens]


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Tensor | float | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, Tensor | None, Tensor] | tuple[Tensor, list[Tensor]]:
    """The GRPO loss from logits, by `token_logps_from_logits`: without a copy of the logits, 6·N·V bytes moved in bf16.

    Args (the others are in the module's docstring):
        logits: (B, L+1, V) float; the last row of each completion is ignored.
        old_logp, ref_logp: (B, L) float, nats. old_logp None: on-policy. ref_logp is required unless beta is 0.
        completion_ids: (B, L) int. completion_mask: (B, L), 0 where a token is not scored; None: all are.
        inplace: the backward writes the gradient over the logits, which are lost then.
        max_completion_length: None: L.
        reduce: return the loss and its metrics instead of each token's.

    Returns:
        loss, kl (None if beta is 0) and is_clipped (0 or 1), (B, L) fp32 (fp64 for fp64 logits), 0 where the mask is;
        with `reduce` the loss (0-dim) and [mean kl (only if beta is not 0), clipped share]. Only the loss is
        differentiable, once, in the logits.
    """
    batch, length = completion_ids.shape
    longest = length if max_completion_length is None else max_completion_length
    objective = _Objective.checked(
        beta, eps_low, eps_high, delta, loss_type, importance_sampling_level, longest, use_bias_correction_kl
    )
    check_tensor("logits", logits, (batch, length + 1, None), FLOATS)
    mask = _mask(completion_mask, completion_ids)
    old, ref = _checked_logps("old_logp", old_logp, mask), _checked_logps("ref_logp", ref_logp, mask)
    if beta and ref is None:
        raise ValueError(f"ref_logp is None and beta is {beta}; the KL needs the reference's. Pass it, or beta=0.")
    logps = _logps_of_completions(logits, completion_ids.long().masked_fill(~mask, 0), temperature, inplace)
    losses = objective.token_losses(logps, old, ref, _factor(vllm_is_ratio, mask), advantages, mask)
    if reduce:
        return objective.reduced(losses, mask, num_items_in_batch)
    loss, kl, clipped = losses
    return loss, kl if beta else None, clipped


def _logps_of_completions(logits: Tensor, ids: Tensor, temperature: float, inplace: bool) -> Tensor:
    """(B, L+1, V), (B, L) -> (B, L). The last rows are scored too, because leaving them out would copy the logits."""
    targets = torch.nn.functional.pad(ids, (0, 1))
    rows = logits.reshape(-1, logits.shape[-1])
    logps = token_logps_from_logits(rows, targets.flatten(), temperature=temperature, inplace_backward=inplace)
    return logps.view_as(targets)[:, :-1]


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """The GRPO loss from hidden states and head, by `fused_grpo_loss`, without the full logits and their recomputation.

    With a bias or use_bias_correction_kl it uses log-probabilities instead: 8·N·V·H FLOP in place of 6.

    Args (the others are in the module's docstring):
        compiled, chunk_size: ignored; they tune Liger's code.
        use_ref_model: if False, the reference arguments of a call are ignored and the KL is 0.
        max_completion_length: needed by `dr_grpo`.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        self.objective = _Objective.checked(
            beta,
            epsilon_low,
            epsilon_high,
            delta,
            loss_type,
            importance_sampling_level,
            max_completion_length,
            use_bias_correction_kl,
        )
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("max_completion_length is None; 'dr_grpo' divides by it. Pass it.")
        self.use_ref_model, self.temperature = use_ref_model, temperature

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics of a batch.

        Args (the others are in the module's docstring):
            _input: (B, L, H) float, hidden states; row t predicts selected_token_ids[:, t].
            lin_weight: (V, H) float. bias: (V) float.
            selected_token_ids: (B, L) int. attention_mask: (B, L), 0 where a token is not scored.
            ref_per_token_logps, old_per_token_logps: (B, L) float, nats. old_per_token_logps None: on-policy.
            ref_input, ref_weight, ref_bias: the reference's hidden states and head, if ref_per_token_logps is None.

        Returns:
            loss, 0-dim fp32 (fp64 for fp64 inputs), differentiable once in _input, lin_weight and bias; and
            (mean kl (only if beta is not 0), clipped share).
        """
        objective, o = self.objective, self.objective.options
        mask = _mask(attention_mask, selected_token_ids)
        check_tensor("_input", _input, (*mask.shape, None), FLOATS)
        targets, weight = selected_token_ids.long()[mask], lin_weight.to(_input.dtype)
        old = _checked_logps("old_per_token_logps", old_per_token_logps, mask)
        ref = self._reference(ref_per_token_logps, ref_input, ref_weight, ref_bias, targets, mask)
        factor = _factor(vllm_is_ratio, mask)
        if bias is not None or (o.beta and objective.use_bias_correction_kl):
            logps = self._logps(_input, weight, bias, targets, mask)
            losses = objective.token_losses(logps, old, ref, factor, advantages, mask)
            loss, metrics = objective.reduced(losses, mask, num_items_in_batch)
            return loss, tuple(metrics)
        o = o._replace(
            old_logps=None if old is None else old[mask],
            ref_logps=None if ref is None or not o.beta else ref[mask],
            sampler_factor=None if factor is None else factor[mask],
            denominator=objective.denominator(mask, num_items_in_batch),
        )
        rest = targets, advantages, torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        loss, stats = fused_grpo_loss(_input[mask], weight, *rest, temperature=self.temperature, options=o)
        return loss, (*((stats.kl,) if o.beta else ()), stats.clip_region)

    def _logps(self, hidden, weight, bias, targets, mask) -> Tensor:
        """(B, L), 0 where `mask` is false."""
        logps = head_logps(hidden[mask], weight, targets, bias=bias, logit_map=LogitMap(self.temperature))["log_probs"]
        return torch.zeros_like(mask, dtype=logps.dtype).masked_scatter(mask, logps)

    @torch.no_grad()
    def _reference(self, logps, hidden, weight, bias, targets, mask) -> Tensor | None:
        """The reference's logps (B, L), as given or computed from its hidden states; None if they are not needed."""
        if not self.use_ref_model:
            return None
        if logps is None and hidden is None:
            raise ValueError("use_ref_model is True; pass ref_per_token_logps or ref_input, or use_ref_model=False.")
        if logps is not None or not self.objective.options.beta:
            return _checked_logps("ref_per_token_logps", logps, mask)
        check_tensor("ref_input", hidden, (*mask.shape, None), FLOATS)
        if weight is None:
            raise ValueError("ref_weight is None; ref_input needs the reference's head. Pass it.")
        return self._logps(hidden, weight.to(hidden.dtype), bias, targets, mask)


def _mask(mask: Tensor | None, ids: Tensor) -> Tensor:
    """(B, L) bool, which of `ids` (B, L) are scored."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; it must be the ids', {tuple(ids.shape)}.")
    return mask != 0


def _checked_logps(name: str, logps: Tensor | None, mask: Tensor) -> Tensor | None:
    if logps is not None:
        check_tensor(name, logps, tuple(mask.shape), FLOATS)
    return logps


def _factor(ratio: Tensor | None, mask: Tensor) -> Tensor | None:
    """vllm_is_ratio as (B, L), 0 where `mask` is false."""
    if ratio is None:
        return None
    batch, length = mask.shape
    if tuple(ratio.shape) not in ((batch,), (batch, 1), (batch, length)):
        raise ValueError(
            f"vllm_is_ratio has shape {tuple(ratio.shape)}; it must be ({batch}, {length}), ({batch}, 1) or ({batch})."
        )
    return (ratio.unsqueeze(1) if ratio.dim() == 1 else ratio).expand(batch, length).masked_fill(~mask, 0)
