"""Ids of the special tokens in the tests' small models."""

SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL_IDS = {token: 100 + i for i, token in enumerate(SPECIAL)}
