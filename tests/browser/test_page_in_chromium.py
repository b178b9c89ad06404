"""The page in a real Chromium: curves, a run in training, a prompt in four columns, hostile texts, keyboard, axe-core.

Needs Debian's `chromium`, and playwright and axe-core of requirements-browser.txt: `make test-browser`.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import axe_playwright_python.base
import pytest
from page_runs import BASE, CHILD, CUT, FAST, XSS, family, line, save, write_run
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright
from script import call, script
from serving import served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from work import HANGING

from milepost.locks import hold_run
from milepost.page import library
from milepost.page import routes as page_routes
from milepost.page.library import Library, id_of
from milepost.page.routes import routes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(axe_playwright_python.base.AXE_FILE_PATH)
MODELS = [f"model-{number}" for number in range(5)]
SIZES = [(360, 800), (1280, 900), (2560, 1440)]
LIMIT = HANGING * 1000  # milliseconds: each wait is for a state, and ends the test only if that never comes
SHOTS = os.environ.get("SCREENSHOTS")  # a folder to keep pictures of the page in


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "Chromium is missing: apt-get install chromium"
    expect.set_options(timeout=LIMIT)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@contextlib.contextmanager
def opened(browser: Browser, address: str, **context: object) -> Iterator[Page]:
    """The page with its curves drawn; an error in it, or a request to another host, fails the test."""
    with contextlib.closing(browser.new_context(**context)) as visit:
        page = new_page(visit)
        errors: list[str] = []
        hosts: set[str] = set()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.extend(refusals(message)))
        page.on("request", lambda request: hosts.add(request.url.split("/api")[0].split("/v1")[0].rstrip("/")))
        page.goto(address)
        page.wait_for_selector("#loss canvas")
        page.wait_for_selector("#sample-list pre")
        settled(page)
        yield page
        assert errors == []
        assert {host for host in hosts if not host.startswith(("data:", "blob:"))} == {address.rstrip("/")}


def new_page(visit: BrowserContext) -> Page:
    """A page that waits as long as a test may take."""
    visit.set_default_timeout(LIMIT)
    return visit.new_page()


def settled(page: Page) -> None:
    """Wait until the page has drawn what it asked for."""
    page.wait_for_selector("#shown[aria-busy=false]")


def refusals(message: ConsoleMessage) -> list[str]:
    """Errors, and what the policy refused; that there is no server of models is no error."""
    return [message.text] if message.type == "error" and "404" not in message.text else []


@pytest.fixture(autouse=True)
def whole_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each look read all runs, however slow this machine is: what a look leaves to the next would be drawn later."""
    monkeypatch.setattr(library, "BUDGET", float("inf"))


@contextlib.contextmanager
def watching(folder: Path, *more: Route) -> Iterator[str]:
    with served(
        Starlette(routes=[*routes(Library(folder / "runs", folder / "checkpoints"), stopping=lambda: False), *more])
    ) as address:
        yield address


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return family(tmp_path)


def check(page: Page, *names: str) -> None:
    """Choose runs by their boxes."""
    for name in names:
        page.check(f'[data-run="{id_of(Path(name))}"]')
    page.wait_for_function("count => document.querySelectorAll('#legend li').length >= count", arg=len(names))
    settled(page)


INK = """({before, least}) => {
  const c = document.querySelector("#loss canvas"); const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
  let n = 0; for (let at = 3; at < d.length; at += 4) n += d[at] > 0;
  return n > least && n !== before ? n : 0; }"""


def ink(page: Page, *, before: int = 0, least: int = 1000) -> int:
    """How many dots of the loss are drawn, once it is more than `least` and another number than `before`."""
    return page.wait_for_function(INK, arg={"before": before, "least": least}).json_value()


def test_curves_of_several_runs_appear_labelled_by_what_differs(browser: Browser, folder: Path) -> None:
    with watching(folder) as address, opened(browser, address) as page:
        alone = ink(page)
        check(page, BASE, FAST, CHILD, CUT)
        expect(page.locator("#legend")).to_contain_text("LEARNING_RATE=0.004")
        before = ink(page, least=alone)
        expect(page.locator("#legend li")).to_have_count(4)
        expect(page.locator("#others figure:visible")).to_have_count(3)
        expect(page.locator("#tree circle.dot")).to_have_count(8)
        expect(page.locator("#tree path.taken")).to_have_count(1)
        expect(page.locator("#checkpoints tbody tr")).to_have_count(8)
        expect(page.locator("#resume pre")).to_contain_text("training.py")
        expect(page.locator("#prompt")).to_be_hidden()
        for change in ("tokens", "time"):
            page.select_option("#axis", change)
        page.check("#log")
        page.fill("#smoothing", "20")
        ink(page, before=before)


