"""Peers: reasons for their absence, and the definitions by which they are judged."""

import re
from dataclasses import replace
from email.message import Message
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5_bench.loading import load_suites
from colt5_bench.records import environment
from colt5_bench.suite import Suite
from suites import peers
from suites._dense import DenseAttention
from suites._sparse import entmax, native_sparse
from suites.select import SUITE as SELECT
from suites.soft_topk import SUITE as SOFT_TOPK
from suites.soft_topk import SoftTopkCase, projected
from suites.sparse_attention import SUITE as SPARSE

ROOT = Path(__file__).parents[2]
SUITES = {name: suite for name, suite in load_suites(ROOT).items() if isinstance(suite, Suite)}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def reasons(suite, device):
    """Reasons why implementations of a suite cannot run its smallest cases, without any package but the
    dependencies."""
    return {
        each.unavailable(case, device)
        for each in suite.implementations.values()
        for case in suite.cases("smoke", device)
    } - {None}


@pytest.mark.parametrize("name", SUITES)
def test_a_package_that_is_missing_is_named_and_its_version_is_recorded(name, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    told = " ".join(map(str, reasons(SUITES[name], CUDA)))
    extras = re.findall(r"pip install '\.\[(\w+)\]'", told)
    assert set(extras) <= {"peers"}
    missing = set(re.findall(r"pip install ([\w-]+)", told))
    assert missing <= set(environment.PEERS)
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{package}>=' in pyproject for package in missing)
    if name in ("select", "soft_topk", "sparse_attention", "normalize"):
        assert missing


@pytest.mark.parametrize("name", ["select", "sparse_attention", "normalize"])
def test_without_a_gpu_kernels_say_so_whatever_is_installed(name, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda module: "there")
    assert any("runs on a GPU only" in reason for reason in reasons(SUITES[name], CPU))
    assert not any("GPU only" in reason or "not installed" in reason for reason in reasons(SUITES[name], CUDA))


@pytest.mark.parametrize(("n", "k", "takes"), [(4096, 128, True), (4097, 128, False), (8192, 8, False), (64, 6, False)])
def test_quack_takes_few_scores(n, k, takes, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda module: "there")
    case = replace(SELECT.cases("smoke", CUDA)[0], n=n, k=k)
    assert (SELECT.implementations["quack_topk"].unavailable(case, CUDA) is None) == takes


@pytest.mark.parametrize("preset", ["smoke", "default", "full"])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_softtorch_takes_what_fits(device, preset, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda module: "there")
    softtorch = SOFT_TOPK.implementations["softtorch"]
    taken = {case.n: softtorch.unavailable(case, device) is None for case in SOFT_TOPK.cases(preset, device)}
    assert taken[min(taken)] or (preset, device) == ("full", CPU)
    assert preset != "full" or not taken[max(taken)]


@pytest.mark.parametrize("name", ["adasplash", "fla_nsa", "attn_gym_gather"])
@pytest.mark.parametrize("case", [each for each in SPARSE.cases("default", CUDA) if each.n == 4096], ids=lambda c: c.id)
def test_sparse_attention_of_packages_runs_at_one_setting_at_least(case, name, monkeypatch):
    """Except packages that need flash-attn, which is compiled at its installation."""
    monkeypatch.setattr(peers, "find_spec", lambda module: None if module == "flash_attn" else "there")
    why = SPARSE.implementations[name].unavailable(case, CUDA)
    if name == "adasplash":
        assert (why is None) == (case.settings == "published")
    else:
        assert (why is None) == case.causal


@pytest.mark.parametrize("heads", [1, 8, 15, 16, 32])
def test_kernels_for_many_heads_say_how_many(heads, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda module: "there")
    case = next(each for each in SPARSE.cases("default", CUDA) if each.causal)
    why = SPARSE.implementations["fla_nsa"].unavailable(replace(case, heads=heads), CUDA)
    assert (why is None) == (heads >= 16)
    assert why is None or f"got {heads}" in why


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_adasplash_gets_what_lies_in_a_row(causal, heads, monkeypatch):
    """Its kernels need contiguous memory, and heads are a view of the result of a linear layer."""
    taken = []

    def adasplash(query, key, value, *, alpha, is_causal):
        taken.extend([query, key, value])
        assert (alpha, is_causal) == (1.5, causal)
        return entmax(query, key, value, is_causal)

    monkeypatch.setattr(peers, "import_module", lambda name: SimpleNamespace(adasplash=adasplash))
    layer = DenseAttention(peers.attend_with_adasplash, 8, heads, 16, causal)
    layer(torch.randn(1, 32, 8))
    assert all(each.is_contiguous() for each in taken)


@pytest.mark.parametrize(("size", "blocks", "window"), [(8, 3, 16), (16, 2, 8), (4, 5, 24)])
@pytest.mark.parametrize("length", [32, 64])
def test_native_sparse_attention_with_fla_is_the_definition(size, blocks, window, length, monkeypatch):
    """With its two attentions by the definition, the sum is the definition: the window and the gates are right."""

    def parallel_nsa(query, key, value, *, g_cmp, g_slc, block_counts, block_size):
        tensors = (each.transpose(1, 2) for each in (query, key, value))
        gates = torch.stack([g_cmp, g_slc, torch.zeros_like(g_cmp)]).transpose(2, 3).unsqueeze(-1)
        attended = native_sparse(*tensors, gates, size=block_size, blocks=block_counts, window=window)
        return attended.transpose(1, 2)

    monkeypatch.setattr(peers, "import_module", lambda name: SimpleNamespace(parallel_nsa=parallel_nsa))
    monkeypatch.setattr(peers.torch, "compile", partial(torch.compile, backend="eager"))
    query, key, value = torch.randn(2, 4, length, 16), *(torch.randn(2, 1, length, 16) for _ in range(2))
    gates = torch.rand(3, 2, 4, length, 1)
    settings = {"size": size, "blocks": blocks, "window": window}
    theirs = peers.native_sparse_with_fla(**settings)(query, key, value, gates)
    torch.testing.assert_close(theirs, native_sparse(query, key, value, gates, **settings))


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=12), st.data(), st.sampled_from([0.05, 0.5, 4.0]))
@settings(max_examples=60, deadline=None)
def test_the_projection_sums_to_k_and_moves_along_the_simplex(row, data, eps):
    """Its gradient is that of scores, minus their mean, where entries are between 0 and 1."""
    k = data.draw(st.integers(1, len(row) - 1))
    scores = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    y = projected(SoftTopkCase(1, len(row), k, eps, 1.0))(scores)
    assert (y >= -1e-9).all()
    assert (y <= 1 + 1e-9).all()
    torch.testing.assert_close(y.sum(), torch.tensor(float(k), dtype=torch.float64), atol=1e-6, rtol=0)
    # Entries between 0 and 1 differ as their scores do; those at 1 have larger scores and those at 0 smaller ones.
    shift = scores / eps - y
    inside = (y > 1e-9) & (y < 1 - 1e-9)
    if inside.any():
        t = shift[inside].mean()
        torch.testing.assert_close(shift[inside], t.expand(int(inside.sum())), atol=1e-6, rtol=0)
        assert (scores / eps - t >= 1 - 1e-6)[y > 1 - 1e-9].all()
        assert (scores / eps - t <= 1e-6)[y < 1e-9].all()
        upstream = torch.arange(1.0, len(row) + 1, dtype=torch.float64)[None]
        (gradient,) = torch.autograd.grad(y, scores, upstream)
        mean = upstream[inside].mean()
        torch.testing.assert_close(gradient[inside], (upstream[inside] - mean) / eps, atol=1e-6 / eps, rtol=1e-6)
        assert (gradient[~inside] == 0).all()


