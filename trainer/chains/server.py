"""Questions to an OpenAI-compatible server: at a bounded rate, again where that helps, none that was answered."""

import asyncio
import base64
import email.utils
import hashlib
import io
import json
import math
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from boxgrpo.trainer.data.images import load_image

from .journal import Journal

HALF = ("length", "content_filter")  # finish reasons of an answer that was broken off
AGAIN = (408, 409, 425, 429)  # statuses that another try may change, as may those from 500 on
HOPELESS = (401, 403, 404, 405)  # statuses that every other request would get, too
THOUGHT = ("reasoning_content", "reasoning")  # where transformers, vLLM and others put what stood in <think>
LONGEST_WAIT = 600.0  # seconds; a server may ask for more


def connect(base_url: str, variable: str, timeout: float):
    """An `openai.AsyncOpenAI` whose key comes from an environment variable. It does not repeat requests itself.

    Raises:
        ValueError: the client is not installed, or the variable is not set.
    """
    try:
        import openai
    except ImportError as error:
        raise ValueError(f"importing openai fails: {error}. Install it: pip install 'openai>=3'.") from error
    key = os.environ.get(variable)
    if not key:
        raise ValueError(
            f"{variable} is not set; the key for {base_url} is read from there. For a server without keys set it to "
            "any word."
        )
    return openai.AsyncOpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=0)


class Pictures:
    """A record's images as the server gets them, read when they are first needed.

    Args:
        paths: the files.
        names: what tells them from other images, in this run and later ones.
        max_pixels: larger images are scaled down to this area.
    """

    def __init__(self, paths: tuple[str, ...], names: tuple[str, ...], max_pixels: int):
        self.paths, self.names, self.max_pixels = paths, names, max_pixels
        self._reading: asyncio.Task | None = None

    async def urls(self) -> list[str]:
        """A JPEG `data:` URL each. Raises ValueError as `load_image` does."""
        if self._reading is None:
            self._reading = asyncio.create_task(asyncio.to_thread(self._read))
        return await self._reading

    def _read(self) -> list[str]:
        urls = []
        for path in self.paths:
            image = load_image(path)
            scale = math.sqrt(self.max_pixels / (image.width * image.height))
            if scale < 1:
                size = [max(1, int(side * scale)) for side in image.size]
                image = image.resize(size, Image.Resampling.BICUBIC)
            image.save(file := io.BytesIO(), "JPEG", quality=90)
            urls.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
        return urls


@dataclass(frozen=True)
class Ask:
    """A question to a model. Whatever could change the answer is part of its key; where the server stands is not."""

    kind: str  # "chain" or "judge"
    model: str
    text: str
    pictures: Pictures
    temperature: float
    max_tokens: int
    source: str  # the record, for messages
    number: int = 0  # of several answers to the same words

    def key(self, attempt: int) -> str:
        """What the answer to this attempt is kept under."""
        p = self.pictures
        asked = [self.model, self.text, p.names, p.max_pixels, self.temperature, self.max_tokens, self.number, attempt]
        return hashlib.blake2b(json.dumps([self.kind, *asked]).encode(), digest_size=16).hexdigest()


class Pace:
    """Lets requests begin one after another, evenly spaced; `per_minute` 0: at once."""

    def __init__(self, per_minute: float):
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next = 0.0  # seconds of the monotonic clock
        self._order = asyncio.Lock()

    async def turn(self) -> None:
        async with self._order:
            while (wait := self._next - time.monotonic()) > 0:  # a hold may come while one waits
                await asyncio.sleep(wait)
            self._next = time.monotonic() + self._interval

    def hold(self, seconds: float) -> None:
        """No request begins for so long."""
        self._next = max(self._next, time.monotonic() + seconds)


class _Failed(Exception):
    def __init__(self, reason: str, message: str = "", *, again: bool = True, wait: float = 0.0):
        super().__init__(message)
        self.reason, self.again, self.wait = reason, again, wait