def test_a_run_in_training_moves_without_a_reload(browser: Browser, folder: Path) -> None:
    place = folder / "runs" / CUT
    with watching(folder) as address, opened(browser, address) as page, hold_run(place, CUT):
        page.wait_for_function("() => document.querySelector('#status').textContent.includes('1 training')")
        page.wait_for_function("() => !document.querySelector('#resume pre')")
        with open(place / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.writelines(line(step, "train", 9.0, since=1.79e9 + 3000) for step in range(302, 400, 2))
        (place / "samples" / "step000400.txt").write_text("a sample that came later", encoding="utf-8")
        save(folder, CUT, 400)
        page.wait_for_function("() => document.querySelector('#sample-list').textContent.includes('came later')")
        page.wait_for_function("() => document.querySelector('#run-list').textContent.includes('9.0000')")
        page.wait_for_function("() => document.querySelectorAll('#tree circle.dot').length === 3")
        readout = page.locator("#loss .readout")
        while "step 398" not in (readout.text_content() or ""):  # the curve may come after the checkpoint
            page.locator("#loss .chart").press("End")
    assert page.is_closed()


def test_a_click_is_not_lost_while_the_page_moves(browser: Browser, folder: Path) -> None:
    """What comes between press and release is shown after it: else the row under the pointer would be another."""
    place = folder / "runs" / CUT
    with watching(folder) as address, opened(browser, address) as page:
        box = page.locator(f'[data-run="{id_of(Path(FAST))}"]')
        box.hover()
        page.mouse.down()
        with (
            page.expect_event("requestfinished", lambda request: "api/details" in request.url),
            open(place / "metrics.jsonl", "a", encoding="utf-8") as file,
        ):
            file.write(line(302, "train", 9.0, since=1.79e9 + 3000))
        settled(page)
        assert "9.0000" not in page.locator("#run-list").inner_text()
        page.mouse.up()
        expect(page.locator("#run-list")).to_contain_text("9.0000")
        expect(box).to_be_checked()
        expect(page.locator("#legend li")).to_have_count(2)


SELECT = "() => getSelection().selectAllChildren(document.querySelector('#sample-list pre'))"


def test_what_is_opened_or_selected_stays_while_the_page_moves(browser: Browser, folder: Path) -> None:
    place = folder / "runs" / CUT
    (folder / "checkpoints" / "damaged.pt").write_bytes(b"no checkpoint")
    with watching(folder) as address, opened(browser, address) as page:
        page.locator("#damaged summary").click()
        page.evaluate(SELECT)
        before = ink(page)
        with open(place / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line(302, "train", 9.0, since=1.79e9 + 3000))
        expect(page.locator("#run-list")).to_contain_text("9.0000")
        ink(page, before=before)
        assert page.evaluate("document.querySelector('#damaged details').open")
        assert "It was I been said so." in page.evaluate("getSelection().toString()")


def test_a_chosen_run_is_drawn_however_many_began_with_its_parent(browser: Browser, folder: Path) -> None:
    """Of 41 runs of a family 30 are drawn, the oldest first; the youngest is the one that is chosen."""
    parent = {"run_id": BASE, "step": 400, "file": "x.pt", "changed": {}}
    names = [f"child-{number:02d}" for number in range(39)]
    for number, name in enumerate(names):
        write_run(folder, name, [402, 500], since=1.79e9 + 9000 + number, parent=parent)
    with watching(folder) as address, opened(browser, address) as page:
        expect(page.locator("#tree text.name")).to_have_count(30)
        expect(page.locator("#tree")).to_contain_text(names[-1])
        expect(page.locator("#tree")).not_to_contain_text(names[-2])
        expect(page.locator("#tree")).to_contain_text("At most 30 runs are drawn")


def test_a_page_that_was_turned_away_comes_back(
    browser: Browser, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser takes 503 as the end of a stream of events, so the page begins another."""
    with watching(folder) as address, contextlib.closing(browser.new_context()) as visit:
        with monkeypatch.context() as full:
            full.setattr(page_routes, "MOST_LISTENERS", 0)
            page = new_page(visit)
            page.goto(address)
            expect(page.locator("#status")).to_contain_text("does not answer")
        expect(page.locator("#status")).to_contain_text("4 runs, 0 training")


async def stream(model: str, prompt: str) -> AsyncIterator[bytes]:
    for piece in (f"{model} of ", prompt, " <img src=x onerror='window.hit=1'>", " end"):
        yield f"data: {json.dumps({'choices': [{'text': piece, 'delta': {'content': piece}}]})}\n\n".encode()
    yield b"data: [DONE]\n\n"


async def complete(request: Request) -> Response:
    asked = await request.json()
    if asked["model"] == MODELS[3]:
        return JSONResponse({"error": {"message": "the queue is full"}}, 429)
    prompt = asked.get("prompt") or asked["messages"][0]["content"]
    return StreamingResponse(stream(asked["model"], prompt), media_type="text/event-stream")


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]})


OPENAI = [Route("/v1/models", models), Route("/v1/completions", complete, methods=["POST"]),
          Route("/v1/chat/completions", complete, methods=["POST"])]  # fmt: skip


@pytest.mark.parametrize("mode", ["completions", "chat"])
def test_a_prompt_streams_into_four_columns(mode: str, browser: Browser, folder: Path) -> None:
    with watching(folder, *OPENAI) as address, opened(browser, address) as page:
        page.on("console", lambda message: None)
        page.wait_for_selector("#prompt-text")
        boxes = page.locator("[name=model]")
        assert [boxes.nth(at).is_checked() for at in range(5)] == [True] * 4 + [False]
        assert boxes.nth(4).is_disabled()  # four at most
        boxes.nth(3).uncheck()
        boxes.nth(4).check()
        page.select_option("#prompt-mode", mode)
        page.fill("#prompt-text", XSS[0])
        page.click("#prompt-send")
        page.wait_for_function(
            "() => [...document.querySelectorAll('#answers .about')].filter(e => e.textContent === 'done').length === 4"
        )
        texts = page.locator("#answers pre").all_inner_texts()
        assert texts == [
            f"{name} of {XSS[0]} <img src=x onerror='window.hit=1'> end" for name in (*MODELS[:3], MODELS[4])
        ]
        assert page.evaluate("window.hit") is None


def test_what_a_server_of_models_refuses_is_shown(browser: Browser, folder: Path) -> None:
    with watching(folder, *OPENAI) as address, contextlib.closing(browser.new_context()) as visit:
        page = new_page(visit)
        page.goto(address)
        page.wait_for_selector("#prompt-text")
        page.fill("#prompt-text", "Dear")
        page.click("#prompt-send")
        page.wait_for_function(
            "() => document.querySelector('#answers').textContent.includes('failed: the queue is full')"
        )


def hostile(folder: Path) -> Path:
    """A run for each of the hostile texts, which stands in its name, note, settings, sample, metrics and parent; and checkpoints of such names."""
    for number, text in enumerate(XSS):
        name = f"{number:02d}{text}".replace("/", "\u2215")
        place = write_run(folder, name, [100, 200], sample=text, RUN_NOTE=json.dumps(text), DROPOUT=json.dumps(text),
                          parent={"run_id": text, "step": 1, "file": text, "changed": {text: [text, text]}})  # fmt: skip
        with open(place / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line(300, "train", 1.0, since=1.79e9, **{text: 1.0}))
    write_run(folder, "plain", [100, 200])
    save(folder, "plain", 100, 200)
    first, second = sorted((folder / "checkpoints").glob("*.pt"))
    first.rename(first.with_name(f"{XSS[0]}.pt"))
    second.rename(second.with_name("<svg onload=window.hit=1>.pt"))
    (folder / "checkpoints" / "<iframe srcdoc=x>.pt").write_bytes(b"no checkpoint")
    return folder


@pytest.mark.parametrize("way", ["served", "report"])
def test_hostile_texts_do_nothing(way: str, browser: Browser, tmp_path: Path) -> None:
    folder = hostile(tmp_path)
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(watching(folder)) if way == "served" else report(folder)
        page = stack.enter_context(opened(browser, address))
        for box in page.locator("#run-list [type=checkbox]").all():
            box.check()
        page.wait_for_function(
            "count => document.querySelectorAll('#sample-list pre').length === count", arg=len(XSS) + 1
        )
        settled(page)
        for summary in page.locator("summary").all():
            summary.click()
        assert page.evaluate("window.hit") is None
        assert page.locator("img, iframe, #shown script, #runs script, b").count() == 0
        text = page.locator("body").text_content()
        for each in XSS[:-1]:
            assert each in text
        assert "\\u202e<b>" in text
        expect(page.locator("#others figure:visible")).to_have_count(3 + len(XSS))


def report(folder: Path) -> str:
    """Write the report of all runs; return its address."""
    done = call(script("plot_run"), folder, RUN="*", OUTPUT=str(folder / "report.html"))
    assert done.code == 0, done.err
    return (folder / "report.html").as_uri()


def test_a_script_that_got_into_the_page_is_refused(browser: Browser, folder: Path) -> None:
    """The policy holds, so that the test above could fail: a handler and a script that are added do not run."""
    with watching(folder) as address, contextlib.closing(browser.new_context()) as visit:
        page = new_page(visit)
        page.goto(address)
        page.wait_for_selector("#loss canvas")
        assert (
            page.evaluate("() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; } }")
            == "TypeError"
        )
        page.evaluate(
            "() => { const s = document.createElement('script'); try { s.textContent = 'window.hit=1'; } catch {} document.body.append(s); }"
        )
        page.evaluate(
            "() => { try { document.body.setAttribute('onclick', 'window.hit=1'); } catch {} document.body.click(); }"
        )
        assert page.evaluate("window.hit") is None


def test_a_checkpoint_is_verified_by_its_button(browser: Browser, folder: Path) -> None:
    with watching(folder) as address, opened(browser, address) as page:
        page.locator("#checkpoints button", has_text="verify").first.click()
        page.locator("#checkpoints td", has_text="intact").wait_for()
        assert page.locator("#checkpoints td", has_text="intact").count() == 1
        assert page.locator("#checkpoints button", has_text="verify").count() > 0


def test_a_report_stands_alone(browser: Browser, folder: Path) -> None:
    with opened(browser, report(folder)) as page:
        expect(page.locator("#legend li")).to_have_count(4)
        assert ink(page) > 1000
        expect(page.locator("#checkpoints tbody tr")).to_have_count(8)
        expect(page.locator("#status")).to_contain_text("report of")
        expect(page.locator("#prompt")).to_be_hidden()


def test_the_keyboard_reaches_everything(browser: Browser, folder: Path) -> None:
    with watching(folder) as address, opened(browser, address) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.locator("#loss .chart").focus()
        for key in ("ArrowLeft", "ArrowLeft", "ArrowRight"):
            page.keyboard.press(key)
        expect(page.locator("#loss .readout")).to_have_text(re.compile("^step 29"))
        page.keyboard.press("+")
        page.wait_for_function("() => !document.querySelector('#reset').disabled")
        page.keyboard.press("0")
        page.wait_for_function("() => document.querySelector('#reset').disabled")
        for text, rows in (("no such run", 0), ("four times", 1)):
            page.locator("#filter").fill(text)
            expect(page.locator("#run-list tbody tr")).to_have_count(rows)
        page.locator("#run-list [type=checkbox]").focus()
        page.keyboard.press("Space")
        page.wait_for_function("() => document.querySelectorAll('#legend li').length === 2")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_accessible_and_within_the_window(width: int, height: int, scheme: str, browser: Browser, folder: Path) -> None:
    view = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
    with watching(folder, *OPENAI) as address, opened(browser, address, bypass_csp=True, **view) as page:
        check(page, BASE, FAST, CHILD, CUT)
        page.wait_for_function("() => document.querySelectorAll('#tree circle.dot').length === 8")
        for summary in page.locator("#settings summary").all():
            summary.click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.evaluate(AXE.read_text(encoding="utf-8"))
        found = page.evaluate("axe.run()")
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]] == []
        assert len(found["passes"]) > 20
        if SHOTS:
            page.screenshot(path=Path(SHOTS) / f"page-{scheme}-{width}.png", full_page=True)