@pytest.mark.parametrize("case", SOFT_TOPK.cases("smoke", CPU), ids=lambda case: case.id)
def test_entmax_is_the_projection(case):
    pytest.importorskip("entmax")
    scores = SOFT_TOPK.problem(case, CPU).inputs["scores"].double()
    theirs = SOFT_TOPK.implementations["entmax"].build(case)(scores)
    torch.testing.assert_close(theirs, projected(case)(scores), atol=1e-9, rtol=0)


def metadata(**entries):
    message = Message()
    for name, value in entries.items():
        for each in value if isinstance(value, list) else [value]:
            message[name.replace("_", "-")] = each
    return message


@pytest.mark.parametrize(
    ("entries", "licence"),
    [
        ({"License_Expression": "Apache-2.0", "License": "other"}, "Apache-2.0"),
        ({"Classifier": ["Topic :: X", "License :: OSI Approved :: BSD License"], "License": "text"}, "BSD License"),
        ({"License": "MIT License\n\nwith its text"}, "MIT License"),
        ({"Classifier": ["Topic :: X"]}, None),
        ({}, None),
    ],
    ids=str,
)
def test_a_licence_is_what_the_metadata_names(entries, licence, monkeypatch):
    monkeypatch.setattr(environment, "metadata", lambda package: metadata(**entries))
    monkeypatch.setattr(environment, "_version", lambda package: "1.0" if package == "entmax" else None)
    assert environment.describe(CPU)["licences"] == {"entmax": licence}
