"""The page in headless Chromium: an example in one click, a task of one's own, cancelling, errors, a phone's width."""

# ruff: noqa: E402 (what needs an extra comes behind the question whether it is there)

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra test")
pytest.importorskip("gradio", reason="needs the extra serve")

from support.serving import picture, running

from lavin_rt.pipeline import Pipeline
from lavin_rt.serve.limits import Limits
from lavin_rt.serve.service import Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TOKEN = "a-token-of-some-length"
WAIT = 60_000


@pytest.fixture(scope="module")
def service():
    return Service(Pipeline.from_pretrained(device="cpu", dtype="float32"), Limits(body_bytes=2**20))


@pytest.fixture(scope="module")
def address(service):
    with running(service, page=True) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address, request):
    """The page, freshly opened; what it asks of other hosts is a failure."""
    options = getattr(request, "param", {"viewport": {"width": 1280, "height": 900}})
    context = browser.new_context(**options)
    page = context.new_page()
    foreign = []

    def note(asked) -> None:
        if asked.url.startswith(("http", "ws")) and not asked.url.startswith(address):
            foreign.append(asked.url)

    page.on("request", note)
    page.goto(address)
    page.locator("#run").wait_for(timeout=WAIT)
    yield page
    context.close()
    assert not foreign


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture
def shot(page, shots, request):
    """Keeps a screenshot under the test's name, for people to look at."""
    yield
    page.screenshot(path=shots / f"{re.sub('[^a-z]+', '-', request.node.name)}.png", full_page=True)


def drop(page, where: str, *files: Path) -> None:
    page.locator(f"{where} input[type=file]").first.set_input_files([str(file) for file in files])
    page.locator(f"{where} img").first.wait_for(timeout=WAIT)


def write(folder: Path, name: str, seed: int) -> Path:
    (folder / name).write_bytes(picture(seed))
    return folder / name


def done(page) -> None:
    page.locator("#status", has_text="Done").wait_for(timeout=WAIT)
    page.locator("#result img").first.wait_for(timeout=WAIT)
    page.locator("#strip img").first.wait_for(timeout=WAIT)


def test_an_example_in_one_click(page, shot):
    page.get_by_role("button", name="depth estimation").click()
    done(page)
    with page.expect_download(timeout=WAIT) as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "depth_estimation-0.png"
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")


def test_a_task_of_one_s_own_from_two_dropped_pairs(page, shot, tmp_path, service):
    page.get_by_role("button", name="Make a task of your own pairs").click()
    for i in range(2):
        drop(page, "#pair-input", write(tmp_path, f"in{i}.png", i))
        drop(page, "#pair-target", write(tmp_path, f"out{i}.png", 10 + i))
        page.locator("#add-pair").click()
        page.locator("#status", has_text=f"{i + 1} pair").wait_for(timeout=WAIT)
    page.get_by_label("Name").fill("from-the-page")
    page.locator("#make-task").click()
    page.locator("#status", has_text="is made and chosen").wait_for(timeout=WAIT)
    assert service.library.find("from-the-page").pairs == 2
    drop(page, "#query", write(tmp_path, "query.png", 5))
    page.locator("#run").click()
    done(page)


def test_cancelling_in_mid_run(page, shot, tmp_path, service):
    drop(page, "#query", write(tmp_path, "query.png", 5))
    page.locator("#how button").first.click()
    page.get_by_label("number input for Steps").fill("100")
    page.locator("#run").click()
    page.locator("#status", has_text="Evaluation").wait_for(timeout=WAIT)
    page.locator("#cancel").click()
    page.locator("#status", has_text="cancelled").wait_for(timeout=WAIT)
    page.get_by_role("button", name="negative").click()  # and the next one works
    done(page)


def test_an_error_that_can_be_read(page, shot, tmp_path):
    page.locator("#run").click()
    page.locator("#status [role=alert]", has_text="drop a picture first").wait_for(timeout=WAIT)
    (tmp_path / "no.png").write_text("this is no picture")
    page.locator("#query input[type=file]").first.set_input_files(str(tmp_path / "no.png"))
    page.wait_for_timeout(1500)
    page.locator("#run").click()
    alert = page.locator("#status [role=alert]", has_text="not a picture")
    alert.wait_for(timeout=WAIT)
    assert "/" not in alert.inner_text()


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}


@pytest.mark.parametrize("page", [PHONE], indirect=True, ids=["dark"])
def test_on_a_phone(page, shot, tmp_path):
    page.get_by_role("button", name="negative").click()
    done(page)
    page.wait_for_function("document.querySelector('#result').getBoundingClientRect().bottom <= innerHeight + 1")
    for folded in ("#how", "#own"):
        page.locator(f"{folded} button").first.click()
    for side in ("#pair-input", "#pair-target"):
        drop(page, side, write(tmp_path, "side.png", 1))
    page.locator("#add-pair").click()
    page.locator("#status", has_text="1 pair").wait_for(timeout=WAIT)
    page.locator("#own .thumbnail-item img").first.wait_for(timeout=WAIT)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") not in ("rgb(255, 255, 255)",)


def test_logging_in(browser):
    service = Service(Pipeline.from_pretrained(device="cpu", dtype="float32"))
    with running(service, token=TOKEN, page=True) as address:
        page = browser.new_context().new_page()
        page.goto(address)
        assert page.url.endswith("/login")
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_role("button", name="Log in").click()
        page.locator("#run").wait_for(timeout=WAIT)
        page.get_by_role("button", name="negative").click()
        done(page)
        page.context.close()
