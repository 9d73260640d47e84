"""An operator of PyTorch has another kernel from the import on."""

import warnings

import torch

library = torch.library.Library("aten", "IMPL")
with warnings.catch_warnings(action="ignore"):
    library.impl("digamma", lambda x: x, "CPU")


def double(scores):
    return 2 * scores
