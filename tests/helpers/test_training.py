"""Training learns, repeats, resumes and refuses as promised, with kept maps and without."""

import copy
import math
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import training
from helpers.encoder import MEAN, STD, Pyramid, ResNet18Encoder, Segmenter, normalize
from helpers.metrics import SegmentationLoss
from helpers.training import (
    Features,
    Precision,
    cache_features,
    evaluate,
    feeding,
    fit,
    minimise,
    one_cycle,
    predict,
)
from helpers.training.feeding import is_frozen

CLASSES = 3
SIZE = (32, 48)
Pairs = list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums depend, in the last bit, on how many threads share them, and on a GPU on chance."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Tiny(nn.Module):
    """A decoder of two maps."""

    def __init__(self, out_channels: int = CLASSES, dropout: float = 0.0) -> None:
        super().__init__()
        self.fine = nn.Conv2d(64, 16, 3, padding=1)
        self.coarse = nn.Conv2d(256, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(16, out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        coarse = F.interpolate(self.coarse(pyramid.c4), size=pyramid.c1.shape[-2:])
        return self.head(self.dropout(self.norm(self.fine(pyramid.c1) + coarse).relu()))


class WithImage(Tiny):
    """… and of the image."""

    def __init__(self, out_channels: int = CLASSES) -> None:
        super().__init__(out_channels)
        self.colour = nn.Conv2d(3, out_channels, 1)

    def forward(self, pyramid: Pyramid, image: Tensor) -> Tensor:
        p1 = super().forward(pyramid)
        return F.interpolate(p1, size=image.shape[-2:], mode="bilinear") + self.colour(image)


class ReadImage(nn.Module):
    """A decoder whose prediction stands in the image: red is class / 10."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, pyramid: Pyramid, image: Tensor) -> Tensor:
        labels = (10 * (image[:, 0] * STD[0] + MEAN[0])).round().long()
        return F.one_hot(labels, self.classes).movedim(-1, 1).float()


@lru_cache
def encoder(seed: int, frozen: bool) -> ResNet18Encoder:
    torch.manual_seed(seed)
    return ResNet18Encoder(None, frozen=frozen)


def model(
    seed: int = 0, frozen: bool = True, decoder: Callable[..., nn.Module] = Tiny, **options: Any
) -> Segmenter:
    copied = copy.deepcopy(encoder(seed, frozen))  # quicker than to build it again …
    copied.train(not frozen)  # … but a copy is in training mode, whatever it was copied from
    torch.manual_seed(seed)
    return Segmenter(copied, decoder(**options))


def pairs(count: int = 6, seed: int = 0, size: tuple[int, int] = SIZE) -> Pairs:
    """Noise under rectangles, red for class 1 and blue for class 2, none the same left to right."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        image = torch.tensor(random.uniform(0, 0.4, (3, *size)), dtype=torch.float32)
        mask = torch.zeros(size, dtype=torch.long)
        for label, channel in ((1, 0), (2, 2)):
            y, x = random.integers(0, size[0] - 16), random.integers(0, size[1] - 20)
            place = slice(y, y + 14), slice(x, x + 17)
            image[(channel, *place)] += 0.6
            image[(2 - channel, *place)] = 0.1
            mask[place] = label
        made.append((image, mask))
    return made


def written(labels: Tensor) -> Tensor:
    """Return images `[B, 3, H, W]` in which `ReadImage` reads these labels."""
    return (labels / 10)[:, None].expand(-1, 3, -1, -1)


def state(trained: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trained.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def record(model: Segmenter, data: Pairs, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """Train, and return every (logits, masks) on which the loss was computed."""
    seen = []

    def loss(logits: Tensor, masks: Tensor) -> Tensor:
        seen.append((logits.detach().clone(), masks.clone()))
        return F.cross_entropy(logits, masks)

    fit(model, data, loss=loss, **options)
    return seen


# --- What is learnt, and what stays ---------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_a_tiny_set_is_learnt(frozen: bool) -> None:
    data, learner = pairs(), model(frozen=frozen)
    untrained = evaluate(learner, data).miou
    history = fit(learner, data, epochs=12, batch_size=3, lr=0.02)
    assert len(history.loss) == len(history.miou) == 12
    assert history.loss[-1] < 0.5 * history.loss[0]
    assert history.miou[-1] > 60 and evaluate(learner, data).miou > max(55, untrained + 20)


def test_a_frozen_encoder_stays_as_it_is_bit_for_bit() -> None:
    learner = model()
    before = state(learner)
    for cache in (False, True):
        fit(learner, pairs(), epochs=1, batch_size=3, cache=cache)
    after = learner.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("decoder.")}


def test_an_encoder_that_is_not_frozen_moves_with_its_statistics() -> None:
    learner = model(frozen=False)
    before = state(learner)
    fit(learner, pairs(), epochs=1, batch_size=3)
    moved = {n for n, value in learner.state_dict().items() if not torch.equal(value, before[n])}
    assert {"encoder.features.conv1.weight", "encoder.features.bn1.running_mean"} <= moved
    assert "encoder.features.layer4.1.bn2.running_var" in moved


@pytest.mark.parametrize(("given", "used"), [({}, 0.1), ({"encoder_lr": 0.002}, 0.5)])
def test_the_encoder_learns_at_a_tenth_of_the_rate_unless_told_otherwise(
    given: dict[str, float], used: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    highest: dict[int, float] = {}

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    highest[id(p)] = max(highest.get(id(p), 0), group["lr"])
            return super().step(closure)

    monkeypatch.setattr("helpers.training.loop.AdamW", Watched)
    learner = model(frozen=False)
    fit(learner, pairs(10), epochs=1, batch_size=1, lr=0.004, **given)
    for part, rate in ((learner.decoder, 0.004), (learner.encoder, 0.004 * used)):
        parameters = [p for p in part.parameters() if p.requires_grad]
        assert [highest[id(p)] for p in parameters] == pytest.approx([rate] * len(parameters))


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    def trained(seed: int, drawn: int = 0, **options: float) -> dict[str, Tensor]:
        learner = model(**options)
        torch.rand(drawn)
        fit(learner, pairs(), epochs=1, batch_size=3, seed=seed)
        return state(learner)

    assert same(trained(0, dropout=0.5), trained(0, drawn=9, dropout=0.5))
    assert not same(trained(0), trained(1))  # the order alone differs


def test_the_result_of_a_tiny_training_has_not_changed() -> None:
    assert training.VERSION == 1, "measure the number below again"
    options: dict[str, Any] = dict(epochs=4, batch_size=2, mixed=False, device="cpu", cache=False)
    found = fit(model(frozen=False), pairs(), **options)
    changed = "Training ends elsewhere than it did: raise VERSION and measure again."
    assert found.loss == pytest.approx([1.4850, 1.2149, 1.1219, 1.0922], rel=1e-2), changed


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_any_number_of_steps_can_be_trained(count: int) -> None:
    history = fit(model(), pairs(count), epochs=1, batch_size=1, cache=False)
    assert math.isfinite(history.loss[0])


def test_every_image_comes_once_an_epoch_and_in_another_order() -> None:
    data = [(image, torch.full(SIZE, i % CLASSES)) for i, (image, _) in enumerate(pairs(7))]
    images: list[Tensor] = []
    learner = model(decoder=ReadImageAndLearn)
    learner.decoder.seen = images
    fit(learner, data, epochs=2, batch_size=3, flip=False, cache=False)
    assert [len(batch) for batch in images] == [3, 3, 1] * 2
    names = [tuple(image[0, 0, :3].tolist()) for batch in images for image in batch]
    assert set(names[:7]) == set(names[7:]) and len(set(names)) == 7
    assert names[:7] != names[7:]


class ReadImageAndLearn(WithImage):
    """Keeps the images that it saw."""

    seen: list[Tensor]

    def forward(self, pyramid: Pyramid, image: Tensor) -> Tensor:
        self.seen.append(image.detach().clone())
        return super().forward(pyramid, image)


# --- Maps that are computed once ------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [Tiny, WithImage])
def test_kept_maps_train_as_fresh_ones_do(decoder: type[nn.Module]) -> None:
    kept, fresh = model(decoder=decoder), model(decoder=decoder)
    options: dict[str, Any] = dict(epochs=3, batch_size=4, lr=0.005, seed=5)
    with_cache = fit(kept, pairs(), cache=True, **options)
    without = fit(fresh, pairs(), cache=False, **options)
    assert with_cache.loss == pytest.approx(without.loss, rel=2e-3)
    assert with_cache.miou == pytest.approx(without.miou, abs=1)
    start = state(model(decoder=decoder).decoder)
    for name, value in kept.decoder.state_dict().items():
        if value.is_floating_point() and not name.startswith(("fine.bias", "coarse.bias")):
            difference = (value - fresh.decoder.state_dict()[name]).norm()
            assert difference < 0.05 * (value - start[name]).norm(), name


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("flip", [True, False])
def test_images_and_masks_are_mirrored_together(cache: bool, flip: bool) -> None:
    data = pairs(3)
    learner = model(decoder=ReadImageAndLearn)
    learner.decoder.seen = images = []
    seen = record(learner, data, epochs=6, batch_size=3, cache=cache, flip=flip)
    mirrored, straight = 0, 0
    for batch, (_, masks) in zip(images, seen, strict=True):
        shown = batch.float() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        for image, mask in zip(shown, masks, strict=True):
            differences = {
                (i, side): (image - (original.flip(-1) if side else original)).abs().max().item()
                for i, (original, _) in enumerate(data)
                for side in (False, True)
            }
            index, side = min(differences, key=differences.__getitem__)
            assert differences[index, side] < 2e-3
            expected = data[index][1].flip(-1) if side else data[index][1]
            assert torch.equal(mask, expected)
            mirrored, straight = mirrored + side, straight + (not side)
    assert straight + mirrored == 18
    assert (5 <= mirrored <= 13) if flip else mirrored == 0


def test_maps_of_a_mirror_image_are_computed_not_mirrored() -> None:
    learner, data = model(), pairs(2)
    features = Features(learner, data, True, Precision("cpu"))
    for index in range(2):
        for side in (False, True):
            image, mask = (part.flip(-1) if side else part for part in data[index])
            batch = features.batch([index], torch.tensor([side]))
            with torch.no_grad():
                expected = learner.encoder(normalize(image[None]))
            assert batch.pyramid is not None and torch.equal(batch.masks[0], mask)
            for found, wanted in zip(batch.pyramid, expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("decoder", [Tiny, WithImage])
@pytest.mark.parametrize("flip", [True, False])
def test_the_memory_that_is_announced_is_the_memory_that_is_held(
    decoder: type[nn.Module], flip: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    learner, data = model(decoder=decoder), pairs(5, size=(45, 70))
    source = feeding.source(learner, data, flip, None, Precision("cpu"))
    held = [t for value in vars(source).values() for t in _tensors(value)]
    held_bytes = sum({t.data_ptr(): t.untyped_storage().nbytes() for t in held}.values())
    assert Features.memory(learner, data, flip, Precision("cpu")) == held_bytes
    kind = "5 images and their mirror images" if flip else "5 images"
    said = f"Caching the features of {kind}: {held_bytes / 1e6:,.0f} MB.\n"
    assert capsys.readouterr().out == said


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def test_the_memory_is_announced_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Features, "__init__", full)
    with pytest.raises(MemoryError):
        fit(model(), pairs(), epochs=1)
    assert capsys.readouterr().out.startswith("Caching the features of 6 images")


def test_what_is_too_large_is_not_kept_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learner, data, precision = model(), pairs(), Precision("cpu")
    needed = Features.memory(learner, data, True, precision)
    monkeypatch.setattr(feeding, "CACHE_LIMIT", needed - 1)
    assert isinstance(feeding.source(learner, data, True, None, precision), feeding.Images)
    assert "Too large to cache" in capsys.readouterr().out
    assert isinstance(feeding.source(learner, data, True, True, precision), Features)
    assert isinstance(feeding.source(learner, data, False, None, precision), Features)  # half
    monkeypatch.setattr(feeding, "CACHE_LIMIT", needed)
    assert isinstance(feeding.source(learner, data, True, None, precision), Features)


def test_maps_of_an_encoder_that_learns_are_not_kept() -> None:
    with pytest.raises(ValueError, match="cache=True needs a frozen encoder"):
        fit(model(frozen=False), pairs(), epochs=1, cache=True)
    precision = Precision("cpu")
    assert isinstance(
        feeding.source(model(frozen=False), pairs(), True, None, precision), feeding.Images
    )


def test_only_an_encoder_that_training_leaves_alone_is_frozen() -> None:
    frozen, learning = ResNet18Encoder(None), ResNet18Encoder(None, frozen=False)
    no_gradients = ResNet18Encoder(None, frozen=False).requires_grad_(False)  # BatchNorm moves
    one_gradient = ResNet18Encoder(None)
    next(one_gradient.parameters()).requires_grad_(True)
    assert is_frozen(frozen)
    assert not any(map(is_frozen, (learning, no_gradients, one_gradient)))


def test_asking_whether_it_is_frozen_leaves_the_training_flags() -> None:
    encoder = ResNet18Encoder(None, frozen=False)
    for index, part in enumerate(encoder.modules()):
        part.training = index % 3 == 0
    before = [part.training for part in encoder.modules()]
    is_frozen(encoder)
    assert [part.training for part in encoder.modules()] == before


@pytest.mark.parametrize("mixed", [True, False])
def test_features_serve_several_decoders_and_train_what_fit_alone_trains(mixed: bool) -> None:
    options: dict[str, Any] = dict(epochs=2, batch_size=4, mixed=mixed)
    kept = cache_features(model(), pairs(), mixed=mixed)
    for seed in (0, 1):
        alone, shared = model(seed=0), model(seed=0)
        alone.decoder, shared.decoder = (model(seed).decoder for _ in range(2))
        expected = fit(alone, pairs(), seed=seed, **options)
        assert fit(shared, pairs(), seed=seed, features=kept, **options) == expected
        assert same(state(shared), state(alone))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": pairs(5)}, "images was 6, is 5"),
        ({"flip": False}, "flip was True, is False"),
        ({"mixed": True}, "mixed was False, is True"),
        ({"model": model(decoder=WithImage)}, "the decoder takes the image was False, is True"),
        ({"model": model(frozen=False)}, "features= needs a frozen encoder"),
    ],
)
def test_features_of_another_training_are_refused(changed: dict[str, Any], said: str) -> None:
    features = cache_features(model(), pairs())
    with pytest.raises(ValueError, match=re.escape(said)):
        fit(**{"model": model(), "data": pairs(), "features": features} | changed)
    with pytest.raises(ValueError, match="needs a frozen encoder"):
        cache_features(model(frozen=False), pairs())


# --- Interrupted and resumed ----------------------------------------------------------------------

LONG: dict[str, Any] = dict(epochs=4, batch_size=2, lr=0.01, seed=3)


def learner() -> Segmenter:
    """One whose training draws random numbers, and whose encoder has a state of its own."""
    return model(frozen=False, dropout=0.3)


def train_until_killed(path: Path) -> None:
    def wait(epoch: int) -> None:
        time.sleep(3600)

    fit(learner(), pairs(), checkpoint=path, after_epoch=wait, **LONG)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = learner()
    fit(trained, pairs(), **LONG)
    torch.set_num_threads(threads)
    return state(trained)


def test_a_training_that_was_killed_ends_as_if_it_had_not_been(
    tmp_path: Path, uninterrupted: dict[str, Tensor]
) -> None:
    path = tmp_path / "state.safetensors"
    child = multiprocessing.get_context("fork").Process(target=train_until_killed, args=(path,))
    child.start()
    while not path.exists() and child.is_alive():
        time.sleep(0.005)
    child.kill()
    child.join()
    assert child.exitcode == -9 and path.exists()
    resumed = learner()
    torch.rand(99)
    done: list[int] = []
    history = fit(resumed, pairs(), resume=path, after_epoch=done.append, **LONG)
    assert 0 < len(done) < LONG["epochs"] and done[-1] == LONG["epochs"]
    assert len(history.loss) == len(history.miou) == LONG["epochs"]
    assert same(state(resumed), uninterrupted)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "state"
    fit(model(), pairs(4), epochs=2, batch_size=2, checkpoint=path, cache=False)
    return path


def test_resuming_what_is_complete_trains_no_more(checkpoint: Path) -> None:
    finished, again = model(), model(seed=1)
    first = fit(finished, pairs(4), epochs=2, batch_size=2, cache=False)
    assert fit(again, pairs(4), epochs=2, batch_size=2, resume=checkpoint, cache=False) == first
    assert same(state(again), state(finished))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"epochs": 3}, "epochs was 2, is 3"),
        ({"batch_size": 1}, "batch_size was 2, is 1"),
        ({"lr": 0.003}, "lr was 0.002, is 0.003"),
        ({"encoder_lr": 0.1}, "encoder_lr was 0.0002, is 0.1"),
        ({"flip": False}, "flip was True, is False"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"data": pairs(3)}, "images was 4, is 3"),
        ({"mixed": True}, "mixed was None, is True"),
        ({"cache": True}, "cache was False, is True"),
        ({"ignore_index": 2}, "ignore_index was -100, is 2"),
    ],
)
def test_resuming_with_other_settings_names_them(
    changed: dict[str, Any], said: str, checkpoint: Path
) -> None:
    options = {"data": pairs(4), "epochs": 2, "batch_size": 2, "cache": False} | changed
    with pytest.raises(ValueError, match=re.escape(said)):
        fit(model(), resume=checkpoint, **options)


