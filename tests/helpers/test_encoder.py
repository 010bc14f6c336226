"""The encoder, its weights and the model around it, used as readers use and misuse them."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ResNet, ResNet18_Weights, resnet18, resnet34
from torchvision.transforms import v2

from helpers import encoder as module
from helpers.bridges.spatial_pyramid import ContextDecoder
from helpers.encoder import (
    BUNDLED,
    BUNDLED_SHA256,
    MEAN,
    OUT_CHANNELS,
    STD,
    STRIDES,
    Pyramid,
    ResNet18Encoder,
    Segmenter,
    ShortEncoder,
    load_bundled,
    load_file,
    normalize,
)
from helpers.inspection import count_macs
from helpers.training import fit
from helpers.training.feeding import is_frozen

SIZES = [(32, 32), (33, 32), (32, 65), (47, 95), (64, 96), (63, 127), (101, 36), (224, 224)]


@pytest.fixture(autouse=True)
def no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shell says, these tests choose their weights themselves."""
    monkeypatch.delenv("BOOK_WEIGHTS", raising=False)


@pytest.fixture(scope="module")
def random_encoder() -> ResNet18Encoder:
    torch.manual_seed(0)
    return ResNet18Encoder(weights=None)


@pytest.fixture(scope="module")
def network() -> ResNet:
    """torchvision's own network with the bundled weights: the independent reference."""
    network = resnet18(num_classes=200)
    state = safetensors.torch.load_file(BUNDLED)
    network.load_state_dict({name: value.to(torch.float32) for name, value in state.items()})
    return network.eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def same(first: nn.Module | dict[str, Tensor], second: nn.Module | dict[str, Tensor]) -> bool:
    one, other = (m if isinstance(m, dict) else m.state_dict() for m in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def batch_norm(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every running statistic."""
    return {name: value.clone() for name, value in model.named_buffers()}


# --- shapes


def assert_shapes(pyramid: Pyramid, batch: int, height: int, width: int) -> None:
    assert isinstance(pyramid, Pyramid)
    assert Pyramid._fields == ("c1", "c2", "c3", "c4", "c5")
    for level, channels, stride in zip(pyramid, OUT_CHANNELS, STRIDES, strict=True):
        side = (math.ceil(height / stride), math.ceil(width / stride))
        assert level.shape == (batch, channels, *side)


@pytest.mark.parametrize("size", SIZES)
def test_shapes(random_encoder: ResNet18Encoder, size: tuple[int, int]) -> None:
    assert_shapes(random_encoder(images(2, 3, *size)), 2, *size)


@given(batch=st.integers(1, 3), height=st.integers(32, 100), width=st.integers(32, 100))
def test_shapes_of_any_size(
    random_encoder: ResNet18Encoder, batch: int, height: int, width: int
) -> None:
    assert_shapes(random_encoder(images(batch, 3, height, width)), batch, height, width)


def test_channels_and_strides_are_those_of_a_real_pass(random_encoder: ResNet18Encoder) -> None:
    pyramid = random_encoder(images(1, 3, 128, 256))
    assert random_encoder.out_channels == tuple(level.shape[1] for level in pyramid)
    assert random_encoder.strides == tuple(128 // level.shape[2] for level in pyramid)
    assert random_encoder.strides == tuple(256 // level.shape[3] for level in pyramid)


def test_every_level_comes_after_a_relu(random_encoder: ResNet18Encoder) -> None:
    for level in random_encoder(normalize(images(2, 3, 64, 64))):
        assert level.min() == 0
        assert level.max() > 0


# --- parity with torchvision


def test_classifier_on_pooled_c5_equals_torchvision_bit_for_bit(network: ResNet) -> None:
    encoder = ResNet18Encoder()
    for size in [(64, 64), (97, 130)]:
        x = normalize(images(3, 3, *size))
        with torch.no_grad():
            logits = network.fc(network.avgpool(encoder(x).c5).flatten(1))
            expected = network(x)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("size", [(64, 64), (75, 43)])
def test_every_level_equals_a_walk_through_torchvision(
    network: ResNet, size: tuple[int, int]
) -> None:
    x = normalize(images(2, 3, *size))
    with torch.no_grad():
        pyramid = ResNet18Encoder()(x)
        c1 = torch.relu(network.bn1(network.conv1(x)))
        c2 = network.layer1(network.maxpool(c1))
        c3 = network.layer2(c2)
        c4 = network.layer3(c3)
        c5 = network.layer4(c4)
    for level, expected in zip(pyramid, (c1, c2, c3, c4, c5), strict=True):
        assert torch.equal(level, expected)


def test_a_second_pass_changes_nothing_of_the_first(random_encoder: ResNet18Encoder) -> None:
    x = images(1, 3, 64, 64)
    first = random_encoder(x)
    kept = [level.clone() for level in first]
    random_encoder(images(2, 3, 32, 32, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert torch.equal(x, images(1, 3, 64, 64))


def test_no_hooks_and_no_classifier_are_left(random_encoder: ResNet18Encoder) -> None:
    random_encoder(images(1, 3, 32, 32))
    for part in random_encoder.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks and not part._backward_hooks
    names = dict(random_encoder.named_parameters())
    assert not any("fc" in name for name in names)
    whole = sum(p.numel() for p in resnet18(num_classes=200).parameters())
    assert sum(p.numel() for p in names.values()) == whole - (512 * 200 + 200)


def test_single_images_and_their_batch_agree(random_encoder: ResNet18Encoder) -> None:
    x = images(3, 3, 64, 64)
    together = random_encoder(x)
    for i in range(3):
        for level, alone in zip(together, random_encoder(x[i : i + 1]), strict=True):
            torch.testing.assert_close(level[i : i + 1], alone)


# --- frozen and not


def train_a_little(model: nn.Module) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for seed in range(2):
        output = model(images(2, 3, 64, 64, seed=seed))
        loss = output.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Head(nn.Module):
    """The smallest decoder: one 1×1 convolution on c5."""

    def __init__(self, out_channels: int = 7) -> None:
        super().__init__()
        self.project = nn.Conv2d(512, out_channels, 1)

    def forward(self, pyramid: Pyramid) -> Tensor:
        return self.project(pyramid.c5)


class Classifier(nn.Module):
    """A model of a reader's own, which knows nothing of `Segmenter`."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"encoder": encoder})
        self.head = nn.Linear(512, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone["encoder"](x).c5.mean((2, 3)))


@pytest.mark.parametrize("wrap", [lambda e: Segmenter(e, Head()), Classifier])
def test_frozen_means_frozen(wrap: Callable[[nn.Module], nn.Module]) -> None:
    encoder = ResNet18Encoder(weights=None, frozen=True)
    before = copy.deepcopy(encoder.state_dict())
    model = wrap(encoder)
    head = copy.deepcopy([p for p in model.parameters() if p.requires_grad])
    train_a_little(model)
    assert same(encoder.state_dict(), before)
    assert all(p.grad is None for p in encoder.parameters())
    assert model.training and not any(part.training for part in encoder.modules())
    assert len(head) == 2
    trained = [p for p in model.parameters() if p.requires_grad]
    assert not any(torch.equal(a, b) for a, b in zip(head, trained, strict=True))


def test_frozen_output_does_not_depend_on_the_mode() -> None:
    encoder = ResNet18Encoder(weights=None)
    x = images(2, 3, 64, 64)
    expected = encoder.eval()(x)
    found = encoder.train()(x)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not any(level.requires_grad for level in found)


def test_unfrozen_learns() -> None:
    encoder = ResNet18Encoder(weights=None, frozen=False)
    assert encoder.training
    before, statistics = copy.deepcopy(encoder.state_dict()), batch_norm(encoder)
    train_a_little(Segmenter(encoder, Head()))
    after = batch_norm(encoder)
    moved = [name for name in statistics if not torch.equal(statistics[name], after[name])]
    assert len(moved) == len(statistics) == 3 * 20
    first = encoder.get_parameter("features.conv1.weight")
    assert first.grad is not None and first.grad.abs().sum() > 0
    assert not torch.equal(first, before["features.conv1.weight"])


def test_unfrozen_in_evaluation_keeps_its_statistics() -> None:
    encoder = ResNet18Encoder(weights=None, frozen=False).eval()
    statistics = batch_norm(encoder)
    encoder(images(2, 3, 32, 32))
    assert same(batch_norm(encoder), statistics)
    assert not any(part.training for part in encoder.modules())


@pytest.mark.parametrize("levels", range(1, 6))
@pytest.mark.parametrize("training", [False, True])
def test_a_short_encoder_makes_the_first_maps_and_nothing_else(levels: int, training: bool) -> None:
    encoder = ResNet18Encoder(weights=None, frozen=False).train(training)
    short = ShortEncoder(encoder, levels)
    assert short.training == training
    x = torch.rand(2, 3, 50, 64)
    before = copy.deepcopy(encoder.state_dict())
    maps = short(x)
    encoder.load_state_dict(before)  # in training, the pass has moved BatchNorm's statistics
    for map_, own in zip(maps[:levels], encoder(x)[:levels], strict=True):
        assert torch.equal(map_, own)
    assert [[*map_.shape] for map_ in maps[levels:]] == [
        [2, channels, 0, 0] for channels in OUT_CHANNELS[levels:]
    ]
    weights = {id(weight) for weight in encoder.parameters()}
    assert {id(weight) for weight in short.parameters()} <= weights  # shared, not copied
    assert (len([*short.parameters()]) < len(weights)) == (levels < 5)


def test_a_short_encoder_costs_less_and_stays_frozen() -> None:
    encoder = ResNet18Encoder(weights=None)
    model = Segmenter(ShortEncoder(encoder, levels=3), Head()).train()
    assert is_frozen(model.encoder) and not model.encoder.training
    x = torch.rand(1, 3, 64, 64)
    assert count_macs(model.encoder, x) < 0.62 * count_macs(encoder, x)
    with pytest.raises(ValueError, match="at least 32 pixels"):
        model(torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize("levels", [0, 6, -1])
def test_levels_that_are_not_there_are_refused(levels: int) -> None:
    with pytest.raises(ValueError, match=f"levels in 1…5, got {levels}"):
        ShortEncoder(ResNet18Encoder(weights=None), levels)


def test_what_a_short_encoder_feeds_can_be_trained() -> None:
    encoder = ShortEncoder(ResNet18Encoder(weights=None), levels=3)
    decoder = ContextDecoder(encoder.out_channels, 3, level=3)
    pairs = [(torch.rand(3, 32, 48), torch.randint(3, (32, 48))) for _ in range(4)]
    torch.manual_seed(0)
    history = fit(Segmenter(encoder, decoder), pairs, epochs=2, batch_size=2, device="cpu")
    assert len(history.loss) == 2 and all(math.isfinite(loss) for loss in history.loss)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_deep_copy_of_a_short_encoder_computes_the_same(frozen: bool) -> None:
    short = ShortEncoder(ResNet18Encoder(weights=None, frozen=frozen), levels=3).eval()
    twin = copy.deepcopy(short)
    statistics = batch_norm(twin)
    x = images(2, 3, 64, 64)
    assert torch.equal(short(x).c3, twin(x).c3)
    assert same(batch_norm(twin), statistics)
    assert not any(part.training for part in twin.modules())


@pytest.mark.slow
@pytest.mark.parametrize("makes", [lambda m: m, lambda m: torch.compile(m, backend="eager")])
def test_a_compiled_decoder_still_gets_the_image(makes) -> None:
    class Beside(nn.Module):
        def forward(self, pyramid: Pyramid, image: torch.Tensor) -> torch.Tensor:
            return image

    x = images(1, 3, 32, 48)
    model = Segmenter(ResNet18Encoder(weights=None), makes(Beside()))
    assert torch.equal(model(x), x)


def test_state_dict_round_trip(tmp_path: Path) -> None:
    source, target = ResNet18Encoder(weights=None), ResNet18Encoder(weights=None)
    assert not same(source, target)
    torch.save(source.state_dict(), tmp_path / "encoder.pt")
    target.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    assert same(source, target)
    x = images(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(source(x), target(x), strict=True))


def test_a_deep_copy_is_frozen_too_and_shares_nothing() -> None:
    encoder = ResNet18Encoder(weights=None)
    twin = copy.deepcopy(encoder).train()
    assert same(encoder, twin) and not any(part.training for part in twin.modules())
    with torch.no_grad():
        twin.get_parameter("features.conv1.weight").zero_()
    assert not same(encoder, twin)


# --- weights


def test_bundled_is_the_default_and_random_differs(network: ResNet) -> None:
    expected = network.conv1.weight
    assert torch.equal(ResNet18Encoder().get_parameter("features.conv1.weight"), expected)
    drawn = ResNet18Encoder(weights=None).get_parameter("features.conv1.weight")
    assert not torch.equal(drawn, expected)


def test_load_bundled_is_the_file_in_float32(network: ResNet) -> None:
    state = load_bundled()
    assert same(state, network)
    assert state["fc.weight"].shape == (200, 512)
    assert {t.dtype for t in state.values()} == {torch.float32, torch.int64}


def test_bundled_file_is_the_one_that_the_card_describes() -> None:
    found = hashlib.sha256(BUNDLED.read_bytes()).hexdigest()
    assert found == BUNDLED_SHA256
    card = (BUNDLED.parent / "README.md").read_text(encoding="utf-8")
    assert found in card
    assert f"{BUNDLED.stat().st_size:,}" in card


def test_damaged_bundle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(BUNDLED.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / BUNDLED.name
    damaged.write_bytes(content)
    monkeypatch.setattr(module, "BUNDLED", damaged)
    with pytest.raises(ValueError, match=r"is damaged.*Install the package again"):
        ResNet18Encoder()
    ResNet18Encoder(weights=None)


def test_truncated_bundle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truncated = tmp_path / BUNDLED.name
    truncated.write_bytes(BUNDLED.read_bytes()[:-1000])
    monkeypatch.setattr(module, "BUNDLED", truncated)
    with pytest.raises(ValueError, match="is damaged"):
        load_bundled()


def test_missing_bundle_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUNDLED", tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors is missing: install the"):
        ResNet18Encoder()


def test_own_weights_come_from_a_file(tmp_path: Path) -> None:
    network = resnet18(num_classes=7)
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in network.state_dict().items()}, tmp_path / "own.st"
    )
    before = torch.random.get_rng_state()
    state = load_file(tmp_path / "own.st")
    assert torch.equal(before, torch.random.get_rng_state())  # reading draws no random number
    assert same(state, network)
    encoder = ResNet18Encoder(weights=tmp_path / "own.st")
    weight = encoder.get_parameter("features.layer4.1.conv2.weight")
    assert torch.equal(weight, network.layer4[1].conv2.weight)


def test_own_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    with pytest.raises(FileNotFoundError, match=r"There is no file .*own\.safetensors"):
        ResNet18Encoder(weights=path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"own\.safetensors is not a safetensors file.*save_file"):
        ResNet18Encoder(weights=path)
    state = {k: v.contiguous() for k, v in resnet34().state_dict().items()}
    safetensors.torch.save_file(state, path)
    with pytest.raises(ValueError, match=r"not a state dict of torchvision's resnet18: \d+ names"):
        ResNet18Encoder(weights=path)
    state = {k: v for k, v in resnet18().state_dict().items() if k != "fc.bias"}
    safetensors.torch.save_file(state, path)
    with pytest.raises(ValueError, match=r"first 'fc\.weight'.*classifier included"):
        ResNet18Encoder(weights=path)


def test_the_environment_switches_the_default_to_random(
    monkeypatch: pytest.MonkeyPatch, network: ResNet
) -> None:
    monkeypatch.setenv("BOOK_WEIGHTS", "random")
    torch.manual_seed(0)
    switched = ResNet18Encoder().get_parameter("features.conv1.weight")
    torch.manual_seed(0)
    assert torch.equal(
        switched, ResNet18Encoder(weights=None).get_parameter("features.conv1.weight")
    )
    assert not torch.equal(switched, network.conv1.weight)


@pytest.mark.parametrize("value", ["bundled", ""])
def test_the_environment_can_ask_for_the_default(
    monkeypatch: pytest.MonkeyPatch, network: ResNet, value: str
) -> None:
    monkeypatch.setenv("BOOK_WEIGHTS", value)
    weight = ResNet18Encoder().get_parameter("features.conv1.weight")
    assert torch.equal(weight, network.conv1.weight)


def test_the_environment_leaves_an_explicit_choice_alone(
    monkeypatch: pytest.MonkeyPatch, network: ResNet
) -> None:
    monkeypatch.setenv("BOOK_WEIGHTS", "bundled")
    weight = ResNet18Encoder(weights=None).get_parameter("features.conv1.weight")
    assert not torch.equal(weight, network.conv1.weight)


def test_a_bad_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOOK_WEIGHTS", "resnet50")
    with pytest.raises(ValueError, match=r"Unknown weights 'resnet50'.*BOOK_WEIGHTS: bundled"):
        ResNet18Encoder()


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "random", "", "Bundled"])
def test_unknown_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r'Unknown weights .* expected "bundled", "imagenet" or'):
        ResNet18Encoder(weights=name)


