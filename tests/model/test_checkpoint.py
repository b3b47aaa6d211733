"""Hugging Face checkpoints in and out: both key layouts, sharded or not, tied or not, and what is refused."""

import json
import os
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from boxgrpo.model.checkpoint import INDEX, load_model, read_config, save_model
from boxgrpo.model.families import make_model
from families import ONE_EACH, published_config

SHARDS = {"one file": "5GB", "shards": "400KB"}
PUBLISHED_NAMES = {  # for vLLM
    "qwen2_vl": """visual.patch_embed.proj.weight visual.blocks.1.attn.qkv.bias visual.blocks.0.mlp.fc2.weight
        visual.merger.ln_q.bias visual.merger.mlp.2.weight model.embed_tokens.weight
        model.layers.1.self_attn.k_proj.bias model.layers.0.mlp.gate_proj.weight
        model.layers.0.post_attention_layernorm.weight model.norm.weight""",
    "qwen2_5_vl": """visual.patch_embed.proj.weight visual.blocks.1.norm1.weight visual.blocks.0.mlp.gate_proj.bias
        visual.blocks.0.mlp.down_proj.weight visual.merger.ln_q.weight visual.merger.mlp.2.weight
        model.embed_tokens.weight model.layers.1.self_attn.k_proj.bias model.norm.weight""",
    "qwen3_vl": """model.visual.patch_embed.proj.bias model.visual.pos_embed.weight
        model.visual.blocks.0.mlp.linear_fc1.weight model.visual.merger.norm.bias model.visual.merger.linear_fc2.weight
        model.visual.deepstack_merger_list.1.norm.weight model.language_model.embed_tokens.weight
        model.language_model.layers.1.self_attn.q_norm.weight model.language_model.norm.weight""",
}
SIZES = {  # parameters, as published
    "qwen2_5_vl": {"3B": 3_754_622_976, "7B": 8_292_166_656},
    "qwen3_vl": {"2B": 2_127_532_032, "4B": 4_437_815_808, "8B": 8_767_123_696},
}

# Of Qwen2-VL-2B-Instruct's config.json as published: text keys at the top, rope_scaling of type mrope, torch_dtype.
PUBLISHED_2B = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}

KEYS = (  # of the config, of its text part, of its vision part
    "image_token_id video_token_id vision_start_token_id vision_end_token_id tie_word_embeddings",
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps "
    "initializer_range max_position_embeddings bos_token_id eos_token_id",
    "depth embed_dim mlp_ratio num_heads hidden_size patch_size spatial_merge_size",
)


@pytest.fixture
def saved(model, tmp_path):
    """The model's folder, one file."""
    save_model(model, tmp_path)
    return tmp_path


def transformers_class(model):
    return getattr(transformers, model.architecture)


SLOW = [pytest.param(f"{kind}, heads of {n}", "shards", marks=pytest.mark.slow) for kind, n in zip(SIZES, (80, 72))]


@pytest.mark.parametrize(("kind", "size"), [*((kind, "one file") for kind in ONE_EACH), ("published", "shards"), *SLOW])
def test_round_trip_through_transformers(twins, make_prompt, pack_prompt, hf_logits, tmp_path, kind, size):
    """Ours -> from_pretrained -> save_pretrained -> ours: the same weights, with no key too many or few.

    Heads are tied in one file, untied in shards.
    """
    ours, _ = twins(kind)
    save_model(ours, tmp_path / "ours", max_shard_size=SHARDS[size])
    assert (tmp_path / "ours" / INDEX).exists() == (size == "shards")
    names = {name for path in (tmp_path / "ours").glob("*.safetensors") for name in load_file(path)}
    assert names.issuperset(PUBLISHED_NAMES[ours.config.model_type].split())
    assert ("lm_head.weight" in names) == (size == "shards")
    nested = {name.startswith(("model.visual", "model.language_model")) for name in names - {"lm_head.weight"}}
    assert nested == {kind.startswith("qwen3_vl")}
    theirs, info = transformers_class(ours).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert same_weights(theirs, twins(kind)[1])

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=SHARDS[size])
    back = load_model(tmp_path / "theirs")
    assert (back.lm_head is None) == (size == "one file")
    assert same_weights(back, ours)
    assert all(p.requires_grad for p in back.parameters())
    prompt = make_prompt([(1, 4, 6), (1, 2, 10)])
    with torch.no_grad():
        logits, expected = back(pack_prompt(prompt)) @ back.head_weight.T, hf_logits(theirs, prompt)[:-1]
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def same_weights(model, expected):
    state = model.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("kind", ONE_EACH)
