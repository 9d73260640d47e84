"""An operator of PyTorch has another kernel after the import."""

import warnings

import torch

library = torch.library.Library("aten", "IMPL")
with warnings.catch_warnings(action="ignore"):
    library.impl("digamma", lambda x: x, "CPU")


def double(scores):
    return 2 * scores
