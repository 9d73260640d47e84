"""Kept launches: each is the one that Triton would choose for the current arguments."""

import random
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import kernels
import reference
from colt5_bench.measuring.static_facts import ALLOCATING, compiled_kernels
from kernels._common import launch
from kernels._common import tape as recording
from kernels._common.launch import Launch, Launcher, Part, Scratch
from kernels._common.plans import Plan
from kernels._common.tensors import INTERPRETED, triton_for_cpu_tensors
from tests.calls import KERNELS, all_tensors_of, operation, results

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter keeps no launches")


@triton.jit
def mix_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    part_ptr,
    free_ptr,
    stride,
    n,
    wide: "i64",
    factor,
    exact: "fp64",
    BLOCK: tl.constexpr,
    FLAG: tl.constexpr,
):
    """Arguments of every kind."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mixed = tl.load(x_ptr + index * stride, mask=index < n, other=0.0) * factor + exact + wide
    tl.store(free_ptr + index, mixed, mask=index < n)
    tl.store(part_ptr + index, mixed, mask=index < n)
    tl.store(y_ptr + index, -mixed if FLAG else mixed, mask=index < n)


class Recorder:
    """A driver without a GPU, which records launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.device: Any = 0
        self.stream = 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 2**20},
            load_binary=lambda name, *_: (object(), object(), 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream

    def launcher_cls(self, src, metadata):
        def run(x, y, z, stream, function, metadata, launch_metadata, enter, exit, *arguments):  # noqa: A002
            plain = (each.data_ptr() if isinstance(each, Tensor) else each for each in arguments)
            for hook in (enter, exit):
                if hook is not None:
                    hook(launch_metadata)
            self.launches.append(((x, y, z), stream, function, metadata, tuple(plain)))

        return run

    def taken(self, known, calls=1):
        """Launches since the last time, of so many equal calls, with names for scratch memory.

        Names are in the order of use within a call. An integer is scratch memory if it is neither known nor small.
        Another call may have the same memory or other.
        """
        launches, self.launches = self.launches, []
        names: dict[tuple[int, int], str] = {}

        def plain(x, call):
            is_scratch = type(x) is int and x not in known and x >= 2**32
            return names.setdefault((call, x), f"scratch {len(names)}") if is_scratch else x

        return [
            (*rest, tuple(plain(x, calls * number // len(launches)) for x in arguments))
            for number, (*rest, arguments) in enumerate(launches)
        ]


@pytest.fixture
def recorder():
    """Replacement for the driver. It has a separate device, because kernels keep compilations by device."""
    active, recorder = driver._active, Recorder()
    recorder.device = f"recorder {id(recorder)}"
    driver.set_active(recorder)
    yield recorder
    driver.set_active(active)


class Uncompiled(CompiledKernel):
    """The parts of a compiled kernel that Triton launches. Its function shows its specialisation."""

    def __init__(self, src, recorder):
        self.module, self.src = None, None
        self.function = (recorder.device, str(src.signature), str(src.constants), str(src.attrs))
        self.packed_metadata, self.metadata, self.name, self.hash = (), None, "", ""
        self._run = recorder.launcher_cls(None, None)

    def _init_handles(self):
        pass


@contextmanager
def uncompiled(kernel, recorder, *devices):
    """Launch a kernel on devices of the recorder without compiling it."""
    active = driver._active
    driver.set_active(recorder)
    for recorder.device in devices:
        # A kernel gets a compiler for a new device.
        kernel.device_caches[recorder.device]
    compiler, kernel.compile = kernel.compile, lambda src, **_: Uncompiled(src, recorder)
    try:
        yield
    finally:
        kernel.compile = compiler
        for device in devices:
            del kernel.device_caches[device]
        driver.set_active(active)


DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int32)
NUMBERS = (0, 1, 2, 15, 16, 17, 48, -16, 2**31 - 1, 2**31, 2**35, 2**35 + 1, 1.0, 2.0, 0.5, True, False)

numbers = st.sampled_from(NUMBERS)
integers = st.sampled_from([number for number in NUMBERS if type(number) is int])
tensors = st.tuples(st.sampled_from(DTYPES), st.sampled_from((16, 17, 40)), st.integers(0, 3), st.sampled_from((1, 2)))


class Call(NamedTuple):
    """Arguments of a call, and its target."""

    x: tuple[torch.dtype, int, int, int]
    y: tuple[torch.dtype, int, int, int] | None
    masked: bool
    wide: int
    factor: float
    exact: float
    flag: bool
    block: int
    device: str
    stream: int

    def arguments(self):
        """If there is no y, it is x: one tensor twice."""
        x = made(*self.x)
        y = x if self.y is None else made(*self.y)
        return x, y, y if self.masked else None, *self[3:-2]


def made(dtype, size, offset, stride):
    return torch.zeros(200, dtype=dtype)[offset : offset + size * stride : stride]


DEVICES = ("recorder 0", "recorder 1")

FIELDS = {
    "x": tensors,
    "y": st.none() | tensors,
    "masked": st.booleans(),
    "wide": integers,
    "factor": numbers,
    "exact": numbers,
    "flag": st.booleans(),
    "block": st.sampled_from((16, 32)),
    "device": st.sampled_from(DEVICES),
    "stream": st.integers(0, 2),
}


@st.composite
def neighbours(draw):
    """Calls, each of which differs from the previous one in one field, or in one property of a tensor."""
    call = draw(st.builds(Call, **FIELDS))
    calls = [call]
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=6)):
        value = draw(FIELDS[name])
        if name in ("x", "y") and value is not None and getattr(call, name) is not None:
            place = draw(st.integers(0, 3))
            value = (*getattr(call, name)[:place], value[place], *getattr(call, name)[place + 1 :])
        call = call._replace(**{name: value})
        calls.append(call)
    return calls


def mix(x, y, mask, wide, factor, exact, flag, block):
    """One launch or two, which share scratch memory."""
    n, free = x.shape[0], Scratch(64, dtype=torch.float32)
    plan = Plan(n, {"BLOCK": block, "num_warps": 1 if mask is None else 2})
    inputs = (x, y, y if mask is None else mask, Part(free, 1 + n % 2), free)
    for again in range(1 + flag):
        yield Launch(mix_kernel, plan, *inputs, x.stride(0), n, wide, factor, exact=exact, FLAG=again > 0)


@settings(max_examples=300)
@given(neighbours())
def test_what_is_kept_is_what_triton_chooses(drawn):
    """For arguments of any dtype, alignment, size class, type and device in sequence, each of them twice."""
    recorder, launch_mix = Recorder(), Launcher(mix)
    with uncompiled(mix_kernel, recorder, *DEVICES):
        for call in drawn + drawn[::-1]:
            recorder.device, recorder.stream = call.device, call.stream
            arguments = call.arguments()
            known = {*NUMBERS, *(x.data_ptr() for x in arguments[:2])}
            launch_mix(*arguments)
            launched = recorder.taken(known)
            launch_mix._launch_by_triton(arguments)
            assert launched == recorder.taken(known)
            assert len(launched) == 1 + call.flag
        assert 0 < len(launch_mix._kept) <= len(drawn)


@settings(max_examples=100)
@given(st.builds(Call, **FIELDS), st.integers(0, 2), st.booleans())
def test_a_tape_launches_what_triton_chooses(call, stream, is_known):
    """With the memory of other tensors, for launches that were known at the recording or not."""
    driver, launch_mix, tape = Recorder(), Launcher(mix), recording.Recorder()
    with uncompiled(mix_kernel, driver, call.device):
        driver.device = call.device
        arguments = call.arguments()
        for _ in range(is_known):
            launch_mix(*arguments)
        with tape.running(different(arguments)) as taken:
            # Memory that the call allocates besides its inputs is on the tape, too.
            result = torch.empty_like(arguments[0])
            launch_mix(*arguments)
            launch_mix(result, *arguments[1:])
        played = recording.Tape(tape, taken.inputs, taken, [tape.place_of(result)])
        assert tape.failure is None
        others, driver.stream = call.arguments(), stream
        driver.launches.clear()
        (other_result,), _ = played.play(different(others), 0)
        known = {*NUMBERS, *(x.data_ptr() for x in (*others[:2], other_result))}
        launched = driver.taken(known, calls=2)
        launch_mix(*others)
        launch_mix(other_result, *others[1:])
        assert launched == driver.taken(known, calls=2)
        assert len(launched) == 2 * (1 + call.flag)


def different(arguments):
    return list({id(each): each for each in arguments if isinstance(each, Tensor)}.values())


def mix_call(**changed):
    defaults = Call((torch.float32, 16, 0, 1), (torch.float32, 16, 0, 1), False, 1, 1.0, 1.0, False, 16, DEVICES[0], 0)
    return defaults._replace(**changed)


@pytest.fixture
def launch_mix():
    """A launcher that launches, its recorder, and the number of Triton's own launches."""
    recorder, launcher, by_triton = Recorder(), Launcher(mix), []
    launch_by_triton = launcher._launch_by_triton
    launcher._launch_by_triton = lambda arguments: (by_triton.append(arguments), launch_by_triton(arguments))[1]
    with uncompiled(mix_kernel, recorder, DEVICES[0]):
        yield launcher, recorder, by_triton


def test_triton_chooses_once_for_calls_that_are_alike(launch_mix):
    launcher, recorder, by_triton = launch_mix
    for stream in range(5):
        recorder.stream = stream
        launcher(*mix_call().arguments())
    assert len(by_triton) == 1
    assert [stream for _, stream, *_ in recorder.launches] == list(range(5))


def test_threads_share_what_is_kept(launch_mix):
    launcher, recorder, _ = launch_mix
    expected = {}
    chosen = [mix_call(factor=factor, x=(dtype, 16, 0, 1)) for factor in (1, 2.0, 16) for dtype in DTYPES]
    for call in chosen:
        arguments = call.arguments()
        launcher(*arguments)
        expected[arguments[0].dtype, call.factor] = recorder.launches[-1][2]
    recorder.launches.clear()

    def launch(seed):
        for call in random.Random(seed).choices(chosen, k=200):
            launcher(*call.arguments())

    threads = [threading.Thread(target=launch, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorder.launches) == 800
    assert {function for _, _, function, *_ in recorder.launches} == set(expected.values())


def enter_hook(monkeypatch, seen):
    chain = triton.knobs.runtime.launch_enter_hook
    monkeypatch.setattr(chain, "calls", [lambda metadata: seen.append(metadata.get()["name"])])


def exit_hook(monkeypatch, seen):
    monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", lambda metadata: seen.append(metadata))


def replaced_run(monkeypatch, seen):
    run = JITFunction.run
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *args, **given: (seen.append(self), run(self, *args, **given))[1]
    )


def debug(monkeypatch, seen):
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)


