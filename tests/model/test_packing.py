"""Packing is exact: a shared prompt gives the results of whole sequences, and no completion affects another."""

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from boxgrpo.model.batch import Conversation, Group, Pixels, Prompt, pack_groups, plan_packs
from boxgrpo.model.decoder import head_dim
from families import EVERY, ONE_EACH
from special_ids import SPECIAL_IDS

IMAGE = SPECIAL_IDS["<|image_pad|>"]


def scored_logps(model, pack):
    """(N) log-probabilities of the pack's scored tokens."""
    logits = model(pack) @ model.head_weight.T
    return logits.log_softmax(-1).gather(1, pack.targets[:, None])[:, 0]


def whole_logps(logits, ids, count):
    """(count) log-probabilities of the last `count` of `ids`, from a whole sequence's logits by transformers."""
    return logits[-count - 1 : -1].log_softmax(-1).gather(1, ids[-count:, None])[:, 0]


@pytest.fixture
def groups(make_prompt):
    """Two prompts with different images; three completions, one of a single token, and a lone one."""
    completions = [torch.tensor(c) for c in ([9, 8, 7, 101], [101], [3, 4, 4, 4, 5, 101])]
    return [
        Group(make_prompt([(1, 4, 8), (1, 6, 4), (1, 2, 2)], seed=1), completions),
        Group(make_prompt([(1, 2, 6)], seed=2), [torch.tensor([11, 12, 101])]),
    ]


@pytest.fixture
def model(twins, kind):
    """Our model, without gradients before and after; its tower is trained unless a test freezes it."""
    ours, _ = twins(kind)
    ours.zero_grad()
    yield ours
    ours.freeze_vision(False)
    ours.model.gradient_checkpointing = False
    ours.zero_grad()


def test_layout():
    """Every field of a pack, laid out by hand: two prompts of 2 and 3 tokens, completions of 2, 1 and 2."""
    no_images = torch.empty(0, 3, dtype=torch.int64)
    first = Prompt(torch.tensor([10, 11]), torch.tensor([[0, 5]] * 3), None, no_images)  # completions start at 6
    second = Prompt(torch.tensor([20, 21, 22]), torch.arange(3).expand(3, -1), None, no_images)
    a, b, c = torch.tensor([30, 31]), torch.tensor([40]), torch.tensor([50, 51])
    pack = pack_groups([Group(first, [a, b]), Group(second, [c])], image_token_id=IMAGE)
    assert pack.input_ids.tolist() == [10, 11, 30, 31, 40, 20, 21, 22, 50, 51]
    assert pack.position_ids.tolist() == [[0, 5, 6, 7, 6, 0, 1, 2, 3, 4]] * 3
    assert pack.cu_seqlens.tolist() == [0, 2, 4, 5, 8, 10]
    assert pack.kv_index.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 5, 6, 7, 8, 9]
    assert pack.cu_seqlens_k.tolist() == [0, 2, 6, 9, 12, 17]
    assert (pack.max_q, pack.max_k) == (3, 5)
    assert pack.predict_from.tolist() == [1, 2, 1, 7, 8]  # the first prompt's last row stands twice
    assert pack.targets.tolist() == [30, 31, 40, 50, 51]
    assert pack.completion_cu.tolist() == [0, 2, 3, 5]
    assert pack.spans == ((0, 2, 0, 0), (2, 2, 0, 2), (4, 1, 0, 2), (5, 3, 0, 0), (8, 2, 5, 3))
    int32 = {"cu_seqlens", "cu_seqlens_k", "completion_cu"}
    int64 = {"input_ids", "position_ids", "kv_index", "predict_from", "targets", "image_rows"}
    assert {getattr(pack, name).dtype for name in int32} == {torch.int32}
    assert {getattr(pack, name).dtype for name in int64} == {torch.int64}
    moved = pack.to("meta")
    assert {getattr(moved, name).device.type for name in int32 | int64} == {"meta"}
    assert moved.image_grid_thw.device.type == "cpu", "its values are read while packing and in the tower"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_pixels_are_those_of_the_table(monkeypatch, dtype):
    """In both frames of each channel, of more patches than are computed at once, rounded once."""
    monkeypatch.setattr("boxgrpo.model.batch.LOOKED_UP", 5)
    patches = torch.randint(256, (13, 588), dtype=torch.uint8)
    table = torch.randn(3, 256)
    values = Pixels(patches, table).values(torch.empty(0, dtype=dtype)).view(-1, 3, 2, 196)
    for channel, colours in enumerate(patches.long().view(-1, 3, 196).unbind(1)):
        for frame in (0, 1):
            assert torch.equal(values[:, channel, frame], table[channel][colours].to(dtype))


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen tower", "trained tower"])
def test_shared_prompt_equals_whole_sequences(model, twins, kind, hf_logits, groups, frozen):
    """Log-probabilities within 1e-5 and every parameter's gradient within 1e-5 of its norm, against transformers."""
    _, theirs = twins(kind)
    model.freeze_vision(frozen)
    theirs.zero_grad()
    if frozen:
        for group in groups:
            group.image_embeds = model.visual(group.prompt.pixels, group.prompt.image_grid_thw)
    pack = pack_groups(groups, image_token_id=IMAGE)
    shared_rows = sum(len(g.prompt.input_ids) + sum(map(len, g.completions)) for g in groups)
    assert len(pack.input_ids) == shared_rows, "a prompt stands once"
    assert (pack.pixels is None) == frozen, "a frozen tower has run already"
    logps = scored_logps(model, pack)

    sequences = [(g.prompt, c) for g in groups for c in g.completions]
    expected = torch.cat([whole_logps(hf_logits(theirs, p, c), c, len(c)) for p, c in sequences])
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)

    weight = torch.randn(len(logps), generator=torch.Generator().manual_seed(0))  # a different pull on every token
    (logps @ weight).backward()
    (expected @ weight).backward()
    published = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): parameter.grad
        for name, parameter in theirs.named_parameters()
    }
    for name, parameter in model.named_parameters():
        if frozen and name.startswith("visual."):
            assert parameter.grad is None, name
        else:
            assert (parameter.grad - published[name]).norm() <= 1e-5 * published[name].norm(), name


