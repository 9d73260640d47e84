from dataclasses import replace

import pytest
import torch
from torch import nn

from colt5_bench.measuring.call import Call
from colt5_bench.process.workspaces import clear_workspaces
from suites import training_step
from suites.training_step import MEASURED, StepCase

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", MEASURED)
def test_a_captured_step_has_the_results_of_the_layer(kind):
    case = StepCase(kind, "tiny", "float32")
    problem = training_step.problem(case, CPU)
    modules: list[nn.Module] = []

    def capture(module, x):
        modules.append(module)
        return module

    captured, plain = training_step._captured(case, capture), training_step.SUITE.implementations["ours"].build(case)
    call = Call(captured, problem, "forward+backward")
    expected = Call(plain, problem, "forward+backward").results()
    for _ in range(2):
        for name, result in call.results().items():
            assert torch.equal(result, expected[name]), name
        # Other tensors in the same memory.
        call = Call(captured, problem, "forward+backward")
    assert len(modules) == 1
    Call(captured, replace(problem, inputs={name: each.clone() for name, each in problem.inputs.items()}), "forward")()
    assert len(modules) == 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
def test_graphs_of_a_step_have_their_own_workspace():
    def graphed():
        # A product with a long sum, which several parts of the GPU share.
        layer = nn.Linear(2**16, 64, device="cuda")
        return training_step._graphed(layer, torch.randn(64, 2**16, device="cuda", requires_grad=True))

    def bytes_of(pools):
        segments = torch.cuda.memory_snapshot()
        return sum(each["allocated_size"] for each in segments if each["segment_pool_id"] in pools)

    def pools():
        return {each["segment_pool_id"] for each in torch.cuda.memory_snapshot()}

    earlier, known = graphed(), pools()
    later, own = graphed(), pools() - known
    before = bytes_of(own)
    clear_workspaces()
    assert bytes_of(own) < before
    del earlier, later
