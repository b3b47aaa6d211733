"""Replacements for Liger 0.8.5's `liger_kernel.transformers.grpo_loss.triton_grpo_loss`,
`liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss` and `liger_kernel.chunked_loss.functional.liger_fused_linear_grpo`.

They take B completions of up to L tokens and raise ValueError where a shape, a dtype or an option does not fit. Their
common arguments:

    advantages: (B) float.
    temperature: above 0.
    beta, lower and upper epsilon: for `cispo` the upper one bounds the ratio itself.
    delta: upper bound of the unclipped ratio, above 0. `cispo`, `sapo` and `vespo` have none and refuse it.
    loss_type: grpo, bnpo, dapo, dr_grpo, cispo, sapo, luspo or vespo. `luspo` is Liger's: the mean over B * L positions
        of a token's loss times its completion's length, which is TRL's only where no completion is padded.
    the mask: a token's weight, a fraction too; a token of weight 0 is not read.
    max_completion_length: `dr_grpo` divides by B times it.
    use_bias_correction_kl: multiply the KL by the ratio.
    vllm_is_ratio: (B, L), (B, 1) or (B) float >= 0, a factor of the policy term. `vespo` takes it into its weight, of
        all L positions, as Liger does: let it be 1 where a token is not scored.
    num_items_in_batch: scored tokens of the step over all ranks, for `dapo`, `cispo` and `vespo`; None: they are
        counted here.
"""

import inspect
import warnings

import torch
from torch import Tensor

from boxgrpo.kernels.dispatch import FLOATS, check_tensor
from boxgrpo.kernels.head import fused_grpo_loss
from boxgrpo.kernels.logps import token_logps_from_logits

from .head import LogitMap, head_logps
from .liger_objective import Objective


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
    options = {"beta": beta, "epsilon": eps_low, "epsilon_high": eps_high, "delta": delta, "loss_type": loss_type}
    options["sapo_temperatures"] = sapo_temperature_pos, sapo_temperature_neg
    options["vespo_gamma"] = vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg
    objective = Objective.checked(options, importance_sampling_level, longest, use_bias_correction_kl)
    check_tensor("logits", logits, (batch, length + 1, None), FLOATS)
    share, scored = _share(completion_mask, completion_ids)
    old, ref = _checked_logps("old_logp", old_logp, scored), _checked_logps("ref_logp", ref_logp, scored)
    if beta and ref is None:
        raise ValueError(f"ref_logp is None and beta is {beta}; the KL needs the reference's. Pass it, or beta=0.")
    logps = _logps_of_completions(logits, completion_ids.long().masked_fill(~scored, 0), temperature, inplace)
    ratio = _checked_ratio(vllm_is_ratio, scored)
    losses = objective.token_losses(logps, old, ref, ratio, advantages, share, scored)
    if reduce:
        return objective.reduced(losses, share, num_items_in_batch)
    loss, kl, clipped = (x * share for x in losses)
    return loss, kl if beta else None, clipped