@pytest.mark.parametrize("frozen", [True, False])
def test_resuming_another_model_is_refused(frozen: bool, checkpoint: Path) -> None:
    other = model(frozen=frozen, out_channels=CLASSES + frozen)
    with pytest.raises(ValueError, match="belongs to another model"):
        fit(other, pairs(4), epochs=2, batch_size=2, resume=checkpoint, cache=False)


def test_resuming_needs_a_checkpoint_that_is_whole(tmp_path: Path, checkpoint: Path) -> None:
    options: dict[str, Any] = dict(epochs=2, batch_size=2, cache=False)
    with pytest.raises(FileNotFoundError, match="Start without resume="):
        fit(model(), pairs(4), resume=tmp_path / "none", **options)
    cut = tmp_path / "cut"
    cut.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="is not a checkpoint of this book"):
        fit(model(), pairs(4), resume=cut, **options)


def test_what_a_picture_on_the_way_draws_changes_nothing() -> None:
    ends = []
    for look in (None, lambda epoch: torch.rand(3)):
        learner = model()
        learner.decoder = nn.Sequential(learner.decoder, nn.Dropout2d(0.3))
        fit(learner, pairs(4), epochs=3, batch_size=2, after_epoch=look)
        ends.append(state(learner))
    assert same(*ends)


