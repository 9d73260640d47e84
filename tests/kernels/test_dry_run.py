"""The first call of a layer compiles all kernels that a dry run lists, in parallel."""

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import kernels
from colt5_bench.measuring.static_facts import ALLOCATING
from kernels._common import dry_run, launch
from kernels._common.dry_run import announced, launches_of_layer
from kernels._common.launch import Scratch, _Pointer
from kernels._common.tensors import INTERPRETED, triton_for_cpu_tensors
from tests.calls import LAYERS, inputs_of, layer_of, results
from tests.kernels.test_launches import Recorder, Uncompiled, zeroed
from tests.reference.conftest import build

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@pytest.fixture
def allocating_zeros(monkeypatch):
    """Kernels do not write to memory, and PyTorch may use the memory as indices."""
    for owner, function in ALLOCATING:
        monkeypatch.setattr(owner, function, zeroed(getattr(owner, function)))


def step(layer, inputs, options, *, wanted=True, autocast=True):
    """Forward and backward pass of CPU tensors by kernels."""
    with triton_for_cpu_tensors():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(wanted):
            outputs = results(layer(*inputs, **options))
        wanted = [y for y in outputs if y.requires_grad]
        if wanted:
            torch.autograd.backward(wanted, [torch.zeros_like(y) for y in wanted])


def told(layer, inputs, options, *, wanted=True, autocast=True):
    """The launches of that step, from a dry run."""
    with (
        triton_for_cpu_tensors(),
        torch.set_grad_enabled(wanted),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        announced(layer, type(layer).forward, *inputs, **options),
    ):
        return [*launches_of_layer()()]


