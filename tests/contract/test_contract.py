"""The trial that every exported class goes through, and proof that it finds what is broken."""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract.builders import BUILDERS, RANKS, Builder, Misuse, images, map_of, pyramid, sides
from torch import Tensor, nn
from torchvision.models import resnet18

from helpers import bridges
from helpers.bridges.encoder import TruncatedEncoder
from helpers.encoder import Pyramid, ResNet18Encoder, Segmenter

SIZES = [
    (32, 32),
    (33, 32),
    (64, 96),
    (65, 97),
    (97, 128),
    (128, 128),
    (180, 240),
    (257, 33),
    (255, 256),
]
BATCHES = (1, 2, 5)
DTYPES = (torch.float32, torch.bfloat16)
# Every size with every batch; dtype and mode take turns, so that each pair of values meets.
CASES = [
    (size, batch, DTYPES[turn % 2], bool(turn // 2 % 2))
    for turn, (size, batch) in enumerate(product(SIZES, BATCHES))
]
SMALLEST = [((32, 32), 1, dtype, True) for dtype in DTYPES]
# Every size once, each batch as often.
FEW = [CASES[3 * turn + turn % 3] for turn in range(len(SIZES))] + SMALLEST
CLOSE = 1e-4

Trial = Callable[[Builder], None]


# --- tools


def build(builder: Builder, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return builder.build()


def trained(builder: Builder, seed: int = 0) -> nn.Module:
    """Build one, give its BatchNorms statistics other than 0 and 1, and switch to evaluation."""
    module = build(builder, seed).train()
    with torch.no_grad():
        module(**feed(builder, 2, 64, 96))
    return module.eval()


def feed(
    builder: Builder,
    batch: int,
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> dict[str, Any]:
    torch.manual_seed(seed)
    return builder.inputs(batch, height, width, dtype)


def change(inputs: dict[str, Any], f: Callable[[str, Tensor], Any]) -> dict[str, Any]:
    """Return the inputs with `f(name, tensor)` in place of every tensor."""
    return {
        name: Pyramid(*(f(*item) for item in value._asdict().items()))
        if isinstance(value, Pyramid)
        else f(name, value)
        for name, value in inputs.items()
    }


def tensors(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return every tensor by its name, the maps of a pyramid by theirs."""
    found: dict[str, Tensor] = {}
    change(inputs, found.__setitem__)
    return found


def exchange(inputs: dict[str, Any], name: str, value: Tensor) -> dict[str, Any]:
    return change(inputs, lambda other, tensor: value if other == name else tensor)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Return it as a share of the largest expected value, or infinity for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    scale = max(float(expected.abs().max()), 1e-6)
    return float((found.float() - expected.float()).abs().max()) / scale


def error_of(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


@cache
def random_encoder() -> ResNet18Encoder:
    torch.manual_seed(0)
    return ResNet18Encoder(weights=None)


# --- the trial


def gives_the_promised_shape(builder: Builder, cases: list[Any] = FEW) -> None:
    """For every size, in both dtypes and both modes."""
    modules = {dtype: build(builder).to(dtype) for dtype in DTYPES}
    assert type(modules[torch.float32]) is builder.cls
    for size, batch, dtype, training in cases:
        case = f"batch {batch}, image {size}, {dtype}, {'training' if training else 'evaluation'}"
        module, inputs = modules[dtype].train(training), feed(builder, batch, *size, dtype)
        if training and builder.one_value(batch, *size):
            error = error_of(lambda: module(**inputs))  # noqa: B023
            assert isinstance(error, ValueError), f"{case}: one value per channel raised {error!r}"
            assert "Expected more than 1 value per channel" in str(error), f"{case}: {error}"
            continue
        with torch.no_grad():
            output = module(**inputs)
        assert isinstance(output, Tensor), f"{case}: a {type(output).__name__} came out"
        found, promised = tuple(output.shape), builder.shape(batch, *size)
        assert len(promised) == RANKS.get(builder.kind, len(promised)), (
            f"{case}: {promised} is promised, which is no {builder.kind}"
        )
        assert found == promised and found[0] == batch, f"{case}: {found}, promised {promised}"
        assert output.dtype == dtype, f"{case}: {output.dtype} came out"
        assert output.isfinite().all(), f"{case}: NaN or infinity came out"


def gives_it_for_every_size_and_batch(builder: Builder) -> None:
    gives_the_promised_shape(builder, CASES + SMALLEST)


def computes_the_same_in_bfloat16(builder: Builder) -> None:
    """But for rounding."""
    module, inputs = trained(builder), feed(builder, 2, 65, 97)
    with torch.no_grad():
        expected = module(**inputs)
        short = change(inputs, lambda _, x: x.bfloat16() if x.is_floating_point() else x)
        found = module.bfloat16()(**short).float()
    error = float((found - expected).norm() / expected.norm())
    assert error < 0.1, f"bfloat16 is off by {error:.0%}"


def leaves_inputs_and_state_alone(builder: Builder) -> None:
    """No input is changed in place; evaluation changes nothing, so a second pass is equal."""
    module, inputs = trained(builder), feed(builder, 2, 65, 97)
    before, state = copied(tensors(inputs)), copied(module.state_dict())
    with torch.no_grad():
        first = module(**inputs)
        written = changed(before, tensors(inputs))
        assert not written, f"changed in place: {written}"
        assert torch.equal(first, module(**inputs)), (
            "a second pass in evaluation gave another result"
        )
        assert not changed(state, module.state_dict()), "evaluation changed the module's state"
        module.train()(**inputs)
    written = changed(before, tensors(inputs))
    assert not written, f"changed in place while training: {written}"


def passes_gradients_on(builder: Builder) -> None:
    """To every parameter, and to every input that the output depends on."""
    module = build(builder).train()
    inputs = change(
        feed(builder, 2, 65, 97), lambda _, x: x.requires_grad_() if x.is_floating_point() else x
    )
    output = module(**inputs)
    (output * torch.randn_like(output)).sum().backward()
    read = {f"input {n}": x for n, x in tensors(inputs).items() if n not in builder.unread}
    leaves = dict(module.named_parameters()) | {n: x for n, x in read.items() if x.requires_grad}
    without = [name for name, leaf in leaves.items() if leaf.grad is None]
    assert not without, f"no gradient reaches {without}"
    broken = [name for name, leaf in leaves.items() if not leaf.grad.isfinite().all()]
    assert not broken, f"NaN or infinity in the gradient of {broken}"
    zero = [name for name in leaves if name in read and not leaves[name].grad.any()]
    assert not zero, f"zero is the gradient of {zero}"


def reads_what_it_says(builder: Builder) -> None:
    """The output depends on every input but those that are listed as unread."""
    module, inputs = trained(builder), feed(builder, 2, 65, 97)
    others = tensors(feed(builder, 2, 65, 97, seed=2))
    with torch.no_grad():
        expected = module(**inputs)
        unread = {
            name
            for name, other in others.items()
            if torch.equal(module(**exchange(inputs, name, other)), expected)
        }
    assert unread == set(builder.unread), f"unread: {sorted(unread)}, listed: {builder.unread}"


def treats_every_image_alone(builder: Builder) -> None:
    """In evaluation, an image's result does not depend on its neighbours in the batch."""
    module, inputs = trained(builder), feed(builder, 5, 65, 97)
    with torch.no_grad():
        together = module(**inputs)
        for index in (0, 4):
            alone = module(**change(inputs, lambda _, x: x[index : index + 1]))  # noqa: B023
            error = largest_difference(together[index : index + 1], alone)
            assert error < CLOSE, f"image {index} of the batch is off by {error:.1%}"


def comes_back_from_its_state(builder: Builder) -> None:
    """Saved and loaded into a second one, it gives the same bit for bit."""
    module, other, inputs = (
        trained(builder),
        build(builder, seed=3).eval(),
        feed(builder, 2, 64, 96),
    )
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(**inputs), module(**inputs)), "the state dict lacks something"


def exports(builder: Builder) -> None:
    """`torch.export`, for batches of any length."""
    module, inputs = trained(builder), feed(builder, 2, 65, 97)
    batch = torch.export.Dim("batch")
    shapes = change(inputs, lambda *_: {0: batch})
    program = torch.export.export(module, (), inputs, dynamic_shapes=shapes).module()
    for length in (2, 5):
        inputs = feed(builder, length, 65, 97)
        with torch.no_grad():
            error = largest_difference(program(**inputs), module(**inputs))
        assert error < CLOSE, f"exported, a batch of {length} is off by {error:.1%}"


def compiles_in_one_graph(builder: Builder) -> None:
    module, inputs = trained(builder), feed(builder, 2, 65, 97)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        error = largest_difference(compiled(**inputs), module(**inputs))
    assert error < CLOSE, f"compiled, it is off by {error:.1%}"


def computes_where_its_inputs_are(builder: Builder) -> None:
    """The meta device stands for a GPU: what `forward` makes on the CPU meets nothing there."""
    module = build(builder).eval().to("meta")
    inputs = change(feed(builder, 2, 65, 97), lambda _, x: x.to("meta"))
    with torch.no_grad():
        output = module(**inputs)
    assert output.device.type == "meta", f"the output is on {output.device}"


def raises_what_it_documents(builder: Builder) -> None:
    for name, misuse in builder.misuses.items():
        with pytest.raises(misuse.error, match=misuse.message) as caught:
            misuse.make(build(builder).eval())
        assert type(caught.value) is misuse.error, f"{name}: a {type(caught.value).__name__}"


def refuses_wrong_inputs(builder: Builder) -> None:
    """Wrong rank, channels, dtype: `ValueError` or `TypeError` says what came and was expected."""
    module, inputs = build(builder).eval(), feed(builder, 2, 64, 96)
    wrong = [
        (f"{name} with {mistake}", exchange(inputs, name, value), came)
        for name, tensor in tensors(inputs).items()
        if name not in builder.unread
        for mistake, value, came in mistakes(tensor)
    ]
    found = [
        f"{what}: {fault}" for what, bad, came in wrong if (fault := silence(module, bad, came))
    ]
    if found:
        raise AssertionError("\n".join(found))


def mistakes(tensor: Tensor) -> Iterable[tuple[str, Tensor, str]]:
    """Return wrong tensors made from a right one: what is wrong, the tensor, what came."""
    yield "no batch", tensor[0], str(list(tensor[0].shape))
    if tensor.is_floating_point():
        channels = -1 if tensor.ndim == 3 else 1
        wide = torch.cat([tensor, tensor.narrow(channels, 0, 1)], channels)
        yield "one channel more", wide, str(list(wide.shape))
        yield "integers", tensor.int(), str(torch.int32)


def silence(module: nn.Module, inputs: dict[str, Any], came: str) -> str:
    """Return what is wrong with the error that wrong inputs raise, or nothing."""
    error = error_of(lambda: module(**inputs))
    if error is None:
        return "no error"
    # A subclass (NotImplementedError is a RuntimeError) or torch's own text is no check of ours.
    if type(error) not in (ValueError, TypeError) or came not in str(error):
        return f"expected a ValueError or TypeError with {came}, got {str(error)[:150]!r}"
    return "" if "expected" in str(error).lower() else f"the message lacks 'expected': {error}"


def fills_the_image_in_a_segmenter(builder: Builder) -> None:
    """A decoder owns no encoder; on one, it learns alone and fills images of any size."""
    encoder, decoder = random_encoder(), build(builder)
    assert not holds_an_encoder(decoder), "the decoder owns an encoder"
    model = Segmenter(encoder, decoder)
    for training, batch, size in [
        (False, 1, (33, 47)),
        (False, 2, (97, 224)),
        (True, 2, (75, 100)),
    ]:
        extra = {k: v for k, v in feed(builder, batch, *size).items() if k == "query"}
        logits = model.train(training)(images(batch, *size), **extra)
        expected = (batch, builder.shape(batch, *size)[1], *size)
        assert logits.shape == expected, f"image {size}: {tuple(logits.shape)} in the segmenter"
    logits.square().mean().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    silent = {f"decoder.{name}" for name, _ in decoder.named_parameters()} ^ learning
    assert not silent, f"in the segmenter, it should be otherwise whether {sorted(silent)} learn"


def holds_an_encoder(decoder: nn.Module) -> bool:
    """Whether a ResNet-18's stem and first stage are among its parameters, whoever wraps them."""
    start = ("features.conv1", "features.bn1", "features.layer1")
    theirs = Counter(
        tuple(p.shape) for name, p in random_encoder().named_parameters() if name.startswith(start)
    )
    return theirs <= Counter(tuple(p.shape) for p in decoder.parameters())


TRIALS: list[Trial] = [
    gives_the_promised_shape,
    gives_it_for_every_size_and_batch,
    computes_the_same_in_bfloat16,
    leaves_inputs_and_state_alone,
    passes_gradients_on,
    reads_what_it_says,
    treats_every_image_alone,
    comes_back_from_its_state,
    exports,
    compiles_in_one_graph,
    computes_where_its_inputs_are,
    raises_what_it_documents,
    refuses_wrong_inputs,
]
DECODER_TRIALS: list[Trial] = [fills_the_image_in_a_segmenter]


def put_to(trial: Trial, builder: Builder) -> None:
    if trial is compiles_in_one_graph and os.name == "nt":
        pytest.skip("torch.compile needs a compiler there")
    trial(builder)


def marks(trial: Trial, builder: Builder) -> list[pytest.MarkDecorator]:
    """A decoder's graph holds its parts: only test-all compiles and exports those alone."""
    if trial is gives_it_for_every_size_and_batch:
        return [pytest.mark.slow, pytest.mark.full]
    if trial in (exports, compiles_in_one_graph):
        return [pytest.mark.slow] + [pytest.mark.full] * (builder.kind != "decoder")
    return []


def trials_of(builders: dict[str, Builder]) -> list[Any]:
    """Return one parameter per class and trial."""
    return [
        pytest.param(trial, builder, id=f"{name}-{trial.__name__}", marks=marks(trial, builder))
        for name, builder in builders.items()
        for trial in (*TRIALS, *(DECODER_TRIALS if builder.kind == "decoder" else []))
    ]


@pytest.mark.parametrize(("trial", "builder"), trials_of(BUILDERS))
def test_an_exported_class(trial: Trial, builder: Builder) -> None:
    fault = builder.faults.get(trial.__name__)
    if fault is None:
        return put_to(trial, builder)
    error = error_of(lambda: put_to(trial, builder))
    assert error is not None, "cured: take its entry out of the builder's faults"
    assert re.fullmatch(fault, str(error)), f"not the known fault:\n{error}"
    pytest.xfail(str(error))


def without_builder(modules: Iterable[ModuleType], builders: dict[str, Builder]) -> set[str]:
    """Return the public `nn.Module` classes that the modules define and no builder makes."""
    known = {builder.cls for builder in builders.values()}
    return {
        f"{module.__name__}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and value not in known
    }


def test_every_exported_class_has_a_builder():
    names = [module.name for module in pkgutil.iter_modules(bridges.__path__)]
    assert "encoder" in names
    modules = [importlib.import_module(f"{bridges.__name__}.{name}") for name in names]
    missing = without_builder(modules, BUILDERS)
    assert not missing, f"add a builder to tests/contract/builders.py for {sorted(missing)}"


# --- proof that the trial finds what is broken: small sound classes, and what one can do to them


def check(name: str, x: Tensor, rank: int, channels: int) -> None:
    if not x.is_floating_point():
        raise TypeError(f"Expected {name} as floating point, got {x.dtype}.")
    if x.ndim != rank or x.shape[1] != channels:
        raise ValueError(f"Expected {name} with {channels} channels, got {list(x.shape)}.")


class SoundVector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, 4)

    def forward(self, x: Tensor) -> Tensor:
        check("c5", x, 4, 512)
        return self.linear(self.scale(x).mean((2, 3)))


class SoundTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Conv2d(512, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        check("c5", x, 4, 512)
        return self.linear(x).flatten(2).transpose(1, 2)


class SoundMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Conv2d(512, 4, 1)
        self.fine = nn.Conv2d(256, 4, 1)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        check("coarse", coarse, 4, 512)
        check("fine", fine, 4, 256)
        return self.fine(fine) + F.interpolate(self.coarse(coarse), fine.shape[-2:])


class SoundMapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 512)

    def forward(self, vector: Tensor) -> Tensor:
        check("vector", vector, 2, 10)
        return self.linear(vector).relu()


class SoundDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = SoundMap()

    def forward(self, pyramid: Pyramid, image: Tensor, query: Tensor) -> Tensor:
        check("image", image, 4, 3)
        check("query", query, 2, 5)
        maps = self.mix(pyramid.c5, pyramid.c4) + query.mean(1)[:, None, None, None]
        return F.interpolate(maps, image.shape[-2:]) + image.mean(1, keepdim=True)


def c5_only(batch: int, height: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"x": map_of("c5", batch, height, width, dtype)}


def positions(height: int, width: int) -> int:
    rows, columns = sides("c5", height, width)
    return rows * columns


VECTOR = Builder(
    cls=SoundVector,
    kind="vector",
    build=SoundVector,
    inputs=c5_only,
    shape=lambda batch, height, width: (batch, 4),
    one_value=lambda batch, height, width: batch * positions(height, width) == 1,
)
TOKENS = Builder(
    cls=SoundTokens,
    kind="tokens",
    build=SoundTokens,
    inputs=c5_only,
    shape=lambda batch, height, width: (batch, positions(height, width), 6),
)
MAP = Builder(
    cls=SoundMap,
    kind="map",
    build=SoundMap,
    inputs=lambda *size: {"coarse": map_of("c5", *size), "fine": map_of("c4", *size)},
    shape=lambda batch, height, width: (batch, 4, *sides("c4", height, width)),
)
MAPPER = Builder(
    cls=SoundMapper,
    kind="mapper",
    build=SoundMapper,
    inputs=lambda batch, height, width, dtype: {"vector": torch.randn(batch, 10).to(dtype)},
    shape=lambda batch, height, width: (batch, 512),
)
DECODER = Builder(
    cls=SoundDecoder,
    kind="decoder",
    build=SoundDecoder,
    inputs=lambda batch, height, width, dtype: {
        "pyramid": pyramid(batch, height, width, dtype),
        "image": images(batch, height, width, dtype),
        "query": torch.randn(batch, 5).to(dtype),
    },
    shape=lambda batch, height, width: (batch, 4, height, width),
    unread=("c1", "c2", "c3"),
)
SOUND = {b.cls.__name__: b for b in (VECTOR, TOKENS, MAP, MAPPER, DECODER)}


@pytest.mark.parametrize(("trial", "builder"), trials_of(SOUND))
def test_a_sound_class_of_every_kind_passes(trial: Trial, builder: Builder) -> None:
    put_to(trial, builder)


class DropsTheBatch(SoundVector):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.scale(x).mean((2, 3)).squeeze())


class NormalisesVectors(SoundVector):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class ChannelsFirst(SoundTokens):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


class KeepsPositions(SoundVector):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :, None, None]


class Doubles(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return F.interpolate(self.coarse(coarse), scale_factor=2) + 0 * fine.sum()


class DoublesAndAdds(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return F.interpolate(self.coarse(coarse), scale_factor=2) + self.fine(fine)


class Float32Only(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return super().forward(coarse, fine).float()


class TakesLogarithms(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return super().forward(coarse, fine).relu().log()


class LosesDigits(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return super().forward(coarse, fine) + 300 - 300


class ChangesItsInput(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(coarse.mul_(2), fine)


class InPlaceReLU(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return super().forward(coarse.relu_(), fine)


class ChangesItsInputInTraining(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return super().forward(coarse, fine.mul_(2) if self.training else fine)


class DropsAlways(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return F.dropout(super().forward(coarse, fine), training=True)


class CountsPasses(SoundMap):
    def __init__(self) -> None:
        super().__init__()
        self.passes: Tensor
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(coarse, fine)


class HasADeadLayer(SoundMap):
    def __init__(self) -> None:
        super().__init__()
        self.dead = nn.Conv2d(4, 4, 1)


class CutsTheGradient(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return super().forward(coarse, fine.detach())


class TakesRoots(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return super().forward(coarse.sqrt(), fine)


class Steps(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return super().forward(coarse, fine.round())


class ForgetsTheFineMap(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return F.interpolate(self.coarse(coarse), fine.shape[-2:])


class LooksAtNeighbours(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return super().forward(coarse - coarse.mean((0, 2, 3), keepdim=True), fine)


class HidesAWeight(SoundMap):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.rand(4, 1, 1)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return super().forward(coarse, fine) * self.weight


class LooksAtValues(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        if coarse.max() > 1e6:
            raise ValueError("too large")
        return super().forward(coarse, fine)


class GoesThroughTheBatch(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        images = zip(coarse.split(1), fine.split(1), strict=True)
        return torch.cat([super(GoesThroughTheBatch, self).forward(*image) for image in images])


class Prints(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(coarse, fine)


class StaysOnTheCPU(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        ramp = torch.linspace(0, 1, fine.shape[-1], dtype=fine.dtype)
        return super().forward(coarse, fine) + ramp


class TakesAnyChannels(SoundMap):
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return super().forward(coarse[:, :512], fine[:, :256])


class LetsTorchComplain(SoundTokens):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).flatten(2).transpose(1, 2)


class SaysTooLittle(SoundTokens):
    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 512 or not x.is_floating_point():
            raise ValueError(f"Bad map: {list(x.shape)}, {x.dtype}.")
        return super().forward(x)


class OwnsAnEncoder(SoundDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = ResNet18Encoder(None)


class OwnsATruncatedNetwork(SoundDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TruncatedEncoder(resnet18(num_classes=2))])


class WantsMultiplesOf32(SoundDecoder):
    def forward(self, pyramid: Pyramid, image: Tensor, query: Tensor) -> Tensor:
        maps = F.interpolate(self.mix(pyramid.c5, pyramid.c4), scale_factor=16)
        return maps + image.mean(1, keepdim=True)


class LearnsNothing(SoundDecoder):
    def forward(self, pyramid: Pyramid, image: Tensor, query: Tensor) -> Tensor:
        mixed = super().forward(pyramid, image, query)
        return mixed.detach() + self.mix.fine.bias.view(-1, 1, 1)


def broken(builder: Builder, cls: type[nn.Module], **changes: Any) -> Builder:
    return replace(builder, cls=cls, build=cls, **changes)


def misuse(message: str, cls: type[Exception] = ValueError, channels: int = 511) -> Builder:
    bad = torch.zeros(1, channels, 2, 2)
    return replace(VECTOR, misuses={"channels": Misuse(lambda module: module(bad), cls, message)})


FAULTS: list[tuple[Trial, Builder, str]] = [
    (gives_the_promised_shape, broken(VECTOR, DropsTheBatch), r"\(4,\), promised \(1, 4\)"),
    (gives_the_promised_shape, broken(VECTOR, NormalisesVectors), "more than 1 value per channel"),
    (gives_the_promised_shape, replace(VECTOR, one_value=lambda *_: False), "more than 1 value"),
    (gives_the_promised_shape, replace(TOKENS, one_value=lambda *_: True), "raised None"),
    (gives_the_promised_shape, broken(TOKENS, ChannelsFirst), r"\(1, 6, 1\), promised \(1, 1, 6\)"),
    (gives_the_promised_shape, broken(VECTOR, KeepsPositions), r"\(1, 4, 1, 1\), promised \(1, 4"),
    (
        gives_the_promised_shape,
        broken(VECTOR, KeepsPositions, shape=lambda batch, *_: (batch, 4, 1, 1)),
        "which is no vector",
    ),
    (gives_the_promised_shape, replace(VECTOR, shape=lambda *_: (1, 4)), r"\(2, 4\), promised"),
    (gives_the_promised_shape, broken(MAP, Doubles), r"\(2, 4, 4, 2\), promised \(2, 4, 3, 2\)"),
    (gives_it_for_every_size_and_batch, broken(MAP, Doubles), r"\(1, 4, 4, 2\), promised \(1, 4"),
    (gives_the_promised_shape, broken(MAP, DoublesAndAdds), "size of tensor a"),
    (gives_the_promised_shape, broken(MAP, Float32Only), "torch.float32 came out"),
    (gives_the_promised_shape, broken(MAP, TakesLogarithms), "NaN or infinity came out"),
    (computes_the_same_in_bfloat16, broken(MAP, LosesDigits), "bfloat16 is off"),
    (leaves_inputs_and_state_alone, broken(MAP, ChangesItsInput), r"in place: \['coarse'\]"),
    (
        leaves_inputs_and_state_alone,
        broken(MAP, ChangesItsInputInTraining),
        r"while training: \['fine'\]",
    ),
    (leaves_inputs_and_state_alone, broken(MAP, DropsAlways), "a second pass"),
    (leaves_inputs_and_state_alone, broken(MAP, CountsPasses), "changed the module's state"),
    (passes_gradients_on, broken(MAP, InPlaceReLU), "in-place operation"),
    (passes_gradients_on, broken(MAP, HasADeadLayer), "no gradient reaches .*dead.weight"),
    (passes_gradients_on, broken(MAP, CutsTheGradient), r"no gradient reaches \['input fine'\]"),
    (passes_gradients_on, broken(MAP, TakesRoots), "NaN or infinity in the gradient of .*coarse"),
    (passes_gradients_on, broken(MAP, Steps), r"zero is the gradient of \['input fine'\]"),
    (reads_what_it_says, broken(MAP, ForgetsTheFineMap), r"unread: \['fine'\], listed: \(\)"),
    (reads_what_it_says, replace(MAP, unread=("coarse",)), r"unread: \[\], listed: \('coarse',\)"),
    (treats_every_image_alone, broken(MAP, LooksAtNeighbours), "image 0 of the batch is off"),
    (comes_back_from_its_state, broken(MAP, HidesAWeight), "the state dict lacks something"),
    (exports, broken(MAP, LooksAtValues), "[Dd]ata-dependent"),
    (exports, broken(MAP, GoesThroughTheBatch), "batch"),
    (compiles_in_one_graph, broken(MAP, LooksAtValues), "[Dd]ata-dependent"),
    (compiles_in_one_graph, broken(MAP, Prints), "graph_break"),
    (computes_where_its_inputs_are, broken(MAP, StaysOnTheCPU), "device"),
    (computes_where_its_inputs_are, broken(MAP, LooksAtValues), "meta"),
    (raises_what_it_documents, misuse("Expected c5", channels=512), "DID NOT RAISE"),
    (raises_what_it_documents, misuse("Expected c4"), "Expected c4"),
    (raises_what_it_documents, misuse("Expected c5", cls=Exception), "channels: a ValueError"),
    (refuses_wrong_inputs, broken(MAP, TakesAnyChannels), "fine with one channel more: no error"),
    (refuses_wrong_inputs, broken(TOKENS, LetsTorchComplain), "x with integers: expected a Val"),
    (refuses_wrong_inputs, broken(TOKENS, SaysTooLittle), "the message lacks 'expected'"),
    (fills_the_image_in_a_segmenter, broken(DECODER, OwnsAnEncoder), "owns an encoder"),
    (fills_the_image_in_a_segmenter, broken(DECODER, OwnsATruncatedNetwork), "owns an encoder"),
    (fills_the_image_in_a_segmenter, broken(DECODER, WantsMultiplesOf32), "size of tensor a"),
    (fills_the_image_in_a_segmenter, broken(DECODER, LearnsNothing), "decoder.mix.fine.weight"),
]


@pytest.mark.parametrize(
    ("trial", "builder", "message"),
    [
        pytest.param(
            *fault,
            id=f"{fault[1].cls.__name__}-{fault[0].__name__}",
            marks=[pytest.mark.slow] * (fault[0] in (exports, compiles_in_one_graph)),
        )
        for fault in FAULTS
    ],
)
def test_a_broken_class_fails(trial: Trial, builder: Builder, message: str) -> None:
    with pytest.raises((AssertionError, RuntimeError, ValueError, pytest.fail.Exception)) as caught:
        put_to(trial, builder)
    assert caught.match(message)


def test_every_trial_is_seen_to_fail():
    assert {trial for trial, _, _ in FAULTS} == {*TRIALS, *DECODER_TRIALS}


def test_every_pair_of_size_batch_dtype_and_mode_is_tried():
    columns = [SIZES, BATCHES, DTYPES, (False, True)]
    for one, other in combinations(range(4), 2):
        tried = {(case[one], case[other]) for case in CASES}
        assert tried == set(product(columns[one], columns[other]))


def test_a_class_without_a_builder_is_found():
    chapter = ModuleType("helpers.bridges.chapter")
    source = """
from torch import nn
from torch.nn import Linear
class Bridge(nn.Module): ...
class Another(Bridge): ...
class _Part(nn.Module): ...
class Shape: ...
def build(): return Bridge()
"""
    exec(source, vars(chapter))
    prefix = "helpers.bridges.chapter"
    assert without_builder([chapter], {}) == {f"{prefix}.Bridge", f"{prefix}.Another"}
    known = {"Bridge": broken(MAP, chapter.Bridge)}
    assert without_builder([chapter], known) == {f"{prefix}.Another"}


def test_a_known_fault_must_be_there_and_hides_no_other():
    torch_complains = broken(TOKENS, LetsTorchComplain)
    name = refuses_wrong_inputs.__name__
    known = replace(torch_complains, faults={name: r"x with (.+\n)+x with integers: .+"})
    with pytest.raises(pytest.xfail.Exception, match="x with integers"):
        test_an_exported_class(refuses_wrong_inputs, known)
    with pytest.raises(AssertionError, match="cured"):
        test_an_exported_class(refuses_wrong_inputs, replace(TOKENS, faults=known.faults))
    other = replace(torch_complains, faults={name: "x with integers: .+"})
    with pytest.raises(AssertionError, match="not the known fault"):
        test_an_exported_class(refuses_wrong_inputs, other)
