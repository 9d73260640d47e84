"""Tests of the training suite: its data, its tasks, its models, and that it learns."""

import hashlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5_bench.measuring.conditions import Conditions
from colt5_bench.measuring.measure import measure
from colt5_bench.measuring.roofline import measure_ceilings
from suites import _text, quality
from suites.quality import LINE, PAIRS, SYMBOLS, QualityCase, cases, far

CPU = torch.device("cpu")
TINY = QualityCase("text", n=128, distance=0, layers=2, dim=32, heads=4, window=16, batch=2, steps=8, seed=1)
HONEST = [name for name in quality.SUITE.implementations if name != "noncausal"]


@pytest.fixture
def folder(tmp_path):
    """Files of random content, with one of them twice."""
    generator = torch.Generator().manual_seed(0)
    for index in range(200):
        content = torch.randint(256, (int(torch.randint(1, 200, (), generator=generator)),), generator=generator)
        path = tmp_path / f"{index % 7}" / f"{index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(content.tolist()))
    (tmp_path / "twice.txt").write_bytes((tmp_path / "3" / "3.txt").read_bytes())
    return tmp_path


def read(path):
    """Read again, even if the path is the same as before."""
    _text.corpus.cache_clear()
    return _text.corpus(path)


def content(corpus):
    return {name: bytes(part.tolist()) for name, part in corpus.splits.items()}


def test_splits_are_disjoint_and_hold_each_content_once(folder):
    splits = content(read(folder))
    files = {path.read_bytes() for path in folder.rglob("*.txt")}
    assert sum(map(len, splits.values())) == sum(map(len, files))
    for each in files:
        if len(each) >= 16:
            assert sum(each in part for part in splits.values()) == 1
    assert len(splits["train"]) > sum(map(len, splits.values())) / 2


def test_splits_depend_on_content_alone(folder):
    before = read(folder)
    for index, path in enumerate(sorted(folder.rglob("*.txt"))):
        path.rename(folder / f"renamed-{997 * index % 1009}")
    after = read(folder)
    assert content(after) == content(before)
    assert after.digest == before.digest


@settings(max_examples=20, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("is_file", [False, True])
def test_the_hash_is_another_with_any_other_byte(tmp_path_factory, is_file, data):
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(64):
        (folder / str(index)).write_bytes(hashlib.sha256(bytes([index])).digest())
    path = folder / "0" if is_file else folder
    before = read(path).digest
    victim = folder / "0" if is_file else folder / str(data.draw(st.integers(0, 63)))
    changed = bytearray(victim.read_bytes())
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    victim.write_bytes(bytes(changed))
    assert read(path).digest != before


@settings(max_examples=50)
@given(st.binary(min_size=40, max_size=2000))
def test_a_single_file_is_split_in_its_order(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("corpus") / "file"
    path.write_bytes(text)
    splits = content(read(path))
    assert splits["train"] + splits["validation"] + splits["test"] == text
    assert len(splits["validation"]) == pytest.approx(len(text) / 20, abs=1)


def test_the_source_of_packages_is_enough_for_the_longest_case():
    longest = max(case.n for case in cases("full", CPU))
    assert min(map(len, read(None).splits.values())) > 10 * longest


@pytest.mark.parametrize("kind", ["nothing there", "empty folder", "short file"])
def test_a_corpus_that_cannot_be_learnt_is_refused(tmp_path, kind):
    path = tmp_path / "corpus"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "short file":
        path.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"--corpus must .*, got .*corpus"):
        read(path)


def test_a_corpus_shorter_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"--corpus must have more than n = 128 bytes in each split, got 128"):
        quality.draw(TINY, torch.zeros(128, dtype=torch.uint8), "train", 0)


