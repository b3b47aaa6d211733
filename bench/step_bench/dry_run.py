"""Launches and bytes of each phase of a GRPO step on a GPU, counted on fake tensors: no GPU is needed, nor memory.

    python bench/step_bench/dry_run.py               2B and 7B: 16 prompts of 4 images, 8 completions of 256 tokens
    python bench/step_bench/dry_run.py --model 7B --operators 40

Vision, prefill, decoding, reference and policy forward run as the loop runs them, in the published sizes and bf16; the
policy also with LoRA adapters, and with a tower in training, which runs in every pack. The backward pass does not run:
autograd's engine has no fake device. Nor does ZeRO: DeepSpeed needs real devices. Attention is torch's flash kernel,
which stands in for flash-attn. How bytes are counted stands in `launches.py`.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from boxgrpo.bench.processes import run_isolated
from boxgrpo.bench.step_bench.cases import MODELS, StepCase, make_config
from boxgrpo.bench.step_bench.launches import Counts, LaunchCounter
from boxgrpo.kernels import LossOptions
from boxgrpo.model.batch import Group, PackedBatch, Pixels, Prompt, pack_groups, plan_packs
from boxgrpo.model.decoder import mrope_position_ids
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.model.generate import prefill
from boxgrpo.trainer.arguments import FlagParser
from boxgrpo.trainer.engine.lora import add_adapters
from boxgrpo.trainer.grpo import logps, policy_loss
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.rollout.local import embed_images
from boxgrpo.trainer.runtime.ranks import run_as_script

PUBLISHED = ("2B", "7B")
UNSEEN = ("flash_attn", "flash_attn_interface", "flashinfer")  # packages whose launches torch does not dispatch
WORDS = 72  # of a prompt's tokens, those of no image
GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }
"""


class PublishedIds:
    """The ids of Qwen2's special tokens, which a config needs."""

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        return list(range(151_643, 151_643 + len(tokens)))

    def __len__(self) -> int:
        return 151_657


def published_case(model: str) -> StepCase:
    return StepCase(model, prompts=16, side=(448, 896), tokens=256, dtype="bfloat16")


