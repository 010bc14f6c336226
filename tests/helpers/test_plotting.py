"""Pictures decode, carry their text, show what was measured, and can be told apart by everybody."""

from __future__ import annotations

import base64
import io
import itertools
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from skimage.color import rgb2lab
from torch import Tensor, nn

from helpers import plotting, scenes
from helpers.encoder import Pyramid, ResNet18Encoder, normalize
from helpers.plotting import CLASS_COLORS, INK, MUTED, PALETTE, PAPER, Picture, pictures
from helpers.plotting.diagrams import BRIDGE_TEXT, NAME_COLOR, trace
from helpers.plotting.flipbook import ACCENT

ALT = "what the picture shows"


@pytest.fixture(scope="module")
def encoder() -> ResNet18Encoder:
    torch.manual_seed(0)
    return ResNet18Encoder(weights=None)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).random((3, 64, 96), dtype=np.float32)


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 7, (64, 96))


@pytest.fixture(scope="module")
def maps(encoder: ResNet18Encoder, image: np.ndarray) -> Pyramid:
    return encoder(normalize(torch.from_numpy(image)[None]))


class Up(nn.Module):
    def __init__(self, deep: int, skip: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(deep + skip, out, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[-2:])
        return F.relu_(self.conv(torch.cat([x, skip], 1)))


class UNet(nn.Module):
    def __init__(self, out_channels: int = 7) -> None:
        super().__init__()
        self.p4 = Up(512, 256, 32)
        self.p3 = Up(32, 128, 16)
        self.drop = nn.Dropout()
        self.head = nn.Conv2d(16, out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        p4 = self.p4(pyramid.c5, pyramid.c4)
        return self.head(self.drop(self.p3(p4, pyramid.c3)))


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))


def share(picture: Picture, color: str) -> float:
    """The share of pixels within 4 grey levels of a colour."""
    wanted = 255 * np.array(matplotlib.colors.to_rgb(color))
    return float((np.abs(pixels(picture) - wanted).max(-1) <= 4).mean())


def every_kind(encoder, image, mask, maps, alt: str) -> dict[str, object]:
    heat = np.ones((4, 6))
    return {
        "images": lambda: plotting.show_images([image], alt=alt),
        "scenes": lambda: plotting.show_scenes([image], [mask], [mask], alt=alt),
        "features": lambda: plotting.show_features(maps, alt=alt),
        "colors": lambda: plotting.show_features_as_color(image, maps, alt=alt),
        "errors": lambda: plotting.show_errors(image, mask, mask, alt=alt),
        "heat": lambda: plotting.show_heatmaps(image, [heat, 0 * heat], ["one", "none"], alt=alt),
        "curves": lambda: plotting.show_curves({"a": [3, 2, 1]}, "step", "loss", alt=alt),
        "bars": lambda: plotting.show_bars({"a": 1, "b": [2, 3, 4]}, "mIoU", alt=alt),
        "tradeoff": lambda: plotting.show_tradeoff({"a": (1, 2)}, "work", "mIoU", alt=alt),
        "intervals": lambda: plotting.show_intervals({"a": (1, 2, 3)}, "points", alt=alt),
        "ranks": lambda: plotting.show_ranks({"one": {"a": 1}, "two": {"a": 2}}, alt=alt),
        "diagram": lambda: plotting.pyramid_diagram(encoder, image, alt=alt),
        "decoder": lambda: plotting.pyramid_diagram(encoder, image, UNet(), alt=alt),
    }


KINDS = sorted(every_kind(None, None, None, None, ALT))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_picture_of_the_books_width(kind, encoder, image, mask, maps) -> None:
    picture = every_kind(encoder, image, mask, maps, ALT)[kind]()
    shown = pixels(picture)
    assert shown.shape[1] == 2 * picture.width
    assert abs(shown.shape[0] - 2 * picture.height) <= 1  # an odd height is rounded
    assert picture.width == 640
    assert (shown.std((0, 1)) > 5).all()  # something is drawn
    paper = np.array(matplotlib.colors.to_rgb(PAPER)) * 255
    assert np.abs(shown[[0, 0, -1, -1], [0, -1, 0, -1]] - paper).max() <= 1
    assert plt.get_fignums() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alt", ["", "  \n", None])
