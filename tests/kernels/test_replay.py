"""Calls that are played from tapes give the same results as the code of the layer."""

import copy
import gc
import pickle
import random
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.overrides import BaseTorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import kernels
import reference
from colt5_bench.measuring.memory import measure_memory
from kernels._common import replay
from kernels._common.tensors import INTERPRETED
from reference.layers.operations import Operations
from tests.calls import LAYERS, inputs_of, layer_of
from tests.measurements import host_time

PLAYED = [name for name in LAYERS if hasattr(getattr(reference, name).forward, "__wrapped__")]

TIMES = 4
"""Number of calls, the last of which are played. The first runs the code of the layer, the second is recorded."""


def gradients(layer, inputs, options, grad, **more):
    """Output and gradients of a training step."""
    given = [each.detach().requires_grad_(each.is_floating_point()) for each in inputs]
    out = layer(*given, **options)
    wanted = [each for each in (*given, *layer.parameters()) if each.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad, allow_unused=True, **more)]


def equal(mine, theirs):
    return all(a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in zip(mine, theirs, strict=True))


def n_played(layer):
    return sum(not isinstance(each, (str, int)) for each in replay.known_calls(layer))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter computes what kernels do")
@pytest.mark.parametrize("name", PLAYED)
def test_layers(name):
    """The fuzz tests check whether their results are right."""
    layer = kernels.played(layer_of(name, random.Random(name), True, block_sizes=(None,)))
    inputs, options = inputs_of(name, layer, batch=1, length=24, context=24)
    given = [each.requires_grad_() for each in inputs]
    grad = torch.randn_like(inputs[0])

    def step():
        with torch.autocast("cpu", torch.float16):
            out = layer(*given, **options)
        return [out, *torch.autograd.grad(out, [*given, *layer.parameters()], grad, allow_unused=True)]

    first, *later = [step() for _ in range(3)]
    assert all(equal(first, each) for each in later)
    assert n_played(layer) == 1, replay.known_calls(layer)


@pytest.mark.skipif(INTERPRETED, reason="kernels take memory of their own there")
@pytest.mark.parametrize("name", host_time.LAYERS)
def test_a_step_takes_no_more_memory(name):
    peaks = []
    with host_time.launching_nothing():
        for played in (False, True):
            step = host_time.step_of(name, played=played)
            for _ in range(TIMES):
                step()
            peaks.append(measure_memory(step, device=torch.device("cpu")))
    written, played = peaks
    assert 0 < played <= written


COMPUTING = ("mm", "addmm", "sum", "add", "add_", "clone", "copy_", "_foreach_copy_", "gelu", "gelu_backward", "sort")


@pytest.mark.skipif(INTERPRETED, reason="kernels take operators of PyTorch there")
@pytest.mark.parametrize("name", host_time.LAYERS)
def test_a_step_takes_the_same_operators(name):
    """Gradients are neither copied nor added up in another way."""
    counts = []
    with host_time.launching_nothing():
        for played in (False, True):
            step = host_time.step_of(name, played=played)
            for _ in range(TIMES):
                step()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                step()
            names = Counter(event.name.removeprefix("aten::") for event in profiler.events())
            counts.append({each: names[each] for each in COMPUTING})
    written, played = counts
    assert played == written
    assert played["mm"] > 0


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors are not played elsewhere")
def test_played_switches_it_off_and_on():
    layer = reference.ConditionalRoutedFeedForward(16, num_heavy_tokens=2, use_triton=True)
    x = torch.randn(1, 16, 16)
    for play in (False, True):
        assert kernels.played(layer, play) is layer
        with torch.no_grad():
            for _ in range(TIMES):
                layer(x)
        assert n_played(layer) == play


