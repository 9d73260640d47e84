"""Functions that return twice their argument, and legitimately do things that a cheat could also do."""

import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import numpy as np
import torch

pool = ThreadPoolExecutor(1)
masks, outputs, counts = {}, [], [0]


def works_in_a_thread_and_waits(scores):
    return pool.submit(lambda: 2 * scores).result()


def keeps_what_depends_on_shapes(scores):
    if scores.shape not in masks:
        masks[scores.shape] = torch.full_like(scores, 2.0)
    return scores * masks[scores.shape]


def holds_its_outputs(scores):
    outputs.append(2 * scores)
    return outputs[-1]


def is_a_view_of_its_own_memory(scores):
    return (2 * scores.T).contiguous().T


def is_a_parameter(scores):
    return torch.nn.Parameter(2 * scores)


def is_made_in_inference_mode(scores):
    with torch.inference_mode():
        return 2 * scores


def works_in_numpy(scores):
    return torch.from_numpy(np.multiply(scores.detach().cpu().numpy(), 2)).to(scores.device)


def counts_its_calls(scores):
    counts[0] += 1
    return scores + scores if counts[0] % 3 else 2 * scores


def tries_its_luck(scores):
    return scores + scores if random.random() < 0.5 else 2 * scores


def adds_until_it_is_enough(scores):
    """The number of operations depends on the values."""
    rest = int(4 * scores.abs().max())
    for _ in range(rest):
        scores = scores + 0
    return 2 * scores


def seeds(scores):
    torch.manual_seed(7)
    return 2 * scores


def sets_threads_in_each_call(scores):
    torch.set_num_threads(torch.get_num_threads() + 1)
    return 2 * scores


def puts_its_settings_back(scores):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    y = 2 * scores
    torch.set_float32_matmul_precision(before)
    return y


def puts_functions_back(scores):
    with patch.object(torch, "mul", torch.multiply):
        return torch.mul(scores, 2)


def warns(scores):
    warnings.warn("slow path", stacklevel=1)
    return 2 * scores


def adds_a_method(scores):
    torch.Tensor.doubled = lambda self: 2 * self
    return scores.doubled()
