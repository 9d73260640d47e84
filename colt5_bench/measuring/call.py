"""A call of an implementation, to be timed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from colt5_bench.case import FORWARD, Problem
from colt5_bench.measuring import memory


class Call:
    """A call of an implementation, with its backward pass if that is measured.

    Gradients are returned, not accumulated, so that nothing has to be reset between calls.
    """

    def __init__(self, function: Callable[..., Tensor], problem: Problem, direction: str) -> None:
        self._function = function
        self._problem = problem
        self._upstream = problem.upstream
        self._wanted = () if direction == FORWARD else problem.differentiable
        self._stream: torch.Stream | None = None
        self._inputs: dict[str, Tensor] = {}
        self.renew()

    def renew(self) -> None:
        """Forget the graphs of earlier calls."""
        stream = torch.cuda.current_stream() if self._upstream.is_cuda else None
        if not self._inputs or stream != self._stream:
            # Nodes of a graph belong to its stream, and would prevent the capture of a call in another stream.
            # In one stream inputs stay the same, as parameters do in training.
            self._stream = stream
            self._inputs = {
                name: tensor.detach().requires_grad_(name in self._wanted)
                for name, tensor in self._problem.inputs.items()
            }
            self._sources = [self._inputs[name] for name in self._wanted]

    def __call__(self) -> tuple[Tensor, ...]:
        """The output, then the gradients."""
        output = self.forward()
        return output, *self.backward(output)

    def forward(self) -> Tensor:
        if not self._sources:
            with torch.no_grad():
                return self._function(**self._inputs)
        return self._function(**self._inputs)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """The gradients; none, if the direction is forward."""
        return torch.autograd.grad(output, self._sources, self._upstream) if self._sources else ()

    def read_bytes(self) -> int:
        """Bytes of all inputs. Memory that tensors share or repeat counts once."""
        given = [*self._inputs.values(), *([self._upstream] if self._sources else [])]
        sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in given}
        return sum(sizes.values())

    def results(self) -> dict[str, Tensor]:
        return self.named(self())

    def named(self, results: Sequence[Tensor]) -> dict[str, Tensor]:
        """The results of a call by name: `output`, and gradients by the names of their inputs."""
        return dict(zip(("output", *self._wanted), results, strict=True))

    def saved_bytes(self) -> int | None:
        if not self._sources:
            return None
        return memory.saved_bytes(lambda: self._function(**self._inputs), self._inputs.values())
