"""The step benchmark: its machinery at a tiny size, its counted floors, and its figures on a CPU."""

import argparse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from boxgrpo.bench.peers import skipped
from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.step_bench import run as step_bench
from boxgrpo.bench.step_bench.cases import MODELS, StepCase, choose_cases, make_config, prepare, step_cases
from boxgrpo.bench.step_bench.run import Plan, line, row, run, run_fresh
from boxgrpo.bench.step_bench.sides import Measurement, Side
from boxgrpo.model.attention import PackedAttention
from boxgrpo.model.batch import Group, pack_groups
from boxgrpo.model.checkpoint import load_model
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.model.step_work import step_work
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.runtime.spans import span

MEASURED = {"flop_per_second": 1e11, "bytes_per_second": 1e10}


def test_all_sides_do_the_same_work_and_the_phases_are_the_step(tiny, tiny_case):
    peers = {"trl", "univg_r1"} - skipped(["trl"]).keys()
    with ThreadPoolExecutor() as pool:
        started = {name: pool.submit(run_fresh, name, tiny_case, tiny, 1) for name in ("ours", *peers)}
        sides = {name: side.result() for name, side in started.items()}
    counted = {"decode": {"launches": 1700, "moved_bytes": 2e9, "waits": 1}}
    # Refuses prompts of other lengths, or other weights.
    found = row(tiny_case, sides, tiny, MEASURED, lambda: counted)
    for name in peers:
        ratio = found[f"{step_bench.PEERS[name]}ratio"]
        assert ratio == pytest.approx(found[f"{name}_s"] / found["ours_s"], abs=0.01, rel=0.05)
        assert found["ours_peak_mb"] > 0 and found[f"{name}_peak_mb"] > 0
        assert len(found["ours_samples_s"]) == len(found[f"{name}_samples_s"]) == 1
    spent = {name: phase["seconds"] for name, phase in found["phases"].items()}
    assert sum(spent.values()) == pytest.approx(found["ours_s"], abs=2e-3)
    assert min(spent.values()) > 0
    (theirs,) = sides["univg_r1"].steps
    assert theirs.keys() >= {"data", "rollout", "reference", "reward", "policy_forward", "backward", "optimizer"}
    assert sum(theirs.values()) == pytest.approx(found["univg_r1_s"], abs=2e-3)
    assert len(table("steps", {"rows": [found]}).splitlines()) == 3
    lines = table("phases", found).splitlines()
    assert len(lines) == 3 + len(spent) and sum("| 1,700 | 2.00 | 1 |" in line for line in lines) == 2
    sides["univg_r1"].prompt_tokens += 1
    found = row(tiny_case, sides, tiny, MEASURED)
    assert "it differs from ours: prompts of" in found["univg_r1_error"] and "univg_r1_ratio" not in found


def test_a_plan_says_how_often_a_side_steps_and_no_case_is_run_twice(tokenizer, monkeypatch, tiny_case):
    """The first row's peers step more often than the others'; growth takes from the rows what they have."""
    ran = []

    def side(name, case, at, steps):
        ran.append((name, case.images, case.generations, case.tokens, steps))
        phases = {"prefill": 0.5, "backward": 0.5 * case.images * case.generations}
        first = phases | {"other": 10.0}  # which is not counted where there are others
        return Side([first] + [phases] * (steps - 1), 100, 9.0, 7, {})

    monkeypatch.setattr(step_bench, "run_fresh", side)  # a step of ours and of TRL's is taken above
    monkeypatch.setattr(step_bench, "prepare", lambda case, *a: prepare(replace(case, side=tiny_case.side), *a))
    plan = Plan(
        steps=2,
        peer_steps={"trl": (3, 1), "univg_r1": (1, 0)},
        growth={"images": (1, 2), "generations": (4, 8)},
        growth_steps=2,
    )
    cases, kept = [tiny_case, replace(tiny_case, images=1)], []
    found = run(cases, ["trl", "univg_r1"], plan, tokenizer, MEASURED, lambda part: kept.append(len(part["rows"])))
    assert ran[:3] == [("ours", 2, 4, 6, 2), ("trl", 2, 4, 6, 3), ("univg_r1", 2, 4, 6, 1)]
    assert ran[3:5] == [("ours", 1, 4, 6, 2), ("trl", 1, 4, 6, 1)]
    assert ran[5:] == [("ours", 2, 8, 6, 2), ("ours", 6, 8, 8, 2), ("ours", 6, 16, 8, 2)]
    assert found["rows"][0]["ours_s"] == 4.5 and found["rows"][0]["ours_samples_s"] == [14.5, 4.5]
    assert [row["ratio"] for row in found["rows"]] == [1.0, 1.0]  # warm over warm; first over first
    assert kept == [1, 1, 1, 2, 2, 2, 2, 2]  # after each side, each size and all of growth
    assert found["growth"]["images"]["seconds"] == [2.5, 4.5] and found["growth"]["images"]["each_s"] == 2.0
    assert found["growth"]["generations"]["samples_s"] == [[14.5, 4.5], [18.5, 8.5]]
    assert len(table("growth", found["growth"]).splitlines()) == 6
    assert "growth" not in run(cases[:1], [], replace(plan, growth={}), tokenizer, MEASURED, lambda part: None)