def drawn(task, distance, batch, index):
    """Sequences `b n+1`, and True for their answers."""
    name, n, distance = far(task, distance)
    case = replace(TINY, task=name, n=n, distance=distance, batch=batch)
    haystack = torch.randint(10, 20, (4 * n,), dtype=torch.uint8)
    inputs, targets = quality.draw(case, haystack, "train", index)
    counts = torch.cat((torch.zeros(batch, 1, dtype=torch.bool), targets != quality.IGNORED), dim=1)
    sequences = torch.cat((inputs, torch.zeros(batch, 1, dtype=torch.long)), dim=1)
    sequences[:, 1:][counts[:, 1:]] = targets[counts[:, 1:]]
    return case, sequences, counts


distances = st.integers(64, 3000)


@settings(max_examples=25, deadline=None)
@given(distance=distances, index=st.integers(0, 100))
def test_recall_is_solved_by_who_looks_the_key_up(distance, index):
    case, sequences, counts = drawn("recall", distance, 3, index)
    gaps = []
    for row, counted in zip(sequences.tolist(), counts.tolist(), strict=True):
        places = [place for place, counts in enumerate(counted) if counts]
        assert len(places) == PAIRS
        for place in places:
            key = row[place - 1]
            assert key < SYMBOLS <= row[place] < 2 * SYMBOLS
            first = row.index(key)
            assert row[first + 1] == row[place]
            assert row[: place - 1].count(key) == 1
            gaps.append(place - 1 - first)
    assert case.distance <= min(gaps)
    assert max(gaps) <= case.distance + 4 * PAIRS


@settings(max_examples=25, deadline=None)
@given(distance=distances, index=st.integers(0, 100))
def test_needle_is_solved_by_who_finds_the_line(distance, index):
    case, sequences, counts = drawn("needle", distance, 3, index)
    for row, counted in zip(sequences.tolist(), counts.tolist(), strict=True):
        places = [place for place, counts in enumerate(counted) if counts]
        assert places == [*range(len(row) - quality.DIGITS, len(row))]
        line = bytes(row).index(LINE)
        assert places[0] - (line + len(LINE)) == case.distance
        assert [row[place - case.distance] for place in places] == [row[place] for place in places]
        assert bytes(row[place] for place in places).isdigit()


@pytest.mark.parametrize("task", quality.TASKS)
def test_batches_are_the_same_each_time_and_differ_by_step(task):
    case = replace(TINY, task=task, n=256, distance=0 if task == "text" else 64)
    words = torch.arange(4096).to(torch.uint8)
    first, again, next_one = (quality.draw(case, words, "train", 1, step) for step in (5, 5, 6))
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs, next_one.inputs)
    counts = first.targets[:, :-1] != quality.IGNORED
    assert torch.equal(first.targets[:, :-1][counts], first.inputs[:, 1:][counts])


def run_of(name, case=TINY):
    torch.manual_seed(case.seed)
    model = quality.SUITE.implementations[name].build(case)
    # A start of zero hides a leak of the heavy branch.
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("null_q_token", "to_out.weight")):
                parameter.normal_()
    splits = {split: torch.randint(256, (4096,), dtype=torch.uint8) for split in ("train", "validation", "test")}
    return quality.Run(case, model, CPU, splits, {})


@pytest.mark.parametrize("name", HONEST)
def test_nothing_that_comes_later_changes_a_logit(name):
    for window in (16, 32):
        assert run_of(name, replace(TINY, window=window)).leak() < 1e-4


@pytest.mark.parametrize("name", ["zero_fp32", "zero_plain"])
def test_precision_is_asked_about_in_long_runs_on_text(name):
    asked = {
        (preset, case.task)
        for preset in ("smoke", "default", "full")
        for case in cases(preset, torch.device("cuda"))
        if not quality.SUITE.implementations[name].unavailable(case, torch.device("cuda"))
    }
    assert asked == {("full", "text")}


