"""Hugging Face checkpoints in and out: config.json and safetensors, one file or sharded."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Qwen2VLConfig

from .batch import FRAMES
from .families.qwen2_vl import Qwen2VL

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# transformers nests the towers since 4.52; the published files and ours have them at the top.
NESTED = (("model.visual.", "visual."), ("model.language_model.", "model."))


def _published_name(name: str) -> str:
    for nested, flat in NESTED:
        if name.startswith(nested):
            return flat + name[len(nested) :]
    return name


def read_config(folder) -> Qwen2VLConfig:
    """The folder's config.json.

    Raises:
        ValueError: it is missing, of another model, or needs what is not implemented.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json; --model must name a folder with a Qwen2-VL checkpoint.")
    try:
        kind = json.loads(path.read_text()).get("model_type")
        config = Qwen2VLConfig.from_pretrained(folder) if kind == "qwen2_vl" else None
    except (ValueError, AttributeError, StrictDataclassError) as error:  # no JSON, no object, a value of another type
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}). Fetch it again.") from error
    if config is None:
        raise ValueError(f"{path} is of model_type {kind!r}; boxgrpo trains 'qwen2_vl' (Qwen2-VL 2B, 7B, 72B).")
    for name, (value, implemented) in _settings(config).items():
        if value != implemented:
            raise ValueError(
                f"{path} has {name} {value!r:.80}; only {implemented!r} is implemented. Use a published Qwen2-VL "
                "checkpoint (2B, 7B or 72B, not quantised)."
            )
    return config


def _settings(config: Qwen2VLConfig) -> dict[str, tuple]:
    """Values of the config and the only ones that are implemented; with others the model would compute something else.

    Where the config has no mrope_section, transformers' default is set.
    """
    text, vision = config.text_config, config.vision_config
    rope, vision_rope = text.rope_parameters, getattr(vision, "rope_parameters", None) or {}
    frequencies = text.hidden_size // text.num_attention_heads // 2
    return {
        "hidden_act": (text.hidden_act, "silu"),
        "rope_type": (rope["rope_type"], "default"),
        "a sum of mrope_section of": (sum(rope.setdefault("mrope_section", [16, 24, 24])), frequencies),
        "use_sliding_window": (bool(text.use_sliding_window), False),
        "layer_types": (sorted(set(text.layer_types)), ["full_attention"]),
        "attention_dropout": (text.attention_dropout or 0, 0),
        "quantization_config": (getattr(config, "quantization_config", None), None),
        "vision_config.hidden_act": (vision.hidden_act, "quick_gelu"),
        "vision_config.rope_type": (vision_rope.get("rope_type", "axial"), "axial"),
        "vision_config.patch_size": (vision.patch_size, 14),
        "vision_config.temporal_patch_size": (vision.temporal_patch_size, FRAMES),
        "vision_config.spatial_merge_size": (vision.spatial_merge_size, 2),
        "vision_config.in_channels": (vision.in_channels, 3),
    }


def load_model(folder, *, dtype: torch.dtype = torch.float32, device="cpu") -> Qwen2VL:
    """Read a checkpoint, in either key layout, tied or untied, sharded or not.

    Raises:
        ValueError: files are missing, or weights do not fit the config; their names are given.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = Qwen2VL(config)
    state = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a dict
                    state[_published_name(name)] = file.get_tensor(name).to(dtype)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}). Fetch it again.") from error
    if model.lm_head is None:  # some writers store the tied head twice
        head = state.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, state.get("model.embed_tokens.weight", head)):
            raise ValueError(
                f"{folder}: config.json has tie_word_embeddings true, but lm_head.weight is not the embedding. "
                "Set it to false there."
            )
    expected = {name: p.shape for name, p in model.named_parameters()}
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    misfits = sorted(n for n in expected.keys() & state.keys() if state[n].shape != expected[n])
    wrong = [f"{n} {tuple(state[n].shape)} for {tuple(expected[n])}" for n in misfits]
    if missing or surplus or wrong:
        raise ValueError(
            f"{folder}: the weights do not fit config.json. Missing: {missing[:3] or 'none'} ({len(missing)}); "
            f"unknown: {surplus[:3] or 'none'} ({len(surplus)}); wrong shape: {wrong[:3] or 'none'} ({len(wrong)}). "
            "Check that config.json and the safetensors files are of the same model."
        )
    model.load_state_dict(state, assign=True)
    if model.device.type == "cuda":
        state.clear()  # so that a layer's weights are freed when they have been copied
        model.model.join_storage()
    return model.requires_grad_(True)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():  # with both, transformers reads the single file
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{folder / INDEX} names a file outside its folder, which is not read. Correct the index.")
        files = [folder / name for name in names]
    else:
        files = [folder / SINGLE]
    absent = [f.name for f in files if not f.is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {absent}; a checkpoint holds {SINGLE}, or {INDEX} and all its shards.")
    return files


def save_model(
    model: Qwen2VL,
    folder,
    *,
    max_shard_size: str | int = "5GB",
    dtype: torch.dtype | None = None,
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
) -> None:
    """Write config.json and the weights under the published names, which `from_pretrained` and vLLM read.

    Args:
        weights: published names and tensors to write in place of the model's own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict().items() if weights is None else weights
    state = {n: t.detach().to("cpu", dtype or t.dtype).contiguous() for n, t in weights}
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        # Written under another name, then renamed: a kill leaves the old file or the new one.
        save_file({k: state[k] for k in keys}, folder / f".{name}", metadata={"format": "pt"})
        os.replace(folder / f".{name}", folder / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    else:
        (folder / INDEX).unlink(missing_ok=True)
    # vLLM would read an earlier save's files beside these, transformers in their place.
    for stale in {folder / SINGLE, *folder.glob("model-?????-of-?????.safetensors")}:
        if stale.name not in split.filename_to_tensors:
            stale.unlink(missing_ok=True)
    model.config.architectures = ["Qwen2VLForConditionalGeneration"]
    model.config.dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
