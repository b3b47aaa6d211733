"""A module in vLLM's place: it takes what vLLM takes, keeps a record, and samples with our own model.

It checks what vLLM is known to: names and shapes of the weights, whether it is awake, one placeholder an image.
"""

import sys
import types
from types import SimpleNamespace

import torch

from boxgrpo.model.batch import Group, Prompt
from boxgrpo.model.checkpoint import load_model
from boxgrpo.model.decoder import mrope_position_ids
from boxgrpo.model.generate import prefill
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.rollout.vllm import request_seed


class SamplingParams(SimpleNamespace):
    """Whatever was asked for."""


class LLM:
    """Keeps `events`, `loaded` (names by hand-over) and the last `prompts` and `params`."""

    noise = 0.0  # added to every weight that is handed over, in its standard deviations
    seed = 0  # of the run: a request's seed is traced back to its serial number with it

    def __init__(self, **arguments):
        self.arguments = arguments
        self.model = load_model(arguments["model"], dtype=getattr(torch, arguments["dtype"]))
        size = arguments["mm_processor_kwargs"]["size"]
        self.processor = Processor.from_pretrained(
            arguments["model"], min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]
        )
        self.awake = {"weights", "kv_cache"}
        self.events, self.loaded = [], []
        self.llm_engine = SimpleNamespace(reset_encoder_cache=lambda: self.events.append("reset_encoder_cache"))
        sys.modules["vllm"].engines.append(self)

    def sleep(self, level):
        self.awake = set()
        self.events.append(f"sleep {level}")

    def wake_up(self, tags):
        self.awake.update(tags)
        self.events += [f"wake {tag}" for tag in tags]

    def reset_prefix_cache(self):
        self.events.append("reset_prefix_cache")
        return True

    def apply_model(self, function):
        return [function(self)]

    @torch.no_grad()
    def load_weights(self, weights):
        assert "weights" in self.awake, "weights were written to memory given up"
        self.events.append("load_weights")
        parameters = dict(self.model.named_parameters())
        g = torch.Generator().manual_seed(0)
        loaded = set()
        for name, tensor in weights:  # an iterable, as in vLLM: gone through once
            loaded.add(name)
            parameters[name].copy_(tensor)  # an unknown name is a KeyError, as in vLLM
            if self.noise and tensor.ndim > 1:
                parameters[name] += self.noise * tensor.std() * torch.randn(tensor.shape, generator=g)
        self.loaded.append(loaded)

    def generate(self, prompts, sampling_params, use_tqdm):
        assert self.awake == {"weights", "kv_cache"}
        self.events.append("generate")
        self.prompts, self.params = prompts, sampling_params
        return [self._answer(*asked) for asked in zip(prompts, sampling_params, strict=True)]

    def _answer(self, request, params):
        prompt, pixel_values = self._expanded(request)
        embeds = None if pixel_values is None else self.model.visual(pixel_values, prompt.image_grid_thw).detach()
        serial = next(s for s in range(1000) if request_seed(self.seed, s) == params.seed)
        decoding = prefill(
            self.model,
            [Group(prompt, image_embeds=embeds, serial=serial)],
            num_generations=params.n,
            eos_token_ids=params.stop_token_ids,
            max_completion_length=params.max_tokens,
        )
        completions = decoding.run(
            seed=self.seed,
            forbidden=torch.tensor([i for i, bias in params.logit_bias.items() if bias <= -100]),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
        )
        outputs = []
        for ids, logps in zip(completions, decoding.results.logps.tolist()):
            reported = [{token: SimpleNamespace(logprob=logp)} for token, logp in zip(ids.tolist(), logps)]
            outputs.append(SimpleNamespace(token_ids=ids.tolist(), logprobs=reported))
        return SimpleNamespace(prompt_token_ids=prompt.input_ids.tolist(), outputs=outputs)

    def _expanded(self, request):
        images, pad = request.get("multi_modal_data", {"image": []})["image"], self.processor.image_token_id
        features = {"pixel_values": None, "image_grid_thw": torch.zeros(0, 3, dtype=torch.int64)}
        if images:
            features = self.processor.image_processor(images=images, return_tensors="pt")
        assert request["prompt_token_ids"].count(pad) == len(images) <= self.arguments["limit_mm_per_prompt"]["image"]
        counts = iter((features["image_grid_thw"].prod(1) // 4).tolist())
        ids = [j for i in request["prompt_token_ids"] for j in [i] * (next(counts) if i == pad else 1)]
        ids = torch.tensor(ids)
        positions = mrope_position_ids(ids, features["image_grid_thw"], image_token_id=pad, spatial_merge_size=2)
        prompt = Prompt(ids, positions, None, features["image_grid_thw"])
        return prompt, features["pixel_values"]


def install(monkeypatch, *, seed: int, noise: float = 0.0) -> list[LLM]:
    """Let `import vllm` find this until the test ends; the list fills with the engines that are made."""
    module = types.ModuleType("vllm")
    module.SamplingParams, module.engines = SamplingParams, []
    module.LLM = type("LLM", (LLM,), {"seed": seed, "noise": noise})
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("RANK", "0")
    return module.engines
