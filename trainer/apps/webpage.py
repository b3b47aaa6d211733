"""A web page for questions to one `Grounder`, served by Flask and waitress to users of this machine.

Nothing is stored: images are in a temporary folder until they are read. One question is answered at a time; closing
the page stops its answer. The page loads only its own two files, and inserts the model's text as text, never as HTML.
"""

import contextlib
import json
import logging
import math
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from boxgrpo.trainer.arguments import optional_import
from boxgrpo.trainer.data.images import image_size
from boxgrpo.trainer.evaluation.pictures import data_uri

from .grounding import Grounder, Question

log = logging.getLogger(__name__)

PAGE = Path(__file__).resolve().parent / "page"
LIMITS = {
    "images": 8,
    "bytes": 64 << 20,  # of a whole request
    "pixels": 100_000_000,  # of a question's images together, by their headers: 300 MB decoded
    "characters": 4000,  # of a question
}
TOO_LARGE = f"the images and the question are over {LIMITS['bytes'] >> 20} MB together. Send smaller or fewer."
LOCAL = ("127.0.0.1", "localhost")
# The page may load its own files, and images from blob: and data: URLs; no other page may frame it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(grounder: Grounder, *, name: str, host: str = LOCAL[0]):
    """Make the WSGI application. `name` is the model's name on the page, `host` the address to serve on."""
    from flask import Flask, Response, render_template, request, send_from_directory
    from werkzeug.exceptions import HTTPException

    app = Flask(__name__, template_folder=str(PAGE), static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = LIMITS["bytes"]
    app.config["MAX_FORM_PARTS"] = LIMITS["images"] + 10
    if host in LOCAL:  # a request to another host name is from another site's page (DNS rebinding)
        app.config["TRUSTED_HOSTS"] = list(LOCAL)
    busy = threading.Lock()

    @app.get("/")
    def index():
        return render_template("index.html", model=name, limits=LIMITS)

    @app.get("/<any('page.css', 'page.js'):file>")
    def own_file(file: str):
        return send_from_directory(PAGE, file)

    @app.post("/ask")
    def ask():
        own = request.host_url.rstrip("/")
        if request.headers.get("Origin", own) != own:
            return {"error": "requests from other sites are refused. Open the page by its own address."}, 403
        if not busy.acquire(blocking=False):
            return {"error": "another question is being answered. Ask again when it is done."}, 503
        with contextlib.ExitStack() as stack:
            stack.callback(busy.release)
            question = prepare(grounder, request)
            response = Response(answer_lines(grounder, question), mimetype="application/x-ndjson")
            # Flask closes every response: sent completely, aborted, or never started.
            response.call_on_close(stack.pop_all().close)
            return response

    @app.errorhandler(Exception)
    def refused(error: Exception):
        if isinstance(error, HTTPException):
            return {"error": TOO_LARGE if error.code == 413 else error.description}, error.code
        return explain(error), 400 if isinstance(error, ValueError) else 500

    @app.after_request
    def add_headers(response):
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-store"
        return response

    return app


def explain(error: Exception) -> dict:
    """The error as the page shows it. A ValueError explains what is wrong with the question; others are logged."""
    if isinstance(error, ValueError):
        return {"error": str(error)}
    log.error("a question failed", exc_info=error)
    return {"error": f"the question failed ({type(error).__name__}). See the terminal for the cause."}


def prepare(grounder: Grounder, request) -> Question:
    """Prepare the question of a form. Its files are renamed to `image 1` and so on, also in error messages.

    Raises:
        ValueError: a limit is exceeded, or as `Grounder.prepare`.
    """
    files, text = request.files.getlist("image"), request.form.get("question", "").strip()
    target = request.form.get("target_image", "0")
    if len(files) > LIMITS["images"]:
        raise ValueError(f"there are {len(files)} images; the page takes {LIMITS['images']}. Remove some.")
    if len(text) > LIMITS["characters"]:
        raise ValueError(f"the question has {len(text)} characters; the limit is {LIMITS['characters']}. Cut it.")
    if not target.isdecimal() or len(target) > 3:
        raise ValueError(f"target_image is {target!r}; it must be a number. Choose an image.")
    with tempfile.TemporaryDirectory(prefix="boxgrpo-") as folder:
        paths = [Path(folder) / f"image {number}" for number in range(1, len(files) + 1)]
        pixels = 0
        for file, path in zip(files, paths, strict=True):
            file.save(path)
            with contextlib.suppress(ValueError):
                pixels += math.prod(image_size(path))  # by its header; `Grounder.prepare` refuses other files
        if pixels > LIMITS["pixels"]:
            raise ValueError(
                f"the images have {pixels / 1e6:.0f} million pixels together; the limit is "
                f"{LIMITS['pixels'] / 1e6:.0f}. Scale them down."
            )
        answer_format = request.form.get("answer_format", "think")
        try:
            return grounder.prepare(text, paths, target=int(target), answer_format=answer_format)
        except ValueError as error:
            raise ValueError(str(error).replace(f"{folder}/", "")) from error


def answer_lines(grounder: Grounder, question: Question) -> Iterator[bytes]:
    """Yield lines of JSON: {"text": so far} after each token, then the answer with its picture, or {"error": ...}."""

    def line(value: dict) -> bytes:
        return json.dumps(value).encode() + b"\n"

    try:
        for ids in grounder.stream(question):
            yield line({"text": grounder.processor.decode(ids)})
        answer = grounder.parse(question, ids)
        picture = data_uri(grounder.draw(question, answer, words=False), "PNG")
        yield line(answer.as_json() | {"headline": answer.headline, "picture": picture})
    except Exception as error:
        yield line(explain(error))


def serve(grounder: Grounder, *, name: str, host: str, port: int) -> None:
    """Serve the page until the process is interrupted; its address is printed to standard error.

    Raises:
        ValueError: Flask or waitress is not installed, or the address cannot be bound.
    """
    with optional_import("serve is true", "Install the server (pip install 'flask>=3.1' waitress)."):
        from waitress import create_server

        app = make_app(grounder, name=name, host=host)
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise ValueError(
            f"host is {host} and port {port}; they cannot be served on ({error}). Change --host or --port."
        ) from error
    server = create_server(
        app,
        sockets=[listening],
        ident=None,
        max_request_body_size=LIMITS["bytes"] + (1 << 20),  # slightly larger requests get Flask's answer, TOO_LARGE
    )
    if host not in LOCAL:
        print(f"{host} is not a local address: everyone who reaches it can send questions.", file=sys.stderr)
    print(f"serving {name} on http://{host}:{listening.getsockname()[1]} until Ctrl-C", file=sys.stderr, flush=True)
    server.run()
