"""Write `book/error_index.md` from `helpers.errors`, with the messages that its examples raise.

python -m tools.error_index            writes the page
python -m tools.error_index --check    fails where the page is not what would be written
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from helpers.errors import ROWS, UNKNOWN, Chapter, Row, find

PAGE = Path(__file__).parent.parent / "book" / "error_index.md"

INTRODUCTION = """\
<!-- Written by tools/error_index.py from helpers/errors.py: edit there. -->

# What does this error mean?

The errors that people hit when they put a decoder on a ResNet-18: why each of them comes and which
line to change. Paste yours, or read on; every message below was raised by the lines under it. What
goes wrong [without a message](error-silent) is at the end.
"""

BOX = """\
```{raw} html
<style>
#error-box textarea, #error-result {
  box-sizing: border-box; width: 100%; border-radius: .4rem; padding: .6rem .8rem;
  border: 1px solid var(--pst-color-border); color: var(--pst-color-text-base);
}
#error-box label { display: block; font-weight: 600; margin-bottom: .3rem; }
#error-box textarea {
  background: var(--pst-color-surface); resize: vertical;
  font: 16px/1.4 var(--pst-font-family-monospace, monospace);
}
#error-result { border-left: .3rem solid var(--pst-color-primary); margin: .6rem 0 1.5rem; }
#error-result:empty { display: none; }
#error-result p { margin: .3rem 0; overflow-wrap: anywhere; }
#error-result pre { margin: .3rem 0; overflow-x: auto; }
.error-message pre { white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
<div id="error-box">
<label for="error-text">Paste the last line of the traceback, or all of it</label>
<textarea id="error-text" rows="4" spellcheck="false" autocapitalize="off" autocomplete="off"
 placeholder="RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x8192 and 6272x256)"
></textarea>
<div id="error-result" role="status" aria-live="polite"></div>
<noscript><p>The box needs JavaScript; the sections below do not.</p></noscript>
</div>
<script type="application/json" id="error-index">DATA</script>
<script src="../_static/error_index.js"></script>
```
"""

IN_CODE = """\
In a notebook or a script, the same words appear under the traceback of whatever goes wrong inside
this block (the error itself passes through unchanged):

```python
from helpers.errors import explaining

with explaining():
    ...  # the lines that fail
```
"""

SILENT = """\
(error-silent)=
## No message, and still wrong

| what you see | what it may be | see |
|---|---|---|
| fine in training, bad in evaluation | BatchNorm of a “frozen” encoder goes on drifting: neither `requires_grad = False` nor leaving it out of the optimiser stops it | [01](../notebooks/01_encoder.ipynb) |
| pretrained, and hardly better than random | the images are not in 0…1, or were not normalised | [01](../notebooks/01_encoder.ipynb) |
| memory grows with every pass; the maps are always those of the first image | hooks append to a list that nobody empties | [01](../notebooks/01_encoder.ipynb) |
| a map that you kept changes afterwards | the next layer, a ReLU, works in place | [01](../notebooks/01_encoder.ipynb) |
| the vector knows what is there and not where | it was averaged over all positions | [02](../notebooks/02_pooling_linear.ipynb) |
| right shapes, and the decoder learns next to nothing | `view` or `reshape` where `transpose` was needed: channels and pixels are mixed | [03](../notebooks/03_conv_projection.ipynb) |
| attention mixes images instead of positions | `batch_first=True` is missing | [04](../notebooks/04_attention.ipynb) |
| masks are blobs | nothing finer than `c5` is read | [05](../notebooks/05_unet.ipynb) |
| more layers change nothing | no activation between them: together they are one linear map | [05](../notebooks/05_unet.ipynb) |
| mIoU depends on the batch size | it was averaged over batches; count over all images, as `evaluate` does | [05](../notebooks/05_unet.ipynb) |
| a branch changes nothing | its gate or mask is stuck, or carries nothing: fix it at its mean, and compare | [09](../notebooks/09_conditional_concat.ipynb) |
| a checkerboard in the output | the kernel of a transposed convolution is no multiple of its stride, or it started unevenly | [08](../notebooks/08_upsampling.ipynb) |
| masks lie beside their things, the more the nearer to the rims | `align_corners=True` | [08](../notebooks/08_upsampling.ipynb) |
| every word of a sentence is known in training, none is right alone | the decoder sees the word that it has to say | [11](../notebooks/11_sequences.ipynb) |
"""  # noqa: E501

SECTION = """\
(error-{slug})=
## {title}

```{{code-block}} text
:class: error-message
{message}
```

**Why.** {cause}

These lines raise it:

{example}

**Cure.** {cure}

{fixed}

Read on: {chapter}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    page = make_page()
    if not check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        raise SystemExit(f"{PAGE.name} is out of date: run python -m tools.error_index")


def make_page() -> str:
    """Return the page as MyST Markdown; runs every example, and raises if one does not fail."""
    # "</script>" in a text would end the block early.
    data = json.dumps(index_data(), ensure_ascii=False).replace("<", "\\u003c")
    start = [INTRODUCTION, BOX.replace("DATA", data), IN_CODE]
    return "\n".join([*start, *map(_section, ROWS), SILENT])


def index_data() -> dict[str, object]:
    """Return what the paste box needs: the rows, and what to say where none fits."""
    rows = [
        {
            "slug": row.slug,
            "pattern": row.pattern,
            "title": row.title,
            "numbers": row.numbers,
            "cause": row.cause,
            "cure": row.cure,
            "change": "\n".join(row.change()),
            "chapter": str(row.chapter),
            "href": _address(row.chapter, "html"),
        }
        for row in ROWS
    ]
    return {"unknown": UNKNOWN, "rows": rows}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop warnings, and what is printed, by libraries below Python as well."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)


def raised_by(row: Row) -> str:
    """Run a row's example and return the last line of its traceback."""
    try:
        with quiet():
            exec(compile(row.example, f"<{row.slug}>", "exec"), {})
    except Exception as error:
        message = "".join(traceback.format_exception_only(error)).strip()
        found = find(message)
        if found is None or found[0] is not row:
            raise AssertionError(f"{row.slug}: the example raised another error") from error
        # From 2.15 on, torch begins with the operator's name; the page shows what all versions say.
        return message.replace(": addmm: ", ": ")
    raise AssertionError(f"{row.slug}: the example raised nothing")


def _section(row: Row) -> str:
    left, right = row.example.splitlines(), row.fixed.splitlines()
    changes = difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes()
    broken = [n for tag, a, b, _, _ in changes if tag != "equal" for n in range(a, b)]
    cured = [n for tag, _, _, a, b in changes if tag != "equal" for n in range(a, b)]
    address = _address(row.chapter, "ipynb")
    return SECTION.format(
        slug=row.slug,
        title=row.title,
        message=raised_by(row).splitlines()[0],  # an exporter adds its graph
        cause=row.cause,
        cure=row.cure,
        example=_code(left, broken),
        fixed=_code(right, cured),
        chapter=f"[{row.chapter}]({address})" if address else row.chapter,
    )


def _address(chapter: Chapter, suffix: str) -> str:
    """Return where a chapter lies, seen from the page, or nothing where it is not written yet."""
    notebook = chapter.notebook
    return f"../notebooks/{notebook.stem}.{suffix}" if notebook.exists() else ""


def _code(lines: list[str], emphasized: list[int]) -> str:
    numbers = ",".join(str(n + 1) for n in emphasized)
    option = [f":emphasize-lines: {numbers}"] if numbers else []
    return "\n".join(["```{code-block} python", *option, *lines, "```"])


if __name__ == "__main__":
    main()
