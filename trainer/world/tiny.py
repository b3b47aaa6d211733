"""The config of a Qwen2-VL small enough to train from random weights on a CPU."""

from transformers import Qwen2VLConfig


def tiny_config(
    vocab_size: int,
    special_ids: dict[str, int],
    *,
    hidden_size: int = 128,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    vision_width: int = 96,
    vision_depth: int = 2,
    vision_heads: int = 4,
    theta: float = 10_000.0,
    initializer_range: float = 0.08,
) -> Qwen2VLConfig:
    """A config with the real patch sizes and any vocabulary.

    At this width the published `initializer_range` of 0.02 keeps attention flat for hundreds of steps; 0.08 does not.
    A theta of 30 helps if positions must be learned from M-RoPE alone; the demo's images have rulers instead.

    Args:
        special_ids: token string -> id of the tokenizer's special tokens, `<|image_pad|>` among them.
    """
    half = hidden_size // heads // 2  # frequencies of a head, divided 1 : 1.5 : 1.5 as in the published models
    temporal = half // 4
    height = (half - temporal) // 2
    return Qwen2VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "initializer_range": initializer_range,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": theta,
                "mrope_section": [temporal, height, half - temporal - height],
            },
            "bos_token_id": special_ids["<|endoftext|>"],
            "eos_token_id": special_ids["<|im_end|>"],
            "pad_token_id": special_ids["<|endoftext|>"],
        },
        vision_config={
            "depth": vision_depth,
            "embed_dim": vision_width,
            "hidden_size": hidden_size,
            "num_heads": vision_heads,
            "mlp_ratio": 2,
            "initializer_range": initializer_range,
        },
        image_token_id=special_ids["<|image_pad|>"],
        video_token_id=special_ids["<|video_pad|>"],
        vision_start_token_id=special_ids["<|vision_start|>"],
        vision_end_token_id=special_ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
