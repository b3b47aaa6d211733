"""Every command refuses wrong input in two lines at most, without a traceback, and with exit status 2."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from boxgrpo.trainer import cli
from boxgrpo.trainer.runtime.ranks import RunFailed, run_as_script
from runs import ROOT

GONE = "--data=gone.json"
WRONG = [
    ("boxgrpo nonsense", "boxgrpo: there is no command 'nonsense'; the commands are sft, grpo, eval"),
    ("boxgrpo grpo --beta=-1 --model={model}", "boxgrpo grpo: beta is -1.0; it must be at least 0. Raise --beta."),
    ("boxgrpo grpo --prompts_per_step=0", "boxgrpo grpo: prompts_per_step is 0; it must be at least 1."),
    ("boxgrpo grpo --data=d.json", "boxgrpo grpo: no model. Name a checkpoint folder with --model."),
    ("boxgrpo grpo --model={model}", "boxgrpo grpo: no data. Name a file of records with --data."),
    ("boxgrpo grpo --config=gone.yaml", "boxgrpo grpo: --config gone.yaml: no such file."),
    (
        "boxgrpo sft --max_steps=many",
        "boxgrpo sft: max_steps is 'many'; it must be a whole number. Change",
    ),
    ("boxgrpo sft", "boxgrpo sft: no model. Name a checkpoint folder with --model."),
    ("grpo.py --model={model} --data=d.json --top_p=2", "grpo.py: top_p is 2.0; it must be at most 1. Lower --top_p."),
    ("grpo.py --model={model} --data=d.json --rollout=vllm", "grpo.py: rollout is 'vllm' and RANK is not set; its"),
    ("boxgrpo grpo --rollout=replay --rollout_file=gone", "boxgrpo grpo: rollout_file is gone; there is no such file."),
    ("sft.py --cutof_len=3", "sft.py: unknown flag '--cutof_len=3'; did you mean --cutoff_len?"),
    ("sft.py --freeze_vision=perhaps", "sft.py: freeze_vision is perhaps; it must be true or false. Change"),
    ("evaluator.py --model={model} --resamples=-1", "evaluator.py: resamples is -1; it must be at least 0."),
    ("evaluator.py --predictions=gone --data=d.json", "evaluator.py: predictions is gone; there is no such file."),
    ("apps/ground.py where --model={model}", "ground.py: there are 0 images; a question needs at least 1."),
    ("apps/ground.py --port=70000", "ground.py: port is 70000; it must be at most 65535. Lower --port."),
    ("apps/inspect_data.py gone.json", "inspect_data.py: gone.json: there is no such file."),
    (
        "apps/inspect_data.py gone.json --image_root=gone",
        "inspect_data.py: image_root is gone; there is no",
    ),
    ("apps/inspect_data.py gone.json --samples=-1", "inspect_data.py: samples is -1; it must be at least 0."),
    ("apps/inspect_data.py gone.json --seed=x", "inspect_data.py: seed is 'x'; it must be a whole number."),
    ("boxgrpo runs", "boxgrpo runs: path is missing. Name it; --help explains it."),
    ("boxgrpo runs gone", "boxgrpo runs: path is gone; there is no such folder. Name a run's output_dir, or a folder"),
    ("boxgrpo runs {model}", "; neither it nor a folder at most two levels down holds metrics.jsonl. Name a run's"),
    ("apps/memory.py --gpus=0", "memory.py: gpus is 0; it must be at least 1. Raise --gpus."),
    ("apps/memory.py --model=3B", "memory.py: model is 3B; there is no such folder."),
    ("chains/make.py --min_iou=1", "make_cot.py: min_iou is 1.0; it must be below 1. Lower --min_iou."),
    ("apps/inspect_data.py", "inspect_data.py: path is missing. Name it; --help explains it."),
    ("chains/make.py --data={file} --model=m --base_url=x:1", "make_cot.py: base_url is x:1; it must begin with http"),
    ("chains/make.py", "make_cot.py: data is ''; there is no such file."),
    ("chains/accept.py --share=0", "accept_cot.py: share is 0.0; it must be above 0. Raise --share."),
    ("chains/accept.py --data=gone.json", "accept_cot.py: data is 'gone.json'; there is no such file."),
    ("demo.py --processes=3", "demo.py: processes is 3; it must be one of 0, 1, 2, 4, 8, 16."),
    ("demo.py --output_dir={file}", "config.json; no folder can be written there. Name another with"),
    ("demo.py --levels=high", "demo.py: levels is 'high'; it must be whole numbers and commas. Correct --levels."),
    ("base.py --levels=0,3", "base.py: level is 3; the world has levels 0 (plain), 1 and 2 (confusable). Name one."),
    ("base.py --size=60", "base.py: size is 60; an image side must be a multiple of 56 pixels. Use 112."),
    ("base.py --output_dir={file}", "config.json; no folder can be written there. Name another with --output_dir."),
    ("../bench/bench.py --parts=x", "bench.py: parts are x; x is none of kernels"),
    ("../bench/soaks/soak.py --zero_stage=4", "soak.py: zero_stage is 4; it must be one of 0, 1, 2, 3."),
    ("../bench/studies/ablation.py --methods=x", "ablation.py: methods are x; 'x' is none of"),
    ("../bench/bench_data.py --records=0", "bench_data.py: records is 0; it must be at least 1."),
    ("evaluator.py --predictions={file} --data=d.json --json={file}/x.json", "/x.json; no file can be written there."),
    ("grpo.py --model={model} --data=d.json --rollout_file={file}/x", "/x; no file can be written there. Name another"),
    ("apps/inspect_data.py gone.json --sheet=s.xyz", "inspect_data.py: sheet is s.xyz; it must end in .png, .jpg,"),
    ("apps/inspect_data.py gone.json --sheet={file}/x.png", "/x.png; no file can be written there. Name another with"),
    ("apps/inspect_data.py gone.json --json={model}", "; no file can be written there. Name another with --json."),
    ("apps/inspect_data.py gone.json --schema=x", "inspect_data.py: schema is 'x'; it must be one of "),
    ("apps/inspect_data.py gone.json --seed", "inspect_data.py: --seed has no value. Give it one."),
    ("apps/ground.py where --model={model} --output={file}/x.png", "/x.png; no file can be written there."),
    ("chains/make.py --output_dir={file}", "; no folder can be written there. Name another with --output_dir."),
    ("apps/inspect_data.py {file} --json={file}", "config.json, which is read; it may be lost. Change --json."),
    (
        "evaluator.py --predictions={file} --data=d.json --json={file}",
        "which is read; it may be lost. Change --json.",
    ),
    ("evaluator.py --predictions={file} --data={file}#2 --json={file}", "config.json, which is read; it may be lost."),
    ("sft.py --model={model} --data={file} --output_dir={model}", "which is read; it may be lost. Change --output_d"),
    ("../bench/kernel_bench/run.py --json={file}/x", "bench_kernels.py: json is "),
    ("../bench/step_bench/run.py --quick --quack", "run.py: unknown flag '--quack'; did you mean --quick?"),
    ("../bench/publish/demands.py {file}", "config.json holds no results ('machine'). Name a file of bench/results/"),
    ("../bench/kernel_bench/run.py --only=(", "bench_kernels.py: only is '('; it must be a regular expression"),
    ("../bench/step_bench/run.py --images=0", "bench_step.py: images is 0; it must be at least 1. Raise --images."),
    ("../bench/profiles/profile_step.py --read={file}", "config.json is no whole trace of torch.profiler (KeyError"),
    ("../bench/checks.py tets", "checks.py: 'tets' names no check. Name one of build, tests."),
    ("../bench/publish/compare.py --parts", "compare.py: --parts has no value. Give it one."),
    ("../bench/studies/ablation.py --output_dir={file}", "; no folder can be written there. Name another with"),
]


@pytest.fixture
def check_refused(initial, tmp_path, monkeypatch, capsys):
    """check_refused(words, message): the command prints the message and ends; nothing is written."""

    def check(words, message):
        command, *args = words.format(model=initial, file=initial / "config.json").split()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(os, "environ", dict(os.environ))  # which bench.py changes
        monkeypatch.setattr(sys, "argv", [command, *args])
        with pytest.raises(SystemExit) as end:
            if command == "boxgrpo":
                cli.main()
            else:
                sys.argv[0] = str(ROOT / "trainer" / command)
                monkeypatch.setattr(sys, "path", [*sys.path])
                runpy.run_path(sys.argv[0], run_name="__main__")
        shown = capsys.readouterr()
        assert shown.out == "" and message in shown.err
        assert end.value.code == 2 and len(shown.err.splitlines()) <= 2 and not list(tmp_path.iterdir())

    return check


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[words for words, _ in WRONG])
def test_a_command_refuses_wrong_input(words, message, check_refused):
    """The message has the value, the rule and the remedy."""
    check_refused(words, message)


@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_case_02_a_negative_max_grad_norm_is_refused_before_anything_is_loaded(engine, check_refused):
    flags = f"--max_grad_norm=-1 --engine={engine}"
    check_refused(f"boxgrpo sft {flags}", "boxgrpo sft: max_grad_norm is -1.0; it must be at least 0.")


def test_case_12_a_schedule_that_needs_more_options_is_refused_before_anything_is_loaded(check_refused):
    words = "grpo.py --model={model} --data=d.json --lr_scheduler_type=reduce_lr_on_plateau"
    check_refused(words, "grpo.py: lr_scheduler_type is 'reduce_lr_on_plateau'; it must be one of ")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("x is 1."), 2),
        (FileNotFoundError(2, "No such file", "typed.json"), 2),
        (RunFailed("out of memory."), 1),
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit("interrupted"), 1),
    ],
)
def test_the_exit_status_tells_wrong_input_from_a_run_that_failed(error, status, capsys, monkeypatch):
    """And of several processes of a machine that have not joined yet, the first alone prints."""

    def main():
        raise error

    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as end:
            run_as_script(main, "x.py")
        shown = capsys.readouterr().err
        assert end.value.code == status and "Traceback" not in shown
        assert bool(shown) == (rank == "0" and status != 130)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (ChildFailedError("sft.py", {0: ProcessFailure(0, 1, 2, "none")}), 2),
        (ChildFailedError("sft.py", {0: ProcessFailure(0, 1, -9, "none")}), 137),
        (SignalException("stopped", signal.SIGTERM), 143),
    ],
)
def test_a_command_that_starts_processes_ends_as_they_do(end, status, initial, tmp_path, monkeypatch, capsys):
    """Without a traceback of torchrun's."""

    def main(args):
        assert args[1].startswith("--nproc_per_node=") and args[2].endswith("trainer/sft.py")
        raise end

    monkeypatch.setattr("torch.distributed.run.main", main)
    monkeypatch.setattr(
        sys, "argv", ["boxgrpo", "sft", f"--model={initial}", f"--data={__file__}", f"--output_dir={tmp_path}"]
    )
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == status and capsys.readouterr().err == ""


@pytest.mark.slow
def test_torchrun_ends_before_its_processes_join(initial, tmp_path):
    """Two processes: one message, and nothing is loaded."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    command = [torchrun, "--standalone", "--nproc_per_node=2", str(ROOT / "trainer/grpo.py")]
    flags = [f"--model={initial}", f"--data={tmp_path}", "--prompts_per_step=3", f"--output_dir={tmp_path / 'run'}"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("prompts_per_step is 3; it must divide into 2 ranks") == 1
    assert "exitcode  : 2" in done.stderr and not (tmp_path / "run").exists()
