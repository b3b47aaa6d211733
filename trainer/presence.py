"""Checks that the files, folders and packages which options name are on this machine, before anything is loaded."""

import json
import os
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

FOLDERS = ("image_root", "eval_image_root", "base", "start")
FILES = ("eval_data", "predictions")
_REPLACED = re.compile(r"checkpoint-\d+|best|results\.json")  # in an output_dir, by a new run or evaluation
INPUTS = ("model", "data", "eval_data", "predictions", "path")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
OUTPUTS = {"json": (), "sheet": PICTURES}  # files to write, and how their names may end
# Of the files of each part of a checkpoint, one must be there.
PARTS = {
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "image processor": ("preprocessor_config.json", "processor_config.json"),
}
# The package that an option's value needs, and the remedy where it is not installed.
PACKAGES = {
    ("engine", "deepspeed"): ("deepspeed", "Install it (pip install deepspeed), or use --engine ddp."),
    ("optimizer", "cpu_adam"): ("deepspeed", "Install it (pip install deepspeed), or use --optimizer adamw."),
    ("optimizer", "apex"): ("apex", "Build NVIDIA/apex from GitHub, or use --optimizer adamw."),
    ("rollout", "vllm"): ("vllm", "Install it (pip install 'vllm>=0.22'), or use --rollout local."),
}
# Merges adapters that another program trained; ours write the merged model beside them.
MERGE = (
    "from peft import PeftModel as P; from transformers import Qwen2VLForConditionalGeneration as Q; "
    'P.from_pretrained(Q.from_pretrained("{base}"), "{adapter}").merge_and_unload().save_pretrained("merged")'
)


def check_presence(o) -> None:
    """Raise ValueError for a file, a folder or a package that the options need and that is not here."""
    if o.model or o.data or not hasattr(o, "rollout"):  # without both grpo.py makes the demo's
        if not getattr(o, "predictions", ""):
            check_model(o.model)
        if not o.data:
            raise ValueError("no data. Name a file of records with --data.")
    check_paths(o)
    rollout, stored = getattr(o, "rollout", ""), getattr(o, "rollout_file", "")
    if rollout == "local" and stored:
        check_output("rollout_file", stored)
    if rollout == "replay":
        check_stored(stored)
    if (folder := getattr(o, "resume", "")) not in ("", "auto") and not Path(folder).is_dir():
        raise ValueError(f"resume is {folder}; it is no checkpoint folder. Name one, or give --resume auto.")
    if getattr(o, "lora_rank", 0):
        _check_package("peft", f"lora_rank is {o.lora_rank}", "Install it (pip install 'peft>=0.18').")
    for (name, value), (package, remedy) in PACKAGES.items():
        if getattr(o, name, None) == value:
            _check_package(package, f"{name} is {value!r}", remedy)
    for source in [o.data] if isinstance(o.data, str) else o.data:
        check_data(source)


def check_data(source: str) -> None:
    """Raise ValueError where `source`, a path or path#count, names no file or folder."""
    path = _without_count(source)
    if not os.path.exists(path):
        remedy = "Correct --data."
        if re.fullmatch(r"\w[\w.-]*/[\w-]+", path):  # no suffix: perhaps the id of a data set
            remedy += f" To fetch one of the hub: hf download {path} --repo-type dataset --local-dir {path}"
        raise ValueError(f"data is {source:.200}; there is no such file or folder. {remedy}")


def check_stored(rollout_file: str) -> None:
    """Raise ValueError where there are no completions to replay."""
    if not Path(rollout_file).is_file():
        raise ValueError(
            f"rollout_file is {rollout_file}; there is no such file. Store one with --rollout local --rollout_file."
        )


