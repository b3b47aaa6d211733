"""The page to ask on: in a real browser, and what it refuses."""

import functools
import io
import json
import re
import socket
import sys
import threading
import time

import httpx2
import pytest
from PIL import Image

from boxgrpo.trainer.apps import ground, webpage
from boxgrpo.trainer.apps.grounding import Grounder
from boxgrpo.trainer.apps.webpage import LIMITS, make_app, serve
from grounded import ANSWER, QUESTION, THOUGHT

pytest.importorskip("flask")
pytest.importorskip("waitress")


@pytest.fixture(scope="module")
def app(grounder):
    return make_app(grounder, name="certain")


def question(*images, text=QUESTION, **fields):
    return {"image": images, "question": text} | fields


def post(app, form, **headers):
    """The whole response, and the request ended as a server ends it."""
    files = [(io.BytesIO(data), "../a.png") for data in form["image"]]
    return app.test_client().post("/ask", data=form | {"image": files}, headers=headers, buffered=True)


def png(*size):
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    return file.getvalue()


def new_page(browser):
    page = browser.new_page()
    page.set_default_timeout(120_000)  # ms: a busy machine is no fault of the page
    return page


def serving(model, *flags):
    """Serve with the real command in a thread of this process; the page's address."""
    printed = io.StringIO()
    args = [f"--model={model}", "--serve", "--port=0", "--min_pixels=784", "--max_pixels=50000", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", printed)
        thread = threading.Thread(target=ground.main, args=(args,), daemon=True)
        thread.start()
        while "until" not in printed.getvalue():
            assert thread.is_alive(), printed.getvalue()
            time.sleep(0.01)
    return re.search(r"on (http://127\.0\.0\.1:\d+) until", printed.getvalue())[1]


def test_a_person_asks_about_two_images_and_sees_reasoning_box_and_picture(browser, certain, pair):
    """The real command in a real browser; what model and person write is never run, and no request leaves."""
    requests, errors = [], []
    address, page = serving(certain, "--dtype=float32"), new_page(browser)
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    title = page.title()

    page.click("#ask")
    assert page.inner_text("#error") == "Add an image first."
    page.set_input_files("#files", [str(path) for path in reversed(pair)])
    page.click("text=Ask >> nth=-1")
    assert page.inner_text("#error") == "Write a question first."
    assert page.locator("#images img").evaluate_all("all => all.map(i => i.alt)") == ["turned.jpg", "one.png"]
    page.get_by_label("move image 1 back").click()
    page.set_input_files("#files", str(pair[0]))
    page.get_by_label("remove image 3").click()
    assert page.locator("#images img").evaluate_all("all => all.map(i => i.alt)") == ["one.png", "turned.jpg"]
    assert page.locator("#images img").evaluate_all("all => all.map(i => i.naturalWidth)") == [112, 80]

    page.fill("#question", QUESTION)
    page.select_option("#target", "2")
    page.press("#question", "Control+Enter")
    page.wait_for_selector("#figure:not([hidden])")
    assert page.inner_text("#status") == "(10, 40), (40, 120) in image 2, 80 x 160 pixels"
    assert page.inner_text("#text") == THOUGHT
    assert page.text_content("#answer") == ANSWER
    assert page.locator("#picture").evaluate("picture => picture.naturalHeight") > 420
    with page.expect_download() as download:
        page.click("#save")
    assert Image.open(download.value.path()).format == "PNG"
    assert page.title() == title and page.locator("main img").count() == 3, "the text of a model or a person ran"
    page.close()
    assert not errors
    assert {url.split("/")[-1] for url in requests if url.startswith(address)} == {"", "page.css", "page.js", "ask"}
    held = ("data:", f"blob:{address}/")  # pictures within the page
    assert all(url.startswith((f"{address}/", *held)) for url in requests), requests


def test_the_page_says_when_there_is_no_box_and_why_a_question_is_refused(browser, initial, pair, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page = new_page(browser)
    page.goto(serving(initial, "--max_completion_length=5"))
    page.set_input_files("#files", str(pair[0]))
    page.fill("#question", "Where?")
    page.click("#ask")
    page.wait_for_selector("#figure:not([hidden])")
    assert "no box found in the answer, which was cut off after 5 tokens" in page.inner_text("#status")
    assert page.inner_text("#heading") == "Answer"

    page.set_input_files("#files", str(tmp_path / "broken.png"))
    page.click("#ask")
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error").startswith("image 2 cannot be opened as an image")
    assert not page.is_visible("#result")
    page.close()


def test_a_visitor_who_leaves_ends_the_question(initial, pair):
    """Else a page closed over a long answer would keep everybody waiting; this model's answer never ends by itself."""
    url = serving(initial, "--max_completion_length=100000") + "/ask"
    form = {"data": {"question": "Where?"}, "files": {"image": pair[0].read_bytes()}}
    ask = functools.partial(httpx2.stream, "POST", url, timeout=30, **form)
    with ask() as first:
        lines = first.iter_lines()  # the connection is closed with it
        assert "text" in json.loads(next(lines)), "an answer is shown as it comes"
        with ask() as second:
            assert second.status_code == 503 and b"another question is being answered" in second.read()
    until, status = time.monotonic() + 20, 503
    while status == 503:
        assert time.monotonic() < until, "the question of a visitor who has left goes on"
        with ask() as later:
            status = later.status_code
    assert status == 200


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (question(), "there are 0 images"),
        (question(b"no picture"), "image 1 cannot be opened as an image (cannot identify image file 'image 1')"),
        (question(png(40, 40), png(400, 400)[:50]), "image 2 cannot be decoded"),
        (question(*[png(40, 40)] * 9), "there are 9 images; the page takes 8"),
        (question(png(40, 40), text="a" * 4001), "the question has 4001 characters; the limit is 4000"),
        (question(png(40, 40), target_image="-1"), "target_image is '-1'; it must be a number"),
        (question(*[png(8000, 5000)] * 3), "the images have 120 million pixels together; the limit is 100"),
        (question(png(9000, 8000)), "image 1 has 9000 x 8000 = 72000000 pixels"),
    ],
)
def test_a_question_that_does_not_fit_is_refused_by_name(app, form, says):
    """None of it shows a path of this machine, and the next question is answered."""
    for _ in range(2):
        response = post(app, form)
        assert response.status_code == 400 and response.json["error"].startswith(says)
        assert "/" not in response.json["error"]


