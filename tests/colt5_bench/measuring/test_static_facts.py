import json

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from colt5_bench.measuring.static_facts import compiled_kernels

BOTH = pytest.mark.parametrize("target", [80, 90])


@triton.jit
def scale_kernel(x_ptr, y_ptr, factor, n, BLOCK: tl.constexpr, NEGATE: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < n) * factor
    tl.store(y_ptr + index, -x if NEGATE else x, mask=index < n)


@triton.jit
def hoard_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    total = x
    for step in range(n):
        total = total * 0.5 + tl.load(y_ptr + step)
    tl.store(y_ptr + index, x + total)


@triton.jit
def sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


def scale(x, factor=2.0, block=128, negate=False, **options):
    y = torch.zeros_like(x)
    scale_kernel[(triton.cdiv(x.numel(), block),)](x, y, factor, x.numel(), BLOCK=block, NEGATE=negate, **options)
    return y


@pytest.mark.compiled
class TestCompileOnly:
    @BOTH
    def test_facts_of_a_small_kernel(self, target):
        (facts,) = compiled_kernels(lambda: scale(torch.ones(1000), num_warps=2, num_stages=2), target=target)
        assert (facts["name"], facts["target"]) == ("scale_kernel", f"sm_{target}")
        assert 8 <= facts["registers"] <= 64
        assert facts["spilled_bytes"] == 0
        assert facts["shared_bytes"] == 0
        assert (facts["num_warps"], facts["num_stages"], facts["cooperative"]) == (2, 2, False)
        assert facts["constants"] == {"BLOCK": 128, "NEGATE": False}
        assert facts["instructions"]["fp32"] >= 1
        assert not facts["instructions"].keys() & {"exponential", "fp64", "shared", "local", "barrier"}
        assert json.loads(json.dumps(facts)) == facts

    @BOTH
    def test_a_kernel_with_too_few_registers_spills(self, target):
        def launch(**options):
            hoard_kernel[(1,)](torch.ones(4096), torch.ones(4096), 10, BLOCK=4096, num_warps=4, **options)

        def spilled(**options):
            (facts,) = compiled_kernels(lambda: launch(**options), target=target, disassemble=False)
            assert "instructions" not in facts
            return facts["spilled_bytes"]

        assert spilled() == 0
        assert spilled(maxnreg=32) > 0

    @BOTH
    def test_a_reduction_between_warps_takes_shared_memory(self, target):
        def launch():
            sum_kernel[(1,)](torch.ones(1024), torch.ones(1), BLOCK=1024, num_warps=8)

        (facts,) = compiled_kernels(launch, target=target)
        assert facts["shared_bytes"] >= 8 * 4

    def test_nothing_runs(self):
        results = []
        compiled_kernels(lambda: results.append(scale(torch.ones(1000))), target=90)
        assert not results[0].any()

    def test_a_cooperative_launch_can_be_compiled(self):
        (facts,) = compiled_kernels(lambda: scale(torch.ones(8), launch_cooperative_grid=True), target=90)
        assert facts["cooperative"] is True

    def test_each_distinct_kernel_appears_once_in_the_order_of_launch(self):
        def launch():
            scale(torch.ones(1024), negate=True)
            scale(torch.ones(1024), block=256)
            scale(torch.ones(512), 3.0, negate=True)
            scale(torch.ones(500), negate=True)
            scale(torch.ones(1024, dtype=torch.float64), negate=True)

        facts = compiled_kernels(launch, target=90)
        assert [each["constants"] for each in facts] == [
            {"BLOCK": 128, "NEGATE": True},
            {"BLOCK": 256, "NEGATE": False},
            # 500 is not a multiple of 16, and fp64 is another type, so these are separate kernels.
            {"BLOCK": 128, "NEGATE": True},
            {"BLOCK": 128, "NEGATE": True},
        ]

    def test_a_kernel_of_the_backward_pass_counts(self):
        class Scale(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return scale(x)

            @staticmethod
            def backward(ctx, grad):
                return scale(grad, negate=True)

        x = torch.ones(1000, requires_grad=True)
        facts = compiled_kernels(lambda: Scale.apply(x).sum().backward(), target=90)
        assert [each["constants"]["NEGATE"] for each in facts] == [False, True]

    def test_targets_do_not_share_what_they_compiled(self):
        launched = {}
        for target in (80, 90, 80):
            launched[target] = compiled_kernels(lambda: scale(torch.ones(1000)), target=target)
        caches = [key for key in scale_kernel.device_caches if isinstance(key, str)]
        assert sorted(caches) == ["compile only: sm_80", "compile only: sm_90"]

    def test_what_no_kernel_has_written_is_zero(self):
        """Even if PyTorch indexes with it; and only within this function."""
        indexed = []

        def launch():
            for indices in (torch.empty(5, dtype=torch.int64), torch.ones(5, dtype=torch.int64).new_empty(5)):
                scale(indices.float())
                indexed.append(torch.arange(3)[torch.empty_like(indices)] + indices)

        allocating = torch.empty, torch.empty_like, torch.Tensor.new_empty
        # PyTorch then fills empty allocations with the largest numbers.
        torch.use_deterministic_algorithms(True)
        try:
            compiled_kernels(launch, target=90)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(each.eq(0).all() for each in indexed)
        assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == allocating

    def test_what_launches_nothing_has_no_kernels(self):
        assert compiled_kernels(lambda: torch.ones(3), target=90) == []

    def test_everything_is_as_before_even_after_an_exception(self):
        run, active = JITFunction.run, driver._active

        def fail():
            scale(torch.ones(10))
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            compiled_kernels(fail, target=90)
        assert JITFunction.run is run
        assert driver._active is active


def test_the_interpreter_has_no_facts(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compiled_kernels(lambda: None, target=90)


@pytest.mark.gpu
class TestLaunched:
    def test_the_gpu_says_what_the_binary_says(self):
        x = torch.ones(1000, device="cuda")
        major, minor = torch.cuda.get_device_capability()
        (loaded,) = compiled_kernels(lambda: scale(x))
        (compiled,) = compiled_kernels(lambda: scale(x), target=10 * major + minor)
        assert loaded == compiled

    def test_kernels_do_run(self):
        results = []
        compiled_kernels(lambda: results.append(scale(torch.ones(1000, device="cuda"))))
        assert results[0].eq(2).all()

    def test_spills_are_seen(self):
        x = torch.ones(4096, device="cuda")
        (facts,) = compiled_kernels(lambda: hoard_kernel[(1,)](x, x, 10, BLOCK=4096, num_warps=4, maxnreg=32))
        assert facts["spilled_bytes"] > 0
