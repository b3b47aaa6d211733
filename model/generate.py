"""Sampling: every prompt is prefilled once, then all G·B completions decode together; those that have ended leave."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from boxgrpo.kernels import sample_tokens

from .batch import Group, pack_groups
from .cache import DecodeCache, Prefill
from .families.qwen2_vl import Qwen2VL

# Where steps are all alike, for a CUDA graph; on a CPU attention to the tokens so far is cheaper.
STATIC_DEVICES = ("cuda",)
DROP_AT = 0.5  # ended rows leave once at most this share is unfinished: each time costs a copy of the cache


class Samples(NamedTuple):
    """Sampled completions, prompt-major: row b·G + g is completion g of prompt b."""

    ids: Tensor  # (n, C) int64, padding after the end token
    lengths: Tensor  # (n) int64, tokens up to and with the end token
    logps: Tensor  # (n, C) fp32, nats at the sampling temperature

    def completions(self) -> list[Tensor]:
        """Each completion's own tokens, (C_i) int64 on the CPU."""
        ids = self.ids.cpu()
        return [row[:count] for row, count in zip(ids, self.lengths.tolist(), strict=True)]


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (n, H) @ weight.T, (V, H), in fp32 as in training: bf16 would change the ratio of policy to sampler.

    On a CPU few rows are up to four times as fast with the operands swapped.
    """
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    if hidden.device.type == "cpu" and len(hidden) <= 32:
        return (weight.float() @ hidden.float().T).T.contiguous()
    return hidden.float() @ weight.float().T


class Rows(NamedTuple):
    """The n completions that decode together, prompt-major; (n) int64 where nothing else is stated."""

    place: Tensor  # row of the results
    serial: Tensor  # their prompts' numbers in the run's stream
    completion: Tensor  # index in the group
    position: Tensor  # M-RoPE position of their first token
    token: Tensor  # sampled last
    unfinished: Tensor  # bool
    hidden: Tensor  # (n, H), the state that predicts the next token


@dataclass
class Decoding:
    """Steps of `Rows`: sample from the last hidden states, then take the sampled tokens through the decoder.

    All state of a step is in tensors that it changes in place, so that a CUDA graph can record it.
    """

    model: Qwen2VL
    cache: DecodeCache
    rows: Rows
    results: Samples
    eos: Tensor  # (E) int64
    graph: torch.cuda.CUDAGraph | None = None
    steps: int = 0  # since the rows last changed

    def sample(self, **options) -> None:
        """The next token of every row, from its hidden state."""
        rows, results, at = self.rows, self.results, self.cache.at.expand_as(self.rows.token)
        counters = {"prompt_ids": rows.serial, "completion_ids": rows.completion, "positions": at}
        tokens, logps = sample_tokens(head_logits(rows.hidden, self.model.head_weight), **counters, **options)
        rows.token.copy_(tokens)
        results.ids.index_put_((rows.place, at), tokens)
        results.logps.index_put_((rows.place, at), logps)
        ended = rows.unfinished & (tokens[:, None] == self.eos).any(1)
        results.lengths.index_copy_(0, rows.place, torch.where(ended, at + 1, results.lengths[rows.place]))
        rows.unfinished.logical_and_(~ended)

    def advance(self) -> None:
        """The hidden states after the sampled tokens."""
        embeds = self.model.model.embed_tokens(self.rows.token)
        positions = (self.rows.position + self.cache.at).expand(3, -1)
        self.rows.hidden.copy_(self.model.model(embeds, positions, self.cache.attend))
        self.cache.at += 1

    def step(self, **options) -> None:
        """Advance and sample; on a GPU the third step of the same rows is recorded, and replayed from then on."""
        if self.graph is None and self.cache.static and self.steps == 2 and self.rows.hidden.is_cuda:
            self._record(**options)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.advance()
            self.sample(**options)
        self.steps += 1

    def _record(self, **options) -> None:
        """As torch.cuda.graph does, but without waiting for the device, which has other streams' work to do."""
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.advance()
                self.sample(**options)
            except BaseException:  # such as a lack of memory: the capture must end, for the rollout goes on
                with contextlib.suppress(RuntimeError):
                    self.graph.capture_end()
                self.graph = None
                raise
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def drop_ended(self, unfinished: Tensor) -> None:
        """Continue with the rows that are `unfinished`, (n) bool on the CPU."""
        kept = unfinished.nonzero().squeeze(1)
        self.cache.keep(kept)
        kept = kept.to(self.rows.token.device)
        self.rows = Rows(*(column[kept] for column in self.rows))
        self.graph, self.steps = None, 0

    @torch.no_grad()
    def run_steps(self, *, anywhere: Callable[[bool], bool] = bool, **options) -> Iterator[int]:
        """Decode as `run` does; yields, after each step, the most tokens that a completion has."""
        self.sample(**options)
        yield 1
        on_cpu = self.cache.at.device.type == "cpu"
        for t in range(1, self.results.ids.shape[1]):
            # Reading the flags costs a synchronisation: every 16 tokens is enough on a GPU.
            if on_cpu or t % 16 == 0:
                unfinished = self.rows.unfinished.cpu()
                if not anywhere(bool(unfinished.any())):
                    return
                if 0 < unfinished.sum() <= DROP_AT * len(unfinished):
                    self.drop_ended(unfinished)
            self.step(**options)
            yield t + 1

    def run(self, **options) -> Samples:
        """Decode until every completion has ended or is full; `options` are those of `sample_tokens`.

        anywhere(unfinished here) -> unfinished on any rank: for ranks that shard the weights and synchronise in every
        layer.
        """
        *_, length = self.run_steps(**options)
        ids, lengths, logps = self.results
        return Samples(ids[:, :length], lengths, logps[:, :length])


