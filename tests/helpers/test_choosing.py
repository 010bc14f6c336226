"""Every answer to the four questions is one, runs, holds its contract, and fits the records."""

import ast
import contextlib
import inspect
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html import escape
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright

import helpers
from helpers import encoder, records
from helpers.advice import ANSWERS, BRIDGES, QUESTIONS, suggest
from helpers.advice.widget import widget
from helpers.bridges.spatial_pyramid import ContextDecoder
from helpers.encoder import Segmenter
from helpers.inspection import count_macs
from tools import cheat_sheet, chromium

ROOT = Path(__file__).parents[2]
COMBINATIONS = list(product(*(options for _, options in QUESTIONS.values())))
PROGRAMS = {suggest(*chosen).code: chosen for chosen in reversed(COMBINATIONS)}
CHROMIUM = os.environ.get("BOOK_CHROMIUM", chromium.system())


# --- the table and the answers -------------------------------------------------------------------


def test_every_combination_has_an_answer():
    assert len(COMBINATIONS) == 6 * 5 * 5 * 2
    for chosen in COMBINATIONS:
        said = suggest(*chosen)
        assert {said.bridge, said.module} <= {
            *(bridge.name for bridge in BRIDGES.values()),
            *(f"helpers.bridges.{bridge.module}" for bridge in BRIDGES.values()),
        }
        assert said.why.endswith((".", ".)")) and len(said.why) > 60
        assert "{" not in said.code and max(map(len, said.code.splitlines())) <= 84
        assert len(said.code.splitlines()) <= 16


def test_every_answer_and_every_bridge_is_reached():
    first = [
        next(n for n, answer in enumerate(ANSWERS) if answer.fits(*chosen))
        for *chosen, _ in COMBINATIONS
    ]
    assert {*first} == {*range(len(ANSWERS))}
    assert {answer.bridge for answer in ANSWERS} == set(BRIDGES)


def test_the_answers_name_only_what_can_be_asked():
    for answer in ANSWERS:
        assert set(answer.out) <= set(QUESTIONS["out"][1])
        assert set(answer.own_input) <= set(QUESTIONS["own_input"][1])
        assert answer.need in {None, *QUESTIONS["need"][1]}


def test_the_arguments_are_the_questions():
    parameters = inspect.signature(suggest).parameters
    assert list(parameters) == list(QUESTIONS)
    firsts = [next(iter(options)) for _, options in QUESTIONS.values()]
    assert [parameter.default for parameter in parameters.values()] == firsts


@pytest.mark.parametrize("key", BRIDGES)
def test_a_bridge_is_where_the_table_says(key):
    bridge = BRIDGES[key]
    found = getattr(import_module(f"helpers.bridges.{bridge.module}"), bridge.name)
    assert callable(found)
    assert bridge.name in bridge.imports[bridge.module]


def test_the_words_say_only_names_that_exist():
    modules = {bridge.module for bridge in BRIDGES.values()}
    known = {name for slug in modules for name in dir(import_module(f"helpers.bridges.{slug}"))}
    known |= set(dir(encoder)) | {"fit"}
    for answer in ANSWERS:
        for code in re.findall(r"`([A-Z]\w+)`", answer.why):
            assert code in known, code


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"out": "masks"}, ["out", "'masks'", "'mask', 'image'"]),
        ({"need": None}, ["need", "None", "'default', 'thin'"]),
        ({"own_input": ["image"]}, ["own_input", "['image']", "'none', 'image'"]),
        ({"encoder": True}, ["encoder", "True", "'frozen', 'tuned'"]),
        ({"out": "x", "need": "y"}, ["out", "'x'", "need", "'y'"]),
    ],
)
def test_a_bad_answer_is_named_with_those_that_are_allowed(given, said):
    with pytest.raises(ValueError) as error:
        suggest(**given)
    assert all(words in str(error.value) for words in said)


def test_a_suggestion_prints_what_it_has():
    said = suggest("vector", "vector", need="thin")
    for text in (str(said), said._repr_markdown_()):
        parts = said.bridge, str(said.chapter), said.contract, said.code
        assert all(part in text for part in parts)
        assert " ".join(said.why.split()) in " ".join(text.split())
    assert said.module == "helpers.bridges.input_mapping"
    assert max(map(len, str(said).splitlines())) <= 84


