"""The chatbot's page in a real browser, on the real small model: ask, stream, open a source, delete, ask again."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.examples.searching import ASKED, MUSEUM, save_taught

APP = Path(__file__).resolve().parents[2] / "examples" / "chatbot_llama_index" / "app.py"
DOCUMENTS = {
    "harbour.md": "The lighthouse on the island of Brennock was built in 1862 and is forty metres tall. "
    "Its lamp burned whale oil until 1911, when it was changed to electric light. Ships bound for the old harbour "
    "take their bearing from it on winter nights, and the keeper writes down each one in a green ledger.",
    "library.md": "The old library of Brennock stands beside the river. Its reading room holds forty thousand "
    "books, most of them given by the widow Agnes Tarrow. <script>document.title = 'broken'</script> It opens at nine "
    "o'clock on weekdays and stays closed on Sundays. 日本語 books have a shelf of their own 📚.",
}
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """A Chromium on the path, or the one that Playwright installed for itself."""
    for name in NAMES:
        if (path := shutil.which(name)) is not None:
            return path
    with sync_api.sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


HOW = "browser test left out: it needs playwright and Chromium (pip install playwright; apt-get install chromium)"
try:
    from playwright import sync_api
except ImportError:
    pytest.skip(HOW, allow_module_level=True)
BROWSER = find_browser()
if BROWSER is None:
    pytest.skip(HOW, allow_module_level=True)

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running chatbot over two short documents."""
    with running(tmp_path_factory.mktemp("chatbot"), DOCUMENTS) as address:
        yield address


@contextmanager
def running(directory: Path, documents: dict[str, str], *options: str) -> Iterator[str]:
    """The address of a chatbot over these documents."""
    (directory / "documents").mkdir()
    for name, text in documents.items():
        (directory / "documents" / name).write_text(text, encoding="utf-8")
    command = [sys.executable, str(APP), str(directory / "documents"), "--db", str(directory / "db"), "--port", "0"]
    command += options
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        seen = []
        for line in process.stdout:
            seen.append(line)
            if found := re.search(r"http://\S+", line):
                break
        else:
            pytest.fail("the chatbot did not start: " + "".join(seen[-20:]))
        yield found.group()
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address) as page:
        yield page


@contextmanager
def opened(browser: Any, address: str) -> Iterator[Any]:
    """A page that must log no error and load nothing from elsewhere."""
    page = browser.new_page(viewport={"width": 1360, "height": 860})
    page.set_default_timeout(120_000)
    problems: list[str] = []

    def note(said: Any) -> None:
        if said.type in ("error", "warning") and "status of 422" not in said.text:  # Chromium's own, of refused input
            problems.append(said.text)

    page.on("console", note)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda sent: None if sent.url.startswith((address, "data:")) else problems.append(sent.url))
    page.goto(address)
    page.get_by_text("What would you like to know?").wait_for()
    yield page
    page.close()
    assert problems == []


def ask(page: Any, question: str) -> Any:
    """Ask by keyboard and wait for the whole answer; returns its turn."""
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("button", name="Ask", exact=True).wait_for()
    return page.locator(".turn").last


