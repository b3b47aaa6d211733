"""`--profile_steps` on both loops, what it refuses, and the utilisation that a run tells."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from boxgrpo.model.checkpoint import load_model
from boxgrpo.model.cost import published_peak
from boxgrpo.trainer import grpo, sft
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.options import GrpoOptions, SftOptions, profile_window, validate_grpo, validate_sft
from boxgrpo.trainer.profiling import profiler
from boxgrpo.trainer.profiling.chrome_trace import read_chrome_trace
from boxgrpo.trainer.profiling.profiler import profiled
from boxgrpo.trainer.profiling.timeline import rows
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.step.metrics import grpo_flop, peak_flop, run_metrics, sft_flop

SIZES = {"min_pixels": 784, "max_pixels": 9408, "dataloader_num_workers": 0}


def a_run(newborn, record_file, **changes) -> GrpoOptions:
    values = {"model": str(newborn), "data": str(record_file), "output_dir": str(record_file.parent / "run")}
    values |= {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 4, "max_steps": 4} | SIZES
    return GrpoOptions(**values | changes)


def taught(record_file):
    """The records as conversations."""
    records = [
        {
            "images": r["images"],
            "messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}],
        }
        for r in json.loads(record_file.read_text())
    ]
    path = record_file.with_name("taught.json")
    path.write_text(json.dumps(records))
    return path


def test_steps_of_grpo_are_profiled_as_the_code_reads(newborn, record_file):
    o = a_run(newborn, record_file, profile_steps="2:4", peak_tflops=0.1)
    grpo.train(o, Ranks())
    folder = record_file.parent / "run/profile"
    assert {path.name for path in folder.iterdir()} == {"steps2-3-rank0.md", "steps2-3-rank0.trace.json.gz"}
    found = {row.name: row for row in rows(read_chrome_trace(folder / "steps2-3-rank0.trace.json.gz"))}
    outer = "data rollout reward pack reference policy optimizer".split()
    assert found["step"].titles == ["step 2", "step 3"]
    assert [name for name in found if name.count(" > ") == 1] == [f"step > {name}" for name in outer]
    inner = ("rollout > vision", "rollout > prefill", "rollout > decode", "policy > forward", "policy > backward")
    assert {f"step > {name}" for name in (*inner, "policy > forward > head+loss", "reference > head")} <= found.keys()
    assert found["step > rollout > decode"].titles == ["decode 4x4"]
    assert all(row.launches > 0 for name, row in found.items() if name != "step > data")
    assert sum(row.seconds for row in found.values() if row.depth == 1) <= found["step"].seconds
    assert "decode 4x4" in (folder / "steps2-3-rank0.md").read_text()

    lines = [json.loads(line) for line in (record_file.parent / "run/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert not {key for key in line if " " in key or key in ("timing_s/step", "timing_s/head+loss")}
        assert 0 < line["perf/mfu"] < 10


def test_steps_of_sft_are_profiled_up_to_the_runs_end(newborn, record_file):
    values = {"model": str(newborn), "data": str(taught(record_file)), "output_dir": str(record_file.parent / "run")}
    sft.train(SftOptions(**values, max_steps=3, train_batch_size=2, profile_steps="2:9", **SIZES), Ranks())
    (trace,) = (record_file.parent / "run/profile").glob("*.gz")
    found = {row.name: row for row in rows(read_chrome_trace(trace))}
    assert trace.name == "steps2-3-rank0.trace.json.gz" and found["step"].titles == ["step 2", "step 3"]
    parts = ("data", "policy", "policy > forward", "policy > forward > head+loss", "policy > backward", "optimizer")
    assert found.keys() == {"step", *(f"step > {name}" for name in parts)}
    lines = (record_file.parent / "run/metrics.jsonl").read_text().splitlines()
    assert "perf/mfu" not in json.loads(lines[0])  # nobody knows this CPU's peak
    timed = {key for key in json.loads(lines[0]) if key.startswith("timing_s/")}
    assert timed == {"timing_s/data", "timing_s/policy", "timing_s/optimizer"}


def test_a_step_that_fails_leaves_its_profile(tmp_path):
    """And every rank's has a name of its own."""
    o = GrpoOptions(output_dir=str(tmp_path), profile_steps="1:3")
    with pytest.raises(KeyError):
        for step in profiled(range(1, 5), o, Ranks(1, 2)):
            torch.ones(2).add_(1)
            if step == 2:
                raise KeyError
    (trace,) = tmp_path.glob("profile/*.gz")
    assert trace.name == "steps1-2-rank1.trace.json.gz"
    assert rows(read_chrome_trace(trace))[0].titles == ["step 1", "step 2"]


def test_a_run_that_goes_on_profiles_what_is_left(tmp_path, caplog):
    o = GrpoOptions(output_dir=str(tmp_path), profile_steps="3:6")
    assert list(profiled(range(5, 8), o, Ranks())) == [5, 6, 7]
    assert [path.name for path in tmp_path.glob("profile/*.gz")] == ["steps5-5-rank0.trace.json.gz"]
    assert list(profiled(range(6, 8), o, Ranks())) == [6, 7]
    assert "goes on from step 6" in caplog.text


