"""make_cot with a real model behind `transformers serve`: a tiny one that has learned two answers by heart."""

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
from boxgrpo.trainer.chains.make import CotOptions, make
from boxgrpo.trainer.chains.prompts import chain_prompt, judge_prompt
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.data.vocabulary import SPECIAL_TOKENS, demo_tokenizer
from boxgrpo.trainer.options import SftOptions
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.world.tiny import tiny_config

QUESTION, GOLD = "Where is the cup of the first image?", (100, 200, 300, 400)
CHAIN = "<think>The cup stands on the left.</think><answer>(100, 200), (300, 400)</answer>"
ASKED = {  # what the model is trained to say to what make_cot will ask
    chain_prompt(QUESTION, GOLD, 2): CHAIN,
    judge_prompt(QUESTION, GOLD, 2, [CHAIN] * 3): "All three say the same.\nBest: 2",
}


@pytest.fixture
def parrot(tmp_path):
    """A checkpoint folder, `data.json` with one record beside it, and `taught.json` with what it has learned."""
    for name in ("a.png", "b.png"):
        Image.effect_noise((56, 56), 60).convert("RGB").save(tmp_path / name)
    images = {"images": ["a.png", "b.png"]}
    (tmp_path / "data.json").write_text(json.dumps([images | {"question": QUESTION, "answer": GOLD}]))
    turns = [(("user", asked), ("assistant", said)) for asked, said in ASKED.items()]
    chats = [images | {"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    (tmp_path / "taught.json").write_text(json.dumps(chats))

    tokenizer = demo_tokenizer([text for chat in ASKED.items() for text in chat])
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = tiny_config(len(tokenizer), special, hidden_size=64, layers=2, vision_width=64)
    save_model(Qwen2VL(config).init_weights(torch.Generator().manual_seed(0)), tmp_path / "newborn")
    processor = Processor(tokenizer, Qwen2VLImageProcessorPil(), min_pixels=3136, max_pixels=50_000)
    processor.save_pretrained(tmp_path / "newborn")
    options = SftOptions(
        model=str(tmp_path / "newborn"),
        data=str(tmp_path / "taught.json"),
        output_dir=str(tmp_path / "parrot"),
        max_steps=60,
        train_batch_size=2,
        learning_rate=5e-3,
        dataloader_num_workers=0,
    )
    sft.train(options, Ranks())
    return tmp_path / "parrot"


@pytest.fixture
def served(parrot):
    """The address of `transformers serve` with that checkpoint."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        str(Path(__file__).resolve().parents[2] / "shared/serve_images_only.py"),
        "serve",
        str(parrot),
    ]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with open(parrot.parent / "serve.log", "w+") as log:
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


def test_a_served_qwen2_vl_is_asked_answers_and_judges(served, parrot, monkeypatch):
    """It gets the prompt and the images token for token as our own processor writes them, and its answers are kept."""
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    folder = parrot.parent
    o = CotOptions(base_url=served, model=str(parrot), data=str(folder / "data.json"), output_dir=str(folder / "cot"))
    o.temperature, o.max_tokens, o.concurrency, o.timeout = 0.0, 64, 2, 60.0
    summary = make(o)
    assert summary["written"] == 1 and summary["chains"] == {"passed": 3}, summary
    ((example,), _) = read_examples(folder / "cot/cold_start.json")
    assert example.turns[1][1] == CHAIN and example.gold == GOLD

    processor = Processor.from_pretrained(parrot, min_pixels=3136, max_pixels=50_000)
    taught, _ = read_examples(folder / "taught.json")
    asked = [len(processor.prompt(example).input_ids) for example in taught]
    said = [int(processor.conversation(example).loss_mask.sum()) for example in taught]
    answers = [json.loads(line) for line in (folder / "cot/answers.jsonl").read_text().splitlines()]
    assert [answer["tokens"] for answer in answers] == [[asked[k], said[k]] for k in (0, 0, 0, 1)]
    assert answers[3]["text"] == "All three say the same.\nBest: 2"