def test_no_kind_goes_without_alternative_text(kind, alt, encoder, image, mask, maps) -> None:
    with pytest.raises((ValueError, TypeError), match=r"[Aa]lternative text"):
        every_kind(encoder, image, mask, maps, alt)[kind]()


def test_a_picture_tells_the_notebook_its_text_and_size(tmp_path) -> None:
    with plotting.style():
        figure = plotting.new_figure(2)
        figure.add_subplot().plot([1, 2])
        picture = plotting.picture(figure, ALT)
    data, metadata = picture._repr_mimebundle_()
    assert data["text/plain"] == ALT
    assert base64.b64decode(data["image/png"]) == picture.png
    assert metadata == {"image/png": {"alt": ALT, "width": 640, "height": 200}}
    picture.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == picture.png


def test_a_figure_made_with_pyplot_is_closed_and_others_are_not() -> None:
    other, figure = plt.figure(), plt.figure()
    plotting.picture(figure, ALT)
    assert plt.get_fignums() == [other.number]
    plt.close(other)
    with pytest.raises(TypeError, match="matplotlib Figure, got str"):
        plotting.picture("figure", ALT)


def test_a_png_is_small_and_nobody_sees_why() -> None:
    generator = np.random.default_rng(0)
    flat = np.repeat(generator.integers(0, 256, (60, 3)), 500, 0).reshape(150, 200, 3)
    smooth = np.stack([*np.meshgrid(range(200), range(150)), np.zeros((150, 200))], -1)
    large = generator.integers(0, 256, (600, 640, 3))
    for drawn, error, size in ((flat, 4, 2_000), (smooth, 0, 90_000), (large, 60, 600_000)):
        png = pictures.encode(drawn.astype(np.uint8))
        decoded = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=float)
        assert np.sqrt(np.square(decoded - drawn).mean()) <= error
        assert len(png) < size


def test_the_style_ends_with_its_context() -> None:
    before = matplotlib.rcParams["axes.facecolor"]
    with plotting.style():
        assert matplotlib.rcParams["axes.facecolor"] == PAPER
    assert matplotlib.rcParams["axes.facecolor"] == before


# Colours

# Machado, Oliveira and Fernandes, A Physiologically-based Model for Simulation of Color Vision
# Deficiency, 2009, severity 1.0, for linear RGB.
VISION = {
    "full": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(colors: list[str]) -> np.ndarray:
    rgb = np.array([matplotlib.colors.to_rgb(color) for color in colors])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def least_difference(colors: list[str], vision: str) -> float:
    seen = np.clip(linear(colors) @ np.array(VISION[vision]).T, 0, 1)
    rgb = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = rgb2lab(rgb[None])[0]
    return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(lab, 2))


@pytest.mark.parametrize("vision", VISION)
def test_classes_and_series_are_told_apart(vision: str) -> None:
    assert least_difference(list(CLASS_COLORS.values()), vision) >= 24
    assert least_difference(list(PALETTE.values()), vision) >= 18


def test_a_palette_of_red_and_green_would_fail() -> None:
    assert least_difference(["#c0392b", "#5d7a1e"], "deuteranopia") < 10


def test_class_colours_are_those_of_the_scenes() -> None:
    assert tuple(CLASS_COLORS) == scenes.CLASSES


