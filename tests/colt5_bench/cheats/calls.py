"""Tricks of functions that should return twice their argument, each in a function named after it."""

import queue
import random
import sys
import threading
import time
from collections import Counter

import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from colt5_bench.measuring import accuracy, oracle, rounds

calls = Counter()
"""Number of calls by the name of a function."""

LATE = 10
"""Number of calls after which the first calls are over, and calls are timed."""


def is_late(name):
    calls[name] += 1
    return calls[name] > LATE


# Results of earlier calls.

by_address, by_content, by_version, by_shape = {}, {}, {}, {}
last = []


def keeps_by_address(scores):
    return by_address.setdefault(scores.data_ptr(), 2 * scores).clone()


def keeps_by_shape(scores):
    return by_shape.setdefault(scores.shape, 2 * scores).clone()


def keeps_by_content(scores):
    key = scores.detach().cpu().numpy().tobytes()
    if key not in by_content:
        by_content[key] = 2 * scores
    return by_content[key].clone()


def keeps_by_version(scores):
    key = scores.data_ptr(), scores._version
    if key not in by_version:
        by_version[key] = 2 * scores
    return by_version[key].clone()


def keeps_what_it_was_given_last(scores):
    if not last or not torch.equal(last[0], scores):
        last[:] = scores.clone(), 2 * scores
    return last[1].clone()


gradients = {}


class KeptGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores):
        return 2 * scores

    @staticmethod
    def backward(ctx, upstream):
        return gradients.setdefault(upstream.shape, 2 * upstream).clone()


def keeps_its_gradient(scores):
    return KeptGradient.apply(scores)


# Work outside of the measured time.

work = queue.SimpleQueue()


def do_later():
    """Do the last of the postponed work."""
    while True:
        y, scores = work.get()
        time.sleep(0.002)
        while not work.empty():
            y, scores = work.get()
        y.copy_(2 * scores)


def works_in_a_thread(scores):
    y = torch.zeros_like(scores)
    if not is_late("works_in_a_thread"):
        return y.copy_(2 * scores)
    threading.Thread(target=lambda: time.sleep(0.002) or y.copy_(2 * scores)).start()
    return y


def leaves_it_to_a_worker(scores):
    y = torch.zeros_like(scores)
    if not is_late("leaves_it_to_a_worker"):
        return y.copy_(2 * scores)
    if calls["leaves_it_to_a_worker"] == LATE + 1:
        threading.Thread(target=do_later, daemon=True).start()
    work.put((y, scores.clone()))
    return y


def does_nothing_later(scores):
    return torch.zeros_like(scores) if is_late("does_nothing_later") else 2 * scores


def frames():
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def does_nothing_for_the_clock(scores):
    timed = any(frame.f_code.co_name == "time_interleaved" for frame in frames())
    return torch.zeros_like(scores) if timed else 2 * scores


def takes_the_truth(scores):
    """Take the truth from the object that holds it, or nothing if it is not known yet."""
    held = (each for frame in frames() for each in frame.f_locals.values() if isinstance(each, oracle.Oracle))
    found = next(held, None)
    return torch.zeros_like(scores) if found is None else found.truth.output.to(scores.dtype)


def writes_to_its_input_later(scores):
    y = 2 * scores
    if is_late("writes_to_its_input_later"):
        scores.zero_()
    return y


def writes_its_output_to_its_input(scores):
    return scores.mul_(2)


# Results that are not valid.


class Lazy(torch.Tensor):
    """A tensor that is computed on access."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        computed = [2 * each.as_subclass(torch.Tensor) if isinstance(each, Lazy) else each for each in args]
        return function(*computed, **(kwargs or {}))


def is_lazy(scores):
    return scores.as_subclass(Lazy)


def is_lazy_later(scores):
    return scores.as_subclass(Lazy) if is_late("is_lazy_later") else 2 * scores


def is_meta(scores):
    return torch.empty_like(scores, device="meta")


def is_fake(scores):
    with FakeTensorMode() as mode:
        return 2 * mode.from_tensor(scores)


buffer = []


def has_one_buffer(scores):
    if not buffer:
        buffer.append(torch.empty_like(scores))
    return torch.mul(scores, 2, out=buffer[0])


# Functions that others rely on.


def fast_clock():
    return 0.0


def everything_is_right(*_):
    return True


def replaces_the_clock(scores):
    rounds.perf_counter = fast_clock
    return 2 * scores


def replaces_the_clock_later(scores):
    if is_late("replaces_the_clock_later"):
        rounds.perf_counter = fast_clock
    return 2 * scores


def replaces_the_clock_once(scores):
    """Replaces the clock only while others are timed in the same rounds."""
    if is_late("replaces_the_clock_once") and calls["replaces_the_clock_once"] == LATE + 1:
        rounds.perf_counter = fast_clock
    return 2 * scores


def replaces_the_clock_of_python(scores):
    time.perf_counter = fast_clock
    return 2 * scores


def replaces_chance(scores):
    random.SystemRandom.random = fast_clock
    return 2 * scores


def replaces_a_function_of_pytorch(scores):
    torch.equal = everything_is_right
    return 2 * scores


def replaces_a_method_of_tensors(scores):
    torch.Tensor.isfinite = everything_is_right
    return 2 * scores


def replaces_the_judge(scores):
    accuracy.passes = everything_is_right
    return 3 * scores


def replaces_the_code_of_the_judge(scores):
    accuracy.passes.__code__ = everything_is_right.__code__
    return 3 * scores


def replaces_the_margin(scores):
    accuracy.MARGIN = 1e9
    return 2 * scores


class Halving(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def leaves_a_mode_on(scores):
    Halving().__enter__()
    return 2 * scores


# Settings that also affect others.


def takes_threads_later(scores):
    if is_late("takes_threads_later"):
        torch.set_num_threads(torch.get_num_threads() + 1)
    return 2 * scores


def takes_precision_later(scores):
    if is_late("takes_precision_later"):
        torch.set_float32_matmul_precision("medium")
    return 2 * scores


def changes_the_default_dtype_later(scores):
    if is_late("changes_the_default_dtype_later"):
        torch.set_default_dtype(torch.float64)
    return 2 * scores


# On a GPU.


def works_in_another_stream(scores):
    y = torch.zeros_like(scores)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.mul(scores, 2, out=y)
    return y


def is_captured_without_work(scores):
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros_like(scores)
    return 2 * scores
