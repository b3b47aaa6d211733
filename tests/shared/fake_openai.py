"""A small OpenAI-compatible server: a test decides each reply, failures included, and every request is recorded."""

import base64
import io
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

BOX = r"\(\d+, \d+\), \(\d+, \d+\)"


@dataclass
class Seen:
    """A request. A repeated one has the same `key`."""

    kind: str  # chain or judge
    question: str
    box: str
    replies: list[str]  # to judge
    images: list[Image.Image]
    body: dict
    headers: dict
    times: int  # this key, this time included
    began: float = field(default_factory=time.monotonic)
    answered: bool = False  # in full

    @property
    def key(self) -> str:
        return json.dumps(self.body, sort_keys=True)


@dataclass
class Reply:
    text: str = ""
    status: int = 200
    finish: str = "stop"
    headers: dict = field(default_factory=dict)
    delay: float = 0.0  # seconds before a byte is sent
    trickle: float = 0.0  # seconds after each quarter of the body
    body: bytes | None = None  # in place of the JSON
    missing: int = 0  # bytes at the end that are announced and never sent
    usage: bool = True
    extra: dict = field(default_factory=dict)  # more fields of the message


def well(seen: Seen) -> Reply:
    """A good model's reply: the box in the prompt, or that the first reply is best."""
    if seen.kind == "judge":
        return Reply("All are true.\nBest: 1")
    return Reply(f"<think>Seen with seed {seen.body['seed']}.</think><answer>{seen.box}</answer>")


class FakeOpenAI(ThreadingHTTPServer):
    """`with FakeOpenAI() as server:` listens on a free port; `server.behave` may be changed at any time."""

    daemon_threads = True

    def __init__(self, behave: Callable[[Seen], Reply] = well):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave, self.seen, self.lock = behave, [], threading.Lock()
        self.at_once = self.most_at_once = 0

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that was killed or stopped waiting

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def of(self, kind: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.kind == kind]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        server: FakeOpenAI = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            seen = self._seen(body, sum(s.body == body for s in server.seen) + 1)
            server.seen.append(seen)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            reply = server.behave(seen)
            time.sleep(reply.delay)
        finally:
            with server.lock:
                server.at_once -= 1  # before the client can send its next request
        data = reply.body if reply.body is not None else json.dumps(self._answer(reply)).encode()
        self.send_response(reply.status)
        for name, value in {"content-type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        data = data[: len(data) - reply.missing]
        for k in range(4):
            self.wfile.write(data[k * len(data) // 4 : (k + 1) * len(data) // 4])
            time.sleep(reply.trickle)
        self.close_connection = bool(reply.missing)
        seen.answered = reply.status == 200 and not reply.missing and reply.body is None

    def _seen(self, body, times) -> Seen:
        (message,) = body["messages"]
        *images, text = message["content"]
        text = text["text"]
        data = [image["image_url"]["url"].removeprefix("data:image/jpeg;base64,") for image in images]
        return Seen(
            kind="judge" if "Best: N" in text else "chain",
            question=re.search(r"Question: (.*)", text)[1],
            box=re.search(BOX, text)[0],
            replies=re.findall(r"Reply \d+:\n(.*)", text),
            images=[Image.open(io.BytesIO(base64.b64decode(url, validate=True))) for url in data],
            body=body,
            headers=dict(self.headers),
            times=times,
        )

    @staticmethod
    def _answer(reply: Reply) -> dict:
        if reply.status != 200:
            return {"error": {"message": reply.text or "an error of the test", "code": reply.status}}
        message = {"role": "assistant", "content": reply.text, **reply.extra}
        answer = {"choices": [{"index": 0, "message": message, "finish_reason": reply.finish}]}
        return answer | ({"usage": {"prompt_tokens": 1000, "completion_tokens": 10}} if reply.usage else {})

    def log_message(self, *_):
        pass