class Small(nn.Module):
    """A layer that counts the runs of its code."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6, bias=False)
        self.register_buffer("shift", torch.randn(6))
        self.factor = 2.0
        self.runs = []

    def forward(self, x, mask=None, *, times=1, residual=None):
        return replay.replay(Small.compute, self, (x,), {"mask": mask, "times": times, "residual": residual})

    def compute(self, x, *, mask, times, residual):
        self.runs.append(torch.is_grad_enabled())
        hidden = self.act(self.first(x.transpose(0, 1) + self.shift)).transpose(0, 1)
        out = self.second(hidden) * self.factor
        out[..., 0] = 0.5
        for _ in range(times):
            out = out + x.square()
        out = out if mask is None else out.masked_fill(mask, 0.0)
        return out if residual is None else out + residual


WRITTEN = {"mask": None, "times": 1, "residual": None}
"""Arguments of `compute`, if there is only one of `forward`."""


@pytest.fixture
def small(monkeypatch):
    """It is played on a CPU if it uses only operators of PyTorch."""
    monkeypatch.setattr(replay, "runs_triton", lambda x: True)
    monkeypatch.setattr(replay, "PACKAGES", (*replay.PACKAGES, "tests."))
    torch.manual_seed(0)
    return Small()


def x_of(*shape):
    return torch.randn(*(shape or (3, 5, 6)))


def played(layer, *inputs, **options):
    """The layer, whose calls with such inputs are played now."""
    for _ in range(TIMES):
        x, *rest = inputs or (x_of(),)
        gradients(layer, (x, *rest), options, torch.randn(x.shape))
    assert len(layer.runs) == 2
    assert n_played(layer) == 1, replay.known_calls(layer)
    layer.runs.clear()
    return layer


def expected(layer, inputs, options, grad, **more):
    """The same from the code of the layer."""
    given = [each.detach().requires_grad_(each.is_floating_point()) for each in inputs]
    out = layer.compute(*given, **{"mask": None, "times": 1, "residual": None, **options})
    wanted = [each for each in (*given, *layer.parameters()) if each.requires_grad]
    found = [out.detach(), *torch.autograd.grad(out, wanted, grad, allow_unused=True, **more)]
    layer.runs.clear()
    return found


def check(layer, x=None, grad=None, runs=0, **options):
    """It gives the results of its code, and has run the code this often."""
    x = x_of() if x is None else x
    grad = torch.randn(x.shape) if grad is None else grad
    mine = gradients(layer, (x,), options, grad)
    n = len(layer.runs)
    assert equal(mine, expected(layer, (x,), options, grad))
    assert n == runs


def test_a_call_is_played(small):
    played(small)
    for _ in range(3):
        check(small)


VALUES = {
    "parameters": lambda layer: layer.first.weight.data.add_(1),
    "a parameter": lambda layer: setattr(layer.first, "weight", nn.Parameter(torch.randn(8, 6))),
    "parameters elsewhere": lambda layer: setattr(layer.first.weight, "data", layer.first.weight.data.clone()),
    "a buffer": lambda layer: layer.shift.add_(1),
    "gradients": lambda layer: [setattr(each, "grad", torch.ones_like(each)) for each in layer.parameters()],
    "hooks of the layer": lambda layer: layer.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", VALUES)
def test_what_changes_values_alone_is_played(small, kind):
    played(small)
    VALUES[kind](small)
    check(small)


class Doubled(nn.Module):
    # Its computation is unknown.
    __module__ = "elsewhere"

    def forward(self, x):
        return 2 * x


CHANGES = {
    "an attribute": lambda layer: setattr(layer, "factor", 3.0),
    "an attribute of a child": lambda layer: setattr(layer.act, "approximate", "tanh"),
    "a child": lambda layer: setattr(layer, "act", nn.ReLU()),
    "an unknown child": lambda layer: setattr(layer, "act", Doubled()),
    "a parameter of another layout": lambda layer: setattr(layer.first, "weight", nn.Parameter(torch.randn(6, 8).T)),
    "a shared parameter": lambda layer: setattr(layer.second, "weight", nn.Parameter(layer.first.weight.detach().T)),
    "a tensor that is no parameter": lambda layer: (
        layer.second.register_parameter("weight", None),
        delattr(layer.second, "weight"),
        setattr(layer.second, "weight", torch.randn(6, 8)),
    ),
    "a parameter without a gradient": lambda layer: layer.first.weight.requires_grad_(False),
    "a new parameter": lambda layer: layer.second.register_parameter("bias", nn.Parameter(torch.randn(6))),
    "a parametrization": lambda layer: parametrize.register_parametrization(layer.first, "weight", Doubled()),
    "a hook": lambda layer: layer.act.register_forward_hook(lambda module, args, out: 2 * out),
    "a hook before": lambda layer: layer.act.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "an operation": lambda layer: setattr(
        layer.act, "operations", replace(Operations.of(True), select=lambda *args, **options: None)
    ),
    "a forward of its own": lambda layer: setattr(layer.act, "forward", lambda x: 3 * x),
    "in double precision": lambda layer: layer.double(),
}


ALWAYS_RUN = {
    *("an unknown child", "a tensor that is no parameter", "a parametrization", "a hook", "a hook before"),
    *("an operation", "a forward of its own", "a shared parameter"),
}
"""Changes after which a layer is never played: an observer may see its calls, or parameters share memory."""


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changes_a_layer_makes_it_run(small, kind):
    played(small)
    CHANGES[kind](small)
    x = x_of().to(small.first.weight.dtype)
    for runs in (1, 1, 1, 1) if kind in ALWAYS_RUN else (1, 1, 0, 0):
        check(small, x, torch.randn_like(x), runs=runs)


CALLS = {
    "shape": lambda: {"x": x_of(4, 5, 6)},
    "strides": lambda: {"x": x_of(5, 3, 6).transpose(0, 1)},
    "alignment": lambda: {"x": torch.randn(91)[1:].view(3, 5, 6)},
    "a number": lambda: {"times": 2},
    "a truth value in the place of a number": lambda: {"times": True},
    "another tensor": lambda: {"mask": torch.rand(3, 5, 6) > 0.5},
    "a residual": lambda: {"residual": x_of()},
}


@pytest.mark.parametrize("kind", CALLS)
def test_another_call_runs_until_it_is_known(small, kind):
    played(small)
    for runs in (1, 1, 0, 0):
        check(small, **CALLS[kind](), runs=runs)
    check(small)


def test_a_residual_may_be_the_input(small):
    for _ in range(TIMES):
        x = x_of().requires_grad_()
        out = small(x, residual=x)
        (found,) = torch.autograd.grad(out.sum(), x)
        (wanted,) = torch.autograd.grad(small.compute(x, mask=None, times=1, residual=x).sum(), x)
        assert torch.equal(found, wanted)
        other = x_of()
        assert torch.equal(small(x, residual=other), small.compute(x, mask=None, times=1, residual=other))


GRADS = {
    "expanded": lambda: torch.ones(()).expand(3, 5, 6),
    "transposed": lambda: x_of(5, 3, 6).transpose(0, 1),
    "not aligned": lambda: torch.randn(91)[1:].view(3, 5, 6),
}


@pytest.mark.parametrize("kind", GRADS)
def test_any_gradient_of_the_output(small, kind):
    check(played(small), grad=GRADS[kind]())


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("kind", ["create_graph", "is_grads_batched", "autocast"])
def test_unusual_backward_passes(small, kind, record):
    """They run the code of the layer once more, for the recorded call as for a played one."""
    for _ in range(1 if record else TIMES):
        gradients(small, (x_of(),), {}, x_of())
    x = x_of().requires_grad_()
    batched = kind == "is_grads_batched"
    grad = torch.randn(2, 3, 5, 6) if batched else x_of()
    found = []
    for function in (small, partial(small.compute, **WRITTEN)):
        out = function(x)
        options = {} if kind == "autocast" else {kind: True}
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            grads = torch.autograd.grad(out, [x, *small.parameters()], grad, **options)
        if kind == "create_graph":
            grads += torch.autograd.grad(grads[0].square().sum(), [x, small.first.weight])
        found.append(grads)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_backward_passes_under_autocast_are_played(small):
    """A dtype other than the recorded one runs the code of the layer once more."""
    for autocast, runs in ((True, 1), (True, 1), (True, 0), (True, 0), (False, 1)):
        small.runs.clear()
        x, grad = x_of().requires_grad_(), x_of()
        outs = small(x), small.compute(x, **WRITTEN)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mine, theirs = (torch.autograd.grad(out, [x, *small.parameters()], grad) for out in outs)
        assert equal(mine, theirs)
        assert len(small.runs) == runs + 1


@pytest.mark.parametrize("known", range(TIMES))
def test_a_graph_that_is_kept_and_one_that_is_not(small, known):
    for _ in range(known):
        gradients(small, (x_of(),), {}, x_of())
    x, grad = x_of().requires_grad_(), x_of()
    out = small(x)
    (theirs,) = torch.autograd.grad(small.compute(x, **WRITTEN), x, grad)
    for keep in (True, True, False):
        (mine,) = torch.autograd.grad(out, x, grad, retain_graph=keep)
        assert torch.equal(mine, theirs)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(out, x, grad)


@pytest.mark.parametrize("known", range(TIMES))
def test_an_input_that_has_changed_is_refused(small, known):
    for _ in range(known):
        gradients(small, (x_of(),), {}, x_of())
    x = x_of().requires_grad_()
    out = small(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(small, use_reentrant):
    played(small)
    for _ in range(TIMES):
        x, grad = x_of().requires_grad_(), x_of()
        checkpoint(small, x, use_reentrant=use_reentrant).backward(grad)
        (theirs,) = torch.autograd.grad(small.compute(x, **WRITTEN), x, grad)
        assert torch.equal(x.grad, theirs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(small, mode):
    played(small)
    with mode():
        x = x_of()
        outs = [small(x) for _ in range(TIMES)]
        assert len(small.runs) == 2
        assert equal(outs, TIMES * [small.compute(x, **WRITTEN)])
    small.runs.clear()
    check(small)


@pytest.mark.parametrize("together", [False, True])
def test_autocast(small, together):
    """Each call has its own casts of weights, even if all are within one context."""
    x, grad = x_of().requires_grad_(), x_of()
    everything = torch.autocast("cpu", torch.bfloat16)
    with everything if together else nullcontext():
        for _ in range(TIMES):
            with nullcontext() if together else everything:
                outs = [small(x), small.compute(x, **WRITTEN)]
            with torch.autocast("cpu", enabled=False):
                mine, theirs = ([out, *torch.autograd.grad(out, [x, *small.parameters()], grad)] for out in outs)
            assert equal(mine, theirs)
    assert n_played(small) == 1


@pytest.mark.parametrize("later", range(1, TIMES + 1))
def test_many_forward_passes_before_their_backward_passes(small, later):
    xs = [x_of().requires_grad_() for _ in range(2 * TIMES)]
    outs = [small(x) for x in xs[:later]]
    for x in xs[later:]:
        outs.append(small(x))
        outs.pop(0).sum().backward()
    sum(each.sum() for each in outs).backward()
    theirs = [torch.autograd.grad(small.compute(x, **WRITTEN).sum(), x) for x in xs]
    assert equal([each.grad for each in xs], [grad for (grad,) in theirs])
    assert n_played(small) == 1


def test_data_parallel_training_gets_all_gradients(small, tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model, seen = DistributedDataParallel(small), []
        for each in small.parameters():
            each.register_post_accumulate_grad_hook(seen.append)
        for n in range(1, TIMES + 1):
            x = x_of()
            model.zero_grad()
            model(x).sum().backward()
            assert len(seen) == 3 * n
            theirs = torch.autograd.grad(small.compute(x, **WRITTEN).sum(), [*small.parameters()])
            assert equal([each.grad for each in small.parameters()], theirs)
        assert n_played(small) == 1
    finally:
        distributed.destroy_process_group()


def test_other_parameters_each_time(small):
    for _ in range(TIMES):
        parameters = {name: torch.randn_like(each).requires_grad_() for name, each in small.named_parameters()}
        x, grad = x_of(), x_of()
        mine = torch.autograd.grad(functional_call(small, parameters, x), [*parameters.values()], grad)
        other = copy.deepcopy(small)
        other.load_state_dict({**small.state_dict(), **parameters})
        assert equal(mine, expected(other, (x,), {}, grad)[2:])
    assert n_played(small) == 1


def test_a_second_derivative_is_that_of_the_call_or_an_error(small):
    mask, parameters = torch.rand(3, 5, 6) > 0.5, {name: each.clone() for name, each in small.named_parameters()}
    for kind in ("a mask that has changed", "other parameters", "nothing"):
        for _ in range(TIMES):
            x = x_of().requires_grad_()
            out = functional_call(small, parameters, (x, mask)) if kind == "other parameters" else small(x, mask)
            if kind == "a mask that has changed":
                mask.logical_not_()
            if kind == "nothing":
                torch.autograd.grad(out.sum(), x, create_graph=True)
                continue
            with pytest.raises(RuntimeError, match="modified by an inplace" if kind[0] == "a" else "other parameters"):
                torch.autograd.grad(out.sum(), x, create_graph=True)


def test_random_numbers_are_drawn_anew(small):
    def forward(self, x):
        return x * torch.rand_like(x)

    for _ in range(TIMES):
        x = torch.ones(3, 5, 6, requires_grad=True)
        out = replay.replay(forward, small, (x,), {})
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(grad, out)
        assert not torch.equal(out, replay.replay(forward, small, (x,), {}))


def test_few_tapes_are_kept(small, monkeypatch):
    monkeypatch.setattr(replay, "MOST_TAPES", 2)

    def runs(length):
        small.runs.clear()
        gradients(small, (x_of(3, length, 6),), {}, x_of(3, length, 6))
        return len(small.runs)

    assert [runs(length) for length in (1, 1, 2, 2, 1, 3, 3)] == [1, 1, 1, 1, 0, 1, 1]
    assert [runs(length) for length in (3, 1, 2)] == [0, 0, 1]


def test_a_forward_pass_that_no_backward_pass_follows_is_seldom_recorded(small, monkeypatch):
    recorded = []

    class Run(replay._Run):
        def __init__(self, call, keep):
            super().__init__(call, keep)
            recorded.extend([keep] if keep else [])

    monkeypatch.setattr(replay, "_Run", Run)
    for _ in range(64):
        small(x_of())
    assert len(recorded) == 6


def test_gradients_are_added_in_place(small):
    """As in autograd: a third tensor for the sum would be the peak."""

    def forward(self, x):
        return torch.cat([x, x, x, x])

    def step(forward):
        x = torch.ones(10000, requires_grad=True)
        forward(x).backward(torch.ones(40000))

    peaks = []
    for each in (partial(forward, small), lambda x: replay.replay(forward, small, (x,), {})):
        for _ in range(TIMES):
            step(each)
        peaks.append(measure_memory(lambda each=each: step(each), device=torch.device("cpu")))
    assert n_played(small) == 1
    assert peaks[1] <= peaks[0]


@pytest.mark.parametrize("when", ["before", "between"])
def test_hooks_of_parameters_and_of_tensors_see_their_whole_gradients_once(small, when):
    """They are registered before the forward pass, or between it and the backward pass."""
    for _ in range(TIMES):
        torch.manual_seed(0)
        found = [_hooked_step(small, when, each) for each in (small, partial(small.compute, **WRITTEN))]
        torch.testing.assert_close(*found)


def _hooked_step(layer, when, function):
    seen, x = [], torch.ones(3, 5, 6, requires_grad=True)
    h = x.sin()
    hooked = [h, layer.first.weight, layer.second.weight]

    def register():
        return [
            each.register_hook(lambda grad, place=place: seen.append((place, grad)) or 2 * grad)
            for place, each in enumerate(hooked)
        ]

    handles = register() if when == "before" else []
    out = function(h) + h @ layer.first.weight.T @ layer.first.weight
    handles = handles or register()
    grads = torch.autograd.grad(out.sum(), [x, *layer.parameters()])
    for each in handles:
        each.remove()
    places, wholes = zip(*sorted(seen, key=lambda each: each[0]), strict=True)
    assert places == (0, 1, 2)
    return [*grads, *wholes]


def test_copies_and_pickles(small):
    played(small)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        check(other, runs=1)
    check(small)


@pytest.mark.parametrize("use_triton", [True, None])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copied_operations_are_those_of_the_kernels(monkeypatch, copied, use_triton):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    own = Operations.of(use_triton)
    assert copied(own).are_own
    assert not copied(replace(own, select=own.normalize)).are_own


ELSEWHERE = torch.ones(6)


def test_a_layer_that_nobody_holds_is_gone(small):
    layer = played(Small())
    watched = weakref.ref(layer)
    del layer
    gc.collect()
    assert watched() is None


UNKNOWN = {
    "a value": lambda self, x: x * float(x.sum()),
    "as many entries as are true": lambda self, x: x[x > 0],
    "a tensor from elsewhere": lambda self, x: x + ELSEWHERE,
    "an input": lambda self, x: x,
    "a changed buffer": lambda self, x: x + self.shift.add_(1),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_no_tape_can_repeat_runs(small, kind):
    runs = []

    def forward(self, x):
        runs.append(kind)
        return UNKNOWN[kind](self, x)

    for n in range(1, TIMES + 1):
        x = x_of()
        shift = small.shift.clone()
        mine = replay.replay(forward, small, (x,), {})
        small.shift.copy_(shift)
        assert torch.equal(mine, UNKNOWN[kind](small, x))
        assert len(runs) == n


class Model(nn.Module):
    """Layers in sequence, and tensors that are used inside and outside of them."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, around):
        h, outside = 3 * x, 0
        for layer in self.layers:
            outside = outside + around(layer, h)
            h = layer(h) + h.tanh()
        return h + outside


