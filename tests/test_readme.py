"""What the README and the prose pages promise is there and works."""

import re
from pathlib import Path

import pytest

from helpers.encoder import BUNDLED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LANDING = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")


def table(text: str) -> list[list[str]]:
    """Return the cells of the rows that begin with a chapter's number."""
    rows = re.findall(r"^\| *\d\d *\|.*\|$", text, flags=re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


CHAPTERS = table(README)


def test_the_example_runs_and_its_comment_is_true():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    promised = [int(side) for side in re.findall(r"# \[([\d, ]+)\]", code)[-1].split(",")]
    assert list(scope["logits"].shape) == promised

    scope["logits"].sum().backward()
    model = scope["model"]
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    assert all(parameter.grad is None for parameter in model.encoder.parameters())


def test_the_table_has_fourteen_chapters_in_order():
    assert [row[0] for row in CHAPTERS] == [f"{number:02}" for number in range(1, 15)]


@pytest.mark.parametrize(("number", "chapter", "question", "status"), CHAPTERS)
def test_a_chapter_is_there_exactly_if_the_table_says_so(number, chapter, question, status):
    assert status in ("read it", "planned")
    slug = LINK.sub(r"\1", chapter)
    found = {path.name for path in (ROOT / "notebooks").glob(f"{number}_*.*")}
    module = ROOT / "helpers" / "bridges" / f"{slug}.py"
    if status == "planned":
        assert not found, f"chapter {number} has files: mark it in README.md and book/index.md"
        assert not module.exists()
        assert not LINK.search(chapter)
    else:
        assert {f"{number}_{slug}.py", f"{number}_{slug}.ipynb"} <= found
        assert LINK.search(chapter)[2] == f"notebooks/{number}_{slug}.ipynb"


def test_the_landing_page_lists_the_same_chapters():
    listed = [[row[0], LINK.sub(r"\1", row[1]), row[2]] for row in table(LANDING)]
    assert listed == [[number, question, status] for number, _, question, status in CHAPTERS]
    linked = [row[0] for row in table(LANDING) if LINK.search(row[1])]
    assert linked == [row[0] for row in CHAPTERS if row[3] == "read it"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "LICENSE-text.md"])
def test_files_that_are_linked_exist(page):
    targets = [target for _, target in LINK.findall((ROOT / page).read_text(encoding="utf-8"))]
    local = [target for target in targets if not target.startswith("https://")]
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_every_address_of_the_repository_is_the_configured_one():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    repository = re.search(r'^Repository\s*=\s*"(.+)"', project, flags=re.MULTILINE)[1]
    how_to_read = (ROOT / "book" / "how_to_read.md").read_text(encoding="utf-8")
    for page in (README, how_to_read):
        assert set(re.findall(r"https://github\.com/[\w.-]+/[\w.-]*\w", page)) == {repository}
    name = repository.removeprefix("https://github.com/")
    links = re.findall(r"https://colab\.research\.google\.com/github/([^)]+)", README)
    assert links
    for opened in links:
        assert opened.startswith(f"{name}/blob/main/notebooks/")
        assert (ROOT / opened.removeprefix(f"{name}/blob/main/")).exists()


def test_the_size_of_the_weights_is_stated():
    assert f"{BUNDLED.stat().st_size / 1e6:.1f} MB" in README


def test_every_reference_says_what_to_read_it_for():
    entries = re.findall(r"^@\w+\{(\w+),$", (ROOT / "book/references.bib").read_text("utf-8"), re.M)
    page = (ROOT / "book" / "references.md").read_text(encoding="utf-8")
    explained = re.findall(r"· \{cite:t\}`(\w+)`\n: \S", page)
    assert sorted(entries) == sorted(explained)
