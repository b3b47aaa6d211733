"""make_cot with a real model behind `transformers serve`: a tiny one, trained until it gives two answers exactly."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from boxgrpo.model.checkpoint import save_model
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer import sft
from boxgrpo.trainer.chains.journal import Journal
from boxgrpo.trainer.chains.judge import chain_prompt, judge_prompt
from boxgrpo.trainer.chains.make import CotOptions, make
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.data.vocabulary import SPECIAL_TOKENS, demo_tokenizer
from boxgrpo.trainer.options import SftOptions
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.world.tiny import tiny_config

QUESTION, GOLD = "Where is the cup of the first image?", (100, 200, 300, 400)
CHAIN = "<think>The cup stands on the left.</think><answer>(100, 200), (300, 400)</answer>"
ANSWERS = {  # prompts of make_cot, and what the model is trained to answer
    chain_prompt(QUESTION, GOLD, 2): CHAIN,
    judge_prompt(QUESTION, GOLD, 2, [CHAIN] * 3): "All three say the same.\nBest: 2",
}


@pytest.fixture
def trained(tmp_path):
    """A checkpoint folder, `data.json` with one record beside it, and `taught.json` with what it has learned."""
    for name in ("a.png", "b.png"):
        Image.effect_noise((56, 56), 60).convert("RGB").save(tmp_path / name)
    images = {"images": ["a.png", "b.png"]}
    (tmp_path / "data.json").write_text(json.dumps([images | {"question": QUESTION, "answer": GOLD}]))
    turns = [(("user", asked), ("assistant", said)) for asked, said in ANSWERS.items()]
    chats = [images | {"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    (tmp_path / "taught.json").write_text(json.dumps(chats))

    tokenizer = demo_tokenizer([text for chat in ANSWERS.items() for text in chat])
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = tiny_config(len(tokenizer), special, hidden_size=64, layers=2, vision_width=64)
    save_model(Qwen2VL(config).init_weights(torch.Generator().manual_seed(0)), tmp_path / "newborn")
    processor = Processor(tokenizer, Qwen2VLImageProcessorPil(), min_pixels=3136, max_pixels=50_000)
    processor.save_pretrained(tmp_path / "newborn")
    options = SftOptions(
        model=str(tmp_path / "newborn"),
        data=str(tmp_path / "taught.json"),
        output_dir=str(tmp_path / "trained"),
        max_steps=60,
        train_batch_size=2,
        learning_rate=5e-3,
        dataloader_num_workers=0,
    )
    sft.train(options, Ranks())
    return tmp_path / "trained"


@pytest.fixture
def served(trained):
    """The address of `transformers serve` with that checkpoint."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = Path(__file__).resolve().parents[2] / "shared/serve_images_only.py"
    command = [sys.executable, str(script), "serve", str(trained), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with open(trained.parent / "serve.log", "w+") as log:
        server = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, TimeoutError):
                    log.seek(0)
                    assert server.poll() is None and time.monotonic() < deadline, log.read()
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.kill()
            server.wait()


@pytest.mark.slow
def test_a_served_qwen2_vl_writes_and_judges_chains(served, trained, monkeypatch):
    """Prompt and images have the server's token counts in our own processor, too, and its answers are kept."""
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    folder = trained.parent
    o = CotOptions(base_url=served, model=str(trained), data=str(folder / "data.json"), output_dir=str(folder / "cot"))
    o.temperature, o.max_tokens, o.concurrency, o.timeout = 0.0, 64, 2, 60.0
    summary = make(o)
    assert summary["written"] == 1 and summary["chains"] == {"passed": 3}, summary
    ((example,), _) = read_examples(folder / "cot/cold_start.json")
    assert example.turns[1][1] == CHAIN and example.gold == GOLD

    processor = Processor.from_pretrained(trained, min_pixels=3136, max_pixels=50_000)
    taught, _ = read_examples(folder / "taught.json")
    sent = [len(processor.prompt(example).input_ids) for example in taught]
    received = [int(processor.conversation(example).loss_mask.sum()) for example in taught]
    made = json.loads((folder / "cot/cold_start.json").read_text())[0]["cot"]
    with Journal(folder / "cot") as journal:
        answers = [journal.get(made[name]) for name in ("chain", "verdict")]
    assert [answer["tokens"] for answer in answers] == [[sent[k], received[k]] for k in (0, 1)]
    assert answers[1]["text"] == "All three say the same.\nBest: 2"