def modules_after(program: str) -> set[str]:
    program = f"{program}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_advice_needs_no_torch():
    assert not {"torch", "numpy"} & modules_after("import helpers; helpers.suggest()")
    assert helpers.suggest is suggest


def test_the_data_of_errors_and_advice_is_read_only_where_it_is_asked_for():
    loaded = modules_after("import helpers.encoder, helpers.training")
    assert not {"helpers.advice", "helpers.errors"} & loaded


# --- the programs --------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def weights_are_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "load_bundled", cache(encoder.load_bundled))
        yield


def run(code: str) -> tuple[dict, str]:
    scope: dict = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "<suggested>", "exec"), scope)
    return scope, printed.getvalue().strip()


def sizes(code: str, scope: dict) -> dict[str, int]:
    """Return what the letters and names of a contract stand for in a program that ran."""
    found = {"B": 2, "H": 180, "W": 240, "h": 45, "w": 60, "T": 4}
    for call in ast.walk(ast.parse(code)):
        for keyword in getattr(call, "keywords", []):
            value = eval(ast.unparse(keyword.value), scope)
            if isinstance(value, int):
                found.setdefault(keyword.arg, value)
    return found


def shape_of(contract: str, known: dict[str, int]) -> list[int]:
    shape = contract.rsplit("→", 1)[1].strip(" []").replace("·", "*")
    shape = re.sub("⌈(.+?)⌉", r"ceil(\1)", shape)
    return [eval(side, {"ceil": math.ceil, **known}) for side in shape.split(",")]


@pytest.mark.parametrize("code", PROGRAMS, ids=[" ".join(chosen) for chosen in PROGRAMS.values()])
def test_a_program_runs_and_prints_the_shape_of_the_contract(code):
    scope, printed = run(code)
    assert json.loads(printed) == shape_of(suggest(*PROGRAMS[code]).contract, sizes(code, scope))
    assert code.rstrip().endswith(f"# {printed}")
    tuned = any(weight.requires_grad for weight in scope["encoder"].parameters())
    assert tuned == (PROGRAMS[code][3] == "tuned")


def test_a_decoder_s_program_takes_other_sizes():
    for chosen in COMBINATIONS:
        said = suggest(*chosen)
        if chosen[2] == "size" and chosen[3] == "frozen" and "logits.shape" in said.code:
            code = said.code.replace("180, 240)  # yours", "33, 97)  # yours")
            assert code != said.code
            assert "words" in said.contract or run(code)[1].endswith("33, 97]")


def test_words_with_an_input_of_one_s_own_as_the_text_says():
    said = suggest("words", "vector")
    scope, _ = run(said.code)
    scope["pyramid"] = scope["encoder"](scope["normalize"](scope["images"]))
    scope["mapped"] = torch.rand(2, 96)
    lines = [line for line in re.findall(r"`(.+?)`", said.why) if "=" in line]
    before = scope["logits"]
    exec("\n".join(lines), scope)
    assert len(lines) == 2 and scope["logits"].shape == before.shape
    assert not torch.allclose(scope["logits"], before)


def test_the_cheap_captioner_is_cheap():
    macs = {}
    for need in ("default", "budget"):
        scope, _ = run(suggest("words", need=need).code)
        pyramid = scope["encoder"](scope["images"])
        macs[need] = count_macs(scope["decoder"], pyramid, scope["words"])
    assert 5 * macs["budget"] < macs["default"]


# --- the records ---------------------------------------------------------------------------------

LARGE = ("sky", "building", "road")


@pytest.fixture(scope="module")
def bench() -> list[dict]:
    """Return what was measured with a frozen encoder, at the rates that were chosen."""
    try:
        found = records.load("benchmark")
    except FileNotFoundError:
        pytest.skip("the benchmark has not been measured")
    return [r for r in found if r.get("chosen") and r["frozen"] and r["device"] == "cpu"]


@pytest.fixture(scope="module")
def costs() -> dict[str, dict]:
    try:
        return {r["what"]: r for r in records.load("costs") if r["device"] == "cpu"}
    except FileNotFoundError:
        pytest.skip("the costs have not been measured")