def _logps_of_completions(logits: Tensor, ids: Tensor, temperature: float, inplace: bool) -> Tensor:
    """(B, L+1, V), (B, L) -> (B, L). The last rows are scored too, because leaving them out would copy the logits."""
    targets = torch.nn.functional.pad(ids, (0, 1))
    rows = logits.reshape(-1, logits.shape[-1])
    logps = token_logps_from_logits(rows, targets.flatten(), temperature=temperature, inplace_backward=inplace)
    return logps.view_as(targets)[:, :-1]


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """The GRPO loss from hidden states and head, by `fused_grpo_loss`, without the full logits and their recomputation.

    With a bias, use_bias_correction_kl, a mask of fractions, a head of another dtype, `luspo`, or `vespo` with
    vllm_is_ratio it uses log-probabilities instead: 8·N·V·H FLOP in place of 6. As in Liger's module, `luspo` reads
    what has weight 0 too.

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
        options = {"beta": beta, "epsilon": epsilon_low, "epsilon_high": epsilon_high, "delta": delta}
        options |= {"loss_type": loss_type, "sapo_temperatures": (sapo_temperature_pos, sapo_temperature_neg)}
        options["vespo_gamma"] = vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg
        self.arguments = options, importance_sampling_level, max_completion_length, use_bias_correction_kl
        Objective.checked(options, "token", max_completion_length, use_bias_correction_kl)  # the call checks the level
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("max_completion_length is None; 'dr_grpo' divides by it. Pass it.")
        self.use_ref_model, self.temperature = use_ref_model, float(temperature)

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
            selected_token_ids: (B, L) int. attention_mask: (B, L), a token's weight.
            ref_per_token_logps, old_per_token_logps: (B, L) float, nats. old_per_token_logps None: on-policy.
            ref_input, ref_weight, ref_bias: the reference's hidden states and head, if ref_per_token_logps is None.

        Returns:
            loss, 0-dim fp32 (fp64 for fp64 inputs), differentiable once in _input, lin_weight and bias; and
            (mean kl (only if beta is not 0), clipped share).
        """
        objective = Objective.checked(*self.arguments)
        o, (share, scored) = objective.options, _share(attention_mask, selected_token_ids)
        check_tensor("_input", _input, (*share.shape, None), FLOATS)
        ids = selected_token_ids.long()
        if o.loss_type == "luspo":  # reads all tokens
            ids, scored = ids.where(scored, ids.clamp(0, len(lin_weight) - 1)), torch.ones_like(scored)
        targets = ids[scored]
        old = _checked_logps("old_per_token_logps", old_per_token_logps, scored)
        ref = self._reference(ref_per_token_logps, ref_input, ref_weight, ref_bias, targets, scored, o.beta)
        ratio = _checked_ratio(vllm_is_ratio, scored)
        whole = o.loss_type == "vespo" and ratio is not None  # a completion's ratio, which no token has for itself
        whole |= bias is not None or bool(o.beta and objective.use_bias_correction_kl) or o.loss_type == "luspo"
        whole |= lin_weight.dtype != _input.dtype  # whose gradient is not to be rounded to _input's
        if whole or ((share != 0) & (share != 1)).any():
            logps = self._logps(_input, lin_weight, bias, targets, scored)
            losses = objective.token_losses(logps, old, ref, ratio, advantages, share, scored)
            loss, metrics = objective.reduced(losses, share, num_items_in_batch)
            return loss, tuple(metrics)
        o = o._replace(
            old_logps=None if old is None else old[scored],
            ref_logps=None if ref is None or not o.beta else ref[scored],
            sampler_factor=None if ratio is None else ratio.expand_as(scored)[scored],
            denominator=objective.denominator(share, num_items_in_batch),
        )
        rest = targets, advantages, torch.nn.functional.pad(scored.sum(1).cumsum(0), (1, 0))
        loss, stats = fused_grpo_loss(_input[scored], lin_weight, *rest, temperature=self.temperature, options=o)
        return loss, (*((stats.kl,) if o.beta else ()), stats.clip_region)

    def _logps(self, hidden, weight, bias, targets, scored) -> Tensor:
        """(B, L), 0 where `scored` is false."""
        one = LogitMap(self.temperature)
        logps = head_logps(hidden[scored], weight, targets, bias=bias, logit_map=one)["log_probs"]
        return torch.zeros_like(scored, dtype=logps.dtype).masked_scatter(scored, logps)

    @torch.no_grad()
    def _reference(self, logps, hidden, weight, bias, targets, scored, beta) -> Tensor | None:
        """The reference's logps (B, L), as given or computed from its hidden states; None if they are not needed."""
        if not self.use_ref_model:
            return None
        if logps is None and hidden is None:
            raise ValueError("use_ref_model is True; pass ref_per_token_logps or ref_input, or use_ref_model=False.")
        if logps is not None and hidden is not None:
            warnings.warn("ref_per_token_logps and ref_input are given. Using ref_per_token_logps.", stacklevel=3)
        if logps is not None or not beta:
            return _checked_logps("ref_per_token_logps", logps, scored)
        check_tensor("ref_input", hidden, (*scored.shape, None), FLOATS)
        if weight is None:
            raise ValueError("ref_weight is None; ref_input needs the reference's head. Pass it.")
        return self._logps(hidden, weight.to(hidden.dtype), bias, targets, scored)


def liger_fused_linear_grpo(
    _input: Tensor,
    weight: Tensor,
    selected_token_ids: Tensor,
    attention_mask: Tensor,
    advantages: Tensor,
    bias: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    beta: float = 0.04,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    temperature: float = 1.0,
    compiled: bool = True,
    use_ref_model: bool = True,
    chunk_size: int = 1,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    num_items_in_batch: Tensor | float | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`LigerFusedLinearGRPOLoss` as a function, its options between its tensors."""
    given = {**locals()}
    call = inspect.signature(LigerFusedLinearGRPOLoss.forward).parameters
    given["lin_weight"] = given.pop("weight")
    tensors = {name: given.pop(name) for name in [*given] if name in call}
    return LigerFusedLinearGRPOLoss(**given)(**tensors)


def _share(mask: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) fp32, the weights of `ids` (B, L); and bool, which are not 0."""
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; it must be the ids', {tuple(ids.shape)}.")
    return mask.to(torch.float32), mask != 0


def _checked_logps(name: str, logps: Tensor | None, scored: Tensor) -> Tensor | None:
    if logps is not None:
        check_tensor(name, logps, tuple(scored.shape), FLOATS)
    return logps


def _checked_ratio(ratio: Tensor | None, scored: Tensor) -> Tensor | None:
    """vllm_is_ratio as (B, L) or (B, 1)."""
    if ratio is None:
        return None
    batch, length = scored.shape
    if tuple(ratio.shape) not in ((batch,), (batch, 1), (batch, length)):
        raise ValueError(
            f"vllm_is_ratio has shape {tuple(ratio.shape)}; it must be ({batch}, {length}), ({batch}, 1) or ({batch})."
        )
    return ratio.unsqueeze(1) if ratio.dim() == 1 else ratio
