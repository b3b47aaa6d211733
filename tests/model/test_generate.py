"""Sampling from a shared prefill: greedy equals transformers', sampled log-probabilities equal the trainer's."""

import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from boxgrpo.model import generate, static_cache
from boxgrpo.model.attention import DecodeCache
from boxgrpo.model.batch import Group, pack_groups
from boxgrpo.model.generate import head_logits, prefill
from boxgrpo.model.static_cache import Segments, StaticCache
from families import EVERY
from sampling import LENGTH, VISION, sample
from special_ids import SPECIAL_IDS

IMAGE = SPECIAL_IDS["<|image_pad|>"]


def transformers_greedy(theirs, prompt):
    images = {}
    if len(prompt.image_grid_thw):
        images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    ids = prompt.input_ids[None]
    out = theirs.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == IMAGE).int(),
        **images,
        max_new_tokens=LENGTH,
        do_sample=False,
        eos_token_id=159,  # which none of the completions contains
        pad_token_id=100,
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", [*EVERY, "published"])
def test_greedy_equals_transformers(twins, groups, make_prompt, kind):
    """Prompts of 0 to 6 images decoded together against each alone; some stop at an end token."""
    sizes = [(1, 4, 6), (1, 2, 4), (1, 6, 4), (1, 4, 2), (1, 2, 2), (1, 4, 4)]
    ours, theirs = twins(kind)
    more = () if kind == "published" else (2, 6)
    groups = [*groups, *(Group(make_prompt(sizes[:n], words=6, seed=20 + n)) for n in more)]
    whole = [transformers_greedy(theirs, group.prompt) for group in groups]
    assert {len(tokens) for tokens in whole} == {LENGTH}
    eos = (whole[1][4], whole[2][7])  # so that at least two stop early
    expected = [tokens[: min((i + 1 for i, t in enumerate(tokens) if t in eos), default=LENGTH)] for tokens in whole]
    assert len({len(tokens) for tokens in expected}) > 1, "the prompts should end at different lengths"
    assert sample(ours, groups, eos_token_ids=eos, temperature=0, forbidden=None)[0] == expected
    assert sample(ours, groups, eos_token_ids=eos, top_k=1, forbidden=None)[0] == expected


def flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, seqused_k=None):
    """aten's flash attention without a mask, segment by segment in fp64."""
    assert (dropout, causal, debug) == (0, False, False) and q.shape[1] == k.shape[1]
    assert {x.dtype for x in (cu_q, cu_k, seqused_k)} == {torch.int32} and len(cu_q) == len(cu_k) == len(seqused_k) + 1
    assert max_q == cu_q.diff().max() and max_k >= seqused_k.max()
    outs, masses = [], []
    for (a, b), c, used in zip(itertools.pairwise(cu_q), cu_k, seqused_k):
        e = c + used
        scores = torch.einsum("qhd,khd->hqk", q[a:b].double(), k[c:e].double()) * q.shape[2] ** -0.5
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(2), v[c:e].double()))
        masses.append(scores.logsumexp(2))
    return torch.cat(outs).to(q.dtype), torch.cat(masses, 1).float(), None, None, None


@pytest.fixture(params=["growing", "static", "static, flash"])
def way(request, monkeypatch):
    """How tokens are decoded: as on a CPU; as on a GPU in fp32; as on a GPU with flash attention."""
    if request.param != "growing":
        monkeypatch.setattr(generate, "STATIC_DEVICES", ("cpu", "cuda"))
        monkeypatch.setattr(static_cache, "PART_KEYS", 3)  # so that prompts are read in several parts
        monkeypatch.setattr(generate.Decoding, "_record", lambda *_, **__: None)
    if request.param == "static, flash":
        monkeypatch.setattr(static_cache, "pick_backend", lambda x: "varlen")
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    return request.param


def pack_of(groups, completions):
    """All completions with their prompts; each group has as many."""
    count = len(completions) // len(groups)
    for i, group in enumerate(groups):
        group.completions = [torch.tensor(c) for c in completions[count * i : count * (i + 1)]]
    return pack_groups(groups, image_token_id=IMAGE)


@torch.no_grad()
def trained_logps(model, pack, temperature=1.0):
    pack = pack.to(model.device)
    logits = model(pack).float() @ model.head_weight.T.float() / temperature
    return logits.log_softmax(-1).gather(1, pack.targets[:, None])[:, 0].cpu()


@pytest.mark.parametrize(("kind", "temperature"), [("tiny", 1.0), ("tiny", 0.7), ("qwen3_vl", 1.0)])
def test_logps_equal_the_trainers(model, groups, temperature, way):
    """Sampling reports the log-probabilities of a forward over the packed completions, token by token."""
    completions, samples = sample(model, groups, num_generations=4, temperature=temperature)
    assert samples.ids.dtype == torch.int64 and samples.logps.dtype == torch.float32
    expected = trained_logps(model, pack_of(groups, completions), temperature)
    sampled = torch.cat([row[: len(c)] for row, c in zip(samples.logps, completions, strict=True)])
    torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("way", ["static"], indirect=True)