@pytest.mark.parametrize(
    ("wanted", "gpu", "there", "expected"),
    [
        ("", True, False, 3),
        ("", True, True, 40),
        ("", False, True, 3),  # what trains on the CPU all the same
        ("full", False, False, 40),
        ("short", True, True, 3),
    ],
)
def test_a_budget_is_long_only_where_it_is_trained_fast(
    wanted: str, gpu: bool, there: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOOK_BUDGET", wanted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert training.budget(3, 40, gpu=gpu) == expected
    monkeypatch.setenv("BOOK_BUDGET", "long")
    with pytest.raises(ValueError, match="'long': expected short or full"):
        training.budget(3, 40)


# --- What cannot be trained -----------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights() -> None:
    learner, calls = model(frozen=False), []

    def loss(logits: Tensor, masks: Tensor) -> Tensor:
        calls.append(state(learner))
        return F.cross_entropy(logits, masks) * (math.nan if len(calls) == 7 else 1)

    with pytest.raises(FloatingPointError, match=r"became nan in epoch 2.*it is 0\.002: try"):
        fit(learner, pairs(4), epochs=3, batch_size=1, loss=loss)
    assert len(calls) == 7 and same(calls[-1], state(learner))
    assert all(value.isfinite().all() for value in learner.state_dict().values())


def test_a_batch_without_a_pixel_that_counts_is_no_number() -> None:
    data = pairs(4)
    data[2][1].fill_(-100)
    with pytest.raises(FloatingPointError, match=r"nan in epoch 1.*no pixel that counts"):
        fit(model(), data, epochs=1, batch_size=1)


def test_a_rate_that_is_far_too_high_is_named() -> None:
    with pytest.raises(FloatingPointError, match=r"(nan|inf) in epoch \d+.*it is 1e\+30: try"):
        fit(model(), pairs(4), epochs=5, batch_size=2, lr=1e30)


Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def changed(change: Change, which: int | None = None) -> Pairs:
    return [change(*pair) if which in (i, None) else pair for i, pair in enumerate(pairs(20))]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("change", "which", "said"),
    [
        (
            lambda i, m: (i, m.where(m != 2, 255)),
            3,
            "contain 255, but .* 3 classes .*ignore_index=255",
        ),
        (lambda i, m: (i, m.where(m != 2, -1)), 3, "contain -1, but the model has 3 classes"),
        (
            lambda i, m: (i, F.one_hot(m, 3).movedim(-1, 0)),
            None,
            r"\[B, H, W\].*mask\.argmax\(0\)",
        ),
        (lambda i, m: (i, m[None]), None, r"\[B, H, W\].*\[\d+, 1, 32, 48\].*mask\[0\]"),
        (lambda i, m: (i, m[:-1]), 3, r"Item 3 is .*\[3, 32, 48\] with a mask \[31, 48\]"),
        (lambda i, m: (i[..., :40], m[:, :40]), 3, "the same for all.*Resize or crop them"),
        (lambda i, m: (i[..., :40], m[:, :40]), 19, "the same for all.*Resize or crop them"),
        (lambda i, m: (i * 255, m), None, "Expected values in 0…1.*images / 255"),
        (lambda i, m: (i.movedim(0, -1), m), None, r"Item \d+ is an image \[32, 48, 3\]"),
    ],
    ids=[
        "label",
        "negative",
        "one-hot",
        "channel",
        "mask size",
        "sizes",
        "last size",
        "0…255",
        "HWC",
    ],
)
def test_data_that_do_not_fit_are_refused(
    change: Change, which: int | None, said: str, cache: bool
) -> None:
    data = changed(change, which)
    with pytest.raises(ValueError, match=said):
        fit(model(), data, epochs=1, batch_size=4, cache=cache)