AROUND = {
    "nothing": lambda layer, h: 0,
    "its input": lambda layer, h: h.sin(),
    "a parameter": lambda layer, h: h @ layer.first.weight.T @ layer.first.weight,
    "a residual": lambda layer, h: layer(h, residual=h) + layer(h, residual=h.cos()),
    "another call": lambda layer, h: layer(h).sin(),
    "an expanded gradient": lambda layer, h: layer(h).sum(),
    "a transposed gradient": lambda layer, h: (layer(h).transpose(0, 2) * 0.7).transpose(0, 2),
}

MODELS = {
    "one layer": lambda: Model(Small()),
    "layers": lambda: Model(Small(), Small()),
    "a layer twice": lambda: Model(*[Small()] * 2),
    "shared parameters": lambda: _sharing(Model(Small(), Small())),
    "layers within": lambda: Model(Outer()),
    "frozen parameters": lambda: _frozen(Model(Small(), Small())),
}


class Outer(Small):
    """A layer that contains another one."""

    def __init__(self):
        super().__init__()
        self.inner = Small()

    def compute(self, x, **options):
        inner = self.inner(x)
        return super().compute(inner, **options) + x * inner


def _sharing(model):
    model.layers[1].first = model.layers[0].first
    return model


def _frozen(model):
    model.layers[0].requires_grad_(False)
    return model


