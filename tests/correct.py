"""Whether tensors are as near to the truth as a correct computation is, by the gate that suites have."""

from colt5_bench.measuring.accuracy import diverge, passes, tolerances


def check_correct(found, plain, expected, at_kink=None, least=0.0):
    """Raise AssertionError unless each of the tensors `found` is as near to its fp64 truth as others may be.

    Args:
        found, expected: tensors by name.
        plain: a function that computes the same by plain PyTorch in the dtype of `found`.
        at_kink: by name, elements where the definition has no single derivative.
        least: what any element may be off by, as a share of the largest.
    """
    allowed, at_kink = tolerances(plain, expected, at_kink), at_kink or {}
    for name, truth in expected.items():
        assert found[name].shape == truth.shape, name
        slack = least * truth.abs().max().item() if truth.numel() else 0.0
        divergence = diverge(found[name], truth, at_kink.get(name), tolerance=allowed[name].at_least(slack))
        assert passes(divergence), (name, divergence)