@pytest.mark.parametrize("cache", [True, False])
def test_an_empty_data_set_is_refused(cache: bool) -> None:
    with pytest.raises(ValueError, match="Expected images ≥ 1, got 0"):
        fit(model(), [], epochs=1, cache=cache)
    with pytest.raises(ValueError, match="Expected images ≥ 1, got 0"):
        evaluate(model(), [])


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"epochs": -1}])
def test_counts_below_one_are_refused(wrong: dict[str, int]) -> None:
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"Expected {name} ≥ 1, got {value}"):
        fit(model(), pairs(1), **wrong)


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="Nothing to train"):
        fit(model().requires_grad_(False), pairs(2), epochs=1)


# --- Masks ----------------------------------------------------------------------------------------


def test_ignored_pixels_change_nothing() -> None:
    """Pixels that do not count have no gradient, whatever number stands for them."""
    trained, losses = [], []
    for number in (-100, 255, CLASSES):
        data = [(image, mask.where(image[1] < 0.3, number)) for image, mask in pairs()]
        learner = model()
        losses.append(fit(learner, data, epochs=2, batch_size=3, ignore_index=number))
        trained.append((state(learner), evaluate(learner, data, ignore_index=number)))
    assert losses[0] == losses[1] == losses[2]
    assert all(same(trained[0][0], weights) for weights, _ in trained)
    assert all(scores == trained[0][1] for _, scores in trained)
    everything = fit(model(), pairs(), epochs=2, batch_size=3)
    assert everything.loss != losses[0].loss


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_masks_are_integers_of_any_size(dtype: torch.dtype) -> None:
    small = [(image, mask.to(dtype)) for image, mask in pairs()]
    assert fit(model(), small, epochs=1) == fit(model(), pairs(), epochs=1)
    assert evaluate(model(), small) == evaluate(model(), pairs())


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("batch_size", [3, 4])
def test_images_can_be_the_targets(cache: bool, batch_size: int) -> None:
    """Mirrored with their inputs, for a batch of as many images as channels, too."""
    data = [(image, image.clone()) for image, _ in pairs(12)]
    learner = model(decoder=ReadImageAndLearn)
    learner.decoder.seen = images = []
    targets: list[Tensor] = []

    def loss(logits: Tensor, masks: Tensor) -> Tensor:
        targets.append(masks.clone())
        return F.mse_loss(logits, masks)

    history = fit(learner, data, epochs=4, batch_size=batch_size, lr=0.02, loss=loss, cache=cache)
    for inputs, wanted in zip(images, targets, strict=True):
        expected = normalize(wanted)
        torch.testing.assert_close(inputs.float(), expected, rtol=0, atol=2e-3)
    assert history.loss[-1] < 0.5 * history.loss[0] and history.miou == []


