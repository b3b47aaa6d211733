"""The rollout that `--rollout` names."""

from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer.data.loader import Examples
from boxgrpo.trainer.data.processor import Processor
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
    examples: Examples,
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
        return VllmRollout(o, processor, vocabulary, policy, examples.most_images)
    return LocalRollout(o, vocabulary, r, stored, sharded=sharded)