def test_too_large_a_request_is_refused(app, monkeypatch):
    monkeypatch.setitem(app.config, "MAX_CONTENT_LENGTH", 1000)
    response = post(app, question(bytes(2000)))
    assert response.status_code == 413 and "over 64 MB together" in response.json["error"]
    monkeypatch.undo()
    assert app.config["MAX_CONTENT_LENGTH"] == LIMITS["bytes"]
    assert post(app, question(bytes(2000))).status_code == 400, "still busy"


def test_another_sites_page_cannot_ask(app):
    """Neither by sending a form here, nor by a name of its own that points here."""
    foreign = post(app, question(png(40, 40)), Origin="http://elsewhere.example")
    assert foreign.status_code == 403
    assert app.test_client().get("/", headers={"Host": "elsewhere.example"}).status_code == 400
    own = post(app, question(b""), Origin="http://localhost")
    assert own.status_code == 400 and "image 1" in own.json["error"], "its own page may ask"


def test_its_own_files_are_served_and_nothing_else(app):
    for path in ("/page.css", "/page.js"):
        assert app.test_client().get(path).data == (webpage.PAGE / path[1:]).read_bytes()
    for path in ("/index.html", "/page.css/../../ground.py", "/../webpage.py", "/%2e%2e/ground.py"):
        assert app.test_client().get(path).status_code == 404, path


def test_the_page_may_load_its_own_files_alone_and_the_models_name_is_text():
    response = make_app(None, name="<script>alert(1)</script>").test_client().get("/")
    assert "<script>alert" not in response.text and "&lt;script&gt;alert" in response.text
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert not re.findall(r"(?:src|href)=\"(?!page\.|data:)", response.text)


def test_a_failure_of_the_model_is_shown_and_the_next_question_is_answered(app, pair, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("secret")
        yield

    data = pair[0].read_bytes()
    monkeypatch.setattr(Grounder, "stream", broken)
    response = post(app, question(data))
    assert json.loads(response.data) == {"error": "the question failed (RuntimeError). See the terminal for the cause."}
    assert "secret" in caplog.text
    monkeypatch.undo()
    assert b"picture" in post(app, question(data)).data


def test_a_missing_server_says_how_to_get_it(monkeypatch):
    for missing in ("flask", "waitress"):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ValueError, match=rf"an import fails: .*{missing}.*pip install 'flask>=3\.1' waitress"):
            serve(None, name="none", host="127.0.0.1", port=0)
        monkeypatch.undo()


def test_an_address_that_cannot_be_served_on_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"host is 127.0.0.1 and port {port}; they cannot be served on .*--port"):
            serve(None, name="certain", host="127.0.0.1", port=port)