def test_logps_in_bf16_are_as_exact_as_the_trainers(twins, groups, way, device):
    """Decoding and a pack's forward round to bf16 about as often: decoding the parts of attention once more before
    they are merged, a pack with liger-kernel norms and gated products once more.

    So both are equally far from fp32 with the same weights, but independently: from each other they are at most as far
    as the sum of the two.
    """
    low = copy.deepcopy(twins("published")[0]).to(device, torch.bfloat16)
    low.model.join_storage()
    completions, samples = sample(low, groups, num_generations=8, max_completion_length=40)
    pack = pack_of(groups, completions)
    sampled = torch.cat([row[: len(c)] for row, c in zip(samples.logps.cpu(), completions, strict=True)])
    exact, trained = trained_logps(copy.deepcopy(low).float(), pack), trained_logps(low, pack)
    ours, theirs = (sampled - exact).abs(), (trained - exact).abs()
    assert len(ours) > 500 and theirs.mean() > 1e-3
    assert ours.mean() < 1.15 * theirs.mean() and ours.max() < 1.5 * theirs.max()
    assert (sampled - trained).abs().mean() < 1.5 * theirs.mean()  # the root of two, were they normal


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::mm", "aten::addmm")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("way", ["static"], indirect=True)
def test_adjacent_weights_are_multiplied_at_once(model, groups, way):
    """Two products a layer for five, with the parameters' names and values; they follow an update, and may move."""
    expected, _ = sample(model, groups, num_generations=2)
    joined = copy.deepcopy(model)
    joined.model.join_storage()
    for (name, p), (theirs, q) in zip(joined.named_parameters(), model.named_parameters(), strict=True):
        assert name == theirs and torch.equal(p, q) and p.is_leaf and p.requires_grad

    def products(model):
        decoding = prefill(model, groups, eos_token_ids=[101])
        with Products() as products, torch.no_grad():
            decoding.next_token(seed=0)
        return products.count

    layers = len(model.model.layers)
    assert products(joined) == products(model) - 3 * layers
    assert sample(joined, groups, num_generations=2)[0] == expected
    attention = joined.model.layers[0].self_attn
    attention.k_proj.weight.data = attention.k_proj.weight.data.clone()  # as an engine may
    assert products(joined) == products(model) - 3 * layers + 2
    with torch.no_grad():
        for p, q in zip(joined.parameters(), model.parameters(), strict=True):
            assert torch.equal(p.mul_(0.5), 0.5 * q)
    halved = copy.deepcopy(joined)  # of which no weights are adjacent
    assert products(halved) == products(model)
    assert sample(joined, groups, num_generations=2)[0] == sample(halved, groups, num_generations=2)[0] != expected


def test_a_sample_depends_on_its_serial_number_alone(model, groups):
    """Not on the batch around it, nor on the number of siblings; another seed or serial number changes it."""
    together, _ = sample(model, groups, num_generations=4)
    assert sample(model, groups[::-1], num_generations=4)[0] == together[8:] + together[4:8] + together[:4]
    for i, group in enumerate(groups):
        assert sample(model, [group], num_generations=2)[0] == together[4 * i : 4 * i + 2]
    assert len({tuple(c) for c in together[:4]}) > 1, "siblings differ"
    other_seed, _ = sample(model, groups, num_generations=4, seed=1)
    for group in groups:
        group.serial += 1
    other_serials, _ = sample(model, groups, num_generations=4)
    assert all(a != b for other in (other_seed, other_serials) for a, b in zip(together, other, strict=True))


def test_forbidden_ids_are_never_sampled(model, groups):
    """Half of the vocabulary is forbidden, each prompt's likeliest tokens with it."""
    favourites = itertools.chain(*sample(model, groups, temperature=0)[0])
    forbidden = torch.tensor(sorted({*favourites, *range(0, 160, 2)}))
    for options in ({"temperature": 0}, {"num_generations": 8, "temperature": 2.0}):
        drawn, _ = sample(model, groups, forbidden=forbidden, **options)
        assert not {*itertools.chain(*drawn)} & {*forbidden.tolist()}


def test_lengths_and_ends(model, groups):
    """A completion ends with its first end token, or has none and the full length."""
    eos = set(range(40))  # a quarter of the vocabulary
    completions, _ = sample(model, groups, num_generations=8, temperature=2.0, eos_token_ids=sorted(eos))
    assert len(completions) == 24
    for completion in completions:
        ends = [i for i, token in enumerate(completion) if token in eos]
        assert ends == [len(completion) - 1] if ends else len(completion) == LENGTH
    assert any(len(c) < LENGTH for c in completions)
    decoding = prefill(model, groups[:1], eos_token_ids=completions[0][:1], max_completion_length=LENGTH)
    assert [*decoding.run_steps(seed=0, temperature=2.0, forbidden=VISION)] == [1], "it stops when all have ended"


