"""The benchmark: peers give what they give at home, all are trained and scored alike, and shared.

What needs segmentation-models-pytorch (smp) is skipped where it is not installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import candidates, costs, peers
from experiments.benchmark.candidates import CANDIDATES, FINALISTS
from experiments.benchmark.peers import PEERS
from experiments.core import provenance, records, scores
from experiments.core.provenance import Tree
from helpers import camvid, training
from helpers import records as stored
from helpers.encoder import ResNet18Encoder, Segmenter, ShortEncoder, normalize
from helpers.inspection import count_macs, count_parameters
from helpers.training import feeding

needs_smp = pytest.mark.skipif(
    not find_spec("segmentation_models_pytorch"),
    reason="smp is needed to run the benchmark only: pip install .[bench]",
)
IGNORE = 3
NAMES = ("background", "block", "bar")
REPOSITORY = Path(__file__).parents[2]


def pairs(count: int, side: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks and bars of one grey each, and a corner that nobody labelled."""
    found = []
    for index in range(count):
        mask = torch.zeros(side, side, dtype=torch.long)
        mask[8 + index : 18 + index, 4:14], mask[:, 40 + index : 42 + index] = 1, 2
        mask[-4:, -4:] = IGNORE
        dice = torch.Generator().manual_seed(index)
        image = mask.clamp(max=2) / 3 + 0.1 * torch.rand(3, side, side, generator=dice)
        found.append((image, mask))
    return found


# --- peers


@needs_smp
def test_the_encoder_of_peers_makes_the_maps_that_ours_makes():
    images = torch.randn(2, 3, 64, 96)
    network = peers.Peer("Unet").network(5).eval()
    with torch.no_grad():
        theirs, ours = network.encoder(images)[1:], ResNet18Encoder()(images)
    for map_, own in zip(theirs, ours, strict=True):
        torch.testing.assert_close(map_, own, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@needs_smp
@pytest.mark.parametrize("what", PEERS)
def test_a_peer_returns_what_its_own_model_returns(what):
    peer, images = PEERS[what], torch.randn(1, 3, 128, 128)  # PAN halves its c5 three times
    torch.manual_seed(7)
    whole = peer.network(5).eval()
    model = peer.model(7, 5).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), whole(images), rtol=1e-4, atol=1e-4)
    assert feeding.is_frozen(model.encoder)
    dilated = {"smp PAN": 16, "smp DeepLabV3Plus": 16, "smp DeepLabV3": 8}
    assert max(model.encoder.strides) == dilated.get(what, 32)
    assert isinstance(model.encoder, ResNet18Encoder) == (what not in dilated)
    assert not any(part is model.encoder for part in model.decoder.modules())


@needs_smp
def test_images_that_a_peer_cannot_take_are_refused():
    with pytest.raises(ValueError, match="multiples of 32"):
        PEERS["smp Linknet"].model(0, 5).eval()(torch.randn(1, 3, 60, 80))


@needs_smp
def test_linknet_costs_what_is_known_of_it():
    model = PEERS["smp Linknet"].model(0, 11)
    assert count_parameters(model.decoder) == pytest.approx(0.49e6, rel=0.02)
    assert sum(costs.macs(model)) == pytest.approx(1.98e9, rel=0.01)


# --- the same for all


def test_streets_are_framed_by_what_is_neither_seen_nor_counted():
    image, mask = torch.rand(3, 180, 240), torch.randint(12, (180, 240))
    framed, labels = benchmark.pad(image, mask, camvid.IGNORE)
    assert framed.shape == (3, 192, 256) and labels.shape == (192, 256)
    assert torch.equal(framed[:, 6:-6, 8:-8], image) and torch.equal(labels[6:-6, 8:-8], mask)
    labels[6:-6, 8:-8] = camvid.IGNORE
    assert (labels == camvid.IGNORE).all()
    zeros = normalize(framed[None])[0]
    zeros[:, 6:-6, 8:-8] = 0
    assert zeros.abs().max() < 1e-6
    unchanged = benchmark.pad(image[:, :128, :128], mask[:128, :128], -100)
    assert torch.equal(unchanged[0], image[:, :128, :128])


def small_fit(decoder: str, data, shared: bool) -> Segmenter:
    model = FINALISTS[decoder].model(0, 3)
    features = benchmark.features(model, data, False, "cpu") if shared else None
    settings = dict(epochs=1, batch_size=2, ignore_index=IGNORE, device="cpu", mixed=False)
    training.fit(model, data, features=features, **settings)
    return model