def test_the_other_layout_of_keys(model, tmp_path):
    """In shards: both towers under `model.`, as some releases of transformers wrote them, or at the top."""
    save_model(model, tmp_path, max_shard_size=SHARDS["shards"])

    def renamed(name):
        if name.startswith(("model.visual.", "model.language_model.")):
            return name.removeprefix("model.").replace("language_model.", "model.", 1)
        return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)

    for path in tmp_path.glob("*.safetensors"):
        save_file({renamed(name): tensor for name, tensor in load_file(path).items()}, path)
    stored = json.loads((tmp_path / INDEX).read_text())
    stored["weight_map"] = {renamed(name): file for name, file in stored["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps(stored))
    assert same_weights(load_model(tmp_path), model)


def test_published_config(tmp_path):
    """Every value of the old flat file arrives, and with it every name and shape of the 2B model."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_2B))
    config = read_config(tmp_path)
    parts = (config, PUBLISHED_2B), (config.text_config, PUBLISHED_2B)
    parts = (*parts, (config.vision_config, PUBLISHED_2B["vision_config"]))
    for (part, published), keys in zip(parts, KEYS, strict=True):
        assert {key: getattr(part, key) for key in keys.split()} == {key: published[key] for key in keys.split()}
    rope = config.text_config.rope_parameters
    assert rope["rope_theta"] == 1e6 and rope["mrope_section"] == [16, 24, 24]

    with torch.device("meta"):
        ours = make_model(config)
    assert_same_shapes(ours)
    assert sum(p.numel() for p in ours.parameters()) == 2_208_985_600


def assert_same_shapes(ours):
    """All parameters have the names, in the nested layout, and shapes of transformers' model of the same config."""
    with torch.device("meta"):
        theirs = transformers_class(ours)(ours.config)
    expected = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): parameter.shape
        for name, parameter in theirs.named_parameters()
    }
    assert {name: parameter.shape for name, parameter in ours.named_parameters()} == expected


@pytest.mark.parametrize(("family", "size"), [(family, size) for family, sizes in SIZES.items() for size in sizes])
def test_published_sizes_of_the_other_families(tmp_path, family, size):
    """Their config.json is read as it is published; then every name and shape is that of transformers' model."""
    (tmp_path / "config.json").write_text(json.dumps(published_config(family, size)))
    with torch.device("meta"):
        ours = make_model(read_config(tmp_path))
    assert_same_shapes(ours)
    assert sum(p.numel() for p in ours.parameters()) == SIZES[family][size]


