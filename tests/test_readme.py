"""What the README and the prose pages promise is there and works."""

import re
from pathlib import Path

import pytest

from helpers.encoder import BUNDLED
from tools import notebook
from tools.project import Chapter, contents

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")
CHAPTERS = contents()


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


def test_the_chapters_are_numbered_in_order():
    assert [chapter.number for chapter in CHAPTERS] == list(range(1, len(CHAPTERS) + 1))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_a_chapter_is_there_exactly_if_chapters_toml_says_so(chapter: Chapter):
    assert chapter.status in ("read it", "planned")
    found = {path.name for path in (ROOT / "notebooks").glob(f"{chapter.number:02}_*.*")}
    if chapter.planned:
        assert not found, f"{chapter.name} has files: change its status in chapters.toml"
        assert not (ROOT / "helpers" / "bridges" / f"{chapter.slug}.py").exists()
        assert not chapter.answer and not chapter.minutes
    else:
        assert found == {f"{chapter.name}.py", f"{chapter.name}.ipynb"}
        assert 0 < len(chapter.answer.split()) <= 15
        assert chapter.minutes == minutes(chapter), f"chapters.toml: minutes of {chapter.name}"


def minutes(chapter: Chapter) -> int:
    """Return how long the prose takes to read, at 220 words a minute, rounded to five."""
    cells = notebook.load(ROOT / "notebooks" / f"{chapter.name}.ipynb").cells
    words = sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown")
    return max(5, 5 * round(words / 220 / 5))


@pytest.mark.parametrize("page", ["README.md", "book/index.md", "_toc.yml"])
def test_a_page_links_the_chapters_that_can_be_read(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for chapter in CHAPTERS:
        assert (f"notebooks/{chapter.name}" in text) != chapter.planned


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE-text.md"]
)
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