@pytest.mark.slow
def test_maps_are_computed_once_and_train_the_same_weights(monkeypatch):
    made = []
    whole = benchmark.cache_features
    monkeypatch.setattr(benchmark, "KEPT", {})
    monkeypatch.setattr(
        benchmark, "cache_features", lambda *given, **more: made.append(1) or whole(*given, **more)
    )
    data = pairs(4)
    for decoder in ("many paths", "1×1, summed"):
        alone, shared = (small_fit(decoder, data, each) for each in (False, True))
        for one, other in zip(alone.parameters(), shared.parameters(), strict=True):
            assert torch.equal(one, other)
    assert len(made) == 1
    small_fit("image beside c4", data, True)  # keeps images, too
    small_fit("image beside c4", pairs(4), True)  # other data
    assert len(made) == 3 and len(benchmark.KEPT) == 1


# --- scores


def test_scores_are_those_of_the_book():
    model, data = FINALISTS["many paths"].model(0, 3), pairs(5)
    expected = training.evaluate(model, data, ignore_index=IGNORE, mixed=False)
    found = scores.score(
        model,
        data,
        classes=NAMES,
        thin=("bar",),
        things=("block", "bar"),
        ignore_index=IGNORE,
        mixed=False,
    )
    for name in ("miou", "boundary_miou", "accuracy"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-3)
    assert list(found.iou.values()) == pytest.approx(expected.iou, abs=1e-3)
    assert found.thin_iou == found.iou["bar"]
    assert found.small_things == 5  # the blocks; the bars are too long


def test_small_things_are_scored_one_by_one():
    truth = np.zeros((1, 64, 64), np.int64)
    truth[0, 4:10, 4:10] = 1  # found by half, and claimed beside it
    truth[0, 4:10, 30:36] = 1  # missed; its neighbour is found, which is no mistake
    truth[0, 4:10, 37:43] = 1
    truth[0, 40:60, 4:10] = 2  # too long
    truth[0, 50:53, 50:53] = 2  # too few pixels
    truth[0, 10:14, 30:36] = IGNORE
    guess = np.zeros_like(truth)
    guess[0, 4:10, 7:13] = 1
    guess[0, 4:14, 37:43] = 1
    guess[0, 10:14, 30:36] = 1  # where nobody knows
    found = scores.small_things(guess, truth, [1, 2], IGNORE)
    # 18 of 36 pixels and 18 beside them; none; all 36 and 24 below them.
    assert found == pytest.approx([18 / 54, 0.0, 36 / 60])


