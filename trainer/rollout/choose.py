"""The rollout that `--rollout` names."""

from collections.abc import Sequence

from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import Example, most_images
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.runtime.ranks import Ranks

from .base import Rollout, Vocabulary
from .local import LocalRollout, ReplayRollout
from .vllm import VllmRollout


def make_rollout(
    o: GrpoOptions,
    processor: Processor,
    vocabulary: Vocabulary,
    policy: Qwen2VL,
    examples: Sequence[Example],
    r: Ranks,
    *,
    stored: dict[str, int],
    sharded: bool,
) -> Rollout:
    """Completions replayed from a file, sampled by vLLM, or sampled by the policy itself.

    Args:
        stored: bytes by file name that a resumed run keeps of its rollout file.
        sharded: no rank has all weights while it samples.
    """
    if o.rollout == "replay":
        return ReplayRollout(o)
    if o.rollout == "vllm":
        return VllmRollout(o, processor, vocabulary, policy, most_images(examples))
    return LocalRollout(o, vocabulary, r, stored, sharded=sharded)
