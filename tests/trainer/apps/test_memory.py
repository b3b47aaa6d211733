"""The memory calculator against tensors that exist: saved for a backward, held by an engine, kept by a cache."""

import json
import pathlib
import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from boxgrpo.bench.records import newest
from boxgrpo.bench.step_bench.cases import MODELS, make_config
from boxgrpo.kernels import LossOptions, fused_grpo_loss
from boxgrpo.kernels.dispatch import Launch
from boxgrpo.kernels.head_triton import fused_grpo_loss_triton
from boxgrpo.model import attention, decoder
from boxgrpo.model.batch import Group, Prompt, pack_groups
from boxgrpo.model.cost import (
    Pack,
    Sharding,
    activation_bytes,
    cache_bytes,
    count,
    loss_bytes,
    reference_bytes,
    state_bytes,
    traffic,
)
from boxgrpo.model.families import make_model
from boxgrpo.model.generate import prefill
from boxgrpo.trainer.apps.memory import MemoryOptions, config_of, engines, largest_pack, main, memory, report, table
from boxgrpo.trainer.arguments import parse
from boxgrpo.trainer.data.vocabulary import demo_tokenizer
from boxgrpo.trainer.engine.ddp import DataParallelEngine as Ddp
from boxgrpo.trainer.engine.memory_check import shape_of
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.run import frozen_copy
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.step.pack import make_packs
from boxgrpo.trainer.world.tiny import tiny_config
from families import family_config
from special_ids import SPECIAL_IDS

ALONE = SimpleNamespace(ranks=Ranks(), lockstep=False, min_packs=0)  # an engine of one rank
DOCUMENT = pathlib.Path(__file__).resolve().parents[3] / "docs/memory.md"
IMAGE = SPECIAL_IDS["<|image_pad|>"]
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES = [
    (tiny_config(600, SPECIAL_IDS), [(150, [40] * 6), (150, [40] * 6)]),
    (
        tiny_config(2000, SPECIAL_IDS, hidden_size=64, layers=5, heads=2, kv_heads=1),
        [(300, [70, 64, 67]), (290, [60])],
    ),
    (family_config("qwen3_vl"), [(150, [40] * 6), (150, [40] * 6)]),
]


def packs_of(config, sizes, budget):
    with torch.device("meta"):
        cost = make_model(config).group_flop
    return make_packs(ALONE, cost, config.image_token_id, groups(sizes), budget)


def groups(sizes):
    def ids(n):
        return torch.randint(100, (n,))

    return [
        Group(
            Prompt(ids(p), torch.arange(p).expand(3, -1), None, torch.zeros(0, 3, dtype=torch.int64)),
            [ids(c) for c in lengths],
            advantages=torch.randn(len(lengths)),
            weight=torch.ones(()),
        )
        for p, lengths in sizes
    ]


def trained(config, dtype=torch.float32, device="cpu"):
    with torch.device(device):
        model = make_model(config).to(dtype)
    model.freeze_vision()
    return model if device == "meta" else model.init_weights(torch.Generator().manual_seed(0))


def loss_of(model, batch):
    def head(hidden, weight):
        return fused_grpo_loss(
            hidden, weight, batch.targets, batch.advantages, batch.completion_cu, beta=0.0, backend="torch"
        )[0]

    return model(batch, head)


def storages(tensors) -> dict[int, int]:
    """Bytes by storage: what two tensors share counts once."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def saved_bytes(model, batch) -> int:
    """Bytes kept for the backward, parameters excluded."""
    kept = []  # tensors, not addresses: what lives cannot lend its address to another
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss_of(model, batch)
    own = storages(model.parameters())
    return sum(size for storage, size in storages(kept).items() if storage not in own)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_activations_are_what_a_forward_saves(shape, checkpointing):
    """fp32 on a CPU, through SDPA over padded buckets."""
    config, packed = SHAPES[shape]
    model, batch = trained(config), pack_groups(groups(packed), image_token_id=IMAGE)
    model.model.gradient_checkpointing = checkpointing
    counted = activation_bytes(config, shape_of(batch, torch.float32), 4, checkpointing=checkpointing)
    assert counted == pytest.approx(saved_bytes(model, batch), rel=0.1)


class FusedNorm(torch.autograd.Function):
    """Keeps what torch's norm keeps on a GPU: derivatives.yaml, _fused_rms_norm."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)


