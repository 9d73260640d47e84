from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from colt5_bench.measuring import sass
from colt5_bench.measuring.static_facts import compiled_kernels

pytestmark = pytest.mark.compiled


@triton.jit
def probe_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, KIND: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    if KIND == "exponential":
        x = tl.exp2(x)
    elif KIND == "fp64":
        x = (x.to(tl.float64) * 3.0 + 1.0).to(tl.float32)
    elif KIND == "sum":
        x += tl.sum(x)
    elif KIND == "special":
        x = tl.sqrt(x)
    tl.store(y_ptr + index, x)


def instructions(kind, target, block=512, **options):
    x = torch.empty(block)
    (facts,) = compiled_kernels(
        lambda: probe_kernel[(1,)](x, x, BLOCK=block, KIND=kind, num_warps=4, **options), target=target
    )
    return facts["instructions"]


@pytest.mark.parametrize("target", [80, 90])
class TestInstructions:
    def test_of_a_copy(self, target):
        counts = instructions("copy", target)
        assert counts["global_load_128"] == counts["global_store_128"] == 1
        assert not counts.keys() & {"exponential", "fp32", "fp64", "shared", "shuffle", "barrier", "local"}

    def test_narrow_accesses(self, target):
        counts = instructions("copy", target, block=128)
        assert counts["global_load_32"] == counts["global_store_32"] == 1

    def test_exponentials_are_counted_one_a_entry(self, target):
        assert instructions("exponential", target)["exponential"] == 4
        assert instructions("exponential", target, block=1024)["exponential"] == 8

    def test_double_precision_and_its_conversions(self, target):
        counts = instructions("fp64", target)
        assert counts["fp64"] == 4
        assert counts["conversion"] == 8

    def test_a_sum_over_warps(self, target):
        assert {"fp32", "shuffle", "shared", "barrier"} <= instructions("sum", target).keys()

    def test_other_special_functions(self, target):
        counts = instructions("special", target)
        assert counts["special"] >= 4
        assert "exponential" not in counts


def test_every_class_is_of_mnemonics_that_no_earlier_one_takes():
    for name, members in sass.CLASSES.items():
        for member in members.split():
            assert sass._class_of(member).startswith(name)


def test_kernels_are_disassembled_side_by_side_and_each_once(monkeypatch):
    both, asked = Barrier(2), []

    def disassemble(command, **options):
        cubin = Path(command[-1]).read_bytes()
        asked.append(cubin)
        # It starts when the other one is running, too.
        both.wait(timeout=30)
        return SimpleNamespace(stdout=f"/*0000*/ FADD ; {len(cubin) * '/*0010*/ LDG.E ; '}")

    monkeypatch.setattr(sass, "cores", lambda: 2)
    monkeypatch.setattr(sass, "subprocess", SimpleNamespace(run=disassemble))
    sass._inspect.cache_clear()
    expected = [{"fp32": 1, "global_load_32": size} for size in (1, 2)]
    for _ in range(2):
        assert sass.instructions([b"a", b"bc"]) == expected
    assert sorted(asked) == [b"a", b"bc"]