@pytest.mark.parametrize("name", ["zero_fp32", "zero_plain"])
def test_precision_alone_differs(name):
    """A decoder with the same weights has the same loss and gradients, except for rounding."""
    runs = [run_of(each) for each in ("zero", name)]
    losses = [run.loss(0) for run in runs]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    assert [run.model.autocasts for run in runs] == [True, False]
    ours, theirs = (dict(run.model.named_parameters()) for run in runs)
    assert ours.keys() == theirs.keys()
    for key, parameter in ours.items():
        torch.testing.assert_close(theirs[key].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("convolves", [True, False])
@pytest.mark.parametrize("rotary_emb", [True, False])
def test_the_order_of_bytes_is_seen_by_convolution_or_rotary_embedding(convolves, rotary_emb):
    # With two layers, a causal mask alone reveals some of the order.
    case = replace(TINY, layers=1)
    model = quality.decoder(case, partial(quality.light, rotary_emb=rotary_emb), convolves=convolves)
    inputs = torch.randint(256, (1, TINY.window))
    order = torch.cat((torch.randperm(TINY.window - 1), torch.tensor([TINY.window - 1])))
    change = (model(inputs) - model(inputs[:, order]))[:, -1].abs().max()
    assert (change > 1e-3) == (convolves or rotary_emb)


def test_the_leak_of_routing_that_looks_ahead_is_seen():
    assert run_of("noncausal").leak() > 1e-2


@pytest.mark.parametrize("name", quality.SUITE.implementations)
def test_parameters_are_as_the_names_say(name):
    sizes = {each: quality._size(quality.SUITE.implementations[each].build(TINY)) for each in (name, "light", "zero")}
    narrow = name in ("light", "light_rotary", "dense", "hybrid")
    expected = sizes["light"] if narrow else sizes["zero"]
    # Routing tokens of further sets, absent convolutions, and the rounding of a hidden size.
    assert sizes[name] == pytest.approx(expected, rel=0.01)


def test_health_of_routers_is_what_was_routed():
    run = run_of("sets_2")
    first, second = run.health(), run.health()
    assert (first["changed"], second["changed"]) == (1, 0)
    assert all(each.grad is None for each in run.model.parameters())
    with torch.no_grad():
        for layer in run.model.blocks:
            layer.attention.kv_router.routing_token[1] = layer.attention.kv_router.routing_token[0]
    assert run.health()["overlap"] == pytest.approx(1)
    assert 0 < first["overlap"] < 1
    assert 0 < first["position_entropy"] <= 6
    assert 0 < first["router_gradient"] < 1


@pytest.mark.parametrize(("name", "reads"), [("light", False), ("dense", False), ("frozen", True), ("random", True)])
def test_health_is_of_what_has_routers(name, reads):
    run = run_of(name)
    figures = run.health()
    assert bool(figures) == reads
    if name == "frozen":
        assert figures["router_gradient"] == 0
    if name == "random":
        assert run.health()["changed"] > 0.5


@pytest.fixture(scope="module")
def conditions():
    return Conditions(CPU, "cpu", "abc", measure_ceilings(CPU))


@pytest.mark.parametrize("name", ["light", "dense", "zero", "sets_4"])
def test_a_run_learns_and_says_all_that_it_measured(name, conditions):
    case = replace(TINY, steps=40, layers=1, batch=4)
    (record,) = measure(quality.SUITE, case, "training", [name], conditions)
    assert (record.status, record.reason) == ("ok", "")
    curve = record.curves["validation_bits_per_byte"]
    assert len(curve) == len(record.curves["step"]) == 5
    assert curve[-1] < curve[0] < 8.5
    assert record.curves["tokens"][-1] == 40 * 4 * 128
    assert record.data == quality.SUITE.data(None)
    assert record.metrics["bits_per_byte"] == pytest.approx(curve[-1], abs=1)
    assert len(record.curves["position"]) == len(record.curves["bits_by_position"]) > 1
    of_routers = {"router_gradient", "changed", "position_entropy"}
    assert of_routers <= record.metrics.keys() or not of_routers & record.metrics.keys()


def test_runs_differ_by_seed_and_by_nothing_else(conditions):
    curves = []
    for seed in (1, 1, 2):
        (record,) = measure(quality.SUITE, replace(TINY, seed=seed), "training", ["zero"], conditions)
        curves.append(record.curves["validation_bits_per_byte"])
    assert curves[0] == curves[1] != curves[2]