# --- which trainings


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A small repository with the code, no records, and two decoders to compare."""
    ignore = shutil.ignore_patterns("weights", "__pycache__")
    for folder in provenance.OURS:
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=ignore)
    monkeypatch.delenv("BOOK_WEIGHTS", raising=False)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(stored, "PLACES", (tmp_path / "results",))
    two = {name: FINALISTS[name] for name in ("U-Net", "many paths")}
    monkeypatch.setattr(benchmark, "CANDIDATES", two)
    return tmp_path


@pytest.fixture
def started(monkeypatch):
    """Trains nothing: the higher rate is better on the images to choose on, worse on others."""
    done = []

    def measure(what, seed, rate, **task):
        done.append((what, seed, rate))
        return {"miou": 50 - 1000 * rate, "tune": {"miou": 40 + 1000 * rate}}

    sweep = replace(benchmark.SWEEP, measure=partial(measure), entries=lambda **_: (), versions=())
    monkeypatch.setattr(benchmark, "SWEEP", sweep)
    return done


RATES = benchmark.CONTESTS["scenes"].rates


def test_a_rate_is_chosen_once_and_not_by_what_is_reported(root, started):
    benchmark.main(["--on", "scenes"])
    low, high = RATES
    first = [(what, 0, rate) for what in ("U-Net", "many paths") for rate in (low, high)]
    others = [(what, seed, high) for seed in (1, 2) for what in ("U-Net", "many paths")]
    assert started == first + others
    found = stored.load("benchmark")
    assert {(r["seed"], r["rate"], r["chosen"]) for r in found} == {
        (0, low, False), (0, high, True), (1, high, True), (2, high, True)
    }  # fmt: skip
    benchmark.main(["--on", "scenes"])
    assert len(started) == 8


def test_seeds_wait_for_a_rate_that_another_process_is_trying(root, started):
    low, high = RATES
    length = benchmark.CONTESTS["scenes"].setting.epochs
    with records.lock(f"benchmark scenes, U-Net, True, seed 0, {length}, cpu, {high}", timeout=0):
        benchmark.main(["--on", "scenes", "--only", "U-Net"])
        assert started == [("U-Net", 0, low)]
    benchmark.main(["--on", "scenes", "--only", "U-Net"])
    assert [seed for _, seed, _ in started] == [0, 0, 1, 2]


def test_what_is_worth_most_comes_first():
    names = list(CANDIDATES)
    wanted = benchmark.tasks(names, 3, None, "cpu", False)
    stages = list(dict.fromkeys((task["data"], task["frozen"]) for task in wanted))
    assert stages == [("scenes", True), ("streets", True), ("streets", False)]

    def seeds(data, what):
        return {t["seed"] for t in wanted if (t["data"], t["what"]) == (data, what)}

    assert seeds("streets", "smp UPerNet") == {0}
    assert seeds("scenes", "smp UPerNet") == seeds("streets", "smp Linknet") == {0, 1, 2}
    tuned = {task["what"] for task in wanted if not task["frozen"]}
    assert tuned == {"smp Unet", "smp FPN", "smp Linknet", "book decoder"}
    once = {what for what in names if not seeds("streets", what)}
    assert once == set(candidates.RECOMMENDED) - {"book decoder"}
    everything = benchmark.tasks(names, 5, 40, "cuda", True)
    assert len(everything) == 3 * len(names) * (2 + 4)
    assert {task["epochs"] for task in everything} == {40}


def test_a_plan_and_a_comparison_write_nothing(root, started, capsys):
    benchmark.main(["--on", "scenes", "--plan"])
    assert "8 are missing: about 0 min, and 8 of unknown length" in capsys.readouterr().out
    assert started == [] and not (root / "results").exists()
    benchmark.main(["--on", "scenes", "--only", "U-Net", "--seeds", "2"])
    before = stored.load("benchmark")
    started.clear()
    capsys.readouterr()
    benchmark.main(["--on", "scenes", "--again"])
    low, high = RATES
    assert started == [("U-Net", 0, low), ("U-Net", 0, high), ("U-Net", 1, high)]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("the same to the last digit" in line for line in lines)
    assert stored.load("benchmark") == before


def test_what_cannot_be_run_is_refused(root, started, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "V-Net"])
    assert "V-Net" in capsys.readouterr().err
    monkeypatch.setattr(benchmark, "CANDIDATES", CANDIDATES)
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install \.\[bench\]"):
        benchmark.main([])
    assert started == []


# --- one training


@pytest.fixture
def tiny(monkeypatch):
    contest = benchmark.CONTESTS["scenes"]
    parts = dict(data=pairs, train=(4,), report=(3,), classes=NAMES)
    setting = replace(contest.setting, **parts, ignore_index=IGNORE, batch_size=2)
    contest = replace(contest, setting=setting, tune=(2,), thin=("bar",), things=("block", "bar"))
    monkeypatch.setitem(benchmark.CONTESTS, "scenes", contest)
    monkeypatch.setattr(benchmark, "KEPT", {})


@pytest.mark.slow
def test_a_record_rests_on_its_decoder_and_not_on_the_list_of_all(root, tiny):
    names = "U-Net", "many paths"
    tasks = [task for task in benchmark.tasks(names, 1, 1, "cpu", False) if task["frozen"]]
    found = {task["what"]: benchmark.SWEEP.record(task) for task in tasks[:4:2]}
    for record in found.values():
        assert 0 <= record["miou"] <= 100 and record["images"] == dict(train=4, tune=2, report=3)
        assert record["small_things"] == 3 and len(record["loss"]) == 1
        assert record["seconds"] > 0 and records.stale(record, Tree()) == []
    assert not list((root / ".cache").rglob("*.safetensors"))
    table = root / "experiments" / "benchmark" / "candidates.py"
    code = table.read_text("utf-8")
    entry = "FINALISTS = {"
    assert code.count(entry) == 1
    table.write_text(code.replace(entry, entry + '"new": unet.TRIALS["c5 only"], '), "utf-8")
    assert [records.stale(found[what], Tree()) for what in names] == [[], []]
    module = root / "helpers" / "bridges" / "unet.py"
    code = module.read_text("utf-8")
    assert "p1 = self.up1(p2, c1)" in code
    module.write_text(code.replace("p1 = self.up1(p2, c1)", "p1 = self.up1(p2, -c1)"), "utf-8")
    stale = [records.stale(found[what], Tree()) for what in names]
    assert stale == [["helpers/bridges/unet.py"], []]


# --- costs


@pytest.mark.parametrize(
    ("what", "levels"), [("c3, PPM", 3), ("image beside c4", 4), ("U-Net", 5), ("c5 alone", 5)]
)
def test_the_encoder_ends_where_a_decoder_reads_no_more(what, levels):
    model = FINALISTS[what].model(0, 11)
    assert costs.levels_read(model, (64, 64)) == levels
    ends = ShortEncoder(ResNet18Encoder(None, frozen=False), levels)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps, all_ = ends.eval()(x), model.encoder(x)
    assert [m.shape for m in maps[:levels]] == [m.shape for m in all_[:levels]]
    assert not any(m.numel() for m in maps[levels:])
    short = costs.shortened(model, (64, 64)).eval()
    assert short.decoder is model.decoder and short(x).shape == (1, 11, 64, 64)


def test_the_work_is_counted_without_doing_it():
    model = FINALISTS["1×1, summed"].model(0, 11)
    x = torch.randn(1, 3, 64, 96)
    whole, encoder = count_macs(model, x), count_macs(model.encoder, x)
    assert costs.macs(model, (64, 96)) == (encoder, whole - encoder)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read on Linux only")
def test_memory_that_is_taken_is_seen():
    """In a process of its own: this one may hold memory that others of its tests gave back."""
    program = (
        "import torch; from experiments.benchmark.costs import resident; "
        "before = resident('VmRSS'); "
        "taken = torch.ones(25_000_000); "  # 100 MB
        "print(resident('VmRSS') - before, resident('VmHWM') - resident('VmRSS'))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    grown, above = map(float, done.stdout.split())
    assert grown == pytest.approx(100, abs=10) and above >= -1


def test_throughput_is_a_share_of_the_encoder_s(monkeypatch):
    monkeypatch.setattr(costs, "SIZE", (32, 32))
    monkeypatch.setattr(costs, "STEPS", 3)

    class Twice(nn.Module):
        def __init__(self, once: nn.Module) -> None:
            super().__init__()
            self.once = once

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [*self.once(x), *self.once(x)]

    encoder = ResNet18Encoder(None, frozen=False)
    share = costs.throughput(Twice(encoder), encoder, "cpu")
    assert 0.25 < share.median < 0.8


def test_costs_rest_on_the_decoder_that_is_named():
    tree, sweep = Tree(), costs.SWEEPS["costs"]
    for what, path in {
        "c3, PPM": "helpers/bridges/spatial_pyramid.py",
        "smp PSPNet, depth 3": "experiments/benchmark/peers.py",
    }.items():
        code = sweep.made_by({"what": what, "device": "cpu"}, tree)["code"]
        assert path in code and "helpers/bridges/sequences.py" not in code


# --- what was measured


def test_no_record_of_the_benchmark_is_missing():
    """Of all that is planned for a CPU: both rates with seed 0, the chosen one with the others."""
    found: dict[tuple[str, str, bool, int], list[tuple[float, bool]]] = {}
    for r in stored.load("benchmark"):
        key = r["data"], r["what"], r["frozen"], r["seed"]
        found.setdefault(key, []).append((r["rate"], bool(r.get("chosen"))))
    wanted = {
        (task["data"], task["what"], task["frozen"], task["seed"])
        for task in benchmark.tasks(list(CANDIDATES), benchmark.SEEDS, None, "cpu", False)
    }
    done = set()
    for (where, what, frozen, seed), tried in found.items():
        chosen = [rate for rate, best in tried if best]
        rates = sorted(benchmark.CONTESTS[where].rates) if seed == 0 else chosen
        if sorted(rate for rate, _ in tried) == rates:
            done.add((where, what, frozen, seed))
            assert len(chosen) == 1 and (chosen[0], True) in found[where, what, frozen, 0], what
    assert wanted - done == set()


def test_no_record_of_the_costs_is_missing():
    assert {record["what"] for record in stored.load("costs")} == set(CANDIDATES)