def test_half_precision(twins, saved, tmp_path):
    """bf16 is requested on reading or on writing; config.json names the dtype of the file."""
    half = load_model(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    save_model(twins("tiny")[0], tmp_path / "half", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "half/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    assert next(twins("tiny")[0].parameters()).dtype == torch.float32, "the trained model keeps its precision"
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "half", dtype="auto")
    assert theirs.dtype == torch.bfloat16


@pytest.mark.parametrize("sizes", [("400KB", "5GB"), ("400KB", "800KB")])
def test_saving_over_an_older_checkpoint(twins, saved, sizes):
    """No file of the older one is left to be read in place of the newer, or beside it."""
    older, newer = load_model(saved), load_model(saved)
    for parameter in older.parameters():
        parameter.data.zero_()
    for model, size in zip((older, newer), sizes, strict=True):
        save_model(model, saved, max_shard_size=size)
    stored = [name for path in saved.glob("*.safetensors") for name in load_file(path)]
    assert sorted(stored) == sorted(newer.state_dict()), "each weight stands in one file"
    weight = newer.model.norm.weight
    assert torch.equal(load_model(saved).model.norm.weight, weight)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(saved)
    assert torch.equal(theirs.model.language_model.norm.weight, weight)


def test_a_single_file_with_a_tied_head_stored_twice_and_an_index(saved, twins):
    """As in transformers: the single file is read, and the head is the embedding."""
    (saved / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    path = saved / "model.safetensors"
    state = load_file(path)
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, path)
    model = load_model(saved)
    assert model.lm_head is None and same_weights(model, twins("tiny")[0])


def edit(name, change):
    """A function that applies `change` to the content of this file in a folder."""

    def harm(folder):
        path = folder / name
        content = json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
        change(content)
        path.write_text(json.dumps(content)) if path.suffix == ".json" else save_file(content, path)

    return harm


def remove(pattern):
    return lambda folder: next(folder.glob(pattern)).unlink()


YARN = {"text_config": None, "rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OTHER, SINGLE, NORM = {"model_type": "llava"}, "model.safetensors", "model.norm.weight"
EXPERTS = {"model_type": "qwen3_vl_moe"}
BROKEN = {
    "no config": (remove("config.json"), "holds no config.json; --model must name a folder"),
    "another model": (
        edit("config.json", lambda c: c.update(OTHER)),
        "is of model_type 'llava'; boxgrpo trains 'qwen2",
    ),
    "experts": (
        edit("config.json", lambda c: c.update(EXPERTS)),
        r"'qwen3_vl_moe'; mixtures of experts .*235B-A22B\) are not implemented; boxgrpo trains .*Qwen3-VL 2B, 4B",
    ),
    "another rotation": (edit("config.json", lambda c: c.update(YARN)), "has rope_type 'yarn'"),
    "no object": (lambda folder: (folder / "config.json").write_text("[]"), "config.json cannot be read"),
    "a wrong type": (
        edit("config.json", lambda c: c["text_config"].update(hidden_act=5)),
        "cannot be read .*hidden_act",
    ),
    "no weights": (remove(SINGLE), r"lacks \['model.safetensors'\]; a checkpoint holds"),
    "half a file": (
        lambda folder: os.truncate(folder / SINGLE, 1000),
        r"safetensors cannot be read \(.*Fetch it again",
    ),
    "a missing shard": (remove("model-00002-of-*"), r"lacks \['model-00002-of-\d+.safetensors'\]"),
    "a shard outside": (edit(INDEX, lambda i: i["weight_map"].update(a="../x")), "names a file outside its folder"),
    "a missing weight": (edit(SINGLE, lambda s: s.pop(NORM)), r"Missing: \['model.norm.weight'\] \(1\)"),
    "an unknown weight": (edit(SINGLE, lambda s: s.update(a=torch.ones(1))), r"unknown: \['a'\] \(1\)"),
    "a head that is not the embedding": (
        edit(SINGLE, lambda s: s.update({HEAD: s[EMBEDDING] + 1})),
        "config.json has tie_word_embeddings true, but lm_head.weight is not the embedding",
    ),
    "a wrong shape": (
        edit(SINGLE, lambda s: s.update({NORM: torch.ones(3)})),
        r"wrong shape: \['model.norm.weight \(3,\) for \(64,\)'\] \(1\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refused(twins, tmp_path, case):
    harm, message = BROKEN[case]
    save_model(twins("tiny")[0], tmp_path, max_shard_size=SHARDS["shards" if "shard" in case else "one file"])
    harm(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


# Of Qwen2-VL: the part of the config, a name in it, and the value.
SETTINGS = [
    ("text_config", "hidden_act", "gelu"),
    ("text_config", "use_sliding_window", True),
    ("text_config", "layer_types", ["full_attention", "sliding_attention"]),
    ("text_config", "attention_dropout", 0.1),
    ("text_config", "mrope_section", [2, 3, 2]),
    ("text_config", "rope_type", "linear"),
    (None, "quantization_config", {"quant_method": "awq", "bits": 4}),
    ("vision_config", "hidden_act", "gelu"),
    ("vision_config", "rope_type", "linear"),
    ("vision_config", "patch_size", 16),
    ("vision_config", "temporal_patch_size", 1),
    ("vision_config", "spatial_merge_size", 4),
    ("vision_config", "in_channels", 4),
    ("vision_config", "hidden_size", 32),
]
# Of the other families: what Qwen2-VL does not have, or has otherwise.
OWN = [
    ("qwen2_5_vl", "vision_config", "window_size", 20),
    ("qwen2_5_vl", "vision_config", "hidden_act", "quick_gelu"),
    ("qwen2_5_vl", "vision_config", "out_hidden_size", 32),
    ("qwen3_vl", "vision_config", "hidden_act", "gelu"),
    ("qwen3_vl", "vision_config", "patch_size", 14),
    ("qwen3_vl", "vision_config", "num_position_embeddings", 17),
    ("qwen3_vl", "vision_config", "deepstack_visual_indexes", [0, 3]),
    ("qwen3_vl", "vision_config", "deepstack_visual_indexes", [1, 0]),
    ("qwen3_vl", "text_config", "attention_bias", True),
    ("qwen3_vl", "text_config", "mrope_interleaved", False),
]


@pytest.mark.parametrize(("kind", "part", "name", "value"), [*(("tiny", *setting) for setting in SETTINGS), *OWN])
def test_case_21_settings_that_are_not_implemented_are_refused_by_name(saved, part, name, value):
    """With the value; a checkpoint with another activation would load, with logits that are wrong by a sixth."""

    def change(config):
        inner = config[part] if part else config
        rotary = name in ("rope_type", "mrope_section", "mrope_interleaved")
        (inner["rope_parameters"] if rotary else inner).update({name: value} | ({"factor": 2.0} if rotary else {}))

    edit("config.json", change)(saved)
    shown = "7" if name == "mrope_section" else re.escape(repr(value))
    with pytest.raises(
        ValueError, match=rf"config.json has .*{name} .*{shown}; only .* is implemented\. Use a published"
    ):
        load_model(saved)


def test_a_config_without_mrope_section_has_transformers_default(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_2B | {"rope_scaling": None}))
    assert read_config(tmp_path).text_config.rope_parameters["mrope_section"] == [16, 24, 24]
