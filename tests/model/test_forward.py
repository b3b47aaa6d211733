"""The forward pass against transformers' classes: positions, tower, logits."""

import copy

import pytest
import torch
import torch.nn.functional as F

from boxgrpo.model.decoder import mrope_position_ids
from boxgrpo.model.families import make_model, qwen2_vl
from families import EVERY, KINDS, ONE_EACH
from kernel_cases import assert_refused
from special_ids import SPECIAL_IDS

GRIDS = {  # (t, h, w) patches: wide, tall, the smallest there is, square, equal ones, two frames
    "text": [],
    "1": [(1, 4, 6)],
    "3": [(1, 4, 8), (1, 6, 4), (1, 2, 2)],
    "equal sizes": [(1, 4, 4)] * 4,
    "5": [(1, 2, 2), (1, 10, 4), (1, 4, 4), (1, 4, 4), (1, 2, 12)],
    "6": [(1, 6, 6), (1, 2, 4), (1, 4, 2), (1, 8, 6), (1, 2, 2), (1, 6, 2)],
    "frames": [(2, 4, 4), (1, 2, 6)],
    "large": [(1, 22, 14), (1, 8, 18)],  # windows of Qwen2.5-VL of every size
}
IMAGE, VIDEO = SPECIAL_IDS["<|image_pad|>"], SPECIAL_IDS["<|video_pad|>"]


CASES = [*(("tiny", grids) for grids in GRIDS), ("published", "text"), ("published", "6")]
CASES += [(kind, "6") for kind in ONE_EACH[1:]]
SLOW = [(kind, grids) for kind in KINDS for grids in GRIDS if (kind, grids) not in CASES]


@pytest.mark.parametrize(("kind", "grids"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_logits_and_positions(twins, make_prompt, pack_prompt, hf_logits, kind, grids):
    ours, theirs = twins(kind)
    prompt = make_prompt(GRIDS[grids])
    with torch.no_grad():
        expected = hf_logits(theirs, prompt)
        logits = ours(pack_prompt(prompt)) @ ours.head_weight.T  # every row but the last predicts
    assert (logits - expected[:-1]).abs().max() < 1e-4 * expected.abs().max()
    if GRIDS[grids]:
        types = (prompt.input_ids == IMAGE).int()
        positions, _ = theirs.model.get_rope_index(prompt.input_ids[None], types[None], prompt.image_grid_thw)
        assert torch.equal(prompt.position_ids, positions[:, 0])
    else:
        assert torch.equal(prompt.position_ids, torch.arange(len(prompt.input_ids)).expand(3, -1))


def test_half_precision(twins, make_prompt, pack_prompt, hf_logits):
    """In bf16 our error against the fp32 logits is at most a fifth larger than that of transformers in bf16."""
    ours, theirs = twins("published")
    prompt = make_prompt(GRIDS["3"])
    with torch.no_grad():
        exact = hf_logits(theirs, prompt)[:-1]
        eager = hf_logits(copy.deepcopy(theirs).bfloat16(), prompt)[:-1].float()
        half = copy.deepcopy(ours).bfloat16()
        logits = (half(pack_prompt(prompt)) @ half.head_weight.T).float()
    assert (logits - exact).norm() < 1.2 * (eager - exact).norm()


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("grids", ["equal sizes", "5", "frames", "large"])
def test_tower(twins, make_prompt, pack_prompt, kind, grids):
    """Image embeddings, also of several images in one pass: none attends to another. They may replace the pixels.

    The features of DeepStack stand behind the embeddings.
    """
    ours, theirs = twins(kind)
    prompt = make_prompt(GRIDS[grids])
    with torch.no_grad():  # frames differ, as those of a still image do not
        values = torch.randn(prompt.pixel_values.shape)
        found = theirs.model.visual(values, prompt.image_grid_thw)
        expected = torch.cat([found.pooler_output, *(getattr(found, "deepstack_features", None) or ())], 1)
        together = ours.visual(values, prompt.image_grid_thw)
        patches = values.split(prompt.image_grid_thw.prod(1).tolist())
        alone = [ours.visual(p, grid[None]) for p, grid in zip(patches, prompt.image_grid_thw, strict=True)]
    atol = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(together, expected, rtol=0, atol=atol)
    torch.testing.assert_close(torch.cat(alone), expected, rtol=0, atol=atol)

    pack = pack_prompt(prompt)
    with torch.no_grad():
        from_pixels = ours(pack)
        pack.image_embeds, pack.pixels = ours.visual(prompt.pixel_values, prompt.image_grid_thw), None
        assert torch.equal(ours(pack), from_pixels)


@pytest.mark.parametrize("kind", ONE_EACH)
def test_tower_with_variable_length_attention(model, make_prompt, kind, monkeypatch):
    """Offsets are made once, of images and of windows; with them the result is that of separate products."""
    tower, prompt, seen = model.visual, make_prompt(GRIDS["5"]), []
    images = prompt.image_grid_thw.prod(1).tolist()

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, *, causal, backend):
        lengths = cu_q.diff().tolist()
        assert cu_q is cu_k and max_q == max_k == max(lengths) and not causal and backend == "varlen"
        assert cu_q.dtype == torch.int32 and cu_q[0] == 0
        seen.append(cu_q)
        parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2)[0].transpose(0, 1)

    with torch.no_grad():
        expected = tower(prompt.pixel_values, prompt.image_grid_thw)
        monkeypatch.setattr(qwen2_vl, "pick_backend", lambda x: "varlen")
        monkeypatch.setattr(qwen2_vl, "varlen", attend)
        found = tower(prompt.pixel_values, prompt.image_grid_thw)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    whole = [i for i, offsets in enumerate(seen) if offsets.diff().tolist() == images]
    assert whole == ([1] if kind == "qwen2_5_vl" else [*range(len(tower.blocks))])
    assert len(seen) == len(tower.blocks) and len({*map(id, seen)}) == (2 if kind == "qwen2_5_vl" else 1)


