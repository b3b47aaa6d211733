"""`boxgrpo runs` and the warnings of a run: what is wrong is told once, in a resumed run too."""

import json
import re

import pytest
import torch

from boxgrpo.trainer import grpo
from boxgrpo.trainer.apps import runs as app
from boxgrpo.trainer.run import Hooks
from boxgrpo.trainer.runtime.ranks import Ranks
from runs import grpo_options, lines

LINE = {"reward": 1.5, "rewards/accuracy/mean": 0.5, "rewards/format/mean": 1.0, "frac_reward_zero_std": 0.25}


@pytest.fixture
def write_run(tmp_path):
    """write_run(name, lines, total_steps, ended): a folder as a run leaves it."""

    def write(name, lines, total_steps=9, ended=False):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = [line | {"total_steps": total_steps} for line in lines]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if ended:
            (folder / "model-00001-of-00002.safetensors").write_text("")
        return folder

    return write


def shown(root, capsys) -> list[list[str]]:
    """The words of each line."""
    app.main([str(root)])
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_each_run_is_a_line_with_its_latest_metrics_and_findings_below(write_run, tmp_path, capsys):
    grpo_lines = [{"step": n, **LINE, "entropy": 0.2, "loss": -1e-9} for n in range(1, 61)]
    grpo_lines += [{"step": 60, "eval/accuracy_at_0.5": value, "eval/count": 8} for value in (0.25, 0.75)]
    for line in grpo_lines[:50]:
        line["frac_reward_zero_std"] = 0.75
    write_run("demo/grpo", grpo_lines, 200)
    write_run("demo/sft", [{"step": n, "loss": 5 / n} for n in (2, 4)], 4, ended=True)
    write_run("new", [])
    head, grpo_row, found, sft_row, new_row, *_ = shown(tmp_path, capsys)
    assert head == "run step reward IoU format equal groups entropy loss held-out Acc".split()
    assert grpo_row == "demo/grpo 60 of 200 1.500 0.500 1.000 0.250 0.200 0.000 0.750 not ended".split()
    assert found[:6] == "step 50: 75.0% of the groups".split()
    assert sft_row == "demo/sft 4 of 4 – – – – – 1.875 – ended".split()
    assert new_row == "new 0 of ? – – – – – – – not ended".split()
    assert shown(tmp_path / "new", capsys)[1] == new_row
    deep = write_run("a/b/c", [])
    assert len(shown(tmp_path, capsys)) == 7 and shown(deep.parent, capsys)[1][0] == "c"


def test_what_a_kill_leaves_is_passed_over(write_run, capsys):
    """A line without an end, zeros from a loss of power, lines of another program, and an earlier run's weights."""
    folder = write_run("killed", [LINE | {"step": 3}], ended=True)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(
            b'\x00\x00\n[1]\n{"loss": 1.0}\n'
            + json.dumps(LINE | {"step": 5, "total_steps": 9}).encode()
            + b'\n{"step": 6, "re'
        )
    assert shown(folder, capsys)[1] == "killed 5 of 9 1.500 0.500 1.000 0.250 – – – not ended".split()


def test_a_run_warns_once_and_a_resumed_one_goes_on_from_there(world, caplog, capsys):
    """No completion has the format, and all are cut off after two tokens: told at steps 20 and 10, the run at 15 ends.

    A resumed run that forgot the first steps would warn at step 25 of the completions, and of the format not at all.
    """

    def no_format(groups, rewards):
        return rewards._replace(format=torch.zeros_like(rewards.format))

    changes = {"prompts_per_step": 1, "num_generations": 2, "max_completion_length": 2, "beta": 0.0, "save_steps": 15}
    warned = []
    for steps in (15, 26):
        caplog.clear()
        options = grpo_options(world, "ill", max_steps=steps, resume="auto", **changes)
        grpo.train(options, Ranks(), Hooks(rewards=no_format))
        warned.append([text for text in caplog.messages if text.startswith("step ")])
    (first,), (second,) = warned
    assert re.match(r"step 10: .* of the completions were cut off in 10 steps", first)
    assert re.match(r"step 20: no completion had the answer format in 20 steps", second)
    _, row, *found, _, _ = shown(world / "ill", capsys)
    assert row[:4] == ["ill", "26", "of", "26"] and row[-1] == "ended" and len(lines(world / "ill")) == 26
    assert [" ".join(words) for words in found] == [first, second]