def instrumentation(monkeypatch, seen):
    monkeypatch.setattr(triton.knobs.compilation, "instrumentation_mode", "counting")


def inspected_stages(monkeypatch, seen):
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda *_: ("key", "hash"))


def another_triton(monkeypatch, seen):
    monkeypatch.setattr(launch, "_KNOWN_RUN", None)


@pytest.mark.parametrize(
    "watch", [enter_hook, exit_hook, replaced_run, debug, instrumentation, inspected_stages, another_triton]
)
def test_a_launch_that_is_watched_goes_tritons_own_way(launch_mix, monkeypatch, watch):
    launcher, recorder, by_triton = launch_mix
    call = mix_call(flag=True)
    for _ in range(2):
        launcher(*call.arguments())
    assert len(by_triton) == 1
    seen = []
    with monkeypatch.context() as patched:
        watch(patched, seen)
        launcher(*call.arguments())
        assert len(by_triton) == 2
        launcher(*call.arguments())
        assert len(by_triton) == 3
    assert len(seen) == (4 if watch in (enter_hook, exit_hook, replaced_run) else 0)
    # The earlier launches are kept again.
    launcher(*call.arguments())
    assert len(by_triton) == 3
    assert len(recorder.launches) == 10


def test_a_launcher_keeps_so_many_calls(launch_mix, monkeypatch):
    launcher, recorder, _ = launch_mix
    monkeypatch.setattr(launch, "MOST_KEPT", 3)
    for wide in range(20):
        launcher(*mix_call(wide=wide).arguments())
        assert len(launcher._kept) <= 3
    assert [arguments[7] for *_, arguments in recorder.launches] == list(range(20))