def test_images_without_text_between():
    """Positions of two adjacent images, at the very start and at the very end; tokens and grids that disagree."""

    def positions(ids, grids):
        grids = None if grids is None else torch.tensor(grids)
        return mrope_position_ids(torch.tensor(ids), grids, image_token_id=IMAGE).tolist()

    two = [[1, 2, 4], [1, 2, 2]]
    assert positions([IMAGE] * 3 + [5], two) == [[0, 0, 2, 3], [0, 0, 2, 3], [0, 1, 2, 3]]
    assert_refused(
        ("1 image tokens in the prompt but 1 images of 2 tokens", lambda: positions([IMAGE, 5], two[:1])),
        ("1 image tokens in the prompt but 0 images of 0 tokens", lambda: positions([IMAGE, 5], None)),
        ("1 image tokens in a row at token 0 for an image of 2", lambda: positions([IMAGE, 5, IMAGE, IMAGE], two)),
    )


def test_case_22_video_tokens_are_refused():
    """Counted as text they would have other positions than transformers', which spreads a video over its grid."""
    ids, grids = torch.tensor([7, IMAGE, VIDEO, VIDEO, 5]), torch.tensor([[1, 2, 2]])
    message = rf"2 video tokens \(id {VIDEO}\) in the prompt; videos are not implemented"
    with pytest.raises(ValueError, match=message):
        mrope_position_ids(ids, grids, image_token_id=IMAGE, video_token_id=VIDEO)
    published = torch.tensor([151655, 151656, 5])
    with pytest.raises(ValueError, match=r"1 video tokens \(id 151656\)"):
        mrope_position_ids(published, grids, image_token_id=151655)


@pytest.mark.parametrize("kind", ONE_EACH)
def test_init_weights_is_reproducible_and_complete(model):
    """The same generator gives the same model, and every parameter is set, the untied head's too."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False

    def fresh():
        model = make_model(config)
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        return model.init_weights(torch.Generator().manual_seed(3)).state_dict()

    first, second = fresh(), fresh()
    assert "lm_head.weight" in first and all(parameter.isfinite().all() for parameter in first.values())
    torch.testing.assert_close(first, second, rtol=0, atol=0)