def test_a_plain_loss_module_will_do_in_mixed_precision() -> None:
    data = [(image, image.clone()) for image, _ in pairs(4)]
    history = fit(
        model(decoder=WithImage), data, epochs=2, batch_size=2, loss=nn.MSELoss(), mixed=True
    )
    assert all(map(math.isfinite, history.loss))
    with pytest.raises(ValueError, match="no classes to compare"):
        evaluate(model(), data)


# --- Precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
def test_bfloat16_trains_almost_as_float32(cache: bool) -> None:
    options: dict[str, Any] = dict(epochs=4, batch_size=3, lr=0.01, cache=cache, device="cpu")
    mixed, plain = model(), model()
    seen = record(mixed, pairs(), mixed=True, epochs=1, cache=cache, device="cpu")
    assert {logits.dtype for logits, _ in seen} == {torch.bfloat16}
    mixed = model()
    half, full = fit(mixed, pairs(), mixed=True, **options), fit(plain, pairs(), **options)
    assert half.loss == pytest.approx(full.loss, rel=0.03) and half.loss != full.loss
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}


# --- Evaluation -----------------------------------------------------------------------------------


def confusion(predicted: Tensor, target: Tensor, classes: int, ignored: int) -> np.ndarray:
    counts = np.zeros((classes, classes))
    for found, wanted in zip(predicted.flatten().tolist(), target.flatten().tolist(), strict=True):
        if wanted != ignored:
            counts[wanted, found] += 1
    return counts