def check_paths(o) -> None:
    """Raise ValueError for inputs that are not there, and for outputs that cannot be written or are inputs."""
    for name in FOLDERS:
        if (folder := getattr(o, name, "")) and not Path(folder).is_dir():
            raise ValueError(f"{name} is {folder}; there is no such folder. Correct --{name}.")
    for name in FILES:
        path = getattr(o, name, "")
        if path and not os.path.exists(_without_count(path)):
            raise ValueError(f"{name} is {path}; there is no such file. Correct --{name}.")
    for name, suffixes in OUTPUTS.items():
        if (path := getattr(o, name, "")) not in (None, "", "-"):
            check_output(name, path, suffixes)
            _check_apart(o, name)
    if folder := getattr(o, "output_dir", ""):
        check_output("output_dir", folder, folder=True)
        _check_apart(o, "output_dir")


def _check_apart(o, output: str) -> None:
    """Raise ValueError where the option `output` names a file or a folder that the command reads."""
    target = Path(getattr(o, output)).resolve()
    for name in INPUTS:
        if name == "model" and hasattr(o, "predictions"):  # an evaluation adds files to a checkpoint
            continue
        paths = getattr(o, name, "") or []
        for path in paths if isinstance(paths, list) else [paths]:
            place = Path(path := _without_count(str(path))).resolve()
            inside = place.relative_to(target).parts if target in place.parents else ()
            if place == target or (inside and _REPLACED.fullmatch(inside[0])):
                what = "is" if place == target else "holds"
                raise ValueError(f"{output} {what} {path}, which is read; it may be lost. Change --{output}.")


def _without_count(source: str) -> str:
    """The path of `path` or `path#count`."""
    return source if os.path.exists(source) else re.sub(r"(?<=.)#\d+$", "", source)


def check_output(name: str, path: str, suffixes: Sequence[str] = (), *, folder: bool = False) -> None:
    """Raise ValueError where no file, or no `folder`, can be written at `path`, or its suffix is none of `suffixes`.

    Folders above it may be missing: whoever writes makes them.
    """
    target = Path(path).absolute()
    if suffixes and target.suffix.lower() not in suffixes:
        raise ValueError(f"{name} is {path}; it must end in {', '.join(suffixes)}. Change --{name}.")
    places = [target, *target.parents] if folder else target.parents
    nearest = next(place for place in places if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK) or (target.is_dir() and not folder):
        kind = "folder" if folder else "file"
        raise ValueError(f"{name} is {path}; no {kind} can be written there. Name another with --{name}.")


def _check_package(package: str, needed: str, remedy: str) -> None:
    if sys.modules.get(package) is None and find_spec(package) is None:
        raise ValueError(f"{needed}, which needs {package}; it is not installed. {remedy}")


def check_model(model: str, *, processor: bool = True) -> None:
    """Raise ValueError where `model` is no checkpoint's folder: it names what to do with adapters and with a hub id."""
    folder = Path(model)
    if not model:
        raise ValueError("no model. Name a checkpoint folder with --model.")
    if (folder / "config.json").is_file():
        for part, names in PARTS.items() if processor else ():
            if not any((folder / name).is_file() for name in names):
                raise ValueError(
                    f"model is {model}; it holds none of {', '.join(names)}. Copy the {part} of the model there from "
                    "which its weights were trained."
                )
        return
    if (folder / "adapter_config.json").is_file():
        if (folder.parent / "config.json").is_file():
            remedy = f"Use --model {folder.parent}, which holds them merged into the model."
        else:
            try:
                base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
            except (ValueError, AttributeError) as error:  # no JSON, or no object
                raise ValueError(f"{folder}/adapter_config.json cannot be read ({error}). Copy it again.") from error
            remedy = (
                f"Merge them, and copy the model's tokenizer: python -c '{MERGE.format(base=base, adapter=folder)}'"
            )
        raise ValueError(f"model is {model}, which holds LoRA adapters alone.\n{remedy}")
    if not folder.parent.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)):
        raise ValueError(
            f"model is {model}; there is no such folder, and no model is downloaded on its own. If it is a model of "
            f"the Hugging Face hub:\nhf download {model} --local-dir {model}"
        )
    what = "it holds no config.json" if folder.is_dir() else "there is no such folder"
    raise ValueError(f"model is {model}; {what}. Name the folder of a Qwen2-VL checkpoint with --model.")