@pytest.mark.parametrize(("checkpointing", "lora"), [(False, False), (True, True)])
def test_activations_of_the_published_2b_through_varlen(checkpointing, lora, monkeypatch):
    """bf16 on the meta device, with the step's largest pack; only the norm is a stand-in."""
    monkeypatch.setattr(attention, "pick_backend", lambda x: "varlen")
    monkeypatch.setattr(decoder.RMSNorm, "forward", lambda norm, x: FusedNorm.apply(x, norm.weight, norm.eps))
    config, options = config_of("2B"), MemoryOptions()
    model, rank = trained(config, torch.bfloat16, "meta"), 0
    if lora:
        peft, rank = pytest.importorskip("peft"), options.lora_rank
        model = peft.inject_adapter_in_model(peft.LoraConfig(r=rank, target_modules=list(LAYERS)), model)
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
        model.to(torch.bfloat16)
        assert count(trained(config, device="meta"), rank).trained == count(model).trained
    model.model.gradient_checkpointing = checkpointing
    lengths = [options.max_completion_length] * options.num_generations
    (batch,) = packs_of(config, [(options.prompt_tokens, lengths)] * 2, options.tokens_per_pass)
    pack = largest_pack(options, prompts=2)
    assert pack == (len(batch.input_ids), len(batch.kv_index), len(batch.targets), 0, False)
    counted = activation_bytes(config, pack, 2, checkpointing=checkpointing, head_trained=not lora, lora_rank=rank)
    assert counted == pytest.approx(saved_bytes(model, batch.to("meta")), rel=0.1)


class PeakBytes(TorchDispatchMode):
    """The most bytes at a time of the tensors that are made under it."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = storages(x for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata not in given:
            self.made[out] = None
        self.peak = max(self.peak, sum(storages(self.made).values()))
        return out


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("scored", [200, 6144, 8192, 20_000])
@pytest.mark.parametrize("name", ["2B", "7B"])
def test_the_loss_makes_what_is_counted(name, scored, trained, monkeypatch):
    """In bf16 on the meta device, where no kernel is launched: at most 1 GB beside the head's two gradients."""
    monkeypatch.setattr(Launch, "run", lambda launch: None)
    text = config_of(name).text_config
    head = [torch.empty(n, text.hidden_size, dtype=torch.bfloat16, device="meta") for n in (scored, text.vocab_size)]
    targets, bounds = (torch.empty(n, dtype=torch.int64, device="meta") for n in (scored, 2))
    with PeakBytes() as made:
        rest = targets, targets[:1].float(), bounds, 1.0, True, trained
        returned = fused_grpo_loss_triton(*head, *rest, *LossOptions())
    counted = loss_bytes(config_of(name), Pack(scored, scored, scored), 2, head_trained=trained)
    assert made.peak == pytest.approx(sum(storages(returned).values()) + counted, rel=1e-3)
    assert counted <= 10**9 + 4 * trained * text.vocab_size * text.hidden_size


