"""A tape of all that a call does on a device: allocations, operators of PyTorch, and launches of kernels.

A call that does the same with other memory is played from the tape, without the Python code in between.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cpu, _empty_strided_cuda  # type: ignore[attr-defined]
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import driver

ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Operators that only allocate memory."""

OF_DTYPES = {"promote_types", "result_type"}
"""Operators that return no tensor, and do not depend on the values of tensors."""

ADD, ADD_IN_PLACE = torch.ops.aten.add.Tensor._op, torch.ops.aten.add_.Tensor._op

Step = Callable[[list[Any], list[int], int], None]
"""A step of a call. It takes the tensors that own memory, their addresses, and a stream."""


class Place(NamedTuple):
    """A tensor, as a part of the memory of another one."""

    owner: int
    size: torch.Size
    stride: tuple[int, ...]

    offset: int
    """Entries from the start of the owner."""


class _Owner(NamedTuple):
    """A tensor that stands for the memory that it brought into the call."""

    place: Place
    dtype: torch.dtype
    device: torch.device
    address: int
    storage_offset: int


class _Instruction(NamedTuple):
    reads: set[int]
    makes: list[int]
    step: Step
    only_allocates: bool = False

    in_place: tuple[int, Step] | None = None
    """A step that does the same in the memory of this tensor, if no later step needs that memory."""


class Pass:
    """A forward or a backward pass while it is recorded."""

    def __init__(self, inputs: list[int]) -> None:
        self.inputs = inputs
        self.instructions: list[_Instruction] = []
        self.made: set[int] = set()

    @property
    def reads(self) -> set[int]:
        return set().union(*(each.reads for each in self.instructions))


