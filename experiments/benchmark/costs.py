"""Measures what the decoders of the benchmark cost: `python -m experiments.benchmark.costs`.

For each, at 192 × 256 pixels and 11 classes: parameters, multiply-accumulates of one image, peak
memory of a training step, and, beside the bare encoder, in turn with it and in one process, how
long one image takes and how many images a second a training of everything gets through. A decoder
that reads no map beyond c3 gets an encoder that ends there. Writes `results/costs.json`; wants a
machine that does nothing else. With `--only` some, with `--device cuda` on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import Timeout
from torch import Tensor, nn

from experiments.benchmark.candidates import CANDIDATES
from experiments.benchmark.peers import Peer
from experiments.core import provenance, records
from experiments.core.records import Record
from experiments.core.sweep import Sweep, arguments
from experiments.core.trials import Trial
from helpers.encoder import OUT_CHANNELS, Pyramid, ResNet18Encoder, Segmenter, ShortEncoder
from helpers.inspection import Ratio, count_macs, count_parameters, relative_latency

NAME = "costs"
SIZE, CLASSES, BATCH = (192, 256), 11, 8
REPEATS, STEPS = 21, 7


def levels_read(model: Segmenter, size: tuple[int, int] = SIZE) -> int:
    """Return how many of the maps, from c1 on, are needed to get at all that the decoder reads."""
    device = next(model.parameters()).device
    x = torch.zeros(2, 3, *size, device=device)
    with torch.no_grad():
        pyramid = model.encoder(x)
    maps = [map_.detach().requires_grad_() for map_ in pyramid]
    extra = {"image": x} if model.takes_image else {}
    found = torch.autograd.grad(
        model.decode(Pyramid(*maps), size, **extra).sum(), maps, allow_unused=True
    )
    return max(k for k, gradient in enumerate(found, start=1) if gradient is not None)


def shortened(model: Segmenter, size: tuple[int, int] = SIZE) -> Segmenter:
    """Return the model with an encoder that makes no map in vain, for all to be trained."""
    device = next(model.parameters()).device
    levels = levels_read(model, size)
    if levels == len(OUT_CHANNELS) or not isinstance(model.encoder, ResNet18Encoder):
        return model
    short = ShortEncoder(ResNet18Encoder(None, frozen=False), levels).to(device)
    return Segmenter(short, model.decoder)


def macs(model: Segmenter, size: tuple[int, int] = SIZE) -> tuple[int, int]:
    """Return the multiply-accumulates of one image, encoder and decoder; nothing is computed."""
    model = shortened(model.to("meta"), size)
    x = torch.empty(1, 3, *size, device="meta")
    encoder = count_macs(model.encoder, x)
    return encoder, count_macs(model, x) - encoder


def training_step(model: nn.Module, x: Tensor, masks: Tensor) -> None:
    """Go forward and backward; a bare encoder has no logits, and gets the mean of its maps."""
    model.zero_grad()
    found = model(x)
    if isinstance(found, Tensor):
        F.cross_entropy(found, masks).backward()
    else:
        torch.stack([map_.mean() for map_ in found]).sum().backward()


def throughput(model: nn.Module, reference: nn.Module, device: str) -> Ratio:
    """Return the images a second that a training gets through, as a share of the reference's."""
    x, masks = batch(BATCH, SIZE, device)
    ratios = []
    for repeat in range(STEPS + 1):
        seconds = []
        for each in (model.train(), reference.train()):
            start = time.perf_counter()
            training_step(each, x, masks)
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        if repeat:  # the first ones warm up
            ratios.append(seconds[1] / seconds[0])
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, lower, upper)


def batch(count: int, size: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(CLASSES, (count, *size), device=device)


def peak(model: nn.Module, device: str) -> float:
    """Return the MB that a training step takes on top; on a CPU, ask it in a fresh process."""
    warm_up = ResNet18Encoder(None, frozen=False).to(device)  # loads what is loaded once
    training_step(warm_up, *batch(2, (64, 64), device))
    model.train()
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        training_step(model, *batch(BATCH, SIZE, device))
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = resident("VmRSS")
    training_step(model, *batch(BATCH, SIZE, device))
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """Return the memory that this process has (`VmRSS`) or had at most (`VmHWM`) in MB; on Linux.

    `ru_maxrss` would not do: a process starts with that of the one that started it.
    """
    status = Path("/proc/self/status").read_text("ascii")
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e6


def build(candidate: Trial | Peer, device: str) -> Segmenter:
    model = shortened(candidate.model(0, CLASSES, frozen=False))
    return model.to(device, memory_format=torch.channels_last)


def cost(candidate: Trial | Peer, what: str, device: str) -> Record:
    reference = ResNet18Encoder("bundled", frozen=False)
    reference = reference.to(device, memory_format=torch.channels_last)
    model = build(candidate, device)
    encoder, decoder = macs(candidate.model(0, CLASSES))
    latency = relative_latency(model, reference, batch(1, SIZE, device)[0], repeats=REPEATS)
    shares = throughput(model, reference, device)
    command = [sys.executable, "-m", f"experiments.benchmark.{NAME}", "--peak", what]
    command += ["--device", device]
    said = subprocess.run(command, cwd=provenance.ROOT, capture_output=True, text=True, check=True)
    return {
        "parameters": count_parameters(model.decoder),
        "encoder_parameters": count_parameters(model.encoder),
        "macs": encoder + decoder,
        "encoder_macs": encoder,
        "decoder_macs": decoder,
        "latency": [round(value, 3) for value in latency],
        "throughput": [round(value, 3) for value in shares],
        "peak_mb": round(float(said.stdout.split()[-1])),
        "size": list(SIZE),
        "classes": CLASSES,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "libraries": getattr(candidate, "libraries", {}),
    }


def measure(what: str, device: str) -> Record:
    return cost(CANDIDATES[what], what, device)


def entries(what: str, device: str) -> Iterator[str]:
    yield "experiments/benchmark/costs.py::cost"
    yield f'experiments/benchmark/candidates.py::CANDIDATES["{what}"]'


SWEEPS = {
    NAME: Sweep(
        NAME,
        partial(measure),
        key=("what", "device"),
        entries=entries,
        versions=(),
        timed=("latency", "throughput", "peak_mb"),
    )
}


def main(given: Sequence[str] | None = None) -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
        parser.add_argument("--peak", choices=CANDIDATES, metavar="NAME", help="print its MB only")

    said = arguments(__doc__, CANDIDATES, seeds=1, given=given, more=more)
    if said.peak:
        print(peak(build(CANDIDATES[said.peak], said.device), said.device))
        return
    tasks = [{"what": what, "device": said.device} for what in said.only]
    try:
        with records.lock(f"{NAME} all", timeout=0):  # alone: it is time that is measured
            SWEEPS[NAME].run(tasks, plan=said.plan, again=said.again)
    except Timeout:
        raise SystemExit("another process measures costs already") from None


if __name__ == "__main__":
    main()
