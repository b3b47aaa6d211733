"""make_cot with a real model behind `transformers serve`, whose random weights answer in no form at all."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from boxgrpo.trainer.chains.judge import render_prompt
from boxgrpo.trainer.chains.make import CotOptions, make_cold_start
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_examples
from runs import wait_for

QUESTION, GOLD = "Where is the cup of the first image?", (100, 200, 300, 400)


@pytest.fixture
def served(initial, tmp_path):
    """The address of `transformers serve` with that checkpoint."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = Path(__file__).resolve().parents[2] / "shared/serve_images_only.py"
    command = [sys.executable, str(script), "serve", str(initial), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]

    def answers():
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return True

    with open(tmp_path / "serve.log", "w+") as log:
        server = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)
        try:
            assert wait_for(server, answers, seconds=120), Path(log.name).read_text()
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.kill()
            server.wait()


@pytest.mark.slow
def test_a_served_qwen2_vl_gets_prompt_and_images_as_our_processor_makes_them(served, initial, tmp_path, monkeypatch):
    """By the tokens that it counts; and its answers are kept."""
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    for name in ("a.png", "b.png"):
        Image.effect_noise((56, 56), 60).convert("RGB").save(tmp_path / name)
    images = {"images": ["a.png", "b.png"]}
    (tmp_path / "data.json").write_text(json.dumps([images | {"question": QUESTION, "answer": GOLD}]))
    o = CotOptions(base_url=served, model=str(initial), data=str(tmp_path / "data.json"), output_dir=str(tmp_path))
    o.max_tokens, o.tries, o.timeout = 64, 1, 60.0
    summary = make_cold_start(o)
    assert summary["answers"] == {"chain": 3, "judge": 0} and not summary["failed_requests"], summary

    request = render_prompt("chain", QUESTION, GOLD, 2)
    turns = [{"role": "user", "content": request}, {"role": "assistant", "content": "?"}]
    (tmp_path / "chat.json").write_text(json.dumps([images | {"messages": turns}]))
    ((chat,), _) = read_examples(tmp_path / "chat.json")
    made = Processor.from_pretrained(initial, min_pixels=784, max_pixels=50_000).prompt(chat)
    assert summary["tokens"]["chain"]["in"] == 3 * len(made.input_ids)
    assert make_cold_start(o) == summary  # all from the journal