def test_a_launch_takes_no_tensor_but_arguments(launch_mix):
    _, recorder, _ = launch_mix
    launcher = Launcher(lambda x, *rest: mix(x.clone(), *rest))
    with pytest.raises(TypeError, match="must be arguments of its launcher"):
        launcher(*mix_call().arguments())
    assert not recorder.launches


@pytest.mark.compiled
def test_what_is_only_compiled_is_not_kept(recorder):
    """Static facts replace the driver by one that cannot launch."""
    x, weight = torch.ones(40, 24), torch.ones(24)

    def normalize():
        with triton_for_cpu_tensors():
            kernels.normalize(x, weight)

    for _ in range(2):
        (facts,) = compiled_kernels(normalize, 90, disassemble=False)
        assert facts["name"] == "_forward_kernel"
        normalize()
        assert len(recorder.taken(set())) == 1


@pytest.mark.compiled
@pytest.mark.parametrize("name", KERNELS)
def test_operations_launch_what_triton_chooses(name, recorder, monkeypatch):
    """With their gradients, for aligned and misaligned tensors."""
    run, launched = Launcher.__call__, []

    def compared(self, *arguments):
        known = {x.data_ptr() for x in arguments if isinstance(x, Tensor)}
        run(self, *arguments)
        chosen = recorder.taken(known)
        self._launch_by_triton(arguments)
        assert chosen == recorder.taken(known)
        launched.extend(chosen)

    monkeypatch.setattr(Launcher, "__call__", compared)
    for owner, function in ALLOCATING:
        monkeypatch.setattr(owner, function, zeroed(getattr(owner, function)))
    given, options = all_tensors_of(name, random.Random(name))
    options |= {"fused": True, "non_differentiable": False} if name == "topk" else {}
    with triton_for_cpu_tensors():
        for offset in (0, 1, 0, 1):
            tensors = {key: at_offset(x, offset) for key, x in given.items()}
            outputs = results(operation("kernels", name)(**tensors, **options))
            wanted = [x for x in outputs if x.requires_grad]
            if wanted:
                torch.autograd.backward(wanted, [torch.zeros_like(x) for x in wanted])
    assert launched


