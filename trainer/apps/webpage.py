"""The page to ask on: Flask and waitress around one `Grounder`, for the person at this machine.

Nothing is kept: images lie in a temporary folder until they are read. One question is answered at a time; a page that
is left ends its question. The page loads nothing but its own two files, and what a model writes reaches it as text.
"""

import base64
import io
import json
import logging
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from .grounding import Asked, Grounder, as_json

log = logging.getLogger(__name__)

PAGE = Path(__file__).resolve().parent / "page"
LIMITS = {
    "images": 8,
    "bytes": 64 << 20,  # of a whole request
    "pixels": 100_000_000,  # of a question's images together, as their headers say: 300 MB decoded
    "characters": 4000,  # of a question
}
LOCAL = ("127.0.0.1", "localhost")
# Own files, and pictures that the page holds itself; nobody may frame it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(grounder: Grounder, *, name: str, host: str = LOCAL[0]):
    """The WSGI application; `name` is the model's on the page, `host` what it will be served on.

    Raises:
        ValueError: no Flask to import.
    """
    try:
        from flask import Flask, Response, render_template, request, send_from_directory
        from werkzeug.exceptions import HTTPException
    except ImportError as error:
        raise ValueError(_not_installed(error)) from error

    app = Flask(__name__, template_folder=str(PAGE), static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = LIMITS["bytes"]
    app.config["MAX_FORM_PARTS"] = LIMITS["images"] + 10
    if host in LOCAL:  # a foreign name that was made to point here is somebody else's page asking
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
        if request.headers.get("Origin", request.host_url.rstrip("/")) != request.host_url.rstrip("/"):
            return {"error": "this page answers its own visitors only. Open it by its own address."}, 403
        if not busy.acquire(blocking=False):
            return {"error": "another question is being answered. Ask again when it is done."}, 503
        try:
            asked = prepared(grounder, request)
        except ValueError as error:
            busy.release()
            return {"error": str(error)}, 400
        except BaseException:
            busy.release()
            raise
        # Closed it is in any case: read to its end, left half way, or never begun.
        response = Response(lines(grounder, asked), mimetype="application/x-ndjson")
        response.call_on_close(busy.release)
        return response

    @app.errorhandler(HTTPException)
    def refused(error: HTTPException):
        said = error.description
        if error.code == 413:
            said = f"the images and the question are over {LIMITS['bytes'] >> 20} MB together. Send smaller or fewer."
        return {"error": said}, error.code

    @app.errorhandler(Exception)
    def failed(error: Exception):
        log.error("a question failed", exc_info=error)
        return {"error": f"the question failed ({type(error).__name__}). The terminal says why."}, 500

    @app.after_request
    def guarded(response):
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-store"
        return response

    return app


def prepared(grounder: Grounder, request) -> Asked:
    """The question that a form puts. Its files get names of ours; errors call them by their numbers.

    Raises:
        ValueError: over a limit, or as `Grounder.prepare`.
    """
    files, question = request.files.getlist("image"), request.form.get("question", "").strip()
    target = request.form.get("target_image", "0")
    if len(files) > LIMITS["images"]:
        raise ValueError(f"there are {len(files)} images; the page takes {LIMITS['images']}. Remove some.")
    if len(question) > LIMITS["characters"]:
        raise ValueError(f"the question has {len(question)} characters; the limit is {LIMITS['characters']}. Cut it.")
    if not target.isdecimal() or len(target) > 3:
        raise ValueError(f"target_image is {target!r}; it must be a number. Choose an image.")
    with tempfile.TemporaryDirectory(prefix="boxgrpo-") as folder:
        paths = [Path(folder) / f"image {number}" for number in range(1, len(files) + 1)]
        for file, path in zip(files, paths, strict=True):
            file.save(path)
        if (pixels := sum(map(header_pixels, paths))) > LIMITS["pixels"]:
            raise ValueError(
                f"the images have {pixels / 1e6:.0f} million pixels together; the limit is "
                f"{LIMITS['pixels'] / 1e6:.0f}. Scale them down."
            )
        try:
            return grounder.prepare(
                question, paths, target=int(target), answer_format=request.form.get("answer_format", "think")
            )
        except ValueError as error:
            raise ValueError(str(error).replace(f"{folder}/", "")) from error


def header_pixels(path: Path) -> int:
    """Pixels that a file says it has; 0 for what is no image, which whoever decodes it refuses by name."""
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0


def lines(grounder: Grounder, asked: Asked) -> Iterator[bytes]:
    """JSON objects, one a line: {"text": so far} for every token, then the answer with its picture, or {"error"}."""

    def line(value: dict) -> bytes:
        return json.dumps(value).encode() + b"\n"

    try:
        for ids in grounder.completion(asked):
            yield line({"text": grounder.processor.decode(ids)})
        answer = grounder.read(asked, ids)
        png = io.BytesIO()
        grounder.picture(asked, answer, words=False).save(png, "PNG")
        picture = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        yield line(as_json(asked, answer) | {"picture": picture})
    except ValueError as error:
        yield line({"error": str(error)})
    except Exception as error:
        log.exception("a question failed")
        yield line({"error": f"the question failed ({type(error).__name__}). The terminal says why."})


def serve(grounder: Grounder, *, name: str, host: str, port: int) -> None:
    """Serve the page until the process is interrupted; says where, on standard error.

    Raises:
        ValueError: no Flask or waitress to import, or an address that cannot be served on.
    """
    try:
        from waitress import create_server
    except ImportError as error:
        raise ValueError(_not_installed(error)) from error
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
        max_request_body_size=LIMITS["bytes"] + (1 << 20),  # what is only a little too large is refused with words
    )
    if host not in LOCAL:
        print(f"{host} is not this machine's own: whoever reaches it can ask.", file=sys.stderr)
    print(f"{name} answers on http://{host}:{listening.getsockname()[1]} until Ctrl-C", file=sys.stderr, flush=True)
    server.run()


def _not_installed(error: ImportError) -> str:
    return f"serve is true and an import fails: {error}. Install the page's server (pip install 'flask>=3.1' waitress)."