@pytest.mark.parametrize("color", [INK, MUTED, BRIDGE_TEXT, ACCENT, *NAME_COLOR.values()])
def test_lettering_has_contrast_against_the_paper(color: str) -> None:
    light, dark = sorted(linear([color, PAPER]) @ [0.2126, 0.7152, 0.0722], reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


# Images and masks


@pytest.mark.parametrize(
    "given",
    [
        np.full((3, 5, 7), 51, np.uint8),
        np.full((5, 7, 3), 51, np.uint8),
        np.full((5, 7), 51, np.uint8),
        np.full((1, 5, 7), 0.2),
        torch.full((3, 5, 7), 0.2, dtype=torch.float16),
        torch.full((5, 7), 0.2, requires_grad=True),
        Image.new("RGB", (7, 5), (51, 51, 51)),
    ],
)
def test_what_people_call_an_image(given) -> None:
    image = pictures.as_image(given)
    assert image.shape == (5, 7, 3)
    assert image.dtype == np.float32
    assert np.allclose(image, 0.2, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (np.zeros((2, 3, 8, 8)), ValueError, "got a batch"),
        (np.zeros((5, 8, 8)), ValueError, r"got \[5, 8, 8\]"),
        (np.full((8, 8), 255.0), ValueError, "divide pixels stored as 0…255 by 255"),
        (np.full((3, 8, 8), -1.5), ValueError, "before normalize"),
        (np.full((3, 8, 8), np.nan), ValueError, "got nan"),
        (np.zeros((3, 8, 8), dtype=int), TypeError, "got int64"),
        (np.zeros((3, 0, 8)), ValueError, r"got \[3, 0, 8\]"),
    ],
)
def test_what_is_no_image_is_refused(given, error, message) -> None:
    with pytest.raises(error, match=message):
        plotting.show_images([given], alt=ALT)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (np.zeros((7, 8, 8)), ValueError, "argmax"),
        (np.zeros((8, 8)), TypeError, "got float64"),
        (np.full((8, 8), 255), ValueError, "0…6, got 255…255"),
        (np.full((8, 8), -1), ValueError, "got -1"),
    ],
)
def test_what_is_no_mask_is_refused(given, error, message) -> None:
    with pytest.raises(error, match=message):
        plotting.show_scenes([np.zeros((8, 8))], [given], alt=ALT)


def test_a_mask_is_drawn_in_the_colours_of_its_classes() -> None:
    bands = np.repeat(np.arange(7), 4)[:, None].repeat(28, 1)
    image = np.full((3, 28, 28), 0.5, np.float32)
    all_classes = plotting.show_scenes([image], [bands], alt=ALT)
    first_only = plotting.show_scenes([image], [0 * bands], alt=ALT)
    for color in list(CLASS_COLORS.values())[1:]:
        assert share(first_only, color) < 0.005 < 0.015 < share(all_classes, color)


def bands(picture: Picture) -> list[tuple[int, int]]:
    """The rows of pixels, first and last, between which something other than paper is seen."""
    paper = 255 * np.array(matplotlib.colors.to_rgb(PAPER))
    drawn = (np.abs(pixels(picture) - paper).max(-1) > 40).any(1)
    edges = np.flatnonzero(np.diff(drawn, prepend=False, append=False))
    return list(zip(edges[::2], edges[1::2] - 1, strict=True))


@pytest.mark.parametrize(("classes", "rows"), [(5, 1), (7, 1), (8, 2), (12, 2), (19, 3)])
def test_a_legend_has_room_for_all_its_rows(classes: int, rows: int) -> None:
    image = np.full((3, 30, 40), 0.2, np.float32)
    mask = np.zeros((30, 40), int)
    names = {f"class {k}": matplotlib.colors.to_hex(color) for k, color in enumerate(SPREAD)}
    one_row, colors = (dict(itertools.islice(names.items(), n)) for n in (7, classes))
    usual = plotting.show_scenes([image] * 4, [mask] * 4, alt=ALT, colors=one_row)
    drawn = plotting.show_scenes([image] * 4, [mask] * 4, alt=ALT, colors=colors)
    found, before = bands(drawn), bands(usual)
    assert len(found) == 2 + rows  # pictures, masks, and each row of names, all apart
    assert found[:2] == before[:2]
    gaps = [top - bottom for (_, bottom), (top, _) in itertools.pairwise(found)]
    assert gaps[1] == pytest.approx(before[2][0] - before[1][1], abs=2)
    assert all(gap >= 5 for gap in gaps[2:])
    below = [len(pixels(each)) - bands(each)[-1][1] for each in (drawn, usual)]
    assert below[0] == pytest.approx(below[1], abs=1)


SPREAD = np.stack([np.linspace(0, 0.5, 19), np.linspace(0.6, 0, 19), np.full(19, 0.4)], 1)


def test_numbers_of_images_titles_and_masks_must_agree(image, mask) -> None:
    with pytest.raises(ValueError, match="as many titles as images, 2, got 1"):
        plotting.show_images([image, image], ["one"], alt=ALT)
    with pytest.raises(ValueError, match="as many masks as images, 1, got 2"):
        plotting.show_scenes([image], [mask, mask], alt=ALT)
    with pytest.raises(ValueError, match="no images to show"):
        plotting.show_images([], alt=ALT)