def _in_a_thread(step):
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(step).result()


MODES = {
    "plain": lambda step: step(),
    "autocast": lambda step: _within(torch.autocast("cpu", torch.bfloat16), step),
    "a default device": lambda step: _within(torch.device("cpu"), step),
    "a function mode": lambda step: _within(BaseTorchFunctionMode(), step),
    "anomaly mode": lambda step: _within(torch.autograd.set_detect_anomaly(True), step),
    "saved tensors elsewhere": lambda step: _within(torch.autograd.graph.save_on_cpu(), step),
    "a thread": _in_a_thread,
}


WATCHED = {"a function mode", "anomaly mode", "saved tensors elsewhere"}
"""Modes in which the code of layers runs."""


def _within(context, step):
    with context:
        return step()


TOGETHER = [(kind, around, "plain") for kind in MODELS for around in AROUND]
TOGETHER += [("layers within", around, mode) for around in AROUND for mode in MODES if mode != "plain"]


@pytest.mark.parametrize(("kind", "around", "mode"), TOGETHER)
def test_all_calls_have_the_same_bits(small, monkeypatch, kind, around, mode):
    torch.manual_seed(1)
    model, x = MODELS[kind](), x_of()
    wanted = [each for each in model.parameters() if each.requires_grad]

    def step():
        given = x.clone().requires_grad_()
        out = model(given, AROUND[around])
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [given, *wanted], allow_unused=True)]

    first, *later = [MODES[mode](step) for _ in range(TIMES)]
    assert all(equal(first, each) for each in later)
    assert all(map(n_played, model.layers)) == (mode not in WATCHED)
    monkeypatch.setattr(replay, "_is_seen", lambda: True)
    for mine, theirs in zip(first, MODES[mode](step), strict=True):
        assert (
            mine is theirs is None or (mine - theirs).norm() <= (0.03 if mode == "autocast" else 1e-5) * theirs.norm()
        )
