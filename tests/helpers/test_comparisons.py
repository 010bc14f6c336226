"""Pictures that compare: points stand where their numbers are, and names cover nothing."""

from __future__ import annotations

import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from helpers.plotting import (
    MUTED,
    PALETTE,
    PAPER,
    charts,
    pictures,
    show_intervals,
    show_ranks,
    show_tradeoff,
)

ALT = "what the picture shows"


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures, before they become pictures."""
    found: list[Figure] = []
    monkeypatch.setattr(pictures, "picture", lambda figure, alt: found.append(figure))
    return found


def many(count: int, seed: int = 0) -> dict[str, tuple[float, list[float]]]:
    """Crowded points: most costs alike, most scores within a few points."""
    dice = np.random.default_rng(seed)
    return {
        f"a decoder, number {index}": (float(cost), list(score + dice.normal(0, 0.3, 3)))
        for index, (cost, score) in enumerate(
            zip(2 + dice.exponential(2, count), dice.normal(48, 3, count), strict=True)
        )
    }


def boxes(figure: Figure) -> dict[str, matplotlib.transforms.Bbox]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    names = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    return {n.get_text(): Text.get_window_extent(n, canvas.get_renderer()) for n in names}


def points(figure: Figure) -> list[tuple[float, float, str, str]]:
    """Position, marker and fill of each point."""
    lines = [line for line in figure.axes[0].lines if line.get_marker() in ("o", "v")]
    return [
        (*(float(d[0]) for d in line.get_data()), line.get_marker(), line.get_markerfacecolor())
        for line in lines
        if len(line.get_data()[0])
    ]


# --- score against cost


def test_a_point_stands_at_its_cost_and_its_mean_score(drawn):
    given = {"a": (1.5, [3.0, 5.0]), "b": (20.0, 7.0)}
    show_tradeoff(given, "cost", "score", alt=ALT, front=["b"])
    (figure,) = drawn
    assert [(x, y) for x, y, *_ in points(figure)] == [(1.5, 4.0), (20.0, 7.0)]
    assert figure.axes[0].get_xscale() == "log"
    bars = [line for line in figure.axes[0].lines if line.get_marker() == "None"]
    assert [list(bar.get_ydata()) for bar in bars] == [[3.0, 5.0], [7.0, 7.0]]
    weights = {t.get_text(): t.get_fontweight() for t in figure.axes[0].texts}
    assert weights == {"a": "normal", "b": "bold"}


@pytest.mark.parametrize("seed", range(3))
def test_names_stand_inside_and_hardly_cover_each_other(drawn, seed):
    show_tradeoff(many(24, seed), "cost", "score", alt=ALT)
    (figure,) = drawn
    found = boxes(figure)
    assert len(found) == 24
    for box in found.values():
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    area = sum(box.width * box.height for box in found.values())
    covered = sum(
        charts._overlap(one, other) for one, other in itertools.combinations(found.values(), 2)
    )
    assert covered < 0.02 * area


@pytest.mark.parametrize("count", [1, 24])
def test_the_words_at_the_axes_are_not_cut(drawn, count):
    show_tradeoff(many(count), "work, gjpqy", "score", alt=ALT, groups={"all": list(many(count))})
    (figure,) = drawn
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    for words in (figure.axes[0].xaxis.label, figure.axes[0].yaxis.label, figure.legends[0]):
        box = words.get_window_extent(renderer)
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_groups_have_colours_and_only_the_front_is_full(drawn):
    given = {"a": (1.0, 1.0), "b": (2.0, 3.0), "c": (3.0, 2.0)}
    groups = {"ours": ["a", "b"], "theirs": ["c"]}
    show_tradeoff(given, "cost", "score", alt=ALT, groups=groups, front=["a", "b"])
    (figure,) = drawn
    fills = [fill for *_, fill in points(figure)]
    assert fills == [PALETTE["encoder"], PALETTE["encoder"], PAPER]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "theirs"]


def test_what_is_below_the_floor_says_its_score_at_the_edge(drawn):
    given = {"a": (1.0, [10.0, 12.0]), "b": (2.0, 50.0), "c": (3.0, 41.0)}
    show_tradeoff(given, "cost", "score", alt=ALT, floor=40)
    (figure,) = drawn
    assert [(y, marker) for _, y, marker, _ in points(figure)] == [
        (40.0, "v"),
        (50.0, "o"),
        (41.0, "o"),
    ]
    assert {text.get_text() for text in figure.axes[0].texts} == {"a (11)", "b", "c"}
    assert figure.axes[0].get_ylim()[0] > 38


def test_a_name_that_stands_away_has_a_line_to_its_point(drawn):
    crowd = {f"crowded {k}": (2.0, 40 + 0.1 * k) for k in range(9)}
    ends = {"low": (1.0, 10.0), "high": (9.0, 90.0)}
    show_tradeoff(crowd | ends, "cost", "score", alt=ALT)
    show_tradeoff({"a": (1.0, 1.0), "b": (9.0, 2.0)}, "cost", "score", alt=ALT)
    crowded, free = (
        [text.arrow_patch.get_visible() for text in figure.axes[0].texts] for figure in drawn
    )
    assert any(crowded) and not all(crowded) and not any(free)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {}, "Expected points"),
        ({"a": (0.0, 1.0)}, {}, "above zero"),
        ({"a": (1.0, 1.0)}, {"front": ["b"]}, "none for {'b'}"),
        ({"a": (1.0, 1.0)}, {"groups": {str(k): ["a"] for k in range(5)}}, "at most 4 groups"),
        ({"a": (1.0, 1.0)}, {"groups": {"ours": ["b"]}}, "none for {'b'}"),
    ],
)
def test_points_that_cannot_be_drawn_are_refused(given, options, message):
    with pytest.raises(ValueError, match=message):
        show_tradeoff(given, "cost", "score", alt=ALT, **options)


# --- intervals


def test_an_interval_is_coloured_by_its_side_of_zero(drawn):
    given = {"less": (-3, -2, -1), "either": (-1, 0.5, 2), "more": (1, 2, 3), "once": -4}
    show_intervals(given, "points", alt=ALT)
    (axes,) = drawn[0].axes
    lines = [line for line in axes.lines if line.get_linewidth() == 3]
    assert [list(line.get_xdata()) for line in lines] == [[-3, -1], [-1, 2], [1, 3]]
    assert [line.get_color() for line in lines] == [PALETTE["decoder"], MUTED, PALETTE["bridge"]]
    assert [fill for *_, fill in points(drawn[0])][-1] == PAPER
    assert [text.get_text() for text in axes.texts] == ["−2.0", "+0.5", "+2.0", "−4.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(given)


@pytest.mark.parametrize("given", [{}, {"a": (1, 2)}, {"a": [[1, 2, 3]]}])
def test_what_is_no_interval_is_refused(given):
    with pytest.raises(ValueError, match="low, middle, high"):
        show_intervals(given, "points", alt=ALT)


# --- ranks


def test_ranks_are_sorted_in_each_column_and_joined_by_name(drawn):
    columns = {"one": {"a": 1.0, "b": 3.0, "c": 2.0}, "two": {"a": 9.0, "b": 7.0, "c": 8.0}}
    show_ranks(columns, alt=ALT, highlight=["b"])
    left, right = drawn[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["b", "c", "a"]
    assert [label.get_text() for label in right.get_yticklabels()] == ["a", "c", "b"]
    assert left.get_ylim() == right.get_ylim() and left.yaxis_inverted()
    places = {text.get_text(): text.get_position() for text in left.texts}
    assert places == {
        "3.0": (0, 0), "2.0": (0, 1), "1.0": (0, 2), "9.0": (1, 0), "8.0": (1, 1), "7.0": (1, 2)
    }  # fmt: skip
    routes = {tuple(line.get_ydata()): line.get_color() for line in left.lines}
    assert routes == {(0, 2): PALETTE["decoder"], (1, 1): PALETTE["sky"], (2, 0): PALETTE["sky"]}


@pytest.mark.parametrize(
    "columns", [{}, {"one": {"a": 1.0}}, {"one": {"a": 1.0}, "two": {"b": 1.0}}]
)
def test_rankings_of_other_names_are_refused(columns):
    with pytest.raises(ValueError, match="two or more rankings of the same names"):
        show_ranks(columns, alt=ALT)
