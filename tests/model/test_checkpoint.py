"""Hugging Face checkpoints in and out: both key layouts, sharded or not, tied or not, and what is refused."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from boxgrpo.model.checkpoint import INDEX, load_model, read_config, save_model
from boxgrpo.model.families.qwen2_vl import Qwen2VL

SHARDS = {"one file": "5GB", "shards": "400KB"}
PUBLISHED_NAMES = """visual.patch_embed.proj.weight visual.blocks.1.attn.qkv.bias visual.blocks.0.mlp.fc2.weight
    visual.merger.ln_q.bias visual.merger.mlp.2.weight model.embed_tokens.weight model.layers.1.self_attn.k_proj.bias
    model.layers.0.mlp.gate_proj.weight model.layers.0.post_attention_layernorm.weight model.norm.weight"""  # for vLLM

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
def saved(twins, tmp_path):
    """The tiny model's folder, one file."""
    save_model(twins("tiny")[0], tmp_path)
    return tmp_path


@pytest.mark.parametrize(("kind", "size"), [("tiny", "one file"), ("published", "shards")], ids=["tied", "untied"])
def test_round_trip_through_transformers(twins, tmp_path, kind, size):
    """Ours -> from_pretrained -> save_pretrained -> ours: the same weights, with no key too many or few."""
    ours, _ = twins(kind)
    save_model(ours, tmp_path / "ours", max_shard_size=SHARDS[size])
    assert (tmp_path / "ours" / INDEX).exists() == (size == "shards")
    names = {name for path in (tmp_path / "ours").glob("*.safetensors") for name in load_file(path)}
    assert names.issuperset(PUBLISHED_NAMES.split()) and ("lm_head.weight" in names) == (kind == "published")
    assert not any(name.startswith(("model.visual", "model.language_model")) for name in names)
    theirs, info = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert same_weights(theirs, twins(kind)[1])

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=SHARDS[size])
    back = load_model(tmp_path / "theirs")
    assert (back.lm_head is None) == (kind == "tiny")
    assert same_weights(back, ours)
    assert all(p.requires_grad for p in back.parameters())


def same_weights(model, expected):
    state = model.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())


def test_nested_keys(twins, tmp_path):
    """The layout that some releases of transformers wrote, here in shards: both towers under `model.`."""
    ours, _ = twins("tiny")
    save_model(ours, tmp_path, max_shard_size=SHARDS["shards"])

    def nested(name):
        return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)

    for path in tmp_path.glob("*.safetensors"):
        save_file({nested(name): tensor for name, tensor in load_file(path).items()}, path)
    stored = json.loads((tmp_path / INDEX).read_text())
    stored["weight_map"] = {nested(name): file for name, file in stored["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps(stored))
    assert same_weights(load_model(tmp_path), ours)


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
        ours, theirs = Qwen2VL(config), Qwen2VLForConditionalGeneration(config)
    expected = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): parameter.shape
        for name, parameter in theirs.named_parameters()
    }
    assert {name: parameter.shape for name, parameter in ours.named_parameters()} == expected
    assert sum(p.numel() for p in ours.parameters()) == 2_208_985_600


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
OTHER, SINGLE, NORM = {"model_type": "qwen2_5_vl"}, "model.safetensors", "model.norm.weight"
BROKEN = {
    "no config": (remove("config.json"), "holds no config.json; --model must name a folder"),
    "another model": (edit("config.json", lambda c: c.update(OTHER)), "is of model_type 'qwen2_5_vl'; boxgrpo trains"),
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


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
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
    ],
)
def test_case_21_settings_that_are_not_implemented_are_refused_by_name(saved, part, name, value):
    """With the value; a checkpoint with another activation would load, with logits that are wrong by a sixth."""

    def change(config):
        inner = config[part] if part else config
        rotary = name in ("rope_type", "mrope_section")
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
