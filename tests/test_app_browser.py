"""`midskip app` in a real browser: `make extras`. Skipped where there is no chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_curve import CURVE

pytestmark = pytest.mark.extras
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
)
SENTENCE = "the cat sat on mat 3, and the dog saw it"
HOSTILE = (
    "<script>alert(1)</script><img src=http://example.org/x onerror=alert(2)> \u202eevil\u2066 **b** [a](javascript:b)"
)
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, saved_model: Path) -> Iterator[str]:
    """Of the command, with a run that has a calibration and one that has none."""
    folder = tmp_path_factory.mktemp("app")
    for name in ("calibrated", "plain"):
        shutil.copytree(saved_model, folder / name)
    config = json.loads((folder / "calibrated" / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"calibration": CURVE})
    (folder / "calibrated" / "config.json").write_text(text, encoding="utf-8")
    (folder / "text.txt").write_text(SENTENCE, encoding="utf-8")
    command = [sys.executable, "-m", "midskip", "app", "calibrated", "plain", "--text_file", "text.txt"]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert re.match(r"http://127\.0\.0\.1:\d+/  \(Ctrl-C ends it\)", line), line
    yield line.split()[0]
    process.send_signal(signal.SIGINT)  # as Ctrl-C does
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "midskip: interrupted" in rest and "Traceback" not in rest


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("browser"), executable_path=CHROMIUM, args=FLAGS.split(),
            viewport={"width": 1280, "height": 1000},
        )  # fmt: skip
        context.set_default_timeout(WAIT_MS)
        yield context
        context.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, opened anew; nothing may be asked of another machine, no dialog opened and no error thrown."""
    page = browser.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#ms-view-a b")
    yield page
    page.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == [] and asked
    assert wrong == []


def text_of(page: Any, side: str = "a") -> str:
    return page.locator(f"#ms-view-{side} .ms-text").inner_text()


def share_of(page: Any) -> float:
    found = re.search(r"([\d.]+)%", page.locator("#ms-view-a .ms-facts").inner_text())
    assert found
    return float(found[1])


def write(page: Any, text: str) -> None:
    page.locator("#ms-box textarea").fill(text)


def wait_for(page: Any, text: str, side: str = "a") -> None:
    page.wait_for_function(
        "([side, text]) => document.querySelector(`#ms-view-${side} .ms-text`)?.innerText.includes(text)",
        arg=[side, text],
    )


def test_text_is_coloured_as_it_is_typed(page: Any) -> None:
    assert text_of(page) == SENTENCE
    page.locator("#ms-box textarea").press_sequentially(" and a bird")
    wait_for(page, "and a bird")
    token = page.locator("#ms-view-a b").first
    blocks = int(token.get_attribute("class").removeprefix("d"))
    legend = page.locator(f"#ms-view-a .ms-legend .d{blocks}")
    colour = "one => getComputedStyle(one).backgroundColor"
    assert token.evaluate(colour) == legend.evaluate(colour) != "rgba(0, 0, 0, 0)"


def test_hostile_text_is_shown_and_does_nothing(page: Any) -> None:
    write(page, HOSTILE)
    wait_for(page, "<script>alert(1)</script><img src=http://example.org/x")
    assert "**b** [a](javascript:b)" in text_of(page) and "onerror" in text_of(page) and "\u202e" not in text_of(page)
    assert page.locator("#ms-view-a img, #ms-view-a script, #ms-view-a a").count() == 0
    page.locator("#ms-view-a b").nth(3).click()
    page.wait_for_selector("#ms-picked-a table")
    assert page.locator("#ms-picked-a img, #ms-picked-a script, .ms-card img").count() == 0


def test_pointing_shows_a_card_and_a_click_runs_other_depths(page: Any) -> None:
    token = page.locator("#ms-view-a b").nth(2)
    token.hover()
    card = page.locator(".ms-card")
    assert re.search(r"of 4 blocks\s+was predicted with [\d.]+ nats\s+predicts .* rank \d+ of", card.inner_text())
    assert card.locator("svg").count() == 2, "gates and scores"
    token.click()
    page.wait_for_selector("#ms-picked-a table")
    picked = page.locator("#ms-picked-a").inner_text()
    assert "every layer" in picked and "as it is" in picked and "Token 2" in picked


def test_everything_is_reached_by_keys(page: Any) -> None:
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('#ms-view-a b')"):
            break
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(key)
    focused = page.evaluate("document.activeElement.dataset.i")
    assert int(focused) == 2
    described = page.evaluate("document.activeElement.getAttribute('aria-describedby')")
    assert page.evaluate("id => document.getElementById(id)?.textContent", described).count("blocks") == 1
    page.keyboard.press("Enter")
    page.wait_for_selector("#ms-picked-a table")
    assert "Token 2" in page.locator("#ms-picked-a").inner_text()
    page.keyboard.press("Escape")
    assert page.locator(".ms-card").count() == 0


