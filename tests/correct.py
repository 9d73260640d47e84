"""Check that tensors are as close to the truth as a correct computation, by the accuracy gate of suites."""

from colt5_bench.measuring.accuracy import diverge, passes, tolerances


def check_correct(found, plain, expected, at_kink=None, least=0.0):
    """Raise AssertionError unless each of the tensors `found` is close enough to its fp64 truth.

    Args:
        found, expected: tensors by name.
        plain: a function that computes the same with plain PyTorch in the dtype of `found`.
        at_kink: by name, elements where the definition has no unique derivative.
        least: allowed error of any element, as a share of the largest.
    """
    allowed, at_kink = tolerances(plain, expected, at_kink), at_kink or {}
    for name, truth in expected.items():
        assert found[name].shape == truth.shape, name
        slack = least * truth.abs().max().item() if truth.numel() else 0.0
        divergence = diverge(found[name], truth, at_kink.get(name), tolerance=allowed[name].at_least(slack))
        assert passes(divergence), (name, divergence)