def test_under_nsys_the_steps_are_marked_off_for_it(tmp_path, monkeypatch):
    """cudaProfilerStart and Stop, which nsys profile -c cudaProfilerApi waits for; torch records nothing beside it."""
    called = []
    monkeypatch.setenv(profiler.UNDER_NSYS, "1")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: called.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: called.append("stop"))
    for step in profiled(range(1, 5), GrpoOptions(output_dir=str(tmp_path), profile_steps="2:4"), Ranks(device="cuda")):
        called.append(step)
        assert not torch.autograd._profiler_enabled()
    assert called == [1, "start", 2, 3, "stop", 4]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"profile_steps": "10-13"}, "must be two numbers, such as 10:13"),
        ({"profile_steps": "13:10"}, "must be the larger"),
        ({"profile_steps": "3:3"}, "must be the larger"),
        ({"profile_steps": "0:3"}, "steps count from 1"),
        ({"profile_steps": "10:13", "max_steps": 9}, "the run ends with step 9"),
        ({"peak_tflops": -1.0}, "peak_tflops is -1"),
        ({"memory_snapshot": True}, "there is no GPU here"),
    ],
)
@pytest.mark.parametrize(("kind", "check"), [(GrpoOptions, validate_grpo), (SftOptions, validate_sft)])
def test_what_cannot_be_profiled_is_refused(given, complaint, kind, check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=complaint):
        check(kind(**given), 1)


def test_steps_behind_the_end_that_the_data_sets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="10:13; the run ends with step 4"):
        profiled(range(1, 5), GrpoOptions(output_dir=str(tmp_path), profile_steps="10:13"), Ranks())
    assert profile_window("") == range(0) and profile_window("10:13") == range(10, 13)


# -- perf/mfu -------------------------------------------------------------------------------------------------------


def test_peaks_are_known_by_name_or_by_flag():
    assert published_peak("NVIDIA H200") == published_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert published_peak("NVIDIA H100 PCIe") == 756e12 and published_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert (
        published_peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb")
        is published_peak("Tesla T4")
        is published_peak("NVIDIA L40")
        is None
    )
    cpu = torch.device("cpu")
    assert peak_flop(GrpoOptions(), cpu) is None and peak_flop(GrpoOptions(peak_tflops=1.5), cpu) == 1.5e12
    assert peak_flop(GrpoOptions(dtype="float32"), torch.device("cuda")) is None


def test_utilisation_is_told_only_beside_a_peak():
    engine, progress = (SimpleNamespace(learning_rate=0.0), SimpleNamespace(num_tokens=0, skipped_steps=0, faults={}))
    said = {"loss": 0.0, "grad_norm": 0.0, "tokens": 10, "epoch": 0.0, "unusable": 0}
    r = Ranks()
    r.world_size, r.gather = 4, lambda value: [value]
    told = run_metrics(r, engine, progress, flop=6e12, peak=1e12, seconds=3.0, **said)
    assert told["perf/mfu"] == 0.5 and told["perf/tokens_per_second"] == 10 / 3
    assert "perf/mfu" not in run_metrics(r, engine, progress, flop=6e12, peak=None, seconds=3.0, **said)


@pytest.fixture(scope="module")
def counted_prompt(newborn, tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("one")
    Image.effect_noise((84, 56), 60).save(folder / "a.png")
    record = {"images": ["a.png"], "question": "Where is it?", "answer": [10, 20, 300, 400]}
    (folder / "a.json").write_text(json.dumps([record]))
    examples, _ = read_examples(folder / "a.json")
    return Processor.from_pretrained(newborn, min_pixels=784, max_pixels=9408).prompt(examples[0])


def test_the_counted_flop_are_those_of_the_passes(newborn, counted_prompt):
    """A step's parts against torch's count of a forward, which gives causal attention its full square."""
    model = load_model(newborn)
    config, prompt = model.config, counted_prompt
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as seen:
        model.embed_images(prompt.pixel_values, prompt.image_grid_thw)
    tower = seen.get_total_flops()
    completions = [torch.arange(3), torch.arange(5)]
    sample = SimpleNamespace(item=prompt)
    group = SimpleNamespace(prompt=prompt, completions=completions)

    def flop(**changes):
        o = GrpoOptions(**changes)
        return grpo_flop(o, config, [sample], [completions], [group])

    decoder = flop(rollout="replay", beta=0.0) - tower
    assert flop(rollout="replay", beta=0.0, lora_rank=4) - tower == pytest.approx(2 / 3 * decoder)
    forward = decoder / 3
    text, tokens = config.text_config, len(prompt.input_ids) + 8
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    products = 2 * layers * tokens + 2 * 8 * text.vocab_size * text.hidden_size
    assert products < forward < 1.2 * products  # attention over so few tokens is little beside them
    assert flop(beta=0.0) == pytest.approx(tower + 4 * forward)  # sampling costs as much as a forward
    assert flop() == pytest.approx(tower + 5 * forward)  # the reference
    assert flop(num_iterations=2) == pytest.approx(
        tower + 9 * forward
    )  # the old log-probabilities, a second policy pass
    assert flop(freeze_vision=False) == pytest.approx(
        5 * tower + 5 * forward
    )  # rollout, reference, three of the policy


def test_a_cold_start_counts_a_forward_and_two_backward(newborn, counted_prompt):
    c = SimpleNamespace(
        input_ids=counted_prompt.input_ids,
        image_grid_thw=counted_prompt.image_grid_thw,
        loss_mask=torch.ones(len(counted_prompt.input_ids), dtype=torch.bool),
    )
    config = load_model(newborn).config
    frozen, whole = (sft_flop(SftOptions(freeze_vision=f), config, [c]) for f in (True, False))
    tower = (whole - frozen) / 2
    assert sft_flop(replace(SftOptions(), lora_rank=4), config, [c]) == pytest.approx((frozen - tower) * 2 / 3 + tower)