def test_gradient_reaches_prompt_and_own_rows_only(model, groups):
    """A completion's log-probabilities depend on exactly its prompt and itself, on no sibling and no other group."""
    embedded = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out: embedded.append(out))
    pack = pack_groups(groups, image_token_id=IMAGE)
    logps = scored_logps(model, pack)
    hook.remove()
    completions = [span for span in pack.spans if span[3]]
    for own, (row, length, start, count) in zip(logps.split(pack.completion_cu.diff().tolist()), completions):
        (grad,) = torch.autograd.grad(own.sum(), embedded[0], retain_graph=True)
        reached = set(grad.abs().sum(1).nonzero()[:, 0].tolist())
        # the last token predicts nothing, and an image's row takes the tower's output
        prompt_rows = set(range(start, start + count)) - set(pack.image_rows.tolist())
        assert reached == prompt_rows | set(range(row, row + length - 1))


@pytest.mark.parametrize("kind", ONE_EACH)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen tower", "trained tower"])
def test_empty_pack(model, frozen):
    """For a rank without work: no hidden states, and each trained parameter gets a gradient of zeros."""
    model.freeze_vision(frozen)
    pack = pack_groups([], image_token_id=IMAGE)
    hidden = model(pack)
    assert hidden.shape == (0, 64)
    (hidden @ model.head_weight.T).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("kind", ONE_EACH)
def test_gradient_checkpointing_changes_nothing(model, groups):
    pack = pack_groups(groups, image_token_id=IMAGE)

    def gradients():
        model.zero_grad()
        scored_logps(model, pack).sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain = gradients()
    runs = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda *args: runs.append(args))
    model.model.gradient_checkpointing = True
    checkpointed = gradients()
    hook.remove()
    assert len(runs) == 2, "a checkpointed layer runs again in the backward"
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, msg=name)