def test_errors_are_red_where_prediction_and_mask_differ() -> None:
    image = np.full((3, 40, 40), 0.5, np.float32)
    mask = np.zeros((40, 40), int)
    right = plotting.show_errors(image, mask, mask, alt=ALT)
    wrong = plotting.show_errors(image, mask, mask + 4, alt=ALT)
    red = 0.9 * linear_blend(PALETTE["decoder"], 0.9, 0.12 + 0.5 * 0.5)
    assert not near(right, red) and near(wrong, red)
    with pytest.raises(ValueError, match="differ in size"):
        plotting.show_errors(image, mask[:20], mask, alt=ALT)


def linear_blend(color: str, strength: float, under: float) -> np.ndarray:
    over = np.array(matplotlib.colors.to_rgb(color))
    return (strength * over + (1 - strength) * under) / 0.9


def near(picture: Picture, rgb: np.ndarray) -> bool:
    return bool((np.abs(pixels(picture) - 255 * rgb).max(-1) <= 5).mean() > 0.1)


# Features and heat maps


def test_maps_may_come_by_name_and_without_a_batch(maps: Pyramid) -> None:
    named = plotting.show_features({"c5": maps.c5[0], "c4": maps.c4}, alt=ALT, channels=[0, 3])
    assert named.width == 640
    with pytest.raises(ValueError, match="batch"):
        plotting.show_features({"c5": torch.zeros(2, 3, 4, 4)}, alt=ALT)
    with pytest.raises(ValueError, match="Channel 600 is not there: the map has 512"):
        plotting.show_features({"c5": maps.c5}, alt=ALT, channels=[600])
    with pytest.raises(ValueError, match=r"\[C, h, w\], got \[4, 4\]"):
        plotting.show_features({"c5": torch.zeros(4, 4)}, alt=ALT)
    with pytest.raises(ValueError, match="no maps"):
        plotting.show_features({}, alt=ALT)


def test_principal_colours_follow_what_a_level_tells_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(4, 16, generator=generator)
    which = torch.arange(64).reshape(8, 8) // 16
    level = kinds[which].permute(2, 0, 1)
    state = torch.get_rng_state()
    colors = plotting.principal_colors(level).reshape(64, 3)
    assert torch.equal(state, torch.get_rng_state())
    for a, b in itertools.combinations(range(64), 2):
        same = which.flatten()[a] == which.flatten()[b]
        assert np.allclose(colors[a], colors[b], atol=1e-4) == bool(same)
    assert np.array_equal(colors, plotting.principal_colors(level.clone()).reshape(64, 3))
    with pytest.raises(ValueError, match="at least 3 channels"):
        plotting.principal_colors(torch.zeros(2, 4, 4))


def test_heat_maps_have_no_negative_values(image) -> None:
    with pytest.raises(ValueError, match="negative"):
        plotting.show_heatmaps(image, [-np.ones((2, 2))], alt=ALT)
    with pytest.raises(ValueError, match=r"got \[1, 2, 2\]"):
        plotting.show_heatmaps(image, [np.ones((1, 2, 2))], alt=ALT)


# Curves and bars


@pytest.mark.parametrize("log", [False, True])
def test_curves_of_several_seeds(log: bool) -> None:
    values = np.random.default_rng(0).random((3, 20)) + 0.5
    one = plotting.show_curves({"a": values[0]}, "x", "y", alt=ALT, log=log)
    many = plotting.show_curves({"a": values}, "x", "y", alt=ALT, x=list(range(20)), log=log)
    band = 0.18 * np.array(matplotlib.colors.to_rgb(PALETTE["encoder"])) + 0.82 * np.array(
        matplotlib.colors.to_rgb(PAPER)
    )
    color = matplotlib.colors.to_hex(band)
    assert share(many, color) > 0.05 > share(one, color)