def ious(counts: np.ndarray) -> np.ndarray:
    both = np.diag(counts)
    with np.errstate(invalid="ignore"):
        return both / (counts.sum(0) + counts.sum(1) - both)


def test_scores_are_those_of_all_pixels_together() -> None:
    classes, generator = 6, torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 3, (5, *SIZE), generator=generator)
    target = torch.where(torch.rand(5, *SIZE, generator=generator) < 0.6, predicted, 1)
    predicted[4], target[4, :9] = 3, 3  # a class that only the last image has
    target[3, :, :20], target[2, 5:7] = 255, 4  # … and one that is never found, and none is 5
    oracle = model(decoder=ReadImage, classes=classes)
    data = list(zip(written(predicted), target, strict=True))
    counts = confusion(predicted, target, classes, 255)
    expected = 100 * ious(counts)
    of_each = [
        100 * np.nanmean(ious(confusion(p, t, classes, 255)))
        for p, t in zip(predicted, target, strict=True)
    ]
    assert expected[4] == 0 and math.isnan(expected[5]) and not np.isnan(expected[:5]).any()
    assert abs(np.mean(of_each) - np.nanmean(expected)) > 5  # else this would prove nothing
    for batch_size in (1, 2, 5, 8):
        found = evaluate(oracle, data, ignore_index=255, batch_size=batch_size)
        assert found.iou == pytest.approx(expected, nan_ok=True, rel=1e-5)
        assert found.miou == pytest.approx(np.nanmean(expected), rel=1e-5)
        assert found.accuracy == pytest.approx(100 * np.trace(counts) / counts.sum(), rel=1e-5)
        assert len(found.boundary_iou) == classes and math.isnan(found.boundary_iou[5])
        assert found.boundary_miou == pytest.approx(np.nanmean(found.boundary_iou), rel=1e-5)


def test_a_class_that_is_ignored_has_no_score() -> None:
    masks = torch.stack([mask for _, mask in pairs(2)])
    wrong = masks.where(masks != 1, 0)  # predicted where 1 was wanted: counts against 1 alone
    oracle = model(decoder=ReadImage, classes=CLASSES)
    data = list(zip(written(wrong), masks, strict=True))
    scores = evaluate(oracle, data, ignore_index=0)
    for values in (scores.iou, scores.boundary_iou):
        assert math.isnan(values[0]) and values[1] == 0 and values[2] > 0
    assert scores.miou == pytest.approx(scores.iou[2] / 2)


def test_a_perfect_model_has_a_hundred_per_cent() -> None:
    masks = torch.stack([mask for _, mask in pairs(2)])
    oracle = model(decoder=ReadImage, classes=CLASSES)
    scores = evaluate(oracle, list(zip(written(masks), masks, strict=True)))
    assert scores == (100, 100, (100,) * 3, (100,) * 3, 100)