def test_head_runs_inside_the_forward(model, groups):
    """Engines that shard parameters gather the head's weight only inside the model's own forward."""
    pack = pack_groups(groups, image_token_id=IMAGE)
    inside = []
    hook = model.register_forward_hook(lambda *args: inside.append("left"))
    with torch.no_grad():
        hidden, weight = model(pack, head=lambda h, w: (inside.append("head"), (h, w))[1])
    hook.remove()
    assert inside == ["head", "left"]
    assert hidden.shape == (len(pack.targets), 64)
    assert weight is model.head_weight


def test_conversations(model, twins, hf_logits, make_prompt):
    """SFT: all learned tokens of all turns are scored, with the log-probabilities of the whole conversation."""
    _, theirs = twins("tiny")
    learned = [[], [3, 4, 9], [0, 5]]  # of the words after the images; the first of all tokens cannot be predicted
    examples = []
    for seed, (grids, words) in enumerate(zip([[(1, 4, 4)], [(1, 2, 6), (1, 4, 2)], []], learned, strict=True)):
        prompt = make_prompt(grids, words=10, seed=seed)
        mask = torch.zeros(len(prompt.input_ids), dtype=torch.bool)
        mask[[len(mask) - 10 + word for word in words]] = True
        examples.append(Conversation(**vars(prompt), loss_mask=mask))
    pack = pack_groups([Group(example) for example in examples], image_token_id=IMAGE)
    assert pack.completion_cu.tolist() == [0, 0, 3, 4]
    assert {span[2:] for span in pack.spans} == {(0, 0)} and pack.advantages is None
    expected = []
    with torch.no_grad():
        logps = scored_logps(model, pack)
        for example in examples:
            all_logps = whole_logps(hf_logits(theirs, example), example.input_ids, len(example.input_ids) - 1)
            expected.append(all_logps[example.loss_mask[1:]])
    torch.testing.assert_close(logps, torch.cat(expected), rtol=0, atol=1e-5)


SIZES = [100, 60, 50, 40, 30, 10, 5, 5]


@pytest.mark.parametrize("costs", [None, [size**2 for size in SIZES]], ids=["sizes", "costs"])
def test_plan_packs(costs):
    """Each item once, none above the budget unless alone, and as few packs as the sizes need."""
    packs = plan_packs(SIZES, 160, costs)
    assert sorted(itertools.chain(*packs)) == list(range(len(SIZES))) and len(packs) == 2
    assert all(sum(SIZES[i] for i in pack) <= 160 for pack in packs)
    if costs:
        sums = [sum(costs[i] for i in pack) for pack in packs]
        by_size = [sum(costs[i] for i in pack) for pack in plan_packs(SIZES, 160)]
        assert max(sums) < max(by_size) and max(sums) < 2 * min(sums)
    assert [3] in plan_packs([5, 9, 3, 30], 10, costs and [1, 1, 1, 1]), "one above the budget is alone"
    assert plan_packs([], 10, costs and []) == []
    assert plan_packs([2, 2, 2], 4) == [[0, 1], [2]], "equal sizes keep their order, on every rank"
    tight = [6, 5, 5, 4]  # by cost the first two would share a pack, and neither pack has room for the last
    assert plan_packs(tight, 10, [1, 9, 8, 7]) == plan_packs(tight, 10)


@pytest.mark.parametrize("kind", EVERY)
def test_flop_formulas_equal_torchs_count(model, make_prompt):
    """Tower, decoder and head; torch counts causal attention as the full square that plain products compute."""
    text = model.config.text_config
    group = Group(make_prompt([(1, 4, 8), (1, 6, 4)], seed=1), [torch.tensor([5, 6, 7])])
    prompt, length = group.prompt, len(group.prompt.input_ids)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as seen:
        model(pack_groups([group], image_token_id=IMAGE), lambda h, w: h @ w.T)
    width = text.num_attention_heads * head_dim(text)
    masked = 4 * width * text.num_hidden_layers * (length * length / 2 + 3 * 3 / 2)
    tower = model.tower_flop(prompt.image_grid_thw)
    assert model.group_flop(group) + tower + masked == seen.get_total_flops()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as seen:
        model.visual(prompt.pixel_values, prompt.image_grid_thw)
    assert tower == seen.get_total_flops()