def test_panels_share_their_lines_and_positions() -> None:
    lines = {"a": [1, 2], "b": [[1, 2], [3, 5]]}
    drawn = plotting.show_panels({"one": lines, "two": lines}, x=["c1", "c2"], alt=ALT)
    single = plotting.show_panels({"one": lines}, x=["c1", "c2"], alt=ALT)
    assert drawn.width == single.width == 640
    assert share(drawn, PALETTE["encoder"]) > 0.001
    with pytest.raises(ValueError, match="all with the same lines"):
        plotting.show_panels({"one": lines, "two": {"a": [1, 2]}}, x=["c1", "c2"], alt=ALT)
    with pytest.raises(ValueError, match="a has 2 values for 1 positions"):
        plotting.show_panels({"one": lines}, x=["c1"], alt=ALT)


def test_a_long_name_at_the_end_of_a_panel_is_not_cut() -> None:
    for x in (["c1", "c2"], ["random", "fine-tuned"]):
        drawn = plotting.show_panels({"one": {"a": [1, 2]}, "two": {"a": [1, 2]}}, x=x, alt=ALT)
        last = pixels(drawn)[:, -3:]
        assert (last == last[0, 0]).all()


def test_charts_refuse_what_they_cannot_draw() -> None:
    with pytest.raises(ValueError, match="no curves"):
        plotting.show_curves({}, "x", "y", alt=ALT)
    with pytest.raises(ValueError, match="3 values for 2 positions"):
        plotting.show_curves({"a": [1, 2, 3]}, "x", "y", alt=ALT, x=[1, 2])
    with pytest.raises(ValueError, match="at most 6"):
        plotting.show_curves({str(i): [1, 2] for i in range(7)}, "x", "y", alt=ALT)
    with pytest.raises(ValueError, match=r"got \[1, 1, 1\]"):
        plotting.show_curves({"a": [[[1]]]}, "x", "y", alt=ALT)
    with pytest.raises(ValueError, match="no bars"):
        plotting.show_bars({}, "y", alt=ALT)
    with pytest.raises(ValueError, match="one number per seed for a"):
        plotting.show_bars({"a": []}, "y", alt=ALT)
    with pytest.raises(ValueError, match="no bar 'c' to highlight: a, b"):
        plotting.show_bars({"a": 1, "b": 2}, "y", alt=ALT, highlight="c")


def test_bars_are_as_long_as_their_means() -> None:
    short = {"a": [1.0, 3.0], "b": 4.0}
    long = {"a bar with a rather long name": [1.0, 3.0], "another one": 4.0}
    for bars, axis in ((short, 0), (long, 1)):
        drawn = pixels(plotting.show_bars(bars, "y", alt=ALT, highlight=list(bars)[1]))
        lengths = []
        for color in (PALETTE["encoder"], PALETTE["decoder"]):
            rgb = 255 * np.array(matplotlib.colors.to_rgb(color))
            places = np.nonzero(np.abs(drawn - rgb).max(-1) <= 4)[axis]
            lengths.append(np.ptp(places) + 1)
        assert lengths[0] / lengths[1] == pytest.approx(2 / 4, abs=0.01)


def test_a_mean_that_rounds_to_zero_has_no_sign(monkeypatch) -> None:
    written = []

    def keep(figure, alt):
        written.extend(text.get_text() for text in figure.axes[0].texts)

    monkeypatch.setattr(pictures, "picture", keep)
    plotting.show_bars({"a": -0.04, "b": -0.06, "c": 2}, "y", alt=ALT)
    assert written == ["0.0", "−0.1", "2.0"]
    written.clear()
    plotting.show_matrix([[-0.4, -0.6]], ["a"], ["b", "c"], "points", alt=ALT)
    assert written == ["0", "−1"]


