"""Checks that the files, folders and packages which options name are on this machine, before anything is loaded."""

import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

FOLDERS = ("image_root", "eval_image_root")
FILES = ("eval_data", "predictions")
TOKENIZERS = ("tokenizer.json", "vocab.json")
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
    if not getattr(o, "predictions", ""):
        check_model(o.model)
    if not o.data:
        raise ValueError("no data. Name a file of records with --data.")
    check_paths(o)
    if getattr(o, "rollout", "") == "replay" and not Path(o.rollout_file).is_file():
        raise ValueError(
            f"rollout_file is {o.rollout_file}; there is no such file. Store one with --rollout local --rollout_file."
        )
    if (folder := getattr(o, "resume", "")) not in ("", "auto") and not Path(folder).is_dir():
        raise ValueError(f"resume is {folder}; it is no checkpoint folder. Name one, or give --resume auto.")
    if getattr(o, "lora_rank", 0):
        _check_package("peft", f"lora_rank is {o.lora_rank}", "Install it (pip install 'peft>=0.18').")
    for (name, value), (package, remedy) in PACKAGES.items():
        if getattr(o, name, None) == value:
            _check_package(package, f"{name} is {value!r}", remedy)


def check_paths(o) -> None:
    """Raise ValueError for folders and files to read that are not there, and for an output_dir that cannot be one."""
    for name in FOLDERS:
        if (folder := getattr(o, name, "")) and not Path(folder).is_dir():
            raise ValueError(f"{name} is {folder}; there is no such folder. Correct --{name}.")
    for name in FILES:
        path = getattr(o, name, "")
        if path and not Path(path).exists() and not Path(re.sub(r"#\d+$", "", path)).exists():
            raise ValueError(f"{name} is {path}; there is no such file. Correct --{name}.")
    folder = Path(getattr(o, "output_dir", ""))
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"output_dir is {folder}; no folder can be written there. Name another with --output_dir.")


def _check_package(package: str, needed: str, remedy: str) -> None:
    if sys.modules.get(package) is None and find_spec(package) is None:
        raise ValueError(f"{needed}, which needs {package}; it is not installed. {remedy}")


def check_model(model: str, *, tokenizer: bool = True) -> None:
    """Raise ValueError where `model` is no checkpoint's folder: it names what to do with adapters and with a hub id."""
    folder = Path(model)
    if not model:
        raise ValueError("no model. Name a checkpoint folder with --model.")
    if (folder / "config.json").is_file():
        if tokenizer and not any((folder / name).is_file() for name in TOKENIZERS):
            raise ValueError(
                f"model is {model}; it holds none of {', '.join(TOKENIZERS)}. Copy the tokenizer of the model there "
                "from which its weights were trained."
            )
        return
    if (folder / "adapter_config.json").is_file():
        if (folder.parent / "config.json").is_file():
            remedy = f"Use --model {folder.parent}, which holds them merged into the model."
        else:
            base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
            remedy = (
                f"Merge them, and copy the model's tokenizer: python -c '{MERGE.format(base=base, adapter=folder)}'"
            )
        raise ValueError(f"model is {model}, which holds LoRA adapters alone.\n{remedy}")
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)):
        raise ValueError(
            f"model is {model}; there is no such folder, and no model is downloaded on its own. If it is a model of "
            f"the Hugging Face hub:\nhf download {model} --local-dir {model}"
        )
    what = "it holds no config.json" if folder.is_dir() else "there is no such folder"
    raise ValueError(f"model is {model}; {what}. Name the folder of a Qwen2-VL checkpoint with --model.")