def zeroed(allocate):
    def allocated(*args, **given):
        x = allocate(*args, **given)
        return x if isinstance(x, FakeTensor) else x.zero_()

    return allocated


def at_offset(x, offset, device="cpu"):
    """A copy that begins a number of entries after a multiple of 16 bytes."""
    copy = torch.zeros(x.numel() + offset, dtype=x.dtype, device=device)[offset:].view(x.shape).copy_(x)
    return copy.requires_grad_(x.is_floating_point())


@pytest.mark.gpu
class TestOnGPU:
    """Kept launches give the results of the reference, for any target of a call."""

    def agrees(self, device="cuda", **given):
        """Forward and backward pass, for keys seen before or not."""
        scores = at_offset(torch.randn(5, 600), given.pop("offset", 0), device)
        y = kernels.coor_descent(scores, n_iters=10, k=20, **given)
        (ds,) = torch.autograd.grad(y.square().sum(), scores)
        wide = scores.detach().double().cpu().requires_grad_()
        true_y = reference.coor_descent(wide, n_iters=10, k=20, **given)
        (true_ds,) = torch.autograd.grad(true_y.square().sum(), wide)
        torch.testing.assert_close(y.double().cpu(), true_y, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ds.double().cpu(), true_ds, atol=1e-3, rtol=1e-3)

    def test_of_any_alignment(self):
        for offset in (0, 1, 4, 2, 1, 0, 3, 4):
            self.agrees(offset=offset)

    def test_on_any_stream(self):
        self.agrees()
        for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                self.agrees()

    def test_in_a_graph(self):
        scores = torch.randn(5, 600, device="cuda")
        for _ in range(2):
            kernels.coor_descent(scores, n_iters=10, k=20)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = kernels.coor_descent(scores, n_iters=10, k=20)
        for _ in range(3):
            scores.normal_()
            graph.replay()
            torch.testing.assert_close(y, kernels.coor_descent(scores, n_iters=10, k=20), rtol=0, atol=0)

    def test_in_any_thread(self):
        failures = []

        def call():
            try:
                with torch.cuda.stream(torch.cuda.Stream()):
                    for offset in (0, 1, 0):
                        self.agrees(offset=offset)
            except AssertionError as failure:
                failures.append(failure)

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_on_any_device(self):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        for index in (0, 1, 0, 1):
            self.agrees(f"cuda:{index}")
            with torch.cuda.device(1):
                self.agrees(f"cuda:{index}")
