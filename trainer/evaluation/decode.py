"""Greedy decoding with the policy's own decoder: many prompts together, or one prompt token by token."""

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from boxgrpo.model.batch import Group, Prompt
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.model.generate import Decoding, prefill
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.rollout.base import Vocabulary
from boxgrpo.trainer.runtime.spans import named_range

log = logging.getLogger(__name__)


class GreedyDecoder:
    """Decodes the likeliest token at every step, for prompts with or without images.

    Args:
        model: with all of its weights on this rank.
        max_completion_length: most tokens of a completion.
    """

    def __init__(self, model: Qwen2VL, processor: Processor, max_completion_length: int):
        self.model, self.processor, self.max_completion_length = model, processor, max_completion_length
        vocabulary = Vocabulary.of(processor, model.config, model.device)
        self.eos_token_ids = vocabulary.eos_token_ids
        self.sampling = {"seed": 0, "temperature": 0.0, "forbidden": vocabulary.forbidden}
        self.at_once: int | None = None  # prompts that fit into memory together; None: no limit known

    def complete(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """Token ids of each completion, (C_i) int64 on the CPU, end token included.

        Where memory runs out, fewer prompts are decoded together from then on. A prompt that does not fit alone gets
        None.
        """
        found: list[Tensor | None] = []
        while len(found) < len(prompts):
            part = prompts[len(found) :][: self.at_once]
            try:
                with named_range("decode", len(part), self.max_completion_length):
                    found += self._prefill(part).run(**self.sampling)
                continue
            except torch.OutOfMemoryError:
                pass  # the cache is freed after this block: the traceback refers to what filled memory
            torch.cuda.empty_cache()
            if len(part) == 1:
                found.append(None)
            else:
                self.at_once = len(part) // 2
                log.warning("memory ran out while answering; from now on %d prompts are decoded together", self.at_once)
        return found

    @torch.no_grad()
    def stream(self, prompt: Prompt) -> Iterator[list[int]]:
        """Yield, after each token, all token ids so far; close the iterator to stop.

        Raises:
            torch.OutOfMemoryError: the GPU's memory runs out.
        """
        decoding = self._prefill([prompt])
        for length in decoding.run_steps(**self.sampling):
            ids = decoding.results.ids[0, :length].tolist()
            yield ids
            if ids[-1] in self.eos_token_ids:
                return

    def _prefill(self, prompts: Sequence[Prompt]) -> Decoding:
        return prefill(
            self.model,
            [Group(prompt) for prompt in prompts],
            eos_token_ids=self.eos_token_ids,
            max_completion_length=self.max_completion_length,
        )