@pytest.mark.parametrize("rows, vocabulary", [(1, 640), (8, 4096), (32, 4096), (33, 4096), (8, 4095)])
def test_head_logits(rows, vocabulary):
    """By blocks of the head's rows and whole, against fp64."""
    hidden, weight = torch.randn(rows, 64), torch.randn(vocabulary, 64)
    got, expected = head_logits(hidden, weight), hidden.double() @ weight.double().T
    torch.testing.assert_close(got.double(), expected, atol=3e-5, rtol=0)


def test_no_prompts_are_refused(model):
    with pytest.raises(ValueError, match="there are 0 prompts to sample from; at least 1 is needed"):
        sample(model, [])


@pytest.fixture
def dropped(monkeypatch):
    """(completions kept, prompts, whether every prompt kept as many) of each time that rows were dropped."""
    sizes = []
    for kind in (DecodeCache, StaticCache):

        def watched(self, kept, keep=kind.keep):
            keep(self, kept)
            counts = self.owner.bincount().tolist()
            sizes.append((len(kept), len(counts), len({*counts}) == 1))

        monkeypatch.setattr(kind, "keep", watched)
    return sizes


def test_dropping_ended_rows_changes_no_token(model, groups, dropped, monkeypatch, way):
    options = {"num_generations": 6, "temperature": 1.5, "eos_token_ids": tuple(range(30)), "max_completion_length": 40}
    monkeypatch.setattr(generate, "DROP_AT", 0)
    expected, whole = sample(model, groups, **options)
    assert not dropped
    monkeypatch.setattr(generate, "DROP_AT", 0.75)
    completions, found = sample(model, groups, **options)
    rows = [n for n, *_ in dropped]
    assert len(rows) > 2 and all(b <= 0.75 * a for a, b in itertools.pairwise([18, *rows])), "fewer rows each time"
    assert dropped[-1][1] < 3 and {full for *_, full in dropped} == {True, False}
    assert completions == expected
    for a, b, completion in zip(found.logps, whole.logps, expected, strict=True):
        torch.testing.assert_close(a[: len(completion)], b[: len(completion)], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "lengths, kv_heads, parts",
    [
        ([1096] * 16, 4, 4),
        ([1096] * 16, 2, 4),
        ([1400] * 4, 2, 5),
        ([9000, 3], 4, 3),
        ([90, 7], 2, 1),
        ([9] * 200, 4, 1),
    ],
)
def test_prompts_are_cut_until_their_blocks_fill_a_gpu(lengths, kv_heads, parts):
    """The first two are the 7B and the 2B with 16 prompts of 4 images: 256 blocks on 132 processors."""
    assert static_cache.count_parts(lengths, kv_heads=kv_heads) == parts <= min(lengths)


def segments(cu_q, starts, filled, device="cpu"):
    tensors = (torch.tensor(x, dtype=torch.int32, device=device) for x in (cu_q, [*starts, 0], filled))
    return Segments(*tensors, max(b - a for a, b in itertools.pairwise(cu_q)), max(filled))


def test_attention_to_a_part_of_the_keys():
    """The stand-in of flash attention: ragged segments, whose keys may overlap and stand in any order."""
    q, k, v = (torch.randn(n, 2, 16) for n in (8, 27, 27))
    given = segments([0, 2, 3, 8], [18, 0, 4], [9, 1, 3])
    cu_q, starts, filled, *sizes = given
    expected = flash(q, k, v, cu_q, starts, *sizes, 0, False, False, seqused_k=filled)[:2]
    for got, exact in zip(static_cache.varlen_part(q, k, v, given), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
def test_flash_attention_to_a_part_of_the_keys(d):
    """torch's flash kernel against the stand-in in fp32: two parts of 3 prompts, and own slots filled in part."""
    q, k, v = (torch.randn(n, 4, d, device="cuda").bfloat16() for n in (42, 768, 768))
    k[512:], v[512:] = float("nan"), float("nan")  # beyond what is filled nothing is read
    for given in (
        segments([0, 7, 8, 21, 28, 29, 42], [0, 100, 101, 50, 100, 300], [50, 1, 199, 50, 1, 212], "cuda"),
        segments([0, 7, 14, 42], [0, 256, 512], [1, 256, 1], "cuda"),
    ):
        k[512], v[512] = k[0], v[0]
        out, lse = static_cache.varlen_part(q, k, v, given)
        expected, mass = static_cache.varlen_part(q.float(), k.float().nan_to_num(), v.float().nan_to_num(), given)
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=2e-2)
        torch.testing.assert_close(lse, mass, rtol=0, atol=1e-3)
