"""Sampling: every prompt is prefilled once, then all G·B completions decode together; ended ones are dropped."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from boxgrpo.kernels import sample_tokens

from .attention import DecodeCache, PackedAttention
from .batch import Group, pack_groups, to_device
from .families import Qwen2VL
from .static_cache import StaticCache

log = logging.getLogger(__name__)
# Where all steps launch the same kernels, for a CUDA graph; on a CPU attention to the tokens so far is cheaper.
STATIC_DEVICES = ("cuda",)
FEW_ROWS = 32  # up to which a CPU multiplies them by HEAD_BLOCK rows of the head at a time
HEAD_BLOCK = 32  # the vocabularies of Qwen's models are multiples of it
DROP_AT = 0.5  # ended rows are dropped when at most this share is unfinished: each time copies the cache


class Samples(NamedTuple):
    """Sampled completions, prompt-major: row b·G + g is completion g of prompt b."""

    ids: Tensor  # (n, C) int64, padding after the end token
    lengths: Tensor  # (n) int64, tokens up to and with the end token
    logps: Tensor  # (n, C) fp32, nats at the sampling temperature


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (n, H) @ weight.T, (V, H), in fp32 as in training: bf16 would change the ratio of policy to sampler.

    On a CPU few rows are multiplied by a small block of the weight at a time: 8 rows of 256 with a vocabulary of
    151,936 take 8 ms on two cores, and twice as long in one product.
    """
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    hidden, weight = hidden.float(), weight.float()
    if hidden.device.type == "cpu" and len(hidden) <= FEW_ROWS and len(weight) % HEAD_BLOCK == 0:
        blocks = weight.unflatten(0, (-1, HEAD_BLOCK)).transpose(1, 2)
        return torch.bmm(hidden.expand(len(blocks), -1, -1), blocks).transpose(0, 1).flatten(1)
    return hidden @ weight.T


class Rows(NamedTuple):
    """The n completions that decode together, prompt-major; (n) int64 where nothing else is stated."""

    place: Tensor  # row of the results
    serial: Tensor  # their prompts' numbers in the run's stream
    completion: Tensor  # index in the group
    position: Tensor  # M-RoPE position of their first token
    token: Tensor  # sampled last
    unfinished: Tensor  # bool
    hidden: Tensor  # (n, H), the state that predicts the next token


@functools.cache
def _recorder(priority: int) -> tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]:
    """A stream of this priority to record steps on, and an empty graph that keeps the memory pool of all recordings.

    torch refuses a pool whose graphs are all gone. While it records, it cannot free what it has reserved outside the
    pool: that is done here, before the first recording and after one that ran out of memory.
    """
    torch.cuda.empty_cache()
    stream, graph = torch.cuda.Stream(priority=priority), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), warnings.catch_warnings(action="ignore"):  # of the empty graph
        graph.capture_begin(capture_error_mode="thread_local")
        graph.capture_end()
    return stream, graph


