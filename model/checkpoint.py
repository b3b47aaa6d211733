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

from .families import FAMILIES, REFUSED, Qwen2VL, make_model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# transformers nests the towers since 4.52, as Qwen3-VL's published files do; our modules have them at the top.
NESTED = (("model.visual.", "visual."), ("model.language_model.", "model."))


def _parameter_name(name: str) -> str:
    for nested, flat in NESTED:
        if name.startswith(nested):
            return flat + name[len(nested) :]
    return name


def read_config(folder):
    """The folder's config.json, as the family's config of transformers.

    Raises:
        ValueError: it is missing, of another model, or needs what is not implemented.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no config.json; --model must name a folder with a checkpoint of "
            f"{' or '.join(family.family for family in FAMILIES.values())}."
        )
    try:
        kind = json.loads(path.read_text()).get("model_type")
        family = FAMILIES.get(kind)
        config = family.config_class.from_pretrained(folder) if family else None
    except (ValueError, AttributeError, TypeError, StrictDataclassError) as error:  # no JSON, no object, a wrong type
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}). Fetch it again.") from error
    if config is None:
        trained = ", ".join(f"{name!r} ({f.family} {f.published_sizes})" for name, f in FAMILIES.items())
        why = f"; {REFUSED[kind]}" if kind in REFUSED else ""
        raise ValueError(f"{path} is of model_type {kind!r}{why}; boxgrpo trains {trained}.")
    for name, (value, implemented) in family.settings(config).items():
        if value != implemented:
            raise ValueError(
                f"{path} has {name} {value!r:.80}; only {implemented!r} is implemented. Use a published "
                f"{family.family} checkpoint ({family.published_sizes}, not quantised)."
            )
    return config


def load_model(folder, *, dtype: torch.dtype = torch.float32, device="cpu") -> Qwen2VL:
    """Read a checkpoint, in either key layout, tied or untied, sharded or not.

    Raises:
        ValueError: files are missing, or weights do not fit the config; their names are given.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = make_model(config)
    state = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a dict
                    state[_parameter_name(name)] = file.get_tensor(name).to(dtype)
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
    weights = ((model.published_name(n), t) for n, t in model.state_dict().items()) if weights is None else weights
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
    model.config.architectures = [model.architecture]
    model.config.dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