def test_none_runs_within_a_backward_pass():
    """On a GPU its own backward pass would wait for the thread that it blocks."""
    layer = layer_of("ConditionalRoutedAttention", random.Random(0), use_triton=True)
    inputs, options = inputs_of("ConditionalRoutedAttention", layer)
    launches = []

    class Within(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            launches.extend(told(layer, inputs, options))
            return grad

    Within.apply(torch.zeros(1, requires_grad=True)).sum().backward()
    assert not launches
    assert told(layer, inputs, options)


def what_is_compiled(kernel, pointers, numbers, named):
    """Everything that Triton may compile a kernel for."""
    types = ((x.dtype, x.data_ptr() % 16 == 0) for x in pointers)
    return kernel.__module__, kernel.__name__, *types, *numbers, *sorted(named.items())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", LAYERS)
def test_a_dry_run_tells_what_a_step_launches(name, seed, monkeypatch, allocating_zeros):
    rng = random.Random(f"{name} {seed}")
    layer = layer_of(name, rng, use_triton=True)
    inputs, options = inputs_of(name, layer, length=rng.choice([40, 64, 333]))
    inputs = [x.requires_grad_(rng.random() < 0.7) for x in inputs]
    how = {"wanted": rng.random() < 0.8, "autocast": rng.random() < 0.7}
    dry = Counter(
        what_is_compiled(each.kernel, map(_Pointer, each.pointers), each.numbers, each.named)
        for each in told(layer, inputs, options, **how)
    )
    launched = Counter()

    def run(self, *given, grid, warmup, **named):
        pointers = [x for x in given if isinstance(x, Tensor)]
        launched[what_is_compiled(self, pointers, given[len(pointers) :], named)] += 1

    monkeypatch.setattr(JITFunction, "run", run)
    step(layer, inputs, options, **how)
    assert dry == launched
    assert dry


class Compiler:
    """Replacement for Triton's compiler, with kernels that a recorder launches. It lists their compilations."""

    def __init__(self):
        self.recorder, self.compiled, self.threads = Recorder(), [], set()
        self.recorder.device = f"recorder {id(self.recorder)}"

    def __call__(self, src, **_):
        self.compiled.append((src.fn, str(src.signature), str(src.constants), str(src.attrs)))
        self.threads.add(threading.get_ident())
        return Uncompiled(src, self.recorder)


@pytest.fixture
def compiler(monkeypatch, allocating_zeros):
    """A compiler of all kernels, for a separate device."""
    compiler, real, active = Compiler(), triton.compiler.compile, driver._active
    monkeypatch.setattr(triton.compiler, "compile", compiler)
    driver.set_active(compiler.recorder)
    yield compiler
    driver.set_active(active)
    for kernel, *_ in compiler.compiled:
        # Triton stored it when the kernel first saw the device.
        kernel.compile = real
        kernel.device_caches.pop(compiler.recorder.device, None)


def layer_and_inputs(name="ConditionalRoutedAttention", **options):
    layer = layer_of(name, random.Random(name), use_triton=True, package=kernels, **options)
    inputs, given = inputs_of(name, layer)
    return layer, [x.requires_grad_() for x in inputs], given


@pytest.mark.parametrize("name", LAYERS)
def test_the_first_launch_compiles_the_whole_step(name, compiler):
    compiled_at_launch = []
    launcher_cls = compiler.recorder.launcher_cls

    def counting(*given):
        run = launcher_cls(*given)
        return lambda *args: (compiled_at_launch.append(len(compiler.compiled)), run(*args))

    compiler.recorder.launcher_cls = counting
    step(*layer_and_inputs(name))
    assert compiled_at_launch[0] == len(compiler.compiled) == len(set(compiler.compiled)) > 1
    assert set(compiled_at_launch) == {len(compiler.compiled)}


def test_kernels_are_compiled_side_by_side(compiler, monkeypatch):
    """Two compilations wait for each other."""
    meeting = threading.Barrier(2, timeout=10)
    met = []
    compile_alone = Compiler.__call__

    def compile_together(self, src, **given):
        if not met:
            met.append(meeting.wait())
        return compile_alone(self, src, **given)

    monkeypatch.setattr(Compiler, "__call__", compile_together)
    step(*layer_and_inputs())
    assert met
    assert threading.get_ident() not in compiler.threads


def test_a_later_call_makes_no_dry_run(compiler, monkeypatch):
    layer, inputs, options = layer_and_inputs()
    runs = []
    real = dry_run._launches_of
    monkeypatch.setattr(dry_run, "_launches_of", lambda *given: (runs.append(given), real(*given))[1])
    for _ in range(3):
        step(layer, inputs, options)
    assert len(runs) == 1


OF_LENGTHS = [name for name in LAYERS if not name.endswith(("Router", "ViT", "ImageAttention"))]


@pytest.mark.parametrize("name", OF_LENGTHS)
def test_new_lengths_seldom_compile(name, compiler, monkeypatch):
    """A second length compiles for expected lengths. A much longer or shorter one, or an aligned one, may compile
    more."""
    rng = random.Random(name)
    layer = build(name, kernels, use_triton=True)
    compiling = []
    for number in range(21):
        length = rng.randint(2048, 60000)
        # The shapes of tensors are enough.
        inputs, options = inputs_of(name, layer, batch=1, length=length, context=length)
        before = len(compiler.compiled)
        with monkeypatch.context() as patched:
            patched.setattr(dry_run, "_lengths_to_come", lambda *_: [])
            launches = told(layer, inputs, options)
        launch.compile_side_by_side(launches, lambda: told(layer, inputs, options), device=-1)  # noqa: B023
        if len(compiler.compiled) > before:
            compiling.append(number)
    assert compiling[:1] == [0]
    assert len(compiling) <= 4


def shapes(*sizes):
    return [torch.empty(size, device="meta") for size in sizes]


@pytest.mark.parametrize(
    ("known", "new", "lengths"),
    [
        ([(2, 4096, 8)], [(2, 4096, 8)], []),
        ([(2, 4096, 8)], [(3, 4096, 8)], []),
        ([(2, 4096, 8)], [(2, 1024, 8)], [16384, 8192, 4096, 2048, 1024, 512, 256]),
        ([(2, 4096, 8)], [(2, 5000, 8)], [32767, 16383, 8191, 4095, 2047, 1023, 511]),
        ([(2, 64, 8), (2, 64)], [(2, 96, 8), (2, 96)], [512, 256, 128, 64, 32, 16, 8]),
    ],
)
def test_lengths_to_come_follow_a_change(known, new, lengths):
    layer = nn.Identity()
    assert dry_run._lengths_to_come(layer, shapes(*known)) == []
    told = dry_run._lengths_to_come(layer, (shapes(*new), {}))
    assert told == [{new[0][1]: length} for length in lengths]


def test_of_nested_layers_the_outermost_is_run(compiler):
    """Its dry run lists the kernels of all."""
    first, inputs, options = layer_and_inputs()
    second, _, _ = layer_and_inputs("ConditionalRoutedFeedForward")
    compiled = {}

    class Both(nn.Module):
        def forward(self, x):
            between = first(x)
            compiled[type(between)] = len(compiler.compiled)
            return second(between)

    with torch.autocast("cpu", torch.bfloat16), announced(Both(), Both.forward, *inputs):
        step(Both(), inputs, options)
    assert compiled[FakeTensor] < compiled[Tensor] == len(compiler.compiled)


def on_a_module(layer, hook):
    layer.q_router.register_forward_pre_hook(hook)


def on_results_of_a_module(layer, hook):
    layer.q_router.register_forward_hook(hook)


def on_gradients_of_a_module(layer, hook):
    layer.light_attn.register_full_backward_hook(hook)


def on_gradients_of_a_parameter(layer, hook):
    next(layer.parameters()).register_hook(hook)


@pytest.mark.parametrize(
    "register", [on_a_module, on_results_of_a_module, on_gradients_of_a_module, on_gradients_of_a_parameter]
)
def test_hooks_see_steps_with_values_alone(register, compiler):
    layer, inputs, options = layer_and_inputs(has_light_attn=True)
    seen = []
    register(layer, lambda *given: seen.extend(map(type, tree_leaves(given))))
    step(layer, inputs, options)
    assert seen
    assert FakeTensor not in seen


class WithValues(nn.Module):
    """A layer that uses values, which a dry run does not have."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) if x.sum().item() < 1e9 else x


def test_a_layer_that_needs_values_launches_all_the_same(compiler):
    layer, inputs, _ = layer_and_inputs()
    whole = WithValues(layer)
    with announced(whole, WithValues.forward, *inputs):
        step(whole, inputs, {})
    assert compiler.recorder.launches
    assert len(compiler.compiled) == len(set(compiler.compiled))


def test_nobody_sees_a_dry_run(compiler, monkeypatch):
    """It changes neither hooks of saved tensors, whose calls a checkpoint counts, nor gradients, nor random numbers."""
    layer, inputs, options = layer_and_inputs()
    packed = []

    def seen(x):
        packed.append(type(x))
        return x

    state = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x):
        told(layer, inputs, options)
    assert not packed
    assert torch.equal(state, torch.get_rng_state())
    assert all(each.grad is None for each in [*layer.parameters(), *inputs])
    with triton_for_cpu_tensors():
        checkpoint(layer, *inputs, use_reentrant=False).sum().backward()
    assert inputs[0].grad is not None


def test_a_mode_of_compiling_that_is_active_stays(compiler):
    with ThreadPoolExecutor(1) as pool, triton.AsyncCompileMode(pool) as mode:
        step(*layer_and_inputs())
        assert not mode.raw_futures
        assert compiler.recorder.launches


def test_an_error_of_the_compiler_is_raised_by_the_launch(compiler, monkeypatch):
    def fail(self, src, **_):
        raise ValueError("cannot be compiled")

    with monkeypatch.context() as patched:
        patched.setattr(Compiler, "__call__", fail)
        for _ in range(2):
            with pytest.raises(ValueError, match="cannot be compiled"):
                step(*layer_and_inputs())
    step(*layer_and_inputs())
    assert compiler.recorder.launches


def test_scratch_memory_and_parts_tell_their_alignment():
    x = torch.zeros(64)
    assert _Pointer(x).data_ptr() == x.data_ptr()
    assert _Pointer(Scratch(3, dtype=torch.int16)).data_ptr() == 0