class Recorder:
    """Records the passes of a call while they run."""

    def __init__(self) -> None:
        self.failure: str | None = None
        """Reason why no tape can repeat the call."""

        self._pass = Pass([])
        self._owners: list[_Owner] = []
        self._number_of: dict[int, int] = {}
        # A reference to a storage keeps its number from being used again.
        self._storages: list[StorageWeakRef] = []

    @property
    def n_owners(self) -> int:
        return len(self._owners)

    def fail(self, reason: str) -> bool:
        """Give up, unless this happened before."""
        self.failure = self.failure or reason
        return False

    @contextmanager
    def running(self, inputs: Sequence[Tensor]) -> Iterator[Pass]:
        """Record the next pass. Inputs are tensors whose memory no pass of the call allocates."""
        if not all(map(self._is_new, inputs)) or len({each.untyped_storage()._cdata for each in inputs}) < len(inputs):
            self.fail("two inputs share memory")
        self._pass = Pass([self._add(each) for each in inputs])
        with _Mode(self):
            yield self._pass

    def has_made(self, tensor: Tensor) -> bool:
        """True for a tensor in memory that the pass allocated."""
        return self._number(tensor) in self._pass.made

    def place_of(self, tensor: Tensor) -> Place:
        """The place of a tensor of the call."""
        number = self._number(tensor)
        offset = int(tensor.storage_offset()) - self._owners[number].storage_offset
        return Place(number, tensor.shape, tensor.stride(), offset)

    def launch(self, tensors: Sequence[Tensor], parts: Sequence[tuple[int, int]], ready: Sequence[Any]) -> None:
        """Record launches that are known except for addresses, as a `Launcher` keeps them."""
        if not self._has(tensors):
            return
        numbers = [self._number(each) for each in tensors]
        addresses = [
            (number, tensor.data_ptr() - self._owners[number].address)
            for number, tensor in zip(numbers, tensors, strict=True)
        ]
        addresses += [(addresses[number][0], addresses[number][1] + offset) for number, offset in parts]
        for each in ready:
            taken = each.take(addresses)
            self._pass.instructions.append(_Instruction({owner for owner, _ in taken}, [], _launching(each, taken)))

    def call(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Any]
    ) -> None:
        """Record the call of a function, to be repeated."""
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if not self._has(tensors):
            return
        getters = [self._getter_of(each) for each in (*args, *kwargs.values())]
        made = [self._add(each) if self._is_new(each) else None for each in outputs]
        makes = [each for each in made if each is not None]
        self._pass.made.update(makes)
        step = _calling(function, getters, [*kwargs], made)
        numbers = [self._number(each) for each in tensors]
        in_place = None
        if function is ADD and len(numbers) == 2 and self._is_alike(tensors[0], outputs[0]):
            # Autograd adds up gradients in the same way, but not while a mode records it.
            in_place = numbers[0], _calling(ADD_IN_PLACE, getters, [*kwargs], made)
        self._pass.instructions.append(_Instruction({*numbers}, makes, step, in_place=in_place))

    def operator(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Record an operator of PyTorch."""
        name, schema = func.overloadpacket.__name__, func._schema
        results = result if isinstance(result, (tuple, list)) else (result,)
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if self.failure is not None or (not outputs and name in OF_DTYPES) or not self._can_repeat(func, args, kwargs):
            return
        if not outputs and not schema.is_mutable:
            self.fail(f"{name} returns no tensor")
        elif name == "lift_fresh":
            # A Python constant. The call may change its copy.
            self.call(result.clone().clone, (), {}, results)
        elif name in ALLOCATING:
            number = self._add(outputs[0])
            self._pass.made.add(number)
            step = _allocating(number, self._owners[number])
            self._pass.instructions.append(_Instruction(set(), [number], step, True))
        elif schema.is_mutable or any(map(self._is_new, outputs)):
            self.call(func._op, args, kwargs, results)
        # Otherwise the operator returns views.

    def getter(self, place: Place) -> Callable[[list[Any]], Tensor]:
        """A function that makes a tensor from the tensors that own memory."""
        number, size, stride, offset = place
        if place == self._owners[number].place:
            return lambda owners: owners[number]

        def view(owners: list[Any]) -> Tensor:
            owner: Tensor = owners[number]
            return owner.as_strided(size, stride, owner.storage_offset() + offset)

        return view

    def _getter_of(self, argument: Any) -> Callable[[list[Any]], Any]:
        """A function that makes an argument of an operator from the tensors that own memory."""
        if isinstance(argument, Tensor):
            return self.getter(self.place_of(argument))
        if isinstance(argument, (list, tuple)) and any(isinstance(each, Tensor) for each in argument):
            getters = [self._getter_of(each) for each in argument]
            return lambda owners: [get(owners) for get in getters]
        return lambda owners: argument

    def _number(self, tensor: Tensor) -> int:
        return self._number_of.get(tensor.untyped_storage()._cdata, -1)

    def _is_new(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and self._number(tensor) < 0

    def _add(self, tensor: Tensor) -> int:
        storage, number = tensor.untyped_storage(), len(self._owners)
        self._number_of[storage._cdata] = number
        self._storages.append(StorageWeakRef(storage))
        place = Place(number, tensor.shape, tensor.stride(), 0)
        self._owners.append(_Owner(place, tensor.dtype, tensor.device, tensor.data_ptr(), int(tensor.storage_offset())))
        return number

    def _is_alike(self, tensor: Tensor, other: Tensor) -> bool:
        """True for two tensors that own memory and have the same layout and dtype."""
        places = [self.place_of(each) for each in (tensor, other)]
        own = all(each == self._owners[each.owner].place for each in places)
        return own and places[0][1:] == places[1][1:] and tensor.dtype == other.dtype

    def _has(self, tensors: Sequence[Tensor]) -> bool:
        """True if all tensors belong to the call, and recording has not failed."""
        if self.failure is not None:
            return False
        if any(map(self._is_new, tensors)):
            return self.fail("it takes a tensor that is no input")
        if any(each.dtype != self._owners[self._number(each)].dtype or each.is_neg() for each in tensors):
            return self.fail("it takes memory as another dtype")
        return True

    def _can_repeat(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """True if an operator's result sizes do not depend on values, and it writes only to memory of this pass."""
        name, parameters = func.overloadpacket.__name__, func._schema.arguments
        # A repeated pass would draw other random numbers.
        if torch.Tag.nondeterministic_seeded in func.tags and "dropout_p" not in {each.name for each in parameters}:
            return self.fail(f"{name} draws random numbers")
        if torch.Tag.dynamic_output_shape in func.tags and not _takes_integers(name, args):
            return self.fail(f"the size of what {name} returns depends on values")
        given = zip(parameters, args, strict=False)
        named = ((each, kwargs[each.name]) for each in parameters if each.name in kwargs)
        for parameter, argument in (*given, *named):
            if parameter.is_write and any(self._number(each) not in self._pass.made for each in tree_leaves(argument)):
                return self.fail(f"{name} changes an input")
        return True


def _takes_integers(name: str, args: Sequence[Any]) -> bool:
    """True for an operator that indexes by integers. With booleans, the number of entries would depend on their
    values."""
    indices = tree_leaves(args[1]) if name == "index" else []
    return bool(indices) and all(each is None or each.dtype in (torch.int32, torch.int64) for each in indices)


class _Mode(TorchDispatchMode):
    """A mode that passes operators to a recorder. PyTorch carries it to the threads of a backward pass."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.recorder.operator(func, args, kwargs or {}, result)
        return result


def current_recorder() -> Recorder | None:
    """The recorder of this thread; None if there is none, or if another mode is active as well."""
    if torch._C._len_torch_dispatch_stack() != 1:
        return None
    mode = torch._C._get_dispatch_stack_at(0)
    return mode.recorder if isinstance(mode, _Mode) else None


class Tape:
    """A pass, to be played.

    Args:
        given: numbers of its input tensors.
        taken: the recorded pass.
        results: places of the tensors that it returns; None for no tensor.
        keep: numbers of the tensors that it passes on to a later pass.
    """

    def __init__(
        self,
        recorder: Recorder,
        given: Sequence[int],
        taken: Pass,
        results: Sequence[Place | None],
        keep: Sequence[int] = (),
    ) -> None:
        self._keep, self._n_owners = keep, recorder.n_owners
        self._results = [None if each is None else recorder.getter(each) for each in results]
        self._steps: list[Step] = []
        needed = {*keep, *(each.owner for each in results if each is not None)}
        # From the last step to the first: memory is freed after the last step that uses it.
        for instruction in reversed(taken.instructions):
            if instruction.only_allocates and needed.isdisjoint(instruction.makes):
                continue
            unused = {*instruction.reads, *instruction.makes} - needed
            needed |= unused
            if unused:
                self._steps.append(_freeing(sorted(unused)))
            changed, in_place = instruction.in_place or (-1, instruction.step)
            self._steps.append(in_place if changed in unused & taken.made else instruction.step)
        self._steps.reverse()
        self._given = [number if number in needed else None for number in given]

    def play(self, tensors: list[Tensor], device: int) -> tuple[list[Any], list[Tensor]]:
        """Repeat the pass with the memory of other tensors, which are removed from the list.

        Returns:
            Results, each a tensor or None, and the kept tensors.
        """
        owners: list[Any] = [None] * self._n_owners
        addresses = [0] * self._n_owners
        for number in self._given:
            # Removed from the list, so that it can be freed.
            tensor = tensors.pop(0)
            if number is not None:
                owners[number], addresses[number] = tensor, tensor.data_ptr()
        del tensor
        stream = driver.active.get_current_stream(device) if device >= 0 else 0
        # The operators were recorded below all three.
        with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast(), torch._C.DisableTorchFunction():
            for step in self._steps:
                step(owners, addresses, stream)
            results = [None if get is None else get(owners) for get in self._results]
        return results, [owners[number] for number in self._keep]


def _allocating(number: int, owner: _Owner) -> Step:
    (_, shape, stride, _), dtype, device = owner[:3]
    size = tuple(shape)
    # Allocated as Inductor does, in half the time: on the current device, which is that of the call.
    allocate = _empty_strided_cuda if device.type == "cuda" else _empty_strided_cpu

    def step(owners: list[Any], addresses: list[int], stream: int) -> None:
        owners[number] = tensor = allocate(size, stride, dtype)
        addresses[number] = tensor.data_ptr()

    return step


def _launching(ready: Any, places: Sequence[tuple[int, int]]) -> Step:
    run, programs, function, _, _, rest, _ = ready

    def step(owners: list[Any], addresses: list[int], stream: int) -> None:
        taken = [addresses[owner] + offset for owner, offset in places]
        # A reference to this object keeps the kernel of the function alive.
        run(programs, 1, 1, stream, function, ready.metadata, None, None, None, *taken, *rest)

    return step


def _calling(
    function: Callable[..., Any],
    getters: Sequence[Callable[[list[Any]], Any]],
    names: list[str],
    made: list[int | None],
) -> Step:
    """Call a function with arguments, the last of which are passed by name."""
    unnamed = len(getters) - len(names)

    def step(owners: list[Any], addresses: list[int], stream: int) -> None:
        arguments = [get(owners) for get in getters]
        if names:
            results = function(*arguments[:unnamed], **dict(zip(names, arguments[unnamed:], strict=True)))
        else:
            results = function(*arguments)
        for number, result in zip(made, results if isinstance(results, (tuple, list)) else (results,)):  # noqa: B905
            if number is not None:
                owners[number] = result
                addresses[number] = result.data_ptr()

    return step


def _freeing(numbers: Sequence[int]) -> Step:
    def step(owners: list[Any], addresses: list[int], stream: int) -> None:
        for number in numbers:
            owners[number] = None

    return step