@cache
def fake_cuda() -> None:
    """Let fake tensors be on CUDA in this process, with or without a GPU. It is of no other use afterwards.

    Raises:
        ValueError: there is no GPU, and no C++ compiler.
    """
    sys.modules.update(dict.fromkeys(UNSEEN))
    torch._C._set_only_lift_cpu_tensors(True)
    torch.cuda._lazy_init = lambda: None  # nor is memory of a GPU that is there taken
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = lambda index: index
    if torch.cuda.is_available():
        return
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
        command += [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
        try:
            subprocess.run(command, input=GUARD, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(f"a device guard for fake CUDA tensors needs g++ ({error}). Install it.") from error
        torch.ops.load_library(library)


def make_groups(case: StepCase, config, fake) -> list[Group]:
    """Prompts as the processor makes them, their pixels fake."""
    grids = case.grids[: case.images]
    tokens = (grids.prod(1) // config.vision_config.spatial_merge_size**2).tolist()
    images = [torch.tensor([config.vision_start_token_id, *[config.image_token_id] * n]) for n in tokens]
    ids = torch.cat([*images, torch.zeros(WORDS, dtype=torch.int64)])
    positions = mrope_position_ids(ids, grids, image_token_id=config.image_token_id)
    patches = int(grids.prod(1).sum())
    with fake:
        colours = torch.empty(patches, 588, dtype=torch.uint8, pin_memory=True)
        pixels = Pixels(colours, torch.empty(3, 256))
    return [Group(Prompt(ids, positions, pixels, grids), serial=i) for i in range(case.prompts)]


def make_model(case: StepCase, lora_rank: int = 0) -> Qwen2VL:
    """The case's model without storage; with a rank, it has adapters."""
    config = make_config(MODELS[case.model], PublishedIds())
    with torch.device("meta"):
        model = Qwen2VL(config).to(getattr(torch, case.dtype))
        model.freeze_vision()
        if lora_rank:
            add_adapters(model, GrpoOptions(lora_rank=lora_rank))
    return model


def count_phases(case: StepCase, variants: bool = True) -> dict[str, Counts]:
    """Counts by phase. "decode" is one token of all completions, with half of their slots filled: the mean of a token.
    "keep" drops the second half of them from the cache. "pack" and "pack_pixels" are the packs' way to the GPU.

    Args:
        variants: whether to count the policy with adapters and with a tower in training, too.

    Raises:
        ValueError: as `fake_cuda`; peft is missing.
    """
    fake_cuda()
    model, adapted = make_model(case), make_model(case, lora_rank=16) if variants else None
    with LaunchCounter().counting() as counter:
        for m in filter(None, (model, adapted)):
            m.to_empty(device="cuda")
        model.model.join_storage()  # as `load_model` does on a GPU
        groups = make_groups(case, model.config, counter.fake)
        counter.phase("vision")
        groups = embed_images(model, groups)
        count_sampling(counter, case, model, groups)
        count_forwards(counter, case, model, groups, adapted)
    return counter.found


def count_sampling(counter: LaunchCounter, case: StepCase, model: Qwen2VL, groups: list[Group]) -> None:
    """Prefill, one token, and what it takes to drop half of the rows."""
    o, rows = GrpoOptions(), case.prompts * case.generations
    counter.phase("prefill")
    sizes = {"num_generations": case.generations, "max_completion_length": case.tokens}
    decoding = prefill(model, groups, eos_token_ids=[0, 1], **sizes)
    counter.used[decoding.cache.filled] = rows * case.tokens // 2
    sampling = {"temperature": o.temperature, "top_k": o.top_k, "top_p": o.top_p, "seed": o.seed}
    tokens = decoding.run_steps(**sampling, forbidden=torch.arange(6, device="cuda"))
    next(tokens)
    counter.phase("decode")
    next(tokens)
    counter.phase("keep")
    decoding.keep(torch.arange(rows // 2))


def count_forwards(
    counter: LaunchCounter, case: StepCase, model: Qwen2VL, groups: list[Group], adapted: Qwen2VL | None
) -> None:
    """Packs and the forward passes over them; with `adapted`, those of the two variants."""
    o = GrpoOptions()
    completions = [torch.zeros(case.tokens, dtype=torch.int64)] * case.generations
    scored = {"advantages": torch.zeros(case.generations, device="cuda"), "weight": torch.ones((), device="cuda")}
    groups = [replace(group, completions=completions, **scored) for group in groups]
    settings = LossOptions(beta=o.beta, denominator=torch.ones((), device="cuda"))

    def pack_first(n: int, **changed) -> PackedBatch:
        chosen = [replace(group, **changed) for group in groups[:n]]
        return pack_groups(chosen, image_token_id=model.config.image_token_id).to("cuda")

    sizes = [len(g.prompt.input_ids) + case.generations * case.tokens for g in groups]
    # Packs of as many groups are alike: one of them is counted as often as there are.
    for n, times in Counter(map(len, plan_packs(sizes, o.tokens_per_pass, sizes))).items():
        counter.phase("pack", times)
        pack = pack_first(n)
        counter.phase("reference", times)
        with torch.no_grad():
            pack = replace(pack, ref_logps=model(pack, partial(logps, pack, o.temperature)))
        counter.phase("policy_forward", times)
        model(pack, partial(policy_loss, o, settings, pack))
        if adapted is None:
            continue
        counter.phase("policy_with_adapters", times)
        adapted(pack, partial(policy_loss, o, settings, pack))
        counter.phase("pack_pixels", times)
        pack = replace(pack_first(n, image_embeds=None), ref_logps=pack.ref_logps)
        counter.phase("policy_with_tower", times)
        model.freeze_vision(False)
        model(pack, partial(policy_loss, o, settings, pack))
        model.freeze_vision()


def counts_of(case: StepCase) -> dict[str, dict]:
    """Launches, bytes moved and waits of a step by phase, in bf16, counted in a process of its own."""
    found = {}
    for name, counts in run_isolated(count_phases, replace(case, dtype="bfloat16"), False).items():
        times = case.tokens if name == "decode" else 1
        totals = (times * counter.total() for counter in (counts.launches, counts.moved, counts.waits))
        found[name] = dict(zip(("launches", "moved_bytes", "waits"), totals, strict=True))
    return found


def table(name: str, counts: Counts, operators: int) -> str:
    """A phase's totals, the operators that move most, and where it waits or mixes."""
    launches, moved = counts.launches, counts.moved
    total = f"{launches.total():>9,} launches{moved.total() / 1e9:>12,.2f} GB"
    lines = [f"{name:<32}{total}, {counts.peak / 1e9:,.2f} GB of memory"]
    for operator, size in moved.most_common(operators):
        lines.append(f"  {operator:<30}{launches[operator]:>9,}{size / 1e9:>21,.3f}")
    for word, places in (("waits", counts.waits), ("mixes", counts.mixes)):
        lines += [f"  {word} {times} x {where}" for where, times in places.items()]
    return "\n".join(lines)


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=PUBLISHED, default=PUBLISHED)
    parser.add_argument("--operators", type=int, default=0, help="operators to list of each phase")
    o = parser.parse_args()
    for model in o.model:
        case = published_case(model)
        print(case.name)
        for name, counts in count_phases(case).items():
            print(table(name, counts, o.operators))


if __name__ == "__main__":
    run_as_script(main, "dry_run.py")