def test_sliders_redraw(page: Any) -> None:
    before = share_of(page)
    assert page.locator("#ms-trained-a input").is_checked()
    budget = page.locator("#ms-budget-a input[type=range]")
    budget.focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("!document.querySelector('#ms-trained-a input').checked")
    page.wait_for_function(f"!document.querySelector('#ms-view-a .ms-facts').innerText.includes('{before}%')")
    page.locator("#ms-ceiling-a input[type=range]").focus()
    page.keyboard.press("Home")
    page.wait_for_function("!document.querySelector('#ms-view-a .ms-text .d4')")
    assert share_of(page) == 0, "no block fits under a ceiling of 1, where layers are mirrored"


def test_two_runs_side_by_side_and_what_cannot_be_set(page: Any) -> None:
    page.locator("#ms-both input").click()
    wait_for(page, SENTENCE, "b")
    assert page.locator("#ms-budget-b input[type=range]").is_disabled()
    assert "midskip calibrate" in page.locator("#ms-b").inner_text()
    write(page, "the dog")
    for side in "ab":
        wait_for(page, "the dog", side)
        page.wait_for_function(f"document.querySelectorAll('#ms-view-{side} b').length < 8")


def test_it_goes_on_with_the_text(page: Any) -> None:
    page.locator("#ms-go-on").click()
    page.wait_for_function(f"document.querySelector('#ms-box textarea').value.length > {len(SENTENCE)}")
    written = page.locator("#ms-box textarea").input_value()
    assert written.startswith(SENTENCE) and written != SENTENCE
    page.wait_for_selector("#ms-view-a .ms[data-look]")
    assert page.locator("#ms-view-a b").count() > 20


SLOWLY = """
import sys, time
from midskip.app.blocks import serve
from midskip.app.session import Session
from midskip.runs import load_run

def slowly(*arguments):
    for step in go_on(*arguments):
        yield step
        time.sleep(0.3)

session = Session({"run": load_run(sys.argv[1])})
go_on, session.go_on = session.go_on, slowly
print(serve(session, sys.argv[2], "127.0.0.1", None, False)[1], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("is_edited", [False, True])
def test_stopped_it_keeps_what_was_written_unless_the_text_was_edited(
    browser: Any, saved_model: Path, is_edited: bool
) -> None:
    """With a model that takes its time."""
    command = [sys.executable, "-c", SLOWLY, str(saved_model), SENTENCE]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    page = browser.new_page()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            page.goto(process.stdout.readline().strip())
            page.wait_for_selector("#ms-view-a .ms[data-look]")
            box, before = page.locator("#ms-box textarea"), page.locator("#ms-view-a b").count()
            page.locator("#ms-go-on").click()
            page.wait_for_function(f"document.querySelectorAll('#ms-view-a b').length > {before + 2}")
            assert box.input_value() == SENTENCE, "it is still being written"
            if is_edited:
                box.fill("my own")
            page.locator("#ms-stop").click()
            if not is_edited:
                page.wait_for_function(f"document.querySelector('#ms-box textarea').value.length > {len(SENTENCE)}")
            page.wait_for_selector("#ms-view-a .ms[data-look]")
            kept = box.input_value()
            time.sleep(1)
            assert box.input_value() == kept and kept.startswith("my own" if is_edited else SENTENCE)
            assert page.locator("#ms-view-a .ms-text").inner_text().startswith(kept[:6])
        finally:
            page.close()
            process.kill()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_either_scheme(browser: Any, address: str, scheme: str) -> None:
    page = browser.new_page()
    page.emulate_media(color_scheme=scheme)
    page.goto(address)
    page.wait_for_selector("#ms-view-a b")
    page.locator("#ms-view-a b").nth(2).hover()
    contrasts = page.evaluate(CONTRAST)
    page.close()
    assert len(contrasts) >= 8
    assert {name: value for name, value in contrasts.items() if value < 4.5} == {}


# WCAG's contrast of words with the first ground behind them that is not transparent
CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const colour = rgb(getComputedStyle(one).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = {};
  for (const name of ['.ms-facts dt', '.ms-facts dd', '.ms-text b', '.ms-legend span', '.ms-legend li', '.ms-note',
    '.ms h4', '.kinds td', '.kinds th', '.ms-card p', '.ms-card small', '.ms-card q']) {
    for (const one of document.querySelectorAll(name)) {
      const [high, low] = [light(rgb(getComputedStyle(one).color)), light(ground(one))].sort((a, b) => b - a);
      found[name] = Math.min(found[name] ?? 99, (high + 0.05) / (low + 0.05));
    }
  }
  return found;
}"""


def test_a_long_text_stays_responsive(page: Any) -> None:
    write(page, (SENTENCE + "\n") * 400)
    page.wait_for_function("document.querySelectorAll('#ms-view-a b').length > 5000")
    tokens = page.locator("#ms-view-a b").count()
    assert page.locator("#ms-view-a *").count() < 2 * tokens
    began = time.monotonic()
    page.locator("#ms-view-a b").nth(4000).hover()
    page.wait_for_selector(".ms-card")
    assert time.monotonic() - began < 5
