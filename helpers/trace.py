"""What really ran: the outputs of an encoder and of a decoder's parts, and what each came from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from helpers.encoder import Pyramid, Segmenter
from helpers.inspection import evaluating


@dataclass(frozen=True)
class Step:
    """One tensor of a forward pass: its name, whose it is, its value, the steps it came from."""

    name: str
    kind: str  # "image", "encoder", "decoder" or "output"
    value: Tensor
    sources: tuple[str, ...]


def trace(
    encoder: nn.Module,
    x: Tensor,
    decoder: nn.Module | None = None,
    query: Tensor | None = None,
    parts: Sequence[str] | None = None,
) -> list[Step]:
    """Run the network on normalised images `[1, 3, H, W]` and return its steps in order.

    The image, the encoder's five maps and, with a decoder, the output of each of its parts at
    each call, then the decoder's own output. Parts are the decoder's direct children that have
    parameters, with those inside a `ModuleList` counted singly; `parts` names others instead.
    Who feeds whom is read off the autograd graph. The hooks are removed, also after an error.
    Raises `ValueError` for a part that is not there.
    """
    with evaluating(encoder), torch.no_grad():
        pyramid = encoder(x)
    inputs = {"image": x.detach().clone().requires_grad_()}
    inputs |= {name: level.detach().requires_grad_() for name, level in pyramid._asdict().items()}
    names = list(inputs)
    steps = [Step("image", "image", x.detach(), ())]
    for before, name in itertools.pairwise(names):
        steps.append(Step(name, "encoder", inputs[name].detach(), (before,)))
    if decoder is None:
        return steps
    calls: list[tuple[str, Tensor, Any]] = []
    maps = Pyramid(*list(inputs.values())[1:])
    with evaluating(decoder), torch.enable_grad(), _listening(decoder, parts, calls):
        output = decoder(maps, **_extra(encoder, decoder, inputs["image"], query))
    known: dict[Any, str] = {}
    for part, value, origin in calls:
        if origin in known:  # passed on unchanged
            continue
        name = _unused(part, [step.name for step in steps])
        steps.append(Step(name, "decoder", value, _sources(origin, known, inputs)))
        known[origin] = name
    if not calls:
        sources = _sources(output.grad_fn, {}, inputs)
        steps.append(Step(type(decoder).__name__, "decoder", output.detach(), sources))
        known[output.grad_fn] = steps[-1].name
    last = (known[output.grad_fn],) if output.grad_fn in known else ()
    steps.append(
        Step("output", "output", output.detach(), last or _sources(output.grad_fn, known, inputs))
    )
    return steps


def parts_of(decoder: nn.Module) -> dict[str, nn.Module]:
    """Return a decoder's direct children by name, with those inside a container counted singly."""
    found: dict[str, nn.Module] = {}
    for name, child in decoder.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found |= {f"{name}.{key}": inner for key, inner in child.named_children()}
        else:
            found[name] = child
    return found


@contextmanager
def _listening(
    decoder: nn.Module, parts: Sequence[str] | None, calls: list[tuple[str, Tensor, Any]]
) -> Iterator[None]:
    available = parts_of(decoder)
    if parts is None:
        parts = [name for name, part in available.items() if any(True for _ in part.parameters())]
    unknown = [name for name in parts if name not in available]
    if unknown:
        raise ValueError(
            f"{type(decoder).__name__} has no part {', '.join(unknown)}: "
            f"it has {', '.join(available)}."
        )

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None:
                calls.append((name, tensor.detach(), tensor.grad_fn))

        return hook

    handles = [available[name].register_forward_hook(listen(name)) for name in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _extra(
    encoder: nn.Module, decoder: nn.Module, image: Tensor, query: Tensor | None
) -> dict[str, Tensor]:
    model = Segmenter(encoder, decoder)
    return model._extra_inputs(image, query)


def _sources(origin: Any, known: dict[Any, str], inputs: dict[str, Tensor]) -> tuple[str, ...]:
    """Walk the autograd graph back from `origin` to the nearest steps."""
    leaves = {id(tensor): name for name, tensor in inputs.items()}
    found, seen = set(), set()
    waiting = [origin]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in known and node is not origin:
            found.add(known[node])
        elif id(getattr(node, "variable", None)) in leaves:
            found.add(leaves[id(node.variable)])
        else:
            waiting.extend(previous for previous, _ in node.next_functions)
    order = [*inputs, *known.values()]
    return tuple(name for name in order if name in found)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return next((found for found in map(_first_tensor, output) if found is not None), None)
    return None


def _unused(name: str, used: Sequence[str]) -> str:
    count, wanted = 1, name
    while name in used:
        count += 1
        name = f"{wanted} ({count})"
    return name