class Asker:
    """Answers from the journal, else from a server.

    Args:
        clients: an AsyncOpenAI for each kind of `Ask`; empty: only the journal answers.
        journal: where each answer is written before it is used.
        concurrency: requests under way at once.
        requests_per_minute: how many may begin; 0: any number.
        tries: of a request without an answer, and answers of which all were broken off, before it is given up.
        backoff: seconds before the second try; doubled from there on.
        timeout: seconds until a request has failed.
        max_failures: requests given up in a row after which the server is taken for dead.
    """

    def __init__(
        self,
        clients: Mapping,
        journal: Journal,
        *,
        concurrency: int,
        requests_per_minute: float,
        tries: int,
        backoff: float,
        timeout: float,
        max_failures: int,
    ):
        self.clients, self.journal = clients, journal
        self.tries, self.backoff, self.timeout, self.max_failures = tries, backoff, timeout, max_failures
        self._slots, self._pace = asyncio.Semaphore(concurrency), Pace(requests_per_minute)
        self._in_a_row = 0  # requests given up

    async def answer(self, ask: Ask) -> dict:
        """The journal's entry: `text`, `finish` and more. Where there is none, `failure`, a short code, and `message`.

        An answer that was broken off is asked for anew; of the last one it is returned with `finish` in HALF. All
        count, those of earlier runs too.

        Raises:
            ValueError: nothing can be asked of this server: it refuses the key or the model, or has gone.
        """
        attempt = failures = 0
        while True:
            entry = self.journal.get(ask.key(attempt))
            if entry is None:
                try:
                    entry = self.journal.add(await self._request(ask, attempt))
                except _Failed as failed:
                    failures += 1
                    if failed.again and failures < self.tries:
                        delay = min(self.backoff * 2 ** (failures - 1), LONGEST_WAIT)
                        await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                        continue
                    return self._given_up(failed)
            attempt += 1
            if entry["finish"] not in HALF or attempt == self.tries:
                return entry

    async def _request(self, ask: Ask, attempt: int) -> dict:
        if not self.clients:
            raise _Failed("not_asked", again=False)
        try:
            urls = await ask.pictures.urls()
        except ValueError as error:
            raise _Failed("bad_image", str(error), again=False) from error
        async with self._slots:
            await self._pace.turn()
            try:
                reply = await self._sent(ask, urls, ask.key(attempt))
            except _Failed as failed:
                self.journal.add({"failure": failed.reason, "kind": ask.kind, "source": ask.source})
                self._pace.hold(failed.wait)
                raise
        self._in_a_row = 0
        return {"key": ask.key(attempt), "kind": ask.kind, "source": ask.source, "model": ask.model} | reply

    async def _sent(self, ask: Ask, urls: list[str], key: str) -> dict:
        import openai

        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        try:
            async with asyncio.timeout(self.timeout):  # the client's own is between two bytes
                reply = await self.clients[ask.kind].chat.completions.create(
                    model=ask.model,
                    messages=[{"role": "user", "content": [*content, {"type": "text", "text": ask.text}]}],
                    temperature=ask.temperature,
                    max_tokens=ask.max_tokens,
                    seed=int(key[:8], 16) >> 1,  # or a server that always begins alike would repeat itself
                )
        except (TimeoutError, openai.APITimeoutError) as error:
            raise _Failed("timeout", f"no answer in {self.timeout:g} s") from error
        except openai.APIStatusError as error:
            raise self._refused(ask, error) from error
        except openai.APIConnectionError as error:
            raise _Failed("connection", repr(error.__cause__ or error)) from error
        except (ValueError, openai.APIError) as error:  # what came is no JSON, or not of this form
            raise _Failed("half_body", str(error)) from error
        return self._read(ask, reply)

    def _refused(self, ask: Ask, error) -> _Failed:
        status, said = error.status_code, self._redacted(ask, str(error.body))[:300]
        if status in HOPELESS:
            raise ValueError(
                f"the server answers {status} for model {ask.model!r}: {said} Correct the key, --model or --base_url."
            ) from None
        again = status in AGAIN or status >= 500
        return _Failed(f"status_{status}", said, again=again, wait=_asked_to_wait(error.response.headers))

    def _read(self, ask: Ask, reply) -> dict:
        """Text, finish reason and tokens of a reply, of which the client has checked nothing."""
        choices, usage = getattr(reply, "choices", None), getattr(reply, "usage", None)
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not hasattr(message := getattr(choice, "message", None), "content"):
            raise _Failed("half_body", "the reply holds no message")
        text, *apart = (getattr(message, name, None) for name in ("content", *THOUGHT))
        text = text if isinstance(text, str) else ""
        thought = next((part.strip() for part in apart if isinstance(part, str)), "")
        if ask.kind == "chain" and thought and "<think>" not in text:
            text = f"<think>{thought}</think>{text}"
        tokens = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        return {
            "finish": str(getattr(choice, "finish_reason", None)),
            "text": self._redacted(ask, text),
            "tokens": tokens if all(isinstance(count, int) for count in tokens) else None,
        }

    def _redacted(self, ask: Ask, text: str) -> str:
        """Without the key: servers do repeat what they were sent. A short one is a word for a server without keys."""
        key = self.clients[ask.kind].api_key
        return text.replace(key, "***") if len(key) >= 16 else text

    def _given_up(self, failed: _Failed) -> dict:
        if failed.reason not in ("not_asked", "bad_image"):
            self._in_a_row += 1
        if self._in_a_row >= self.max_failures:
            raise ValueError(
                f"{self._in_a_row} requests in a row have failed, the last with {failed.reason} ({failed}). All "
                f"answers are kept in {self.journal.path}; the same command goes on once the server answers."
            )
        return {"failure": failed.reason, "message": str(failed)}


def _asked_to_wait(headers: Mapping[str, str]) -> float:
    """Seconds that Retry-After asks for, a number or a date, up to LONGEST_WAIT; 0 where it does not."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT) if math.isfinite(seconds) else 0.0
