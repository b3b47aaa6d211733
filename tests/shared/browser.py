"""A real browser for the tests of pages: Debian's Chromium, driven by Playwright."""

import shutil

import pytest

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")  # not longer: while it lives, no test in this process can run an event loop of its own
def browser():
    """A Playwright Browser, headless; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no chromium here")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=program, headless=True, args=FLAGS)
        yield chromium
        chromium.close()