# --- ImageNet weights, from a server of our own


class Hub:
    """A server on 127.0.0.1 that torchvision takes for its own, and the folder it downloads to."""

    def __init__(self, content: bytes, folder: Path) -> None:
        self.content = content
        self.name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        self.folder = folder
        self.requests = 0
        self.status = 200
        self.missing_bytes = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.requests += 1
                self.send_response(hub.status)
                self.send_header("Content-Length", str(len(hub.content) + hub.missing_bytes))
                self.end_headers()
                self.wfile.write(hub.content)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/models/{self.name}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Tensor]]:
    torch.manual_seed(1)
    state = resnet18().state_dict()
    path = tmp_path_factory.mktemp("checkpoint") / "resnet18.pth"
    torch.save(state, path)
    return path.read_bytes(), state


@pytest.fixture
def hub(
    checkpoint: tuple[bytes, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    hub = Hub(checkpoint[0], tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", hub.url)
    yield hub
    hub.stop()


def assert_is_checkpoint(encoder: ResNet18Encoder, state: dict[str, Tensor]) -> None:
    body = {f"features.{name}": t for name, t in state.items() if not name.startswith("fc.")}
    assert same(encoder.state_dict(), body)


def test_imagenet_weights_are_downloaded_once(
    hub: Hub, checkpoint: tuple[bytes, dict[str, Tensor]]
) -> None:
    assert_is_checkpoint(ResNet18Encoder(weights="imagenet"), checkpoint[1])
    assert hub.files() == [hub.name]
    hub.stop()
    assert_is_checkpoint(ResNet18Encoder(weights="imagenet"), checkpoint[1])
    assert hub.requests == 1


def test_the_environment_switches_the_default_to_imagenet(
    hub: Hub, checkpoint: tuple[bytes, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOOK_WEIGHTS", "imagenet")
    assert_is_checkpoint(ResNet18Encoder(), checkpoint[1])


def wrong_hash(hub: Hub) -> None:
    hub.content = hub.content[:-1] + bytes([hub.content[-1] ^ 1])


def truncated(hub: Hub) -> None:
    hub.content = hub.content[: len(hub.content) // 2]
    hub.missing_bytes = len(hub.content)


def not_found(hub: Hub) -> None:
    hub.status = 404


def no_server(hub: Hub) -> None:
    hub.stop()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (wrong_hash, "invalid hash value"),
        (truncated, ""),  # the reason differs between versions of Python
        (not_found, "404"),
        (no_server, "refused"),
    ],
)
def test_a_failed_download_says_so_and_leaves_nothing(
    hub: Hub, spoil: Callable[[Hub], None], reason: str
) -> None:
    spoil(hub)
    with pytest.raises(RuntimeError) as caught:
        ResNet18Encoder(weights="imagenet")
    message = str(caught.value)
    assert message.startswith(f"The ImageNet weights could not be loaded from {hub.url} (")
    assert reason in message
    assert message.endswith(
        'Check the connection and try again, or use weights="bundled", which needs no download.'
    )
    assert "\n" not in message and "Delete" not in message
    assert hub.files() == []


def test_a_good_download_after_a_bad_one(
    hub: Hub, checkpoint: tuple[bytes, dict[str, Tensor]]
) -> None:
    truncated(hub)
    with pytest.raises(RuntimeError, match="could not be loaded"):
        ResNet18Encoder(weights="imagenet")
    hub.content, hub.missing_bytes = checkpoint[0], 0
    assert_is_checkpoint(ResNet18Encoder(weights="imagenet"), checkpoint[1])


@pytest.mark.parametrize("content", [b"", b"<html>Please log in</html>", None])
def test_a_damaged_file_in_the_cache_is_named_and_deleting_it_cures(
    hub: Hub, checkpoint: tuple[bytes, dict[str, Tensor]], content: bytes | None
) -> None:
    cached = hub.folder / "hub" / "checkpoints" / hub.name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(checkpoint[0][: len(checkpoint[0]) // 2] if content is None else content)
    with pytest.raises(RuntimeError, match="could not be loaded") as caught:
        ResNet18Encoder(weights="imagenet")
    assert f"Delete {cached}, which may be damaged." in str(caught.value)
    assert hub.requests == 0
    cached.unlink()
    assert_is_checkpoint(ResNet18Encoder(weights="imagenet"), checkpoint[1])


# --- normalize


def test_normalize_equals_torchvision() -> None:
    preset = ResNet18_Weights.IMAGENET1K_V1.transforms()
    assert [*MEAN] == preset.mean and [*STD] == preset.std
    x = images(2, 3, 40, 50)
    expected = v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])(x)
    torch.testing.assert_close(normalize(x), expected, rtol=0, atol=1e-6)


def test_normalize_changes_neither_its_input_nor_the_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = images(1, 3, 32, 32).to(dtype)
        kept = x.clone()
        result = normalize(x)
        assert result.dtype == dtype and torch.equal(x, kept)
        torch.testing.assert_close(result.float(), normalize(x.float()), rtol=0.02, atol=0.02)


def test_normalize_of_black_and_white() -> None:
    black, white = normalize(torch.zeros(1, 3, 32, 32)), normalize(torch.ones(1, 3, 32, 32))
    assert black.min().item() == pytest.approx(-0.485 / 0.229)
    assert white.max().item() == pytest.approx((1 - 0.406) / 0.225)


# What came, the cure that the message must contain, and what else it must say.
CURED = {
    "stored pixels": (
        (images(1, 3, 40, 40) * 255).byte(),
        "images.float() / 255.",
        "torch.uint8",
    ),
    "integers": ((images(1, 3, 40, 40) * 255).long(), "images.float() / 255.", "torch.int64"),
    "0…255 as floats": (images(1, 3, 40, 40) * 255, "images / 255.", "Expected values in 0…1"),
    "one image": (images(3, 40, 40), "images[None]", "got [3, 40, 40]"),
    "grayscale": (
        images(2, 1, 40, 40),
        "images.expand(-1, 3, -1, -1)",
        "got [2, 1, 40, 40]",
    ),
    "alpha": (images(2, 4, 40, 40), "images[:, :3]", "got [2, 4, 40, 40]"),
    "channels last": (
        images(2, 40, 50, 3),
        "images.permute(0, 3, 1, 2)",
        "got [2, 40, 50, 3]",
    ),
    "half too small": (
        images(1, 3, 16, 40),
        "F.interpolate(images, scale_factor=2)",
        "at least 32 pixels, got [1, 3, 16, 40]",
    ),
}


CURED |= {
    "a quarter of the size": (
        images(1, 3, 8, 40),
        "F.interpolate(images, scale_factor=4)",
        "got [1, 3, 8, 40]",
    ),
    "one pixel": (
        images(1, 3, 1, 1),
        "F.interpolate(images, scale_factor=32)",
        "got [1, 3, 1, 1]",
    ),
    "video": (images(2, 4, 3, 40, 40), "images.flatten(0, 1)", "got [2, 4, 3, 40, 40]"),
    "bicubic, below": (images(1, 3, 40, 40) - 0.1, "images.clamp(0, 1)", "normalise once"),
    "bicubic, above": (images(1, 3, 40, 40) + 0.1, "images.clamp(0, 1)", "normalise once"),
}


@pytest.mark.parametrize("name", CURED)
def test_normalize_names_a_cure_that_works(name: str) -> None:
    wrong, cure, reason = CURED[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        normalize(wrong)
    message = str(caught.value)
    assert cure in message and reason in message
    cured = eval(cure, {"images": wrong, "F": F})
    assert normalize(cured).shape[1] == 3


# One mistake on top of another: each message must lead on, until the images are good.
PICTURES = {
    "stored": (images(40, 50, 3) * 255).byte(),
    "stored, alpha": (images(40, 50, 4) * 255).byte(),
    "stored, gray": (images(40, 50, 1) * 255).byte(),
    "stored, gray, no channel": (images(40, 50) * 255).byte(),
    "batch, alpha": images(2, 40, 50, 4) * 255,
    "thumbnail": images(16, 9, 3) * 255,
    "video, channels last": images(2, 4, 40, 50, 3),
}
CURES = [
    "images.float() / 255.",
    "images / 255.",
    "images[None, None]",
    "images[None]",
    "images.flatten(0, 1)",
    "images.expand(-1, 3, -1, -1)",
    "images[:, :3]",
    "images.permute(0, 3, 1, 2)",
    "F.interpolate(images, scale_factor=2)",
    "F.interpolate(images, scale_factor=4)",
]


@pytest.mark.parametrize("name", PICTURES)
def test_following_the_messages_ends_with_good_images(name: str) -> None:
    picture = PICTURES[name]
    for _ in range(5):
        try:
            assert normalize(picture).shape[1] == 3
            return
        except (TypeError, ValueError) as error:
            cure = next(cure for cure in CURES if cure in str(error))
            picture = eval(cure, {"images": picture, "F": F})
    pytest.fail(f"the messages lead nowhere: {list(picture.shape)}")


def test_normalize_forgives_the_rounding_of_a_resize() -> None:
    white = F.interpolate(torch.ones(1, 3, 97, 61), size=(80, 80), mode="bilinear", antialias=True)
    assert white.max() > 1
    torch.testing.assert_close(normalize(white), normalize(torch.ones(1, 3, 80, 80)))


def test_normalize_refuses_an_empty_batch() -> None:
    with pytest.raises(ValueError, match=r"at least one image, got \[0, 3, 40, 40\]"):
        normalize(torch.rand(0, 3, 40, 40))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_normalize_refuses_what_is_no_number_and_helps_to_find_it(value: float) -> None:
    x = images(3, 3, 32, 32)
    x[1, 0, 5, 5] = value
    with pytest.raises(ValueError, match=r"NaN or infinity.*images\.isfinite\(\)"):
        normalize(x)
    assert x.isfinite().all(dim=(1, 2, 3)).tolist() == [True, False, True]


def test_normalize_refuses_to_normalise_twice() -> None:
    x = images(1, 3, 32, 32)
    with pytest.raises(ValueError, match="normalised already"):
        normalize(normalize(x))


@pytest.mark.filterwarnings("error")
def test_normalize_takes_the_array_that_its_cure_makes() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    with pytest.raises(TypeError, match=r"Expected a tensor .* got Image") as caught:
        normalize(picture)  # type: ignore[arg-type]
    cure = str(caught.value).partition("Pillow: ")[2].removesuffix(".")
    cured = eval(cure, {"picture": picture, "torch": torch, "np": np})
    torch.testing.assert_close(cured[0].permute(1, 2, 0), torch.from_numpy(pixels) / 255)
    assert normalize(cured).shape == (1, 3, 40, 50)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2, 3, 32, 32), (2, 2, 40, 40), (2, 7, 40, 40)])
def test_encoder_and_normalize_refuse_other_shapes(
    random_encoder: ResNet18Encoder, shape: tuple[int, ...]
) -> None:
    for call in (random_encoder, normalize):
        with pytest.raises(ValueError) as caught:
            call(torch.rand(shape))
        assert f"got {list(shape)}" in str(caught.value)


@pytest.mark.parametrize("wrong", [None, [[0.5]], "image.png", 3.0])
def test_encoder_refuses_what_is_no_tensor(random_encoder: ResNet18Encoder, wrong: object) -> None:
    with pytest.raises(TypeError, match=r"Expected a tensor \[B, 3, H, W\], got"):
        random_encoder(wrong)


def test_encoder_refuses_integers(random_encoder: ResNet18Encoder) -> None:
    with pytest.raises(TypeError, match=r"Expected floating point, got torch\.uint8"):
        random_encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


# --- Segmenter


class WithImage(Head):
    def forward(self, pyramid: Pyramid, image: Tensor) -> Tensor:  # type: ignore[override]
        maps = F.interpolate(super().forward(pyramid), size=image.shape[-2:])
        return torch.cat([maps, image], dim=1)


class WithQuery(Head):
    def forward(self, pyramid: Pyramid, query: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(pyramid) * query[:, :, None, None]


class WithBoth(Head):
    def forward(  # type: ignore[override]
        self, pyramid: Pyramid, query: Tensor, image: Tensor
    ) -> Tensor:
        maps = F.interpolate(super().forward(pyramid), size=image.shape[-2:])
        return torch.cat([maps * query[:, :, None, None], image], dim=1)


@pytest.mark.parametrize("size", SIZES)
def test_output_has_the_size_of_the_image(
    random_encoder: ResNet18Encoder, size: tuple[int, int]
) -> None:
    model = Segmenter(random_encoder, Head(5))
    assert model(images(2, 3, *size)).shape == (2, 5, *size)


def test_output_is_the_bilinear_enlargement_of_the_decoders(
    random_encoder: ResNet18Encoder,
) -> None:
    head = Head(4)
    x = images(1, 3, 64, 96)
    expected = nn.Upsample(scale_factor=32, mode="bilinear")(head(random_encoder(x)))
    torch.testing.assert_close(Segmenter(random_encoder, head)(x), expected)


def test_a_decoder_of_full_size_passes_unchanged(random_encoder: ResNet18Encoder) -> None:
    decoder = WithImage(2)
    x = images(1, 3, 45, 61)
    model = Segmenter(random_encoder, decoder)
    assert torch.equal(model(x), decoder(random_encoder(x), image=x))
    assert torch.equal(model(x)[:, 2:], x)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_decoder_gets_what_it_asks_for(random_encoder: ResNet18Encoder, batch: int) -> None:
    x, query = images(batch, 3, 64, 64), images(batch, 2)
    pyramid = random_encoder(x)
    plain, image, asked, both = Head(2), WithImage(2), WithQuery(2), WithBoth(2)
    full = {"size": (64, 64), "mode": "bilinear"}
    torch.testing.assert_close(
        Segmenter(random_encoder, plain)(x), F.interpolate(plain(pyramid), **full)
    )
    torch.testing.assert_close(Segmenter(random_encoder, image)(x), image(pyramid, x))
    torch.testing.assert_close(
        Segmenter(random_encoder, asked)(x, query=query),
        F.interpolate(asked(pyramid, query), **full),
    )
    torch.testing.assert_close(Segmenter(random_encoder, both)(x, query), both(pyramid, query, x))


@pytest.mark.parametrize("decoder", [WithQuery, WithBoth])
def test_a_missing_query_is_asked_for(random_encoder: ResNet18Encoder, decoder: type[Head]) -> None:
    model = Segmenter(random_encoder, decoder(2))
    with pytest.raises(
        ValueError, match=rf"{decoder.__name__} needs a query: call model\(x, query"
    ):
        model(images(1, 3, 64, 64))


@pytest.mark.parametrize("decoder", [Head, WithImage])
def test_a_query_that_nobody_takes_is_refused(
    random_encoder: ResNet18Encoder, decoder: type[Head]
) -> None:
    model = Segmenter(random_encoder, decoder(2))
    with pytest.raises(ValueError, match=f"{decoder.__name__} takes no query"):
        model(images(1, 3, 64, 64), query=images(1, 2))


class Vector(nn.Module):
    def forward(self, pyramid: Pyramid) -> Tensor:
        return pyramid.c5.mean((2, 3))


class Tokens(nn.Module):
    def forward(self, pyramid: Pyramid) -> Tensor:
        return pyramid.c5.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("decoder", "shape"), [(Vector(), [2, 512]), (Tokens(), [2, 4, 512])])
def test_a_decoder_that_returns_no_maps_is_refused(
    random_encoder: ResNet18Encoder, decoder: nn.Module, shape: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"expected maps .* give it a decoder") as caught:
        Segmenter(random_encoder, decoder)(images(2, 3, 64, 64))
    assert f"The decoder returned {shape}" in str(caught.value)


class Levels(nn.Module):
    def forward(self, pyramid: Pyramid) -> list[Tensor]:
        return list(pyramid)


def test_a_decoder_that_returns_several_tensors_is_refused(
    random_encoder: ResNet18Encoder,
) -> None:
    with pytest.raises(ValueError, match="The decoder returned a list; expected maps"):
        Segmenter(random_encoder, Levels())(images(2, 3, 64, 64))


def test_bad_images_are_refused_before_the_decoder_runs(random_encoder: ResNet18Encoder) -> None:
    with pytest.raises(ValueError, match=r"images\.expand"):
        Segmenter(random_encoder, WithImage())(images(2, 1, 64, 64))


# --- other ways to run it


def test_bfloat16() -> None:
    torch.manual_seed(0)
    model = Segmenter(ResNet18Encoder(), Head()).eval()
    x = normalize(images(1, 3, 64, 64))
    expected = model(x)
    found = model.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


def test_autocast(random_encoder: ResNet18Encoder) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Segmenter(random_encoder, Head())(images(2, 3, 64, 64))
    assert found.shape == (2, 7, 64, 64) and found.isfinite().all()


@pytest.mark.slow
def test_export_of_the_encoder_for_other_sizes(random_encoder: ResNet18Encoder) -> None:
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        random_encoder, (images(2, 3, 64, 96),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    )
    for shape in [(2, 3, 64, 96), (3, 3, 75, 50)]:
        x = images(*shape, seed=2)
        for found, expected in zip(program.module()(x), random_encoder(x), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_export_of_the_whole_model(random_encoder: ResNet18Encoder) -> None:
    model = Segmenter(random_encoder, WithBoth(2)).eval()
    x, query = images(1, 3, 64, 64), images(1, 2)
    program = torch.export.export(model, (x, query))
    torch.testing.assert_close(program.module()(x, query), model(x, query))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="torch.compile needs a compiler there")
@pytest.mark.parametrize("whole", [False, True])
def test_compile_in_one_graph(random_encoder: ResNet18Encoder, whole: bool) -> None:
    torch._dynamo.reset()
    model = Segmenter(random_encoder, Head()) if whole else random_encoder
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(tuple(compiled(x)), tuple(model(x)))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_copy_is_in_the_same_mode_and_on_its_own(frozen):
    encoder = ResNet18Encoder(None, frozen=frozen)
    list(encoder.modules())[5].eval()
    copied = copy.deepcopy(encoder)
    modes = [[part.training for part in each.modules()] for each in (encoder, copied)]
    assert modes[0] == modes[1]
    x = torch.randn(2, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(encoder.eval()(x), copied.eval()(x), strict=True))
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert next(encoder.parameters()).any()
