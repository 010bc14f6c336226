"""The built book asks no other host, every picture has words, and it works in a real browser."""

import functools
import os
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml
from bs4 import BeautifulSoup
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support import ROOT

from tools import chromium

BOOK = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [TOC["root"], *(entry["file"] for part in TOC["parts"] for entry in part["chapters"])]
# `make test` says which browser to use, and leaves it empty where none could be had.
CHROMIUM = os.environ.get("BOOK_CHROMIUM", chromium.system())
pytestmark = pytest.mark.slow
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium could be had")
LAPTOP, PHONE = (1280, 900), (390, 844)
PATIENCE = 600_000  # ms, for a busy machine
expect.set_options(timeout=PATIENCE)


def parsed(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


def built_pages() -> list[Path]:
    pages = sorted(BOOK.rglob("*.html"))
    assert pages, "there is no book in _build/html: run make book"
    return [page for page in pages if "_static" not in page.parts]


def is_described(alt: str | None) -> bool:
    """Tell whether an alternative text is one: without it, Sphinx writes the picture's address."""
    return bool(alt and alt.strip()) and not re.search(r"\.(png|jpe?g|svg|webp)$", alt)


# --- without a browser ---------------------------------------------------------------------------


def test_every_page_of_the_contents_was_built():
    assert {f"{page}.html" for page in PAGES} <= {
        page.relative_to(BOOK).as_posix() for page in built_pages()
    }
    assert TOC["root"] in (BOOK / "index.html").read_text(encoding="utf-8")


def test_no_page_loads_anything_from_another_host():
    loaded = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
    found = [
        f"{page.relative_to(BOOK)}: {tag}"
        for page in built_pages()
        for name, attribute in loaded.items()
        for tag in parsed(page).find_all(name)
        if re.match(r"(https?:)?//", tag.get(attribute) or "")
    ]
    assert found == []


def test_no_style_and_no_inline_script_names_another_host():
    address = re.compile(r"(?:url\(|@import\s)\s*[\"']?(?:https?:)?//[^)\"']+")
    found = [
        f"{sheet.relative_to(BOOK)}: {hit}"
        for sheet in BOOK.rglob("*.css")
        for hit in address.findall(sheet.read_text(encoding="utf-8"))
    ]
    for page in built_pages():
        for script in parsed(page).find_all("script", src=False):
            found += re.findall(r"https?://[^\"' ]*\.m?js\b", script.get_text())
    assert found == []


def test_every_picture_of_every_page_has_alternative_text():
    pictures = [(page, image) for page in built_pages() for image in parsed(page).find_all("img")]
    missing = [
        f"{page.relative_to(BOOK)}: {image.get('src')[:80]}"
        for page, image in pictures
        if not is_described(image.get("alt"))
    ]
    assert missing == []


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Serve the book on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(BOOK))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        started = driver.chromium.launch(
            executable_path=CHROMIUM, args=chromium.FLAGS, timeout=PATIENCE
        )
        yield started
        started.close()


@pytest.fixture
def visit(browser: Browser, address: str):
    """Return a function that opens a page and, at the end, insist that nothing went wrong on it."""
    problems: list[str] = []
    contexts = []

    def asked(url: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            problems.append(f"asks another host: {url}")

    def answered(status: int, url: str) -> None:
        if status >= 400:
            problems.append(f"answer {status}: {url}")

    def open_page(name: str, size: tuple[int, int] = LAPTOP, theme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]})
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        context.add_init_script(
            f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}')"
        )
        page = context.new_page()
        page.on("request", lambda request: asked(request.url))
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
        page.on("response", lambda response: answered(response.status, response.url))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on(
            "console",
            lambda line: (
                problems.append(f"{line.type}: {line.text}") if line.type == "error" else None
            ),
        )
        page.goto(f"{address}/{name}", wait_until="networkidle")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


class TestInTheBrowser:
    pytestmark = needs_browser

    @pytest.mark.parametrize(
        ("size", "theme"),
        [
            pytest.param(LAPTOP, "light", id="laptop-light"),
            pytest.param(PHONE, "dark", id="phone-dark"),
            pytest.param(LAPTOP, "dark", id="laptop-dark", marks=pytest.mark.full),
            pytest.param(PHONE, "light", id="phone-light", marks=pytest.mark.full),
        ],
    )
    @pytest.mark.parametrize("name", [*PAGES, "search", "genindex"])
    def test_a_page_opens_and_nothing_is_wrong(self, visit, name, size, theme):
        page = visit(f"{name}.html", size, theme)
        assert page.locator("html").get_attribute("data-theme") == theme
        assert page.evaluate("document.scrollingElement.scrollWidth") <= size[0]
        alts = page.eval_on_selector_all("img", "all => all.map(one => one.getAttribute('alt'))")
        assert [alt for alt in alts if not is_described(alt)] == []
        broken = "all => all.filter(one => one.complete && !one.naturalWidth).map(one => one.src)"
        assert page.eval_on_selector_all("img", broken) == []

    def test_the_first_page_leads_to_the_book(self, visit):
        page = visit("index.html")
        page.wait_for_url(f"**/{TOC['root']}.html")

    def test_the_page_that_forwards_finds_the_icon_that_browsers_ask_for(self, address):
        with urlopen(f"{address}/favicon.ico") as answer:  # raises for 404
            assert answer.status == 200 and answer.read(4) == b"\0\0\1\0"

    def test_a_formula_is_typeset_by_the_mathjax_that_comes_with_the_book(self, visit, address):
        page = visit("search.html")
        page.add_script_tag(url=f"{address}/_static/vendor/mathjax/tex-mml-chtml.js")
        page.evaluate(
            "document.querySelector('h1').textContent = '\\\\(x^2 \\\\in \\\\mathbb{R}\\\\)'"
        )
        page.evaluate("MathJax.startup.promise.then(() => MathJax.typesetPromise())")
        expect(page.locator("h1 mjx-container")).to_be_visible()

    def test_search_finds_a_phrase(self, visit):
        page = visit("search.html?q=receptive+field")
        hits = page.locator("#search-results li a")
        expect(hits.first).to_be_visible()
        assert any("01_encoder" in hit.get_attribute("href") for hit in hits.all())

    def test_every_flipbook_moves_by_mouse_and_by_keyboard(self, visit):
        pages = [name for name in PAGES if parsed(BOOK / f"{name}.html").select(".flipbook")]
        assert pages, "no page of the book has a flipbook"
        for name in pages:
            for book in visit(f"{name}.html").locator(".flipbook").all():
                labels = book.get_attribute("data-labels").split("|")
                shown, slider = book.locator("img:visible"), book.locator("input[type=range]")

                def shows(position: int, labels=labels, shown=shown) -> None:
                    expect(shown).to_have_count(1)
                    expect(shown).to_have_attribute(
                        "alt", re.compile(f": {re.escape(labels[position])}$")
                    )

                shows(0)
                slider.focus()
                slider.press("ArrowRight")
                shows(1)
                slider.press("ArrowLeft")
                shows(0)
                box = slider.bounding_box()
                slider.click(position={"x": box["width"] - 3, "y": box["height"] / 2})
                shows(len(labels) - 1)
                book.get_by_role("button", name="Play").click()
                shows(0)
                book.get_by_role("button", name="Pause").press("Enter")
                expect(book.get_by_role("button", name="Play")).to_be_visible()