def test_a_group_above_the_budget_stands_in_several_packs():
    o = MemoryOptions(tokens_per_pass=3000, prompt_tokens=2000, max_completion_length=300, num_generations=8)
    packs = packs_of(tiny_config(160, SPECIAL_IDS), [(2000, [300] * 8)], 3000)
    largest = max(packs, key=lambda p: len(p.input_ids))
    assert largest_pack(o, 1)[:3] == (len(largest.input_ids), len(largest.kv_index), len(largest.targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ddp_holds_what_is_counted(dtype):
    """Every tensor of policy, reference, engine and optimizer, after a step and another backward: to the byte."""
    config = tiny_config(300, SPECIAL_IDS, layers=2)
    policy = trained(config, dtype)
    reference = frozen_copy(policy, without_vision=True)
    engine = Ddp(policy, GrpoOptions(lr_scheduler_type="constant"), Ranks(), 10)
    batch = pack_groups(groups([(20, [5, 6])]), image_token_id=IMAGE)
    for _ in range(2):
        loss = loss_of(policy, batch)
        engine.backward(loss)
        if not engine.optimizer.state:
            engine.step()
    grads = [p.grad for p in (*policy.parameters(), *engine.masters.values()) if p.grad is not None]
    moments = [t for state in engine.optimizer.state.values() for t in state.values()]
    held = storages([*policy.parameters(), *reference.parameters(), *engine.masters.values(), *grads, *moments])
    c, size, ddp = count(policy), dtype.itemsize, engines(1)[0]
    counted = sum(state_bytes(c, ddp, 1, size).values()) + reference_bytes(c, ddp, 1, size, 0.04)
    assert sum(held.values()) == counted
    per_parameter = {torch.float32: 4 + 4 + 8, torch.bfloat16: 2 + 4 + 4 + 8}[dtype]
    assert counted == per_parameter * c.trained + size * (c.frozen + c.decoder) + 4 * c.tensors
    assert (
        reference_bytes(c, ddp, 1, size, 0.0) == reference_bytes(c, Sharding("lora", 0, lora=True), 1, size, 1.0) == 0
    )


@pytest.mark.parametrize("config", [tiny_config(160, SPECIAL_IDS, heads=4, kv_heads=1), family_config("qwen3_vl")])
def test_a_cache_holds_what_is_counted(config):
    sizes = {"num_generations": 3, "max_completion_length": 7}
    cache = prefill(trained(config), groups([(30, []), (30, [])]), eos_token_ids=[101], **sizes).cache
    tensors = [t for pairs in (cache.prefix, cache.own) for pair in pairs for t in pair]
    held = storages([*tensors, cache.padding, cache.at])
    assert sum(held.values()) == cache_bytes(config, 2, 30, 6, 7, 4)


def test_the_published_models_have_their_published_sizes():
    for name, size in (("2B", 2_208_985_600), ("7B", 8_291_375_616), ("72B", 73_405_560_320)):
        c = count(trained(config_of(name), device="meta"))
        assert c.trained + c.frozen == size and c.trained == c.decoder


def test_zero_shares_what_its_stage_shares():
    c = count(trained(config_of("7B"), device="meta"))
    states = {e.name: state_bytes(c, e, 8, 2) for e in engines(16)}
    one, two, three = (states[f"zero {stage}"] for stage in (1, 2, 3))
    share = c.trained / 8
    for state in (one, two, three):
        assert state["masters"] + state["moments"] == pytest.approx(12 * share)
    assert one["gradients"] == 2 * c.trained  # bf16; from stage 2 on sums in fp32
    assert two["gradients"] == three["gradients"] == pytest.approx(4 * share)
    assert one["weights"] == two["weights"] == 2 * (c.trained + c.frozen)
    assert three["weights"] == pytest.approx((c.trained + c.frozen) / 4, rel=0.001)
    for stage in (1, 2, 3):
        offloaded = states[f"zero {stage}, offload"]
        assert offloaded["masters"] == offloaded["moments"] == 0
        assert offloaded["host"] == pytest.approx({1: 18, 2: 18, 3: 20}[stage] * share)
        assert offloaded["gradients"] <= states[f"zero {stage}"]["gradients"]


def test_the_total_is_of_the_phase_that_needs_most():
    model = trained(config_of("7B"), device="meta")
    zero3 = Sharding("zero 3", 3)
    found = memory(model, zero3, MemoryOptions(gpus=64, prompts_per_step=64, num_generations=2))
    resident = found["state"] + found["reference"]
    assert found["total"] == resident + found["training"]
    assert found["total_checkpointed"] == resident + found["cache"] + found["gathered"] > resident + found["step"]
    assert found["gathered"] == 2 * 8_291_375_616
    assert memory(model, zero3, MemoryOptions(beta=0.0))["reference"] == 0
    layers = memory(model, zero3, MemoryOptions(ds3_gather_for_generation=False))
    assert layers["gathered"] == 2 * 1_050_000_000


def test_the_total_on_a_cpu_is_what_the_step_benchmark_measured():
    """Peak resident memory above the loaded model, the process's own buffers and fragments included."""
    config = make_config(MODELS["44M"], demo_tokenizer(["a"]))
    model = trained(config, device="meta")
    for row in newest()["step"]["rows"]:
        o = MemoryOptions(gpus=1, device="cpu", dtype=row["dtype"], prompt_tokens=round(row["prompt_tokens"]))
        o.prompts_per_step, o.max_completion_length = row["prompts"], row["tokens"]
        found = memory(model, engines(1)[0], o)
        counted = (found["total"] - found["weights"]) / 1e6
        assert 0.85 < counted / row["ours_peak_mb"] <= 1.0, row["case"]


def test_gradients_stand_beside_activations_where_a_step_has_several_packs():
    model = trained(config_of("2B"), device="meta")
    one, several = (memory(model, engines(1)[0], MemoryOptions(tokens_per_pass=n)) for n in (16384, 8192))
    assert one["total"] - one["training"] == one["state"] + one["reference"] - one["gradients"]
    assert several["total"] - several["training"] == several["state"] + several["reference"]


def test_traffic():
    """Two GPUs: each receives half of what it gathers."""
    model = trained(tiny_config(160, SPECIAL_IDS), device="meta")
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.model, model.visual)]
    moved = traffic(count(model), 2, 2, tokens=10, packs=3, beta=0.04)
    assert list(moved.values()) == [sum(sizes), 10 * sizes[0] + sizes[1], 9 * sizes[0], 3 * sizes[0]]
    assert traffic(count(model), 1, 2, tokens=10, beta=0.04) == dict.fromkeys(moved, 0)
    assert traffic(count(model), 2, 2, tokens=10)["forward and backward"] == 2 * sizes[0]


