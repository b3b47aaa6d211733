"""`boxgrpo COMMAND ...`: every command of the package under one name."""

import importlib
import os
import sys
from pathlib import Path

import torch

from boxgrpo.model.checkpoint import read_config
from boxgrpo.trainer.arguments import parse
from boxgrpo.trainer.options import GrpoOptions, SftOptions, check_command
from boxgrpo.trainer.runtime.ranks import run_as_script

# Module of boxgrpo.trainer, and the command's description.
COMMANDS = {
    "sft": ("sft", "cold start: supervised fine-tuning on reasoning chains, on all local GPUs"),
    "grpo": ("grpo", "GRPO with IoU and format rewards, on all local GPUs; without flags: on the demo's drawn scenes"),
    "eval": ("evaluator", "score a checkpoint, or answers from a file, on a benchmark"),
    "ground": ("apps.ground", "answer a question about images by a box, on the command line or on a web page"),
    "inspect": ("apps.inspect_data", "count a file's records, tasks and faults"),
    "runs": ("apps.runs", "list runs with their latest metrics, and what is wrong with them"),
    "memory": ("apps.memory", "memory per GPU by engine and model, computed from shapes"),
    "chains": ("chains.make", "request reasoning chains for a cold start from an OpenAI-compatible server"),
    "accept": ("chains.accept", "write a page on which people accept or reject a tenth of the chains"),
    "demo": ("demo", "draw scenes, train a tiny model on them by SFT and GRPO, score it before and after"),
}
TRAINING = {"sft": SftOptions, "grpo": GrpoOptions}


def usage() -> str:
    rows = "\n".join(f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: boxgrpo COMMAND [flags]     boxgrpo COMMAND --help explains the flags\n\n{rows}"


def main() -> None:
    name, *args = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        print(f"boxgrpo: there is no command {name!r}; the commands are {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"boxgrpo {name}", *args]
    if name in TRAINING and not {"-h", "--help"} & {*args}:
        run_as_script(lambda: launch(name, args), sys.argv[0])
    run_as_script(importlib.import_module(f"boxgrpo.trainer.{COMMANDS[name][0]}").main, sys.argv[0])


def launch(name: str, args: list[str]) -> None:
    """Run torchrun with a process for each GPU; exit as the first process that failed, without torchrun's traceback.

    Wrong options are refused here, where nothing has been started.
    """
    processes = max(1, torch.cuda.device_count())
    check_command(options := parse(TRAINING[name], args), processes)
    if options.model:
        read_config(options.model)
    script = str(Path(__file__).with_name(f"{name}.py"))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Seconds after a SIGTERM in which the step and its checkpoint end.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    try:
        run.main(["--standalone", f"--nproc_per_node={processes}", script, *args])
    except ChildFailedError as failed:
        status = failed.get_first_failure()[1].exitcode  # negative: a signal's number
        sys.exit(status if status > 0 else 128 - status)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    main()
