"""`boxgrpo COMMAND ...`: every command of the package under one name."""

import os
import runpy
import sys
from pathlib import Path

import torch

# Module of boxgrpo.trainer, and the command's description.
COMMANDS = {
    "sft": ("sft", "cold start: supervised fine-tuning on reasoning chains, on all local GPUs"),
    "grpo": ("grpo", "GRPO with IoU and format rewards, on all local GPUs; without flags: on the demo's drawn scenes"),
    "eval": ("evaluator", "score a checkpoint, or answers from a file, on a benchmark"),
    "ground": ("apps.ground", "answer a question about images by a box, on the command line or on a web page"),
    "inspect": ("apps.inspect_data", "count a file's records, tasks and faults"),
    "memory": ("apps.memory", "memory per GPU by engine and model, computed from shapes"),
    "chains": ("chains.make", "request reasoning chains for a cold start from an OpenAI-compatible server"),
    "accept": ("chains.accept", "write a page on which people accept or reject a tenth of the chains"),
    "demo": ("demo", "draw scenes, train a tiny model on them by SFT and GRPO, score it before and after"),
}
TRAINING = ("sft", "grpo")


def usage() -> str:
    rows = "\n".join(f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: boxgrpo COMMAND [flags]     boxgrpo COMMAND --help explains the flags\n\n{rows}"


def main() -> None:
    name, *args = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        sys.exit(f"boxgrpo: there is no command {name!r}; the commands are {', '.join(COMMANDS)}.")
    module, _ = COMMANDS[name]
    if name in TRAINING and not {"-h", "--help"} & {*args}:
        torchrun = Path(sys.executable).with_name("torchrun")
        script = Path(__file__).with_name(f"{module}.py")
        devices = max(1, torch.cuda.device_count())
        command = [str(torchrun), "--standalone", f"--nproc_per_node={devices}", str(script), *args]
        os.execv(command[0], command)
    sys.argv = [f"boxgrpo {name}", *args]
    runpy.run_module(f"boxgrpo.trainer.{module}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