@torch.no_grad()
def prefill(
    model: Qwen2VL,
    groups: Sequence[Group],
    *,
    eos_token_ids: Sequence[int],
    num_generations: int = 1,
    max_completion_length: int = 256,
    static: bool = True,
) -> Decoding:
    """Take every group's prompt through the model once, ready to decode its completions.

    Args:
        groups: B prompts without completions; their tensors are moved to the model's device. With the run's seed their
            serial numbers fix the noise, whatever the batch. Without `image_embeds` the tower runs here.
        eos_token_ids: a completion ends with the first of these.
        num_generations, max_completion_length: completions of each prompt, and their tokens at most.
        static: false: no CUDA graph, for a model whose layers do more than launch kernels.

    Raises:
        ValueError: no prompts.
    """
    if not groups:
        raise ValueError("there are 0 prompts to sample from; at least 1 is needed. Pass some.")
    device = model.device
    batch = pack_groups(groups, image_token_id=model.config.image_token_id).to(device)
    attend = Prefill(batch)
    hidden = model.hidden(batch, attend)[(batch.cu_seqlens[1:] - 1).long()]  # (B, H), of the prompts' last tokens
    static = static and device.type in STATIC_DEVICES
    cache = DecodeCache(attend, num_generations, max_completion_length, static=static)
    n = len(groups) * num_generations
    eos = torch.tensor(list(eos_token_ids), device=device)
    results = Samples(
        ids=torch.full((n, max_completion_length), int(eos_token_ids[0]), device=device),
        lengths=torch.full((n,), max_completion_length, device=device),
        logps=torch.zeros(n, max_completion_length, device=device),
    )
    serials = torch.tensor([g.serial for g in groups], device=device)
    positions = torch.tensor([int(g.prompt.position_ids.max()) + 1 for g in groups], device=device)
    rows = Rows(
        place=torch.arange(n, device=device),
        serial=serials.repeat_interleave(num_generations),
        completion=torch.arange(num_generations, device=device).repeat(len(groups)),
        position=positions.repeat_interleave(num_generations),
        token=torch.zeros(n, dtype=torch.int64, device=device),
        unfinished=torch.ones(n, dtype=torch.bool, device=device),
        hidden=hidden.repeat_interleave(num_generations, 0),
    )
    return Decoding(model, cache, rows, results, eos)


def generate(
    model: Qwen2VL,
    groups: Sequence[Group],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    forbidden: Tensor | None = None,
    **prefill_options,
) -> Samples:
    """Sample `num_generations` completions of every group's prompt; further options are those of `prefill`.

    Args:
        temperature: 0 is greedy.
        forbidden: (F) int64 ids that are never sampled, vision tokens above all.
    """
    options = {"seed": seed, "temperature": temperature, "top_k": top_k, "top_p": top_p, "forbidden": forbidden}
    return prefill(model, groups, **prefill_options).run(**options)
