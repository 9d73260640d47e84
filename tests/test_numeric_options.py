"""Numeric options of operations and layers. An error names each value that is not a number, or not an integer if one is
needed."""

import inspect
import random

import numpy
import pytest
import torch

import reference
from tests.calls import LAYERS, OPERATIONS, arguments_of, operation
from tests.reference.conftest import SIZES

WRONG = [torch.tensor(1.0), "1", True, float("nan"), float("inf"), -1, None]
TENSORS = {("coor_descent", "k"), ("soft_topk", "k"), ("segmented_coor_descent", "k")}
SIGNED = {"cosine_sim_scale"}
OPTIONAL = {"eps_init", "cosine_sim_scale", "rotary_theta"}
NUMBERS = {"eps": 0.1, "eps_init": 2.0, "cosine_sim_scale": 8.0, "block_size": 6}
"""Options that a random call may lack."""


def is_numeric(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def options_of(arguments, function):
    named = {name: value for name, value in arguments.items() if is_numeric(value)}
    return named | {name: each for name, each in NUMBERS.items() if name in inspect.signature(function).parameters}


def wrong_for(name, option, default):
    for value in WRONG:
        allowed = (isinstance(value, torch.Tensor) and (name, option) in TENSORS) or (value == -1 and option in SIGNED)
        if not allowed and not (value is None and (default is None or option in OPTIONAL)):
            yield value


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("package", "name"), OPERATIONS, ids=map(".".join, OPERATIONS))
def test_operations(package, name, seed):
    function = operation(package, name)
    arguments = arguments_of(name, random.Random(seed))
    if arguments.get("non_differentiable"):
        arguments["non_differentiable"] = False
    for option in options_of(arguments, function):
        default = inspect.signature(function).parameters[option].default
        for value in wrong_for(name, option, default):
            with pytest.raises(ValueError, match=rf"^{option} must be "):
                function(**arguments | {option: value})


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    parameters = inspect.signature(getattr(reference, name)).parameters
    options = {option: each.default for option, each in parameters.items() if is_numeric(each.default)}
    options |= {option: value for option, value in SIZES[name].items() if is_numeric(value)}
    optional = {option: 4 for option in parameters if option.endswith(("block_size", "segments", "window_size"))}
    for option in {**optional, **options}:
        for value in wrong_for(name, option, parameters[option].default):
            with pytest.raises(ValueError, match=" must be "):
                getattr(reference, name)(**SIZES[name] | {option: value})


@pytest.mark.parametrize(("package", "name"), OPERATIONS, ids=map(".".join, OPERATIONS))
def test_numbers_of_numpy(package, name):
    function = operation(package, name)
    arguments = arguments_of(name, random.Random(0))
    kinds = {int: numpy.int64, float: numpy.float64}
    converted = {key: kinds[type(each)](each) if is_numeric(each) else each for key, each in arguments.items()}
    function(**converted)