def test_the_width_is_that_of_the_boundary() -> None:
    masks = torch.stack([mask for _, mask in pairs(2)])
    shifted = masks.roll(1, dims=-1)
    oracle = model(decoder=ReadImage, classes=CLASSES)
    data = list(zip(written(shifted), masks, strict=True))
    narrow, wide = evaluate(oracle, data, width=1), evaluate(oracle, data, width=5)
    assert narrow.boundary_miou < wide.boundary_miou - 5 and narrow.miou == wide.miou


def test_evaluating_and_predicting_leave_the_model_as_it_was() -> None:
    learner = model(frozen=False, dropout=0.5).train()
    learner.decoder.norm.eval()
    before, flags = state(learner), [part.training for part in learner.modules()]
    assert evaluate(learner, pairs()) == evaluate(learner, pairs())  # no dropout
    predict(learner, torch.stack([image for image, _ in pairs()]))
    assert same(state(learner), before)
    assert [part.training for part in learner.modules()] == flags
    assert all(p.grad is None for p in learner.parameters())


def test_predict_returns_the_class_of_each_pixel() -> None:
    labels = torch.randint(0, 6, (2, 33, 50), generator=torch.Generator().manual_seed(0))
    found = predict(model(decoder=ReadImage, classes=6), written(labels))
    assert found.dtype == torch.int64 and torch.equal(found, labels)


def test_whoever_looks_on_sees_every_prediction_once() -> None:
    labels = torch.randint(0, 6, (5, *SIZE), generator=torch.Generator().manual_seed(0))
    seen: list[tuple[Tensor, Tensor]] = []
    data = list(zip(written(labels), labels.flip(0), strict=True))
    oracle = model(decoder=ReadImage, classes=6)
    alone = evaluate(oracle, data, batch_size=2)
    assert evaluate(oracle, data, batch_size=2, also=lambda *batch: seen.append(batch)) == alone
    predicted, masks = (torch.cat(part) for part in zip(*seen, strict=True))
    assert torch.equal(predicted, labels) and torch.equal(masks, labels.flip(0))


# --- History --------------------------------------------------------------------------------------


def test_the_history_holds_the_miou_of_the_validation_data() -> None:
    learner, other = model(dropout=0.3), model(dropout=0.3)
    after: list[float] = []
    held_out = pairs(4, seed=9)

    def measure(_: int) -> None:
        after.append(evaluate(learner, held_out).miou)

    history = fit(
        learner, pairs(), epochs=2, batch_size=3, validation=held_out, after_epoch=measure
    )
    plain = fit(other, pairs(), epochs=2, batch_size=3)
    assert history.miou == after and history.miou != plain.miou
    assert history.loss == plain.loss and same(state(learner), state(other))  # it only looks on


def test_the_history_holds_the_mean_loss_and_the_miou_of_what_was_seen() -> None:
    learner, data = model(), pairs()
    seen = record(learner, data, epochs=1, batch_size=3)
    history = fit(model(), data, epochs=1, batch_size=3)
    losses = [F.cross_entropy(logits, masks).item() for logits, masks in seen]
    assert history.loss == pytest.approx([np.mean(losses)], rel=1e-5)
    counts = sum(confusion(logits.argmax(1), masks, CLASSES, -100) for logits, masks in seen)
    assert history.miou == pytest.approx([100 * np.nanmean(ious(counts))], rel=1e-4)


def test_the_loss_may_have_weights_of_its_own() -> None:
    weighted = SegmentationLoss(class_weights=torch.tensor([0.1, 1.4, 1.5]))
    history = fit(model(), pairs(), epochs=6, batch_size=3, lr=0.02, loss=weighted)
    assert history.loss[-1] < 0.7 * history.loss[0]


# --- Anything else --------------------------------------------------------------------------------

INPUTS, TARGETS = torch.linspace(-1, 1, 30).view(10, 3), torch.linspace(0, 2, 10)[:, None]


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))


