"""Chapter 01's exports: three ways to the same maps, and the smallest decoder."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from helpers.bridges.encoder import LinearProbe, TruncatedEncoder, collecting_stages
from helpers.encoder import Pyramid, ResNet18Encoder, Segmenter, load_bundled


@pytest.fixture(scope="module")
def encoder() -> ResNet18Encoder:
    return ResNet18Encoder()


@pytest.fixture
def network() -> nn.Module:
    network = resnet18(num_classes=200)
    network.load_state_dict(load_bundled())
    return network.eval()


@pytest.mark.parametrize("size", [(32, 32), (65, 97), (128, 224)])
def test_truncated_and_hooked_maps_are_the_encoders(encoder, network, size):
    x = torch.randn(2, 3, *size)
    expected = encoder(x)
    assert torch.equal(TruncatedEncoder(network)(x), expected.c5)
    with collecting_stages(network) as maps:
        network(torch.randn(1, 3, 40, 40))
        network(x)
        for name, map_ in expected._asdict().items():
            assert torch.equal(maps[name], map_), f"{name} is not that of the latest pass"


def test_hooks_and_maps_are_gone_after_an_error(network):
    with pytest.raises(RuntimeError, match="size"), collecting_stages(network) as maps:
        network(torch.randn(1, 3, 64, 64))
        assert list(maps) == ["c1", "c2", "c3", "c4", "c5"]
        network(torch.randn(1, 5, 64, 64))
    assert maps == {}
    assert not any(module._forward_hooks for module in network.modules())


def test_no_hook_stays_behind_where_a_stage_is_missing():
    network = resnet18()
    del network.layer3
    with pytest.raises(AttributeError, match="layer3"), collecting_stages(network):
        pass
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_a_probe_is_one_linear_layer_at_every_position(encoder, level):
    torch.manual_seed(level)
    pyramid = encoder(torch.randn(2, 3, 65, 97))
    probe = LinearProbe(encoder.out_channels, 7, level).train()
    probe(pyramid)  # statistics for the scale
    probe.eval()
    map_ = pyramid[level - 1].double()
    mean, variance = probe.scale.running_mean.double(), probe.scale.running_var.double()
    scaled = (map_.permute(0, 2, 3, 1) - mean) / (variance + probe.scale.eps).sqrt()
    expected = scaled @ probe.linear.weight[:, :, 0, 0].double().T + probe.linear.bias.double()
    assert torch.allclose(probe(pyramid).permute(0, 2, 3, 1).double(), expected, atol=1e-4)


@pytest.mark.parametrize("level", [0, 6, -1])
def test_a_probe_refuses_a_level_that_does_not_exist(encoder, level):
    with pytest.raises(ValueError, match=f"level from 1 to 5, got {level}"):
        LinearProbe(encoder.out_channels, 7, level)


@pytest.mark.parametrize("shape", [(1, 64, 4, 4), (512, 4, 4)])
def test_a_probe_refuses_other_maps(encoder, shape):
    probe = LinearProbe(encoder.out_channels, 7, level=5)
    maps = [torch.zeros(1, c, 8, 8) for c in encoder.out_channels[:4]]
    with pytest.raises(ValueError, match=r"Expected c5 as \[B, 512, h, w\]"):
        probe(Pyramid(*maps, torch.zeros(shape)))


def test_a_segmenter_with_a_probe_trains_only_the_probe(encoder):
    model = Segmenter(encoder, LinearProbe(encoder.out_channels, 7, level=4)).train()
    logits = model(torch.randn(2, 3, 75, 100))
    assert logits.shape == (2, 7, 75, 100)
    logits.square().mean().backward()
    with_gradient = [name for name, p in model.named_parameters() if p.grad is not None]
    assert with_gradient == ["decoder.linear.weight", "decoder.linear.bias"]


@pytest.mark.slow
def test_a_probe_exports(encoder):
    model = Segmenter(encoder, LinearProbe(encoder.out_channels, 7, level=3)).eval()
    x = torch.randn(1, 3, 64, 96)
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), model(x), atol=1e-5)