@dataclass
class Decoding:
    """Completions token by token: sample from the last hidden states, then take the tokens through the decoder.

    All state of a step is in tensors that it changes in place, so that a CUDA graph can record it.
    """

    model: Qwen2VL
    cache: DecodeCache | StaticCache
    rows: Rows
    results: Samples
    eos: Tensor  # (E) int64
    graph: torch.cuda.CUDAGraph | None = None
    steps: int = 0  # since the rows last changed
    warned: bool = False  # that there was no memory for a graph

    def next_token(self, *, advance: bool = True, **options) -> None:
        """Take each row's last token through the decoder, unless `advance` is false, and sample its next one."""
        rows, results, cache = self.rows, self.results, self.cache
        if advance:
            decoder = self.model.model
            inputs = decoder.embed_tokens(rows.token), (rows.position + cache.at).expand(3, -1)
            rows.hidden.copy_(decoder.decode(*inputs, cache) if cache.static else decoder(*inputs, cache.attend))
            cache.advance()
        at = cache.at.expand_as(rows.token)
        counters = {"prompt_ids": rows.serial, "completion_ids": rows.completion, "positions": at}
        tokens, logps = sample_tokens(head_logits(rows.hidden, self.model.head_weight), **counters, **options)
        rows.token.copy_(tokens)
        results.ids.index_put_((rows.place, at), tokens)
        results.logps.index_put_((rows.place, at), logps)
        ended = rows.unfinished & (tokens[:, None] == self.eos).any(1)
        results.lengths.index_copy_(0, rows.place, torch.where(ended, at + 1, results.lengths[rows.place]))
        rows.unfinished.logical_and_(~ended)

    def keep(self, kept: Tensor) -> None:
        """Continue with the rows `kept` (n') int64, ascending, on the CPU."""
        self.cache.keep(kept)
        on_device = to_device(kept, self.rows.token.device)
        self.rows = Rows(*(column[on_device] for column in self.rows))
        self.graph, self.steps = None, 0

    def _record(self, **options) -> None:
        """Record `next_token`, as torch.cuda.graph does, but without waiting for the device's other streams.

        If memory runs out there is no graph: the steps of these rows launch their kernels one by one.
        """
        stream, empty = _recorder(torch.cuda.current_stream().priority)  # which the graph's kernels keep
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # on which recording runs nothing
            graph.capture_begin(empty.pool(), capture_error_mode="thread_local")
            try:
                self.next_token(**options)
            except BaseException as error:  # the capture must end, because the rollout continues
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                _recorder.cache_clear()  # so that the next recording has more memory, too
                if not isinstance(error, torch.OutOfMemoryError):
                    raise
                if not self.warned:
                    log.warning("memory ran out while a decoding step was recorded; it takes longer without CUDA graph")
                self.warned = True
            else:
                graph.capture_end()
                self.graph = graph

    @torch.no_grad()
    def run_steps(self, *, anywhere: Callable[[bool], bool] = bool, **options) -> Iterator[int]:
        """Decode as `run` does; yields, after each step, the most tokens that a completion has.

        On a GPU the third step of the same rows is recorded, and replayed from then on.
        """
        self.next_token(advance=False, **options)
        yield 1
        device = self.cache.at.device
        for t in range(1, self.results.ids.shape[1]):
            # Reading the flags costs a synchronisation: every 16 tokens is enough on a GPU.
            if device.type == "cpu" or t % 16 == 0:
                unfinished = self.rows.unfinished.cpu()
                if not anywhere(bool(unfinished.any())):
                    return
                if 0 < unfinished.sum() <= DROP_AT * len(unfinished):
                    self.keep(unfinished.nonzero().squeeze(1))
            if self.cache.static and self.steps == 2:
                self._record(**options)
            if self.graph is not None:
                self.graph.replay()
            else:
                self.next_token(**options)
            self.steps += 1
            yield t + 1

    def run(self, *, after_step: Callable[[], Any] = lambda: None, **options) -> list[Tensor]:
        """Decode until every completion has ended or is full; `options` are those of `sample_tokens`.

        after_step: called after each token is queued.
        anywhere(unfinished here) -> unfinished on any rank: for ranks that shard the weights and synchronise in every
        layer.

        Returns:
            Each completion's own tokens, (C_i) int64 on the CPU, prompt-major.
        """
        for _ in self.run_steps(**options):
            after_step()
        ids = self.results.ids.cpu()
        return [row[:count] for row, count in zip(ids, self.results.lengths.tolist(), strict=True)]


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
    device = model.head_weight.device
    batch = pack_groups(groups, image_token_id=model.config.image_token_id).to(device)
    attend = PackedAttention(batch, kv=[])
    hidden = model.hidden(batch, attend)[(batch.cu_seqlens[1:] - 1).long()]  # (B, H), of the prompts' last tokens
    text = model.config.text_config
    if static and device.type in STATIC_DEVICES:
        repeat = text.num_attention_heads // text.num_key_value_heads
        cache = StaticCache(attend, num_generations, max_completion_length, repeat=repeat)
    else:
        cache = DecodeCache(attend, num_generations, max_completion_length)
    n = len(groups) * num_generations
    eos, serials, positions = (
        to_device(torch.tensor(values), device)
        for values in (
            list(eos_token_ids),
            [g.serial for g in groups],
            [int(g.prompt.position_ids.max()) + 1 for g in groups],
        )
    )
    results = Samples(
        ids=torch.full((n, max_completion_length), int(eos_token_ids[0]), device=device),
        lengths=torch.full((n,), max_completion_length, device=device),
        logps=torch.zeros(n, max_completion_length, device=device),
    )
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