def large(record: dict) -> float:
    return sum(record["iou"][name] for name in LARGE) / len(LARGE)


def scores(bench: list[dict], where: str, what: str, of) -> list[float]:
    return [of(r) for r in bench if (r["data"], r["what"]) == (where, what)]


def better(bench: list[dict], where: str, what: str, of) -> list[str]:
    """Return our decoders whose worst seed is better than its best one; one seed says nothing."""
    own = scores(bench, where, what, of)
    others = {r["what"] for r in bench if not r["what"].startswith(("smp ", "book, "))}
    found = {other: scores(bench, where, other, of) for other in others}
    judged = {other: values for other, values in found.items() if min(len(values), len(own)) > 1}
    return sorted(other for other, values in judged.items() if min(values) > max(own))


def record_of(need: str) -> str:
    name = suggest("mask", need=need).bridge
    (record,) = {bridge.record for bridge in BRIDGES.values() if bridge.name == name}
    return record


@pytest.mark.parametrize("need", ["default", "thin", "large", "budget"])
def test_what_is_suggested_was_measured(bench, costs, need):
    assert len(scores(bench, "scenes", record_of(need), lambda r: r["miou"])) >= 2
    assert record_of(need) in costs


@pytest.mark.parametrize(
    ("need", "where", "of"),
    [
        ("default", "scenes", lambda r: r["miou"]),
        ("default", "streets", lambda r: r["miou"]),
        ("thin", "scenes", lambda r: r["thin_iou"]),
        ("thin", "streets", lambda r: r["thin_iou"]),
        ("large", "streets", large),
    ],
)
def test_nothing_of_ours_is_better_at_what_it_is_suggested_for(bench, need, where, of):
    own = scores(bench, where, record_of(need), of)
    if where == "streets" and len(own) < 2:
        pytest.skip(f"on streets, {record_of(need)} has {len(own)} seed(s): no spread to judge by")
    assert better(bench, where, record_of(need), of) == []


def test_the_image_beside_the_features_draws_sharper_scenes_and_coarser_streets(bench):
    def margin(where: str, better: str, worse: str) -> float:
        found = (scores(bench, where, w, lambda r: r["boundary_miou"]) for w in (better, worse))
        first, second = found
        return min(first) - max(second)

    beside, book = "image beside c3…c5", record_of("thin")
    assert margin("scenes", beside, book) > 0
    assert margin("streets", book, beside) > 1
    assert suggest("mask", "image").bridge == "ConditionalDecoder"


def test_nothing_of_ours_is_cheaper_than_what_is_suggested_for_little_work(bench, costs):
    own = costs[record_of("budget")]
    ours = {r["what"] for r in bench if not r["what"].startswith(("smp ", "book, "))}
    assert own["macs"] == min(costs[what]["macs"] for what in ours)
    whole = costs["book decoder"]["encoder_macs"]
    assert own["macs"] < whole and own["latency"][2] < 1  # the text: less than the encoder alone
    assert costs["c3, ASPP"]["macs"] < 1.2 * own["macs"]  # the text: little more …
    gained, before = (
        scores(bench, "scenes", what, lambda r: r["miou"]) for what in ("c3, ASPP", "c3, PPM")
    )
    assert min(gained) - max(before) > 2  # … and over two points


def test_the_suggested_program_does_the_work_that_was_measured(costs):
    scope, _ = run(suggest("mask", need="budget").code)
    x = torch.rand(1, 3, 192, 256)
    decoder = ContextDecoder(scope["encoder"].out_channels, 11, level=3)
    model = Segmenter(scope["model"].encoder, decoder).eval()
    assert count_macs(model, x) == costs[record_of("budget")]["macs"]


# --- the widget and the cheat sheet --------------------------------------------------------------


def test_the_widget_holds_every_suggestion():
    html = widget().html
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    found = json.loads(data)
    assert len(found["answers"]) == len(COMBINATIONS)
    for chosen, places in zip(COMBINATIONS, found["answers"], strict=True):
        said = suggest(*chosen)
        where = str(said.chapter), said.chapter.name
        parts = [said.bridge, *where, said.contract, said.why, said.code]
        assert [found["texts"][place] for place in places] == parts


