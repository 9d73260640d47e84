import gc
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5_bench.measuring.memory import measure_memory, saved_bytes

pytestmark = pytest.mark.alone

CPU = torch.device("cpu")
KB = 1000


def allocate(size):
    return torch.empty(size, dtype=torch.uint8)


def peak(call):
    return measure_memory(call, device=CPU)


class TestPeakOnCpu:
    def test_the_result_counts(self):
        assert peak(lambda: allocate(7 * KB)) == 7 * KB

    def test_nothing_is_nothing(self):
        assert peak(lambda: None) == 0

    def test_a_temporary_counts_while_it_lives(self):
        def call():
            first = allocate(5 * KB)
            temporary = allocate(11 * KB)
            del temporary
            second = allocate(3 * KB)
            return first, second

        assert peak(call) == 16 * KB

    def test_temporaries_one_after_the_other_count_once(self):
        def call():
            for _ in range(10):
                allocate(4 * KB)

        assert peak(call) == 4 * KB

    def test_what_was_allocated_before_does_not_count(self):
        kept = allocate(1000 * KB)
        assert peak(lambda: (kept.view(10, -1), allocate(KB))) == KB

    def test_memory_from_before_that_the_call_frees_makes_no_room(self):
        kept = [allocate(6 * KB)]

        def call():
            kept.clear()
            return allocate(10 * KB)

        assert peak(call) == 10 * KB

    def test_operators_and_the_backward_pass_count(self):
        x = torch.zeros(1000, requires_grad=True)
        upstream = torch.ones(1000)

        def call():
            y = x.exp().exp()
            return torch.autograd.grad(y, x, upstream)

        # At the end both results of exp and the gradients of both are alive.
        assert peak(call) == 4 * 4 * KB

    @settings(max_examples=25)
    @given(st.lists(st.tuples(st.booleans(), st.integers(1, 10**6)), max_size=12))
    def test_is_that_of_any_sequence(self, steps):
        expected = current = 0
        alive = []
        for free, size in steps:
            if free and alive:
                current -= alive.pop()
            else:
                alive.append(size)
                current += size
                expected = max(expected, current)

        def call():
            held = []
            for free, size in steps:
                if free and held:
                    held.pop()
                else:
                    held.append(allocate(size))

        assert peak(call) == expected

    def test_is_silent(self, capfd):
        peak(lambda: allocate(KB))
        captured = capfd.readouterr()
        assert captured.out + captured.err == ""


class TestSaved:
    def test_a_result_that_is_the_output_does_not_count(self):
        x = torch.zeros(100, requires_grad=True)
        assert saved_bytes(lambda: x.exp(), [x]) == 0

    def test_an_intermediate_counts_once_however_often_it_is_saved(self):
        x = torch.zeros(100, requires_grad=True)

        def forward():
            y = x.exp()
            return y * y.view(10, 10).reshape(-1) * x

        # exp(x), which three operations save, and exp(x) squared.
        assert saved_bytes(forward, [x]) == 800

    def test_an_input_does_not_count_and_neither_does_a_view_of_it(self):
        x, w = torch.zeros(100, requires_grad=True), torch.ones(100)
        assert saved_bytes(lambda: x.view(10, 10).t() * w.view(10, 10), [x, w]) == 0

    def test_a_view_keeps_all_of_its_storage(self):
        x = torch.zeros(10, requires_grad=True)
        assert saved_bytes(lambda: x * torch.ones(1000)[:10], [x]) == 4000

    def test_custom_functions_count_by_what_they_save(self):
        class Keep(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x, torch.zeros(5, dtype=torch.float64))
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                return grad

        x = torch.zeros(100, requires_grad=True)
        assert saved_bytes(lambda: Keep.apply(x), [x]) == 40

    @pytest.mark.parametrize("saved", ["input", "output", "both"])
    @pytest.mark.parametrize("calls", [1, 3])
    def test_nothing_stays(self, saved, calls):
        """Functions may save their results, and so may later functions."""
        outputs = []

        class Keep(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                y = 2 * x
                ctx.save_for_backward(*([x] if saved != "output" else []), *([y] if saved != "input" else []))
                return y

            @staticmethod
            def backward(ctx, grad):
                return grad

        def forward():
            y = torch.zeros(100, requires_grad=True)
            for _ in range(calls):
                y = Keep.apply(y)
                outputs.append(weakref.ref(y))
            return y

        saved_bytes(forward, [])
        gc.collect()
        assert all(ref() is None for ref in outputs)

    def test_gradients_are_on_even_where_they_were_off(self):
        x = torch.zeros(100, requires_grad=True)
        with torch.no_grad():
            assert saved_bytes(lambda: x.exp() + 1, [x]) == 400

    def test_storages_that_are_gone_are_not_mistaken_for_others(self):
        x = torch.zeros(100, requires_grad=True)

        def forward():
            total = x.sum()
            for _ in range(5):
                # Saved, and freed with its graph at the next pass of the loop, if nothing else refers to it.
                total = x.exp().exp().sum().detach() + x.sum()
            return total

        assert saved_bytes(forward, [x]) == 10 * 400


@pytest.mark.gpu
class TestPeakOnGpu:
    device = torch.device("cuda")

    def test_temporaries_count_and_results_are_alive_until_the_end(self):
        def call():
            temporary = torch.empty(2**20, dtype=torch.uint8, device=self.device)
            result = torch.empty(2**21, dtype=torch.uint8, device=self.device)
            del temporary
            return result

        assert measure_memory(call, device=self.device) == 3 * 2**20
        assert measure_memory(call, device=self.device) == 3 * 2**20

    @pytest.mark.parametrize("spare", [1, 1000, 700 * 2**10])
    def test_only_bytes_that_are_asked_for_count(self, spare):
        """The allocator gives a large block as a whole if less than a megabyte of it would be left."""
        size = 20 * 2**20 - spare
        assert (
            measure_memory(partial(torch.empty, size, dtype=torch.uint8, device=self.device), device=self.device)
            == size
        )
