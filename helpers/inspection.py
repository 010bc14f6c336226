"""Look at networks from outside: shapes, parameters, multiply-accumulates, relative latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from helpers.encoder import OUT_CHANNELS, SMALLEST_SIDE, STRIDES, Pyramid


class Level(NamedTuple):
    """One level of the encoder's pyramid, as it leaves an image of a given size."""

    name: str
    channels: int
    height: int
    width: int
    stride: int


class Ratio(NamedTuple):
    """How many times longer one module takes than another: the median and its quartiles."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.2f} × ({self.lower:.2f} … {self.upper:.2f})"


def shapes(module: nn.Module, *inputs: Any) -> Any:
    """Run `module(*inputs)` once and return the shapes of its output, nested as the output is.

    A tensor gives a tuple of its sides, a `Pyramid` a `Pyramid` of such tuples, and so on through
    named tuples, tuples, lists and dicts; what is no tensor stays as it is. Runs in evaluation
    mode, without gradients, and leaves the module as it was.
    """
    with evaluating(module), torch.no_grad():
        return tree_map_only(Tensor, lambda t: tuple(t.shape), module(*inputs))


def pyramid_levels(height: int, width: int) -> list[Level]:
    """Return what the encoder makes of an image of `height × width` pixels, computed, not run.

    Five `Level`s, `c1` to `c5`; sides are rounded up. Raises `ValueError` below 32 pixels.
    """
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(
            f"Expected sides of at least {SMALLEST_SIDE} pixels, got {height} × {width}."
        )
    return [
        Level(name, channels, -(-height // stride), -(-width // stride), stride)
        for name, channels, stride in zip(Pyramid._fields, OUT_CHANNELS, STRIDES, strict=True)
    ]


def count_parameters(module: nn.Module) -> int:
    """Return how many numbers the module learns, or has learnt; a shared parameter counts once.

    BatchNorm's running statistics are buffers, not parameters.
    """
    return sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, *inputs: Any) -> int:
    """Return the multiply-accumulates of one call `module(*inputs)`.

    That is half of what `torch.utils.flop_counter` counts: convolutions, matrix products and
    attention; not additions, normalisation, activations, pooling or resizing. Counted for the
    whole batch, in evaluation mode, forward only; the module is left as it was.
    """
    # The counter takes fused attention and oneDNN's LSTM for nothing: run their parts.
    attention: Any = torch.backends.mha
    onednn: Any = torch.backends.mkldnn
    before = attention.get_fastpath_enabled(), onednn.enabled
    attention.set_fastpath_enabled(False)
    onednn.enabled = False
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            evaluating(module),
            torch.enable_grad(),  # the counter stumbles over views of parameters made without
            FlopCounterMode(display=False) as counter,
        ):
            module(*inputs)
    finally:
        attention.set_fastpath_enabled(before[0])
        onednn.enabled = before[1]
    return counter.get_total_flops() // 2


def relative_latency(
    module: nn.Module, reference: nn.Module, *inputs: Any, repeats: int = 20
) -> Ratio:
    """Return how many times longer `module(*inputs)` takes than `reference(*inputs)`.

    The two run in turn, `repeats` times, after one unmeasured run each, so that whatever else the
    machine does slows both; the result is the median of the ratios with its quartiles, which is
    comparable between machines where milliseconds are not. In evaluation mode, without
    gradients. Raises `ValueError` for fewer than 3 repeats.
    """
    if repeats < 3:
        raise ValueError(f"Expected at least 3 repeats for a median with quartiles, got {repeats}.")
    with evaluating(module, reference), torch.no_grad():
        _seconds(module, inputs), _seconds(reference, inputs)
        ratios = [_seconds(module, inputs) / _seconds(reference, inputs) for _ in range(repeats)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, lower, upper)


def _seconds(module: nn.Module, inputs: tuple[Any, ...]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    module(*inputs)
    wait()
    return time.perf_counter() - start


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Inside this context the modules are in evaluation mode; afterwards each part is as it was."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in before:
            part.training = training