def test_the_widget_is_small_asks_no_host_and_needs_no_script_to_say_something():
    html = widget().html
    assert len(html) < 90_000 and "http" not in html and "@" not in html
    shown = re.sub(r"<(template|script|style)\b.*?</\1>", "", html, flags=re.DOTALL)
    for bridge in BRIDGES.values():
        assert bridge.name in shown and escape(bridge.purpose) in shown
    bundle = widget()._repr_mimebundle_()
    assert bundle["text/html"] == html == widget()._repr_html_()


def test_the_cheat_sheet_is_up_to_date():
    page = cheat_sheet.PAGE.read_text(encoding="utf-8")
    assert page == cheat_sheet.make_page(), "run make sync"
    assert all(f"`{bridge.name}`" in page for bridge in BRIDGES.values())


PATIENCE = 600_000  # ms: how long a busy machine may take
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=chromium.FLAGS)
        yield started
        started.close()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium could be had")
class TestInTheBrowser:
    @pytest.fixture
    def show(self, browser: Browser, tmp_path: Path):
        """Return a function that opens a page with two widgets, which may do nothing wrong."""
        problems: list[str] = []
        contexts = []
        html = widget().html

        def open_page(width: int = 1280, name: str = "notebooks/13_x.html", **options) -> Page:
            file = tmp_path / name
            file.parent.mkdir(exist_ok=True)
            head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            file.write_text(f"<!doctype html>{head}{html}{html}", encoding="utf-8")
            context = browser.new_context(viewport={"width": width, "height": 844}, **options)
            context.set_default_timeout(PATIENCE)
            contexts.append(context)
            page = context.new_page()
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(file.as_uri())
            return page

        yield open_page
        for context in contexts:
            context.close()
        assert problems == []

    def test_the_answer_changes_with_what_is_chosen_and_in_this_widget_only(self, show):
        page = show()
        first, second = page.locator(".bridge-chooser").all()
        for root in (first, second):
            expect(root.get_by_role("status")).to_contain_text("BookDecoder")
            expect(root.locator("table")).to_have_count(0)
        for chosen in [("words", "picture", "size", "tuned"), ("map", "none", "large", "frozen")]:
            for (question, _), answer in zip(QUESTIONS.values(), chosen, strict=True):
                first.get_by_label(question).select_option(answer)
            said = suggest(*chosen)
            status = first.get_by_role("status")
            expect(status).to_contain_text(said.why.replace("`", ""))
            expect(status.locator("[data-part=bridge]")).to_have_text(said.bridge)
            expect(first.locator("[data-part=contract]")).to_have_text(said.contract)
            assert first.locator("pre").inner_text().strip() == said.code.strip()
            link = status.get_by_role("link", name=str(said.chapter))
            page_of = f"../notebooks/{said.chapter.name}.html"
            expect(link).to_have_attribute("href", page_of)
        expect(second.get_by_role("status")).to_contain_text("BookDecoder")

    def test_it_works_from_the_keyboard(self, show):
        root = show().locator(".bridge-chooser").first
        root.get_by_label("What should come out?").press("ArrowDown")
        expect(root.get_by_role("status")).to_contain_text(suggest("image").why)

    def test_the_code_is_copied(self, show):
        page = show(permissions=["clipboard-read", "clipboard-write"])
        page.get_by_role("button", name="Copy the code").first.click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == suggest().code

    def test_a_phone_scrolls_the_code_and_not_the_page(self, show):
        page = show(390)
        for chosen in range(6):
            page.locator("select").first.select_option(index=chosen)
            assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
        assert page.locator("select").first.bounding_box()["height"] >= 40

    def test_without_scripts_there_is_a_table(self, show):
        page = show(390, java_script_enabled=False)
        expect(page.get_by_role("cell", name="BookDecoder").first).to_be_visible()
        expect(page.locator("select")).to_have_count(0)

    def test_in_a_notebook_it_links_to_no_page_that_is_not_there(self, show):
        page = show(name="outputframe.html")
        assert page.locator("[data-part=chapter]").first.get_attribute("href") is None