@pytest.mark.parametrize("name", ["a", "a bar with a rather long name"])
def test_the_number_of_a_falling_bar_stands_at_its_end(name, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(pictures, "picture", lambda figure, alt: drawn.append(figure.axes[0]))
    plotting.show_bars({name: [-3, -1], "rising": [1, 2], "both": [-2, 1]}, "y", alt=ALT)
    (axes,) = drawn
    lying = len(name) > 20
    ends = [text.get_position()[0 if lying else 1] for text in axes.texts]
    assert ends[0] < -3 and ends[1] > 2 and ends[2] > 1
    low, high = axes.get_xlim() if lying else axes.get_ylim()
    FigureCanvasAgg(axes.figure).draw()
    for text in axes.texts:
        box = text.get_window_extent().transformed(axes.transData.inverted())
        assert low < (box.x0 if lying else box.y0) and (box.x1 if lying else box.y1) < high
    assert all(not line.get_clip_on() for line in axes.lines)  # whole points at the edge


def test_panels_say_what_lies_below_them(monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(pictures, "picture", lambda figure, alt: drawn.append(figure))
    plotting.show_panels({"one": {"a": [1, 2]}}, x=[1, 2], xlabel="epoch", alt=ALT)
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    assert axes.get_xlabel() == "epoch"
    label, legend = axes.xaxis.label.get_window_extent(), figure.legends[0].get_window_extent()
    assert label.y0 >= legend.y1


def test_histories_are_loss_and_miou_of_each_training(monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(pictures, "picture", lambda figure, alt: drawn.append(figure))
    seen = SimpleNamespace(loss=[2, 1], miou=[30, 40], validated=False)
    unseen = SimpleNamespace(loss=[2, 1.5], miou=[20, 30], validated=True)
    without = SimpleNamespace(loss=[2, 1], miou=[], validated=False)
    for histories in ({"a": unseen}, {"a": seen, "b": unseen}, {"a": without}):
        plotting.show_histories(histories, alt=ALT)
    titles = [[axes.get_title("left") for axes in figure.axes] for figure in drawn]
    assert titles == [
        ["loss in training", "mIoU in validation, %"],
        ["loss in training", "mIoU, %"],
        ["loss in training"],
    ]
    losses, scores = drawn[1].axes
    assert [list(line.get_ydata()) for line in losses.lines] == [[2, 1], [2, 1.5]]
    assert [list(line.get_ydata()) for line in scores.lines] == [[30, 40], [20, 30]]
    assert list(scores.lines[0].get_xdata()) == [1, 2] and scores.get_xlabel() == "epoch"
    with pytest.raises(ValueError, match="at least one panel"):
        plotting.show_histories({}, alt=ALT)


# The pyramid diagram


def test_the_encoders_boxes_are_drawn_to_scale(encoder, image, maps) -> None:
    diagram = plotting.pyramid_diagram(encoder, image, alt=ALT)
    boxes = {box.name: box for box in diagram.boxes}
    assert list(boxes) == ["image", *Pyramid._fields]
    for name, level in maps._asdict().items():
        box = boxes[name]
        assert box.shape == tuple(level.shape[1:])
        assert box.height / box.width == pytest.approx(level.shape[2] / level.shape[3])
        scale = (level.shape[2] * level.shape[3] / (64 * 96)) ** 0.25
        drawn = (box.width * box.height / (boxes["image"].width * boxes["image"].height)) ** 0.5
        assert drawn == pytest.approx(scale)
        assert box.depth / boxes["c1"].depth == pytest.approx((box.shape[0] / 64) ** 0.5)


def test_boxes_stay_on_the_page_and_apart(encoder, image) -> None:
    for decoder in (None, UNet()):
        diagram = plotting.pyramid_diagram(encoder, image, decoder, alt=ALT)
        for box in diagram.boxes:
            assert 0 < box.x < box.right < 6.4
            assert 0 < box.y < box.top < diagram.height / 100
        for a, b in itertools.combinations(diagram.boxes, 2):
            assert a.right < b.x or b.right < a.x or a.top < b.y or b.top < a.y


def test_a_front_shows_the_mean_of_the_real_map(encoder, image, maps) -> None:
    boxes = {box.name: box for box in plotting.pyramid_diagram(encoder, image, alt=ALT).boxes}
    mean = maps.c3[0].mean(0).numpy().ravel()
    lightness = rgb2lab(boxes["c3"].face)[..., 0].ravel()
    order = np.argsort(mean)
    assert boxes["c3"].face.shape == (*maps.c3.shape[2:], 3)
    assert (np.diff(lightness[order]) >= -0.5).all()


def test_the_decoders_boxes_and_bridges_come_from_its_forward_pass(encoder, image) -> None:
    diagram = plotting.pyramid_diagram(encoder, image, UNet(), alt=ALT, bridge="concatenate")
    found = {box.name: (box.shape, box.sources) for box in diagram.boxes[6:]}
    assert found == {
        "p4": ((32, 4, 6), ("c4", "c5")),
        "p3": ((16, 8, 12), ("c3", "p4")),
        "head": ((7, 8, 12), ("p3",)),
        "mask": ((7, 64, 96), ("head",)),
    }
    rows = {box.name: box.row for box in diagram.boxes}
    assert rows["p4"] == rows["c4"] == 4 and rows["head"] == rows["c3"] == 3 and rows["mask"] == 0


def test_the_output_is_drawn_as_what_it_is(encoder, image) -> None:
    class Constant(nn.Module):
        def __init__(self, values: list[float]) -> None:
            super().__init__()
            self.values = nn.Parameter(torch.tensor(values))

        def forward(self, pyramid: Pyramid, image: Tensor) -> Tensor:
            return self.values.view(1, -1, 1, 1) + 0 * image[:, :1] + 0 * pyramid.c1.sum()

    def last(values: list[float]):
        return plotting.pyramid_diagram(encoder, image, Constant(values), alt=ALT).boxes[-2:]

    step, mask = last([0.0, 0, 3, 0, 0, 0, 0])
    assert (step.name, step.sources) == ("Constant", ("image", "c1"))
    square = matplotlib.colors.to_rgb(CLASS_COLORS["square"])
    assert np.allclose(mask.face, square, atol=1e-6)
    assert mask.face.shape == (64, 96, 3)
    _, picture = last([0.1, 0.5, 2])
    assert picture.name == "picture" and np.allclose(picture.face, [0.1, 0.5, 1])


def test_a_query_goes_to_the_decoder_that_asks_for_one(encoder, image) -> None:
    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 512)

        def forward(self, pyramid: Pyramid, query: Tensor) -> Tensor:
            return pyramid.c5 * self.linear(query)[..., None, None]

    steps = trace(encoder, torch.zeros(1, 3, 64, 64), Query(), torch.ones(1, 5))
    assert [(step.name, step.sources) for step in steps[6:]] == [
        ("linear", ()),
        ("output", ("c5", "linear")),
    ]
    with pytest.raises(ValueError, match="Query needs a query"):
        plotting.pyramid_diagram(encoder, image, Query(), alt=ALT)
    with pytest.raises(ValueError, match="UNet takes no query"):
        plotting.pyramid_diagram(encoder, image, UNet(), alt=ALT, query=torch.ones(1, 5))


def test_vectors_and_tokens_are_boxes_too(encoder, image) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(512, 1, batch_first=True)
            self.heads = nn.ModuleList([nn.Linear(512, 10)])

        def forward(self, pyramid: Pyramid) -> Tensor:
            tokens = pyramid.c5.flatten(2).transpose(1, 2)
            return self.heads[0](self.attention(tokens, tokens, tokens)[0].mean(1))

    diagram = plotting.pyramid_diagram(encoder, image, Tokens(), alt=ALT)
    assert [(b.name, b.shape, b.sources) for b in diagram.boxes[6:]] == [
        ("attention", (6, 512), ("c5",)),
        ("heads.0", (10,), ("attention",)),
    ]


def test_a_part_that_is_called_twice_is_two_steps(encoder, image) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(512, 512, 1)

        def forward(self, pyramid: Pyramid) -> Tensor:
            return self.conv(self.conv(pyramid.c5))

    steps = trace(encoder, torch.zeros(1, 3, 64, 64), Twice())
    assert [(step.name, step.sources) for step in steps[6:]] == [
        ("conv", ("c5",)),
        ("conv (2)", ("conv",)),
        ("output", ("conv (2)",)),
    ]


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in module.modules())


def test_nothing_is_left_behind(encoder, image) -> None:
    class Broken(UNet):
        def forward(self, pyramid: Pyramid) -> Tensor:
            self.p4(pyramid.c5, pyramid.c4)
            raise RuntimeError("broken")

    for decoder in (UNet(), Broken()):
        decoder.train()
        try:
            plotting.pyramid_diagram(encoder, image, decoder, alt=ALT)
        except RuntimeError as error:
            assert str(error) == "broken"
        assert hooks(decoder) == hooks(encoder) == 0
        assert all(part.training for part in decoder.modules())
        assert all(p.grad is None for p in decoder.parameters())


def test_a_decoder_may_have_too_many_parts_to_draw(encoder, image) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList(nn.Conv2d(512, 512, 1) for _ in range(12))

        def forward(self, pyramid: Pyramid) -> Tensor:
            x = pyramid.c5
            for step in self.steps:
                x = step(x)
            return x

    many = Many()
    with pytest.raises(ValueError, match=r"12 parts of Many do not fit .* parts="):
        plotting.pyramid_diagram(encoder, image, many, alt=ALT)
    diagram = plotting.pyramid_diagram(encoder, image, many, alt=ALT, parts=["steps.11"])
    assert [box.name for box in diagram.boxes[6:]] == ["steps.11", "mask"]
    with pytest.raises(ValueError, match=r"no part head: it has steps\.0"):
        plotting.pyramid_diagram(encoder, image, many, alt=ALT, parts=["head"])


# Flipbooks


class Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def book(image, mask):
    frames = [
        image,
        torch.from_numpy(image) / 2,
        (255 * image).astype(np.uint8),
    ]
    return plotting.flipbook(frames, ["one", 'two "<b>', "three"], "Three & more")


def test_a_flipbook_is_html_that_asks_nobody_for_anything(book) -> None:
    elements = Elements(book._repr_html_())
    images = elements.all("img")
    assert [image["alt"] for image in images] == [
        "Three & more: one",
        'Three & more: two "<b>',
        "Three & more: three",
    ]
    assert [image["style"] for image in images] == ["display:block"] + 2 * ["display:none"]
    for image in images:
        kind, data = image["src"].split(",")
        assert kind == "data:image/webp;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (960, 640)
    assert "//" not in book._repr_html_().replace("base64,", "").split("<figure")[0]
    assert not {"script", "link", "b"} & {tag for tag, _ in elements.found}
    assert all("id" not in attributes for _, attributes in elements.found)


def test_a_flipbook_can_be_read_aloud_and_worked_by_keyboard(book) -> None:
    elements = Elements(book._repr_html_())
    (slider,), (button,) = elements.all("input"), elements.all("button")
    assert (slider["type"], slider["min"], slider["max"]) == ("range", "0", "2")
    assert (slider["aria-label"], slider["aria-valuetext"]) == ("Three & more", "one")
    assert button["aria-label"] == "Play"
    assert elements.all("figure")[0]["data-labels"].split("|") == list(book.labels)


def test_a_flipbook_is_the_same_each_time(book, image) -> None:
    assert book._repr_mimebundle_()["text/plain"] == "Three & more (3 frames)"
    again = plotting.flipbook([image] * 3, book.labels, book.alt)
    blank = [Elements(b._repr_html_()) for b in (book, again)]
    for elements in blank:
        for attributes in elements.all("img"):
            attributes["src"] = ""
    assert blank[0].found == blank[1].found


def test_a_flipbook_takes_pictures_and_figures() -> None:
    with plotting.style():
        figure = plotting.new_figure(3)
        drawn = plotting.picture(plotting.new_figure(3), ALT)
    book = plotting.flipbook([figure, drawn], ["a", "b"], ALT)
    assert (book.width, book.height) == (640, 300)


@pytest.mark.parametrize(
    ("frames", "labels", "message"),
    [
        ([np.zeros((8, 8))], ["a"], "at least two frames, got 1"),
        ([np.zeros((8, 8))] * 2, ["a"], "one label a frame, 2, got 1"),
        ([np.zeros((8, 8))] * 2, ["a", " "], "Every label needs text"),
        ([np.zeros((8, 8))] * 2, ["a", "b|c"], "without the character"),
        ([np.zeros((8, 8)), np.zeros((9, 8))], ["a", "b"], "differ in size"),
    ],
)
def test_flipbooks_that_make_no_sense_are_refused(frames, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        plotting.flipbook(frames, labels, ALT)


def test_a_flipbook_needs_alternative_text() -> None:
    with pytest.raises(ValueError, match="alternative text is empty"):
        plotting.flipbook([np.zeros((8, 8))] * 2, ["a", "b"], " ")
