"""`--rollout vllm`: completions from an installed vLLM, one engine in each rank's own process.

The engine and the trainer use the GPU alternately: between rollouts the engine is in vLLM's sleep mode, its weights in
host memory and its KV cache freed. Each rollout wakes it with the policy's current weights.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from boxgrpo.model.batch import Group, Prompt
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer.arguments import optional_import
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.engine.lora import merged_weights
from boxgrpo.trainer.runtime.ranks import RunFailed
from boxgrpo.trainer.runtime.spans import span

from .base import Vocabulary

FORBIDDEN_BIAS = -100.0  # the lowest bias that vLLM documents: multiplies a token's odds by e^-100
REMEDY = "Use another version of vLLM, or --rollout local."


def request_seed(seed: int, serial: int) -> int:
    """A seed that depends only on the run's seed and the sample. vLLM adds g to it for completion g of a prompt, so
    two prompts need distant seeds: these are 56-bit hashes."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {serial}".encode(), digest_size=7).digest())


class VllmRollout:
    """Samples with vLLM, which also returns the log-probability of each token.

    Args:
        options: GrpoOptions; `model` is the folder that vLLM starts from.
        policy: gives the dtype and the context length; its weights are loaded at each call.
        max_images: maximum number of images in a prompt, for which vLLM reserves memory.

    Raises:
        ValueError: vllm is not installed.
    """

    def __init__(self, options, processor: Processor, vocabulary: Vocabulary, policy: Qwen2VL, max_images: int):
        with optional_import("rollout is 'vllm'", "Install it (pip install 'vllm>=0.22'), or use --rollout local."):
            import vllm
        self.vllm, self.options, self.processor, self.vocabulary = vllm, options, processor, vocabulary
        self.written: dict[str, int] = {}
        o = options
        self.llm = vllm.LLM(
            model=o.model,
            dtype=str(policy.head_weight.dtype).removeprefix("torch."),
            seed=o.seed,
            generation_config="vllm",  # Qwen's own holds top_k 1
            distributed_executor_backend="external_launcher",  # this process, this rank's GPU, no pickling
            gpu_memory_utilization=o.vllm_gpu_memory_utilization,
            enable_sleep_mode=True,
            max_model_len=min(
                o.max_prompt_length + o.max_completion_length, policy.config.text_config.max_position_embeddings
            ),
            limit_mm_per_prompt={"image": max_images, "video": 0},
            mm_processor_kwargs={"size": dict(processor.image_processor.size)},
            mm_processor_cache_gb=0,  # an image is used once per epoch
            # Raw logps ignore temperature and forbidden ids: at temperature 1 they are the trainer's. Processed ones
            # are at the temperature but leave out the forbidden ids, whose probability a trained policy keeps near 0.
            logprobs_mode="raw_logprobs" if o.temperature == 1 else "processed_logprobs",
        )
        self.llm.sleep(level=1)

    def __call__(
        self, policy: Qwen2VL, groups: Sequence[Group], after_prefill: Callable[[], Any] = lambda: None
    ) -> list[Group]:
        """As `LocalRollout`, with the sampler's own logps. `image_embeds` are not used: vLLM runs the tower itself."""
        after_prefill()
        if not groups:
            return []
        with span("load_weights"):
            self.load_weights(policy)
        with span("generate"):
            requests = [self.request(g.prompt) for g in groups]
            outputs = self.llm.generate(requests, [self.sampling(g.serial) for g in groups], use_tqdm=False)
        self.llm.sleep(level=1)
        return self.collect(groups, outputs)

    def load_weights(self, policy: Qwen2VL) -> None:
        """Wake the engine, load the policy's weights and clear the caches that the old weights filled."""
        torch.cuda.empty_cache()  # frees unused blocks for the engine, which allocates its memory again
        self.llm.wake_up(tags=["weights"])
        self.llm.apply_model(lambda model: model.load_weights(merged_weights(policy, trained=True)))
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_encoder_cache()  # its keys do not include the tower's weights

    def request(self, prompt: Prompt) -> dict:
        """A prompt in vLLM's form: one placeholder per image, which vLLM repeats, and the scaled images."""
        is_image = prompt.input_ids == self.processor.image_token_id
        again = is_image & is_image.roll(1)  # a prompt does not begin with an image
        request = {"prompt_token_ids": prompt.input_ids[~again].tolist()}
        if images := self.processor.images_of(prompt):
            request["multi_modal_data"] = {"image": images}
        return request

    def sampling(self, serial: int):
        """SamplingParams of one prompt's group."""
        o = self.options
        return self.vllm.SamplingParams(
            n=o.num_generations,
            seed=request_seed(o.seed, serial),
            temperature=o.temperature,
            top_k=o.top_k,
            top_p=o.top_p,
            max_tokens=o.max_completion_length,
            stop_token_ids=list(self.vocabulary.eos_token_ids),
            logit_bias=dict.fromkeys(self.vocabulary.forbidden.tolist(), FORBIDDEN_BIAS),
            logprobs=0,  # of the sampled token only
            detokenize=False,
        )

    def collect(self, groups: Sequence[Group], outputs: Sequence) -> list[Group]:
        """The groups with vLLM's completions, which are checked against the requests."""
        if len(outputs) != len(groups):
            raise RunFailed(f"vLLM answered {len(outputs)} of {len(groups)} requests. {REMEDY}")
        found = []
        for group, output in zip(groups, outputs, strict=True):
            self._check(group, output)
            completions = [torch.tensor(list(c.token_ids)) for c in output.outputs]
            logps = [
                torch.tensor([logprobs[token].logprob for token, logprobs in zip(c.token_ids, c.logprobs, strict=True)])
                for c in output.outputs
            ]
            found.append(replace(group, completions=completions, sampler_logps=logps))
        return found

    def _check(self, group: Group, output) -> None:
        image, requested = self.processor.image_token_id, self.options.num_generations
        ours, theirs = group.prompt.input_ids.tolist(), list(output.prompt_token_ids)
        counts = [(len(c.token_ids), len(c.logprobs or ())) for c in output.outputs]
        fault = ""
        if theirs != ours:
            images = f"{theirs.count(image)} of them for images; the prompt has {len(ours)} and {ours.count(image)}"
            fault = f"read {len(theirs)} tokens, {images}"
        elif len(counts) != requested:
            fault = f"gave {len(counts)} completions; num_generations is {requested}"
        for tokens, reported in counts:
            if not 0 < tokens == reported:
                rule = "a completion has at least one token, and each has one"
                fault = fault or f"gave {tokens} tokens and log-probabilities of {reported}; {rule}"
        if fault:
            raise RunFailed(f"{group.source}: vLLM {fault}. {REMEDY}")