def by_hand(
    module: nn.Module,
    draw: Callable[[], Any],
    epochs: int,
    cycle: dict[str, Any] | None,
    clip: float = math.inf,
) -> list[float]:
    """Adam with decay and, maybe, a cycle, as anyone would write it; `draw` returns an epoch."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    schedule = cycle and torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, **cycle)
    losses = []
    for _ in range(epochs):
        total, seen = 0.0, 0
        for chosen in draw():
            loss = F.mse_loss(module(INPUTS[chosen]), TARGETS[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            if schedule:
                schedule.step()
            total, seen = total + loss.item() * len(chosen), seen + len(chosen)
        losses.append(total / seen)
    return losses


def mse(module: nn.Module) -> Callable[[Tensor, int], Tensor]:
    return lambda chosen, epoch: F.mse_loss(module(INPUTS[chosen]), TARGETS[chosen])


def test_minimise_is_the_loop_with_an_order_of_its_own() -> None:
    wanted, found, order = network(), network(), torch.Generator().manual_seed(7)
    torch.manual_seed(1)
    cycle = dict(total_steps=3 * 4 + 1, pct_start=0.2)
    losses = by_hand(wanted, lambda: torch.randperm(10, generator=order).split(3), 3, cycle)
    torch.manual_seed(1)  # what dropout draws
    longer = lambda optimizer, steps: one_cycle(optimizer, steps + 1)  # noqa: E731
    options: dict[str, Any] = dict(epochs=3, lr=0.01, batch_size=3, seed=7, schedule=longer)
    assert minimise(found, mse(found), 10, **options) == pytest.approx(losses, rel=1e-9)
    assert same(state(found), state(wanted)) and not found.training


def test_minimise_is_the_loop_that_draws_from_torch_and_clips() -> None:
    wanted, found, free = network(), network(), network()
    torch.manual_seed(1)
    cycle = dict(total_steps=3 * 4, pct_start=0.1)
    losses = by_hand(wanted, lambda: torch.randperm(10).split(3), 3, cycle, clip=0.5)
    options: dict[str, Any] = dict(epochs=3, lr=0.01, batch_size=3, seed=None)
    options |= dict(schedule=partial(one_cycle, warm_up=0.1))
    torch.manual_seed(1)
    assert minimise(found, mse(found), 10, clip=0.5, **options) == pytest.approx(losses, rel=1e-9)
    torch.manual_seed(1)
    minimise(free, mse(free), 10, **options)
    assert same(state(found), state(wanted)) and not same(state(free), state(wanted))


@pytest.mark.parametrize("cycle", [None, dict(total_steps=12)])
def test_minimise_is_the_loop_of_steps_that_draw_with_replacement(cycle: Any) -> None:
    wanted, found = network(), network()
    torch.manual_seed(1)
    losses = by_hand(wanted, lambda: [torch.randint(10, (4,))], 12, cycle)
    torch.manual_seed(1)
    loss_of = lambda *_: mse(found)(torch.randint(10, (4,)), 0)  # noqa: E731
    schedule = cycle and partial(one_cycle, warm_up=0.3)
    assert minimise(found, loss_of, 1, epochs=12, lr=0.01, schedule=schedule) == losses
    assert same(state(found), state(wanted))


def test_minimise_trains_what_needs_a_gradient_and_lets_one_look_on() -> None:
    ends, done = [], []
    for look in (None, lambda epoch: done.append((epoch, torch.rand(3)))):
        module = network()
        module[0].requires_grad_(False)
        before = state(module)
        minimise(module, mse(module), 10, epochs=2, after_epoch=look)
        ends.append(state(module))
    assert same(*ends) and [epoch for epoch, _ in done] == [1, 2]
    moved = {name for name, value in ends[0].items() if not torch.equal(value, before[name])}
    assert moved == {"2.weight", "2.bias"}


@pytest.mark.parametrize("warm_up", [0.1, 0.2, 0.3, 0.5, 1 / 3])
def test_any_number_of_steps_can_go_up_and_down(warm_up: float) -> None:
    for steps in range(1, 13):
        optimizer = torch.optim.AdamW(network().parameters(), lr=0.01)
        cycle, rates = one_cycle(optimizer, steps, warm_up), []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            cycle.step()
        assert all(0 < rate <= 0.0101 for rate in rates)


def test_what_cannot_be_minimised_is_refused() -> None:
    module = network()
    for wrong in ({"count": 0}, {"epochs": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=r"Expected \w+ ≥ 1, got 0"):
            minimise(module, mse(module), **{"count": 10, "epochs": 1} | wrong)
    with pytest.raises(FloatingPointError, match=r"inf in epoch 2.*it is 0\.002: try"):
        minimise(module, lambda *given: mse(module)(*given) / (1 - given[1]), 10, epochs=2)
    with pytest.raises(ValueError, match="empty parameter list"):
        minimise(module.requires_grad_(False), mse(module), 10, epochs=1)


# --- Names and imports ----------------------------------------------------------------------------


def test_old_keywords_go_on_working_and_say_the_new_ones() -> None:
    new, old = model(frozen=False), model(frozen=False)
    fit(new, pairs(2), epochs=1, lr=0.01, encoder_lr=0.002)
    with pytest.warns(DeprecationWarning) as warned:
        fit(old, pairs(2), epochs=1, rate=0.01, encoder_rate=0.002)
    assert same(state(new), state(old))
    said = sorted(str(each.message) for each in warned)
    assert [text.split(";")[0] for text in said] == [
        "fit(encoder_rate=…) is now encoder_lr=…",
        "fit(rate=…) is now lr=…",
    ]
    assert all(each.filename == __file__ for each in warned)
    with pytest.raises(TypeError, match="both rate and lr"):
        fit(model(), pairs(2), lr=0.01, rate=0.01)


def test_the_import_brings_neither_pictures_nor_torchmetrics() -> None:
    code = "import sys, helpers.training; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torchmetrics", "matplotlib", "skimage", "IPython", "helpers.plotting"}
    assert not heavy & set(run.stdout.split())
