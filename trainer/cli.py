"""`boxgrpo COMMAND ...`: every command of the package under one name."""

import os
import runpy
import sys
from pathlib import Path

import torch

# Module of boxgrpo.trainer, and what it does.
COMMANDS = {
    "sft": ("sft", "cold start: supervised fine-tuning on reasoning chains, on all local GPUs"),
    "grpo": ("grpo", "GRPO with IoU and format rewards, on all local GPUs; without flags: the drawn demo's"),
    "eval": ("evaluator", "score a checkpoint, or answers made elsewhere, on a benchmark"),
    "ground": ("apps.ground", "ask a checkpoint where something is, on the command line or on a page"),
    "inspect": ("apps.inspect_data", "what a file of records holds, and its faults"),
    "memory": ("apps.memory", "memory per GPU by engine and model, from shapes alone"),
    "chains": ("chains.make", "reasoning chains for a cold start, from an OpenAI-compatible server"),
    "accept": ("chains.accept", "a sheet on which people accept or reject a tenth of the chains"),
    "demo": ("demo", "draw a world, cold-start a tiny model on it, go on with GRPO, score before and after"),
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
