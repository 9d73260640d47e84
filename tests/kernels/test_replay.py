"""Calls that are played from tapes give what the layer gives as it is written."""

import copy
import gc
import pickle
import random
import weakref
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import kernels
import reference
from colt5_bench.measuring.memory import measure_memory
from kernels._common import replay
from kernels._common.launch import INTERPRETED
from tests import host_time
from tests.calls import LAYERS, inputs_of, layer_of

PLAYED = [name for name in LAYERS if hasattr(getattr(reference, name).forward, "__wrapped__")]

TIMES = 4
"""Calls of which the last ones are played: the first runs as it is written, and the second one is recorded."""


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
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", PLAYED)
def test_layers(name, autocast):
    written = layer_of(name, random.Random(f"{name} {autocast}"), True, block_sizes=(None,))
    layer = kernels.played(copy.deepcopy(written))
    for _ in range(3):
        inputs, options = inputs_of(name, layer, batch=1, length=24, context=24)
        grad = torch.randn_like(inputs[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            given = [each.requires_grad_() for each in inputs]
            outs = [each(*given, **options) for each in (layer, written)]
        mine, theirs = (
            [out, *torch.autograd.grad(out, [*given, *each.parameters()], grad, allow_unused=True)]
            for out, each in zip(outs, (layer, written), strict=True)
        )
        assert equal(mine, theirs)
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


class Small(nn.Module):
    """A layer that counts how often it runs as it is written."""

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


@pytest.fixture
def small(monkeypatch):
    """It is played on a CPU, where it takes operators of PyTorch alone."""
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
    """The same of the layer as it is written."""
    given = [each.detach().requires_grad_(each.is_floating_point()) for each in inputs]
    out = layer.compute(*given, **{"mask": None, "times": 1, "residual": None, **options})
    wanted = [each for each in (*given, *layer.parameters()) if each.requires_grad]
    found = [out.detach(), *torch.autograd.grad(out, wanted, grad, allow_unused=True, **more)]
    layer.runs.clear()
    return found


def check(layer, x=None, grad=None, runs=0, **options):
    """It gives what it gives as it is written, and has run so often for that."""
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
    def forward(self, x):
        return 2 * x


CHANGES = {
    "an attribute": lambda layer: setattr(layer, "factor", 3.0),
    "an attribute of a child": lambda layer: setattr(layer.act, "approximate", "tanh"),
    "a child": lambda layer: setattr(layer, "act", nn.ReLU()),
    "an unknown child": lambda layer: setattr(layer, "act", Doubled()),
    "a parameter": lambda layer: setattr(layer.first, "weight", nn.Parameter(torch.randn(8, 6))),
    "a parameter without a gradient": lambda layer: layer.first.weight.requires_grad_(False),
    "a new parameter": lambda layer: layer.second.register_parameter("bias", nn.Parameter(torch.randn(6))),
    "a parametrization": lambda layer: parametrize.register_parametrization(layer.first, "weight", Doubled()),
    "a hook": lambda layer: layer.act.register_forward_hook(lambda module, args, out: 2 * out),
    "a hook before": lambda layer: layer.act.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "a forward of its own": lambda layer: setattr(layer.act, "forward", lambda x: 3 * x),
    "in double precision": lambda layer: layer.double(),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changes_a_layer_makes_it_run(small, kind):
    played(small)
    CHANGES[kind](small)
    x = x_of().to(small.first.weight.dtype)
    for runs in (1, 1):
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
    """They go through the layer once more, of the call that is recorded as of one that is played."""
    for _ in range(1 if record else TIMES):
        gradients(small, (x_of(),), {}, x_of())
    x = x_of().requires_grad_()
    batched = kind == "is_grads_batched"
    grad = torch.randn(2, 3, 5, 6) if batched else x_of()
    found = []
    for function in (small, partial(small.compute, mask=None, times=1, residual=None)):
        out = function(x)
        options = {} if kind == "autocast" else {kind: True}
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            grads = torch.autograd.grad(out, [x, *small.parameters()], grad, **options)
        if kind == "create_graph":
            grads += torch.autograd.grad(grads[0].square().sum(), [x, small.first.weight])
        found.append(grads)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_layer_whose_backward_passes_are_unusual_is_not_played(small):
    """Played, each of its steps would go through it once more."""
    for runs in (1, 2, 1, 1):
        small.runs.clear()
        out = small(x_of().requires_grad_())
        with torch.autocast("cpu", torch.bfloat16):
            out.backward(x_of())
        assert len(small.runs) == runs


@pytest.mark.parametrize("known", range(TIMES))
def test_a_graph_that_is_kept_and_one_that_is_not(small, known):
    for _ in range(known):
        gradients(small, (x_of(),), {}, x_of())
    x, grad = x_of().requires_grad_(), x_of()
    out = small(x)
    (theirs,) = torch.autograd.grad(small.compute(x, mask=None, times=1, residual=None), x, grad)
    for keep in (True, True, False):
        (mine,) = torch.autograd.grad(out, x, grad, retain_graph=keep)
        assert torch.equal(mine, theirs)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, x, grad)


def test_an_input_that_has_changed_is_refused(small):
    x = x_of().requires_grad_()
    out = played(small)(x)
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
        (theirs,) = torch.autograd.grad(small.compute(x, mask=None, times=1, residual=None), x, grad)
        assert torch.equal(x.grad, theirs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(small, mode):
    played(small)
    for runs in (1, 1, 0, 0):
        x = x_of()
        small.runs.clear()
        with mode():
            mine = small(x)
            n = len(small.runs)
            theirs = small.compute(x, mask=None, times=1, residual=None)
        # PyTorch decomposes a linear layer differently while something takes it down in inference mode.
        torch.testing.assert_close(mine, theirs)
        assert n == runs
    small.runs.clear()
    check(small)


def test_autocast(small):
    played(small)
    for _ in range(TIMES):
        x, grad = x_of().requires_grad_(), x_of()
        with torch.autocast("cpu", torch.bfloat16):
            outs = [small(x), small.compute(x, mask=None, times=1, residual=None)]
        mine, theirs = ([out, *torch.autograd.grad(out, [x, *small.parameters()], grad)] for out in outs)
        assert equal(mine, theirs)
    assert n_played(small) == 2


def test_a_forward_pass_that_no_backward_pass_follows_is_seldom_recorded(small, monkeypatch):
    recorded = []
    monkeypatch.setattr(replay, "Recorder", lambda make=replay.Recorder: recorded.append(1) or make())
    for _ in range(64):
        small(x_of())
    assert len(recorded) == 6


def test_gradients_are_added_in_place(small):
    """As autograd does: a third tensor for the sum would be the peak."""

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


def test_hooks_of_parameters_and_of_tensors_see_gradients_once(small):
    seen = []
    small.first.weight.register_hook(seen.append)
    for n in range(1, TIMES + 1):
        gradients(small, (x_of(),), {}, x_of())
        assert len(seen) == n


def test_copies_and_pickles(small):
    played(small)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        check(other, runs=1)
    check(small)


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