def test_the_document_holds_what_the_command_prints():
    text = DOCUMENT.read_text()
    assert table(report(MemoryOptions()), MemoryOptions()) in text
    (flags,) = re.findall(r"boxgrpo memory (--model 72B.*?)`", text, re.DOTALL)
    plan = parse(MemoryOptions, [flag.strip("'") for flag in re.findall(r"'[^']*'|\S+", flags)])
    assert table(report(plan), plan) in text
    whole = memory(trained(config_of("72B"), device="meta"), Sharding("zero 3", 3), MemoryOptions())["gathered"]
    assert f"{whole / 1e9:.0f} GB" in text


def test_json_and_refusals(capsys, tmp_path):
    tiny_config(160, SPECIAL_IDS).save_pretrained(tmp_path)
    main(["--model", str(tmp_path), "--engine", "ddp", "--dtype", "float32", "--json", "-"])
    (of,) = json.loads(capsys.readouterr().out).values()
    assert of["engines"]["ddp"]["masters"] == 0 and of["engines"]["ddp"]["total"] > of["engines"]["ddp"]["state"] > 0
    with pytest.raises(ValueError, match="engine is 'fsdp'; it must begin one of: ddp; zero 1"):
        main(["--engine", "fsdp"])
    with pytest.raises(ValueError, match="gpus is 0; it must be at least 1. Raise --gpus"):
        main(["--gpus", "0"])
    with pytest.raises(ValueError, match="dtype is 'fp8'; it must be one of bfloat16, float32. Change --dtype"):
        main(["--dtype", "fp8"])
    with pytest.raises(ValueError, match="device is 'tpu'; it must be one of cuda, cpu. Change --device"):
        main(["--device", "tpu"])
