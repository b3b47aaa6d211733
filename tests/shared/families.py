"""Small configs of Qwen2.5-VL and Qwen3-VL.

Windows, learned positions and DeepStack have edges at the sizes of the tests' images. With a small theta the lowest
frequencies of M-RoPE change logits, too.
"""

import pytest

from boxgrpo.model.families import FAMILIES
from special_ids import SPECIAL_IDS

TEXT = {
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.08,
    "max_position_embeddings": 4096,
}
VISION = {"initializer_range": 0.08}
IDS = {"vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}

# By name: the family, whether the head is tied, settings of the decoder and of the tower. A window of 56 pixels is 2 x
# 2 merged blocks, one of 112 is 4 x 4. A learned grid of 16 positions is smaller than most images, one of 2304 larger.
KINDS = {
    "qwen2_5_vl": (
        "qwen2_5_vl",
        True,
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "sections": (2, 3, 3)},
        {"hidden_size": 64, "intermediate_size": 80, "num_heads": 4, "depth": 3, "window_size": 56}
        | {"fullatt_block_indexes": [1]},
    ),
    "qwen2_5_vl, heads of 80": (
        "qwen2_5_vl",
        False,
        {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "sections": (16, 24, 24)},
        {"hidden_size": 160, "intermediate_size": 100, "num_heads": 2, "depth": 4, "window_size": 112}
        | {"fullatt_block_indexes": [0, 2]},
    ),
    "qwen3_vl": (
        "qwen3_vl",
        True,
        {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 32, "sections": (7, 5, 4)},
        {"hidden_size": 64, "intermediate_size": 80, "num_heads": 4, "depth": 3, "num_position_embeddings": 16}
        | {"deepstack_visual_indexes": [0, 1]},
    ),
    "qwen3_vl, heads of 72": (
        "qwen3_vl",
        False,
        {"hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 128}
        | {"sections": (24, 20, 20)},
        {"hidden_size": 144, "intermediate_size": 200, "num_heads": 2, "depth": 5, "num_position_embeddings": 2304}
        | {"deepstack_visual_indexes": [0, 2, 3]},
    ),
}

# Of the config.json that is published with each size: decoder, tower, and whether the head is tied.
TEXT_SIZES = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
)
VISION_SIZES = "depth hidden_size intermediate_size".split()
PUBLISHED = {
    "qwen2_5_vl": {
        "3B": ((2048, 11008, 36, 16, 2, 151936), (32, 1280, 3420), True),
        "7B": ((3584, 18944, 28, 28, 4, 152064), (32, 1280, 3420), False),
    },
    "qwen3_vl": {
        "2B": ((2048, 6144, 28, 16, 8, 151936), (24, 1024, 4096), True),
        "4B": ((2560, 9728, 36, 32, 8, 151936), (24, 1024, 4096), True),
        "8B": ((4096, 12288, 36, 32, 8, 151936), (27, 1152, 4304), False),
    },
}

ONE_EACH = ("tiny", "qwen2_5_vl", "qwen3_vl")  # of `twins`
EVERY = [*ONE_EACH, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in ONE_EACH)]


def family_config(kind: str, vocab_size: int = 160, ids: dict[str, int] = SPECIAL_IDS):
    """The small config with this name. `ids`: of the special tokens."""
    family, tied, text, vision = KINDS[kind]
    text = TEXT | text | {"vocab_size": vocab_size}
    rope = {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [*text.pop("sections")]}
    return FAMILIES[family].config_class(
        text_config=text | {"rope_parameters": rope},
        vision_config=VISION | vision | {"out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=tied,
        **{f"{name}_token_id": ids[f"<|{token}|>"] for name, token in IDS.items()},
    )


def published_config(family: str, size: str) -> dict:
    """What the family's published config.json of this size holds, of the keys that a model is made from."""
    text, vision, tied = PUBLISHED[family][size]
    text = dict(zip(TEXT_SIZES, text, strict=True)) | {"rms_norm_eps": 1e-06, "hidden_act": "silu"}
    ids = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
    ids |= {"vision_end_token_id": 151653, "model_type": family, "tie_word_embeddings": tied}
    vision = dict(zip(VISION_SIZES, vision, strict=True)) | {"num_heads": 16, "out_hidden_size": text["hidden_size"]}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    if family == "qwen3_vl":
        text |= {"head_dim": 128, "rope_theta": 5000000, "attention_bias": False, "model_type": "qwen3_vl_text"}
        text["rope_scaling"] = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
        vision |= {"hidden_act": "gelu_pytorch_tanh", "patch_size": 16, "num_position_embeddings": 2304}
        vision["deepstack_visual_indexes"] = [8, 16, 24] if vision["depth"] == 27 else [5, 11, 17]
        return ids | {"text_config": text, "vision_config": vision | {"model_type": "qwen3_vl"}}
    text |= {"rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    text |= {"max_window_layers": 70, "use_sliding_window": False, "sliding_window": 32768, "torch_dtype": "bfloat16"}
    vision |= {"hidden_act": "silu", "patch_size": 14, "in_chans": 3, "spatial_patch_size": 14, "window_size": 112}
    return ids | text | {"vision_config": vision | {"fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}}