def test_ask_open_a_source_delete_and_ask_again(page: Any) -> None:
    expect = sync_api.expect
    page.get_by_text("Compare with full prefill").click()
    page.evaluate(
        """() => { window.steps = new Set(); new MutationObserver(() => {
            const answer = document.querySelector('.answer'); if (answer) window.steps.add(answer.textContent.length);
        }).observe(document.getElementById('turns'), {subtree: true, childList: true, characterData: true}); }"""
    )
    turn = ask(page, "How many books does the reading room of the library hold?")
    assert re.search("40,000|thousand", turn.locator(".answer").inner_text())
    assert page.evaluate("window.steps.size") > 3  # it grew piece by piece
    expect(turn.locator(".facts")).to_contain_text("First token after")
    expect(turn.locator(".comparison")).to_contain_text(re.compile("full prefill", re.IGNORECASE))
    expect(turn.locator(".comparison dl")).to_be_visible()

    source = turn.get_by_role("button", name="library.md")
    expect(source).to_contain_text("from cache")
    source.click()
    panel = page.get_by_role("complementary", name="library.md")
    expect(panel.get_by_role("heading")).to_be_focused()
    text = panel.get_by_role("region")
    assert text.inner_text() == DOCUMENTS["library.md"]  # every token, and the script as text
    assert page.title() == "Chat with your documents"
    recomputed = text.locator(".r").count()
    assert f"{recomputed} of " in panel.inner_text()
    assert recomputed > 0
    shades = text.evaluate(
        "node => [...node.querySelectorAll('.s1, .s6')].map(t => getComputedStyle(t).backgroundColor)"
    )
    assert len(set(shades)) >= 2  # drawn in different shades
    page.keyboard.press("Escape")
    expect(panel).to_be_hidden()
    expect(source).to_be_focused()

    before = page.locator("#totals").inner_text()
    page.get_by_role("button", name="Delete library.md").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#change").get_by_text(re.compile(r"Deleted library\.md: .1 chunk"))).to_be_visible()
    assert page.locator("#totals").inner_text() != before
    turn = ask(page, "How many books does the reading room of the library hold?")
    expect(turn.get_by_role("button", name="harbour.md")).to_be_visible()
    assert turn.get_by_role("button", name="library.md").count() == 0

    page.reload()  # the history is kept
    expect(page.locator(".turn")).to_have_count(2)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_documents_come_and_bad_input_is_told(page: Any, tmp_path: Path) -> None:
    expect = sync_api.expect
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("The question is empty")
    bad = tmp_path / "photo.exe"
    bad.write_bytes(b"MZ")
    page.locator("#file").set_input_files(bad)
    expect(page.locator("#upload-problem")).to_contain_text("cannot be read. Allowed: .md, .txt")
    good = tmp_path / "<b>ferry<b>.txt"
    good.write_text("The ferry to Brennock leaves at half past six every morning from the north pier.")
    page.locator("#file").set_input_files(good)
    expect(page.locator("#change").get_by_text("Added <b>ferry<b>.txt: +1 chunk")).to_be_visible()
    page.get_by_role("button", name="Delete <b>ferry<b>.txt").click()
    page.keyboard.press("Escape")  # keeps it
    expect(page.get_by_role("button", name="Delete <b>ferry<b>.txt")).to_be_visible()


def test_a_phone(page: Any) -> None:
    expect = sync_api.expect
    page.set_viewport_size({"width": 375, "height": 720})
    expect(page.locator("#documents")).to_be_hidden()
    page.get_by_role("button", name="Documents", exact=True).click()
    expect(page.get_by_role("button", name="Delete harbour.md")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#documents")).to_be_hidden()
    turn = ask(page, "How tall is the lighthouse?")
    turn.get_by_role("button", name="harbour.md").click()
    expect(page.locator("#source")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.get_by_role("button", name="Close source").click()
    expect(page.locator("#source")).to_be_hidden()


def test_a_search_of_the_model_is_shown_with_what_it_found(browser: Any, tmp_path: Path) -> None:
    expect = sync_api.expect
    prompt = ast.literal_eval(re.search(r"AGENT_PROMPT = (.+)", (APP.parent / "agent.py").read_text("utf-8"))[1])
    model = save_taught(tmp_path / "model", prompt)
    options = ("--model", str(model), "--tools")
    with running(tmp_path, {"town.md": MUSEUM}, *options) as address, opened(browser, address) as page:
        turn = ask(page, ASKED)
        expect(turn.locator(".call")).to_have_text("search documents “museum”")
        assert turn.locator(".answer").inner_text().startswith("I look.")
        source = turn.get_by_role("button", name="town.md")
        expect(source).to_contain_text("from cache")
        expect(turn.locator(".facts")).to_have_count(1)
        source.click()
        assert page.get_by_role("complementary", name="town.md").get_by_role("region").inner_text() == MUSEUM.strip()
        if shots := os.environ.get("SHOTS"):
            page.screenshot(path=shots)
        page.reload()  # the history is kept, without what the search found
        expect(page.locator(".turn")).to_have_count(1)
