"""Requests to an OpenAI-compatible server: the rate is bounded, failed requests are repeated, answers are stored."""

import asyncio
import functools
import hashlib
import json
import math
import os
import random
import time
from dataclasses import dataclass

from PIL import Image

from boxgrpo.trainer.arguments import optional_import
from boxgrpo.trainer.data.images import load_image
from boxgrpo.trainer.evaluation.pictures import data_uri
from boxgrpo.trainer.runtime.ranks import RunFailed

from .journal import Journal

TRUNCATED = ("length", "content_filter")  # finish reasons of a truncated answer
FATAL = (401, 403, 404, 405)  # statuses with which every further request would fail, too
REASONING_FIELDS = ("reasoning_content", "reasoning")  # where servers put the text of <think>


@dataclass
class RecordImages:
    """A record's images in the form that is sent to the server, read when they are first needed."""

    source: str  # of the record
    paths: tuple[str, ...]
    names: tuple[str, ...]  # part of an answer's key, so the same in every run
    max_pixels: int  # larger images are scaled down to this area

    @functools.cached_property
    def urls(self) -> asyncio.Task:
        """Awaiting it gives a JPEG `data:` URL for each image, or raises ValueError as `load_image` does."""
        return asyncio.create_task(asyncio.to_thread(lambda: list(map(self._encode, self.paths))))

    def _encode(self, path: str) -> str:
        image = load_image(path)
        scale = math.sqrt(self.max_pixels / (image.width * image.height))
        if scale < 1:
            image = image.resize([max(1, int(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        return data_uri(image, "JPEG", quality=90)


def connect(journal: Journal, o) -> dict:
    """An `openai.AsyncOpenAI` for each kind of prompt; the API keys come from environment variables.

    Raises:
        ValueError: the client is not installed, or a variable is not set.
    """
    with optional_import("ask is true", "Install the client: pip install 'openai>=3'."):
        import openai
    # The client's own timeout limits the time between two bytes; that of `_transport` limits the whole answer.
    settings = {"timeout": None, "max_retries": o.tries - 1, "http_client": _transport(journal, o)}
    clients = {}
    for kind, url, variable in (("chain", o.base_url, "OPENAI_API_KEY"), ("judge", o.judge_base_url, "JUDGE_API_KEY")):
        if not url:
            clients[kind] = clients["chain"]
            continue
        if not os.environ.get(variable):
            raise ValueError(
                f"{variable} is not set; the key for {url} is read from there. For a server without keys set it to "
                "any word."
            )
        clients[kind] = openai.AsyncOpenAI(base_url=url, api_key=os.environ[variable], **settings)
    return clients


def _transport(journal: Journal, o):
    """Make the HTTP client of `connect`, which spaces requests evenly and counts each failure.

    openai's client repeats a request without an answer, with a truncated one, or with a status of 408, 409, 429 or at
    least 500. The wait before it is Retry-After, if at most two minutes, else `o.backoff` seconds, doubled each time.
    """
    import httpx2  # what openai's client is built on
    import openai

    class Transport(openai.DefaultAsyncHttpxClient):
        _next = 0.0  # when the next request may begin, in seconds of the monotonic clock

        async def send(self, request, **settings):
            """Return a response even without an answer: with a status of 502, so that openai's client repeats it."""
            start = max(self._next, now := time.monotonic())
            self._next = start + (60 / o.requests_per_minute if o.requests_per_minute else 0)
            await asyncio.sleep(start - now)
            try:
                async with asyncio.timeout(o.timeout):
                    response = await super().send(request, **settings)
                if not response.is_error and read_reply(response.content):
                    return response
                failure = f"status_{response.status_code}" if response.is_error else "half_body"
                message = "" if response.is_error else "the reply holds no message"
            except TimeoutError:
                failure, message = "timeout", f"no answer in {o.timeout:g} s"
            except Exception as error:  # httpx's errors, and those of TLS that it passes on
                failure, message = "connection", repr(error)
            journal.add({"failure": failure})
            if message:
                response = httpx2.Response(502, text=message, request=request)
            response.extensions["failure"] = failure
            if "retry-after" not in response.headers:
                retries = int(request.headers.get("x-stainless-retry-count", 0))
                wait = o.backoff * 2**retries * random.uniform(0.5, 1.0)
                response.headers["retry-after-ms"] = str(min(max(1e3 * wait, 1), 120e3))  # 0 would be ignored
            return response

    return Transport()


def read_reply(body: bytes) -> dict | None:
    """`text`, `reasoning`, `finish` and `tokens` (sent and received, or None) of a reply; None: it holds no message."""
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        message, usage = choice["message"], reply.get("usage") or {}
        text, *reasoning = (message.get(name) for name in ("content", *REASONING_FIELDS))
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return {
        "text": text if isinstance(text, str) else "",
        "reasoning": next((part.strip() for part in reasoning if isinstance(part, str)), ""),
        "finish": str(choice.get("finish_reason")),
        "tokens": tokens if all(isinstance(count, int) for count in tokens) else None,
    }


class Requester:
    """Gets answers from the journal, else from a server, unless `o.ask` is false.

    At most `o.concurrency` requests are in flight, including those that wait for another try. The run ends after
    `o.max_failures` consecutive requests without an answer.
    """

    def __init__(self, journal: Journal, o):
        self.journal, self.o = journal, o
        self.clients = connect(journal, o) if o.ask else {}
        self.models = {"chain": (o.model, o.temperature), "judge": (o.judge_model or o.model, o.judge_temperature)}
        self._semaphore = asyncio.Semaphore(o.concurrency)
        self._failed_in_a_row = 0

    async def close(self) -> None:
        for client in self.clients.values():
            await client.close()

    async def answer(self, kind: str, text: str, images: RecordImages, number: int = 0) -> dict:
        """Return the journal's entry (`text`, `finish`, ...), or without an answer the code `failure` and `message`.

        A truncated answer is requested again with another seed; the last of `o.tries` is returned as it is.

        Args:
            kind: "chain" or "judge".
            number: index of the answer among several to the same text.

        Raises:
            ValueError: no request can succeed: the server refuses the key or the model, or cannot be reached.
        """
        model, temperature = self.models[kind]
        entry = {}
        for attempt in range(self.o.tries):
            # Everything that the answer depends on, but not the server's address.
            fields = [kind, model, text, images.names, images.max_pixels]
            fields += [temperature, self.o.max_tokens, number, attempt]
            key = hashlib.blake2b(json.dumps(fields).encode(), digest_size=16).hexdigest()
            entry = self.journal.get(key) or await self._request(kind, text, images, key)
            if entry.get("finish") not in TRUNCATED:
                break
        return entry

    async def _request(self, kind: str, text: str, images: RecordImages, key: str) -> dict:
        if not self.clients:
            return {"failure": "not_asked", "message": ""}
        import openai

        try:
            urls = await images.urls
        except ValueError as error:
            return {"failure": "bad_image", "message": str(error)}
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        model, temperature = self.models[kind]
        try:
            async with self._semaphore:
                reply = await self.clients[kind].chat.completions.with_raw_response.create(
                    model=model,
                    messages=[{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
                    temperature=temperature,
                    max_tokens=self.o.max_tokens,
                    seed=int(key[:8], 16) >> 1,  # without it a server with a constant seed would repeat its answer
                )
        except openai.APIStatusError as error:
            return self._fail(model, error)
        self._failed_in_a_row = 0
        answer = read_reply(reply.http_response.content)
        text, reasoning = answer["text"], answer.pop("reasoning")
        if kind == "chain" and reasoning and "<think>" not in text:
            text = f"<think>{reasoning}</think>{text}"
        names = {"key": key, "kind": kind, "source": images.source, "model": model}
        return self.journal.add(names | answer | {"text": self._redact(text)})

    def _fail(self, model: str, error) -> dict:
        failure, message = error.response.extensions["failure"], self._redact(str(error.body))[:300]
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.o.max_failures or error.status_code in FATAL:
            raise RunFailed(
                f"requests that failed in a row: {self._failed_in_a_row}, the last with {failure} for model {model!r} "
                f"({message}). Where the server refuses them, correct the key, --model or --base_url. All answers are "
                f"kept in {self.journal.path}; the same command continues from there."
            )
        return {"failure": failure, "message": message}

    def _redact(self, text: str) -> str:
        """Replace the API keys, which servers may repeat. A key under 16 characters is a placeholder, not a secret."""
        for key in {client.api_key for client in self.clients.values()}:
            text = text.replace(key, "***") if len(key) >= 16 else text
        return text