def test_a_side_without_room_is_told(tiny, tiny_case):
    found = row(tiny_case, {"ours": "out of memory: 1 GiB"}, tiny, MEASURED)
    assert found["ours_error"].startswith("out of memory") and "ratio" not in found and "phases" not in found
    assert table("steps", {"rows": [found]}).endswith(
        "| boxgrpo, MB |\n| --- | --- | --- | --- | --- |\n| tiny | 2 | 2 | - | - |"
    )


def test_a_phase_is_without_those_inside_it(monkeypatch):
    measured, ticks = Measurement(waits=True), iter(range(100))
    monkeypatch.setattr(measured, "now", lambda wait: next(ticks))
    with measured.listening():
        for _ in range(3):
            with span("data"):
                pass
            with span("rollout"), span("prefill"):
                pass
    assert [set(step) for step in measured.whole_steps()] == [{"data", "rollout", "prefill", "other"}] * 2
    step = measured.whole_steps()[1]
    assert step["prefill"] == 1 and step["rollout"] == 2 and step["data"] == 1


def test_the_counted_products_are_those_of_the_model(tiny, tiny_case):
    """As torch counts them when attention is plain products, which give a causal one its full square."""
    model, case = load_model(tiny / "model"), replace(tiny_case, prompts=1)
    examples, _ = read_examples(tiny / "records.json")
    prompt = Processor.from_pretrained(tiny / "model", min_pixels=1, max_pixels=10**6).prompt(examples[0])
    tokens = len(prompt.input_ids)
    sizes = (case.prompts, tokens, case.generations, case.tokens)
    counted = step_work(model.config, case.grids, sizes, torch.float32, masters=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as seen:
        embeds = model.visual(prompt.pixel_values, prompt.image_grid_thw)
    assert counted["vision"][0] == seen.get_total_flops()

    text = model.config.text_config
    upper = 4 * text.hidden_size * text.num_hidden_layers * tokens**2 / 2
    batch = pack_groups([Group(prompt, (), embeds)], image_token_id=model.config.image_token_id)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as seen:
        model.hidden(batch, PackedAttention(batch))
    assert counted["prefill"][0] + upper == seen.get_total_flops()


def test_the_published_models_have_their_published_sizes(tokenizer):
    for name, size in (("44M", 44_169_984), ("2B", 2_208_985_600), ("7B", 8_291_375_616)):
        with torch.device("meta"):
            model = Qwen2VL(make_config(MODELS[name], tokenizer))
        assert sum(p.numel() for p in model.parameters()) == size


def test_which_rows_are_asked_for():
    def flags(**given):
        return argparse.Namespace(**{"quick": False, "model": None, "images": None, "prompts": None} | given)

    assert choose_cases(flags(), gpu=False) == step_cases(False)
    assert choose_cases(flags(images=6), gpu=False) == [StepCase(images=6)]
    assert {case.model for case in choose_cases(flags(), gpu=True)} == {"2B", "7B"}
    assert choose_cases(flags(model="7B", images=1), gpu=True)[0].grids.prod() == 4 * 401_408 // 28**2
    assert [case.model for case in choose_cases(flags(quick=True), gpu=True)] == ["tiny"]
    with pytest.raises(ValueError, match="model is 2B; it runs on a GPU"):
        choose_cases(flags(model="2B"), gpu=False)


def test_a_straight_line_fits():
    assert line([1, 2, 4], [0.75, 1.0, 1.5]) == {"fixed_s": 0.5, "each_s": 0.25, "misfit_percent": 0.0}
    assert line([1, 2, 3], [1.0, 1.3, 1.0])["misfit_percent"] == pytest.approx(15.4)
