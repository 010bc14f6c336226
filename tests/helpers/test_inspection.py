"""The measurements agree with formulas and structures that were worked out independently."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from helpers.encoder import Pyramid, ResNet18Encoder, Segmenter
from helpers.inspection import (
    count_macs,
    count_parameters,
    evaluating,
    pyramid_levels,
    relative_latency,
    shapes,
)


@pytest.fixture(scope="module")
def encoder() -> ResNet18Encoder:
    return ResNet18Encoder(weights=None)


class Nested(nn.Module):
    def forward(self, x: Tensor) -> object:
        return {"maps": [x, (x[0], None)], "name": "nested"}


def test_shapes_are_nested_as_the_output_is(encoder: ResNet18Encoder) -> None:
    found = shapes(encoder, torch.zeros(2, 3, 64, 96))
    assert isinstance(found, Pyramid)
    assert found.c1 == (2, 64, 32, 48)
    assert found.c5 == (2, 512, 2, 3)
    nested = shapes(Nested(), torch.zeros(2, 3))
    assert nested == {"maps": [(2, 3), ((3,), None)], "name": "nested"}


@pytest.mark.parametrize("size", [(32, 32), (33, 65), (224, 224), (97, 127)])
def test_levels_are_those_that_the_encoder_returns(
    encoder: ResNet18Encoder, size: tuple[int, int]
) -> None:
    computed = [(level.channels, level.height, level.width) for level in pyramid_levels(*size)]
    assert computed == [shape[1:] for shape in shapes(encoder, torch.zeros(1, 3, *size))]
    assert [level.stride for level in pyramid_levels(*size)] == list(encoder.strides)


def test_levels_refuse_an_image_that_is_too_small() -> None:
    with pytest.raises(ValueError, match="at least 32 pixels, got 31 × 64"):
        pyramid_levels(31, 64)


def test_measuring_leaves_the_module_as_it_was() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    module.train()
    module[1].eval()  # a part that differs from the rest must stay different
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    shapes(module, x)
    count_macs(module, x)
    relative_latency(module, module, x, repeats=3)
    assert [part.training for part in module.modules()] == [True, True, False, True]
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert x.grad is None and all(p.grad is None for p in module.parameters())


def test_the_mode_returns_after_an_error() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="inside"), evaluating(module):
        assert not module.training
        raise RuntimeError("inside")
    assert module.training


def test_parameters_are_those_of_torchvision_without_the_classifier(
    encoder: ResNet18Encoder,
) -> None:
    network = resnet18()
    expected = sum(p.numel() for p in network.parameters()) - (512 * 1000 + 1000)
    assert count_parameters(encoder) == expected


def test_a_shared_parameter_counts_once() -> None:
    layer = nn.Linear(3, 5)
    assert count_parameters(nn.Sequential(layer, nn.ReLU(), layer)) == 3 * 5 + 5


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(7, 5), (4, 7), 4 * 7 * 5),
        (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 10, 12), 2 * 10 * 12 * 8 * 6 * 9),
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), (1, 6, 10, 12), 5 * 6 * 8 * 6 * 9),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6), (1, 6, 10, 12), 10 * 12 * 6 * 9),
        (nn.ConvTranspose2d(8, 4, 4, 2, 1), (1, 8, 16, 16), 16 * 16 * 8 * 4 * 16),
        (nn.LSTM(32, 64, batch_first=True), (2, 10, 32), 2 * 10 * 4 * 64 * (32 + 64)),
        (nn.GRU(32, 64, batch_first=True), (2, 10, 32), 2 * 10 * 3 * 64 * (32 + 64)),
        (
            nn.TransformerEncoderLayer(64, 4, 128, batch_first=True),
            (2, 49, 64),
            2 * (4 * 49 * 64 * 64 + 2 * 49 * 49 * 64 + 2 * 49 * 64 * 128),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_macs_follow_the_formula(module: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    # In evaluation mode attention and LSTM take fused kernels, which the counter does not see.
    assert count_macs(module.eval(), torch.randn(shape)) == expected


class Asking(nn.Module):
    """A learned query, the same for every image, as in a transformer's decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.rand(5, 8))
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.query.expand(len(x), -1, -1))


@pytest.mark.parametrize("without", [False, True])
def test_macs_of_a_parameter_that_is_handed_on_expanded(without: bool) -> None:
    with torch.set_grad_enabled(not without):
        assert count_macs(Asking(), torch.rand(2, 1)) == 2 * 5 * 8 * 3


def test_macs_of_the_encoder_are_the_sum_over_its_convolutions(encoder: ResNet18Encoder) -> None:
    counted = []

    def count(module: nn.Conv2d, inputs: object, output: Tensor) -> None:
        counted.append(output[0].numel() * module.weight[0].numel())

    convolutions = [part for part in encoder.modules() if isinstance(part, nn.Conv2d)]
    handles = [part.register_forward_hook(count) for part in convolutions]
    x = torch.randn(1, 3, 64, 96)
    encoder(x)
    for handle in handles:
        handle.remove()
    assert count_macs(encoder, x) == sum(counted) > 0


def test_counting_restores_the_fused_kernels() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    enabled = torch.backends.mkldnn.enabled
    with pytest.raises(RuntimeError):
        count_macs(nn.Linear(3, 3), torch.zeros(1, 4))
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled == enabled


def test_a_much_heavier_module_takes_longer(encoder: ResNet18Encoder) -> None:
    x = torch.randn(1, 3, 64, 64)
    repeated = nn.Sequential(*[nn.Conv2d(3, 3, 9, padding=4) for _ in range(60)])
    ratio = relative_latency(repeated, nn.Conv2d(3, 3, 1), x, repeats=5)
    assert ratio.lower <= ratio.median <= ratio.upper
    assert ratio.median > 2
    assert str(ratio).startswith(f"{ratio.median:.2f} × (")


def test_the_ratio_is_the_median_of_pairs_measured_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    clock = iter([0, 9, 0, 9, *[0, 2, 0, 1], *[0, 6, 0, 2], *[0, 20, 0, 4]])
    monkeypatch.setattr("helpers.inspection.time.perf_counter", lambda: next(clock))
    first, second = nn.Identity(), nn.Identity()
    first.register_forward_hook(lambda *_: calls.append("module"))
    second.register_forward_hook(lambda *_: calls.append("reference"))
    ratio = relative_latency(first, second, torch.zeros(1), repeats=3)
    assert calls == ["module", "reference"] * 4
    assert ratio == (3, 2.5, 4)  # of 2, 3 and 5


def test_too_few_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 repeats"):
        relative_latency(nn.Identity(), nn.Identity(), torch.zeros(1), repeats=2)


def test_a_whole_model_can_be_measured(encoder: ResNet18Encoder) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Conv2d(512, 7, 1)

        def forward(self, pyramid: Pyramid) -> Tensor:
            return self.project(pyramid.c5)

    x = torch.zeros(1, 3, 64, 64)
    model = Segmenter(encoder, Head())
    assert shapes(model, x) == (1, 7, 64, 64)
    assert count_macs(model, x) - count_macs(encoder, x) == 2 * 2 * 512 * 7
