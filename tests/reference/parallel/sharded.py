"""Calls that tests make in each rank: all ranks have the whole, and each takes its own part."""

import os
import signal
import time
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels._common.dry_run import announced, launches_of_layer
from reference import parallel


def stretch(group, lengths):
    """This rank's entries of a dimension, as a slice."""
    start = sum(lengths[: group.rank()])
    return slice(start, start + lengths[group.rank()])


def part(group, lengths, tensor, dim):
    own = stretch(group, lengths)
    return tensor.narrow(dim, own.start, own.stop - own.start)


def leaves(arguments):
    """Arguments, with differentiable tensors as leaves."""
    for name, each in arguments.items():
        if isinstance(each, Tensor) and each.is_floating_point():
            arguments[name] = each.detach().clone().requires_grad_()
    return arguments


def gradients(arguments):
    return {name: each.grad for name, each in arguments.items() if isinstance(each, Tensor) and each.requires_grad}


def operation(group, name, lengths, arguments, dims, loss_of, on_mesh=False):
    """Outputs of an operation, and gradients of its arguments.

    Args:
        dims: the dimension, by name, of arguments that are sharded.
        loss_of: the loss, as a function of group, lengths and outputs.
        on_mesh: whether the operation gets a mesh instead of the group.
    """
    own = {key: part(group, lengths, each, dims[key]) if key in dims else each for key, each in arguments.items()}
    own = leaves(own)
    out = getattr(parallel, name)(
        **own, mesh=DeviceMesh.from_group(group, torch.get_default_device().type) if on_mesh else group
    )
    loss = loss_of(group, lengths, out)
    if loss is not None:
        loss.backward()
    outputs = [out] if isinstance(out, Tensor) else [*out]
    return [None if each is None else each.detach() for each in outputs], gradients(own)


class Alone:
    """The group of one process that has the whole."""

    def rank(self):
        return 0


def no_loss(group, lengths, out):
    return None


def masked_by_one(group, scores, mask, lengths, masked):
    own = part(group, lengths, mask, -1) if group.rank() == masked else None
    return parallel.coor_descent(part(group, lengths, scores, -1), n_iters=5, k=2, mask=own, mesh=group)


def of_shapes(group, shapes, dtypes):
    scores = torch.zeros(shapes[group.rank()], dtype=dtypes[group.rank()])
    parallel.coor_descent(scores, n_iters=1, k=1, mesh=group)


def on_mesh_of_two_dimensions(group):
    mesh = DeviceMesh(torch.get_default_device().type, [[*range(group.size())]])
    parallel.coor_descent(torch.zeros(4), n_iters=1, k=1, mesh=mesh)


def layer(group, layer, lengths, tensors, grad, options, context=nullcontext, run=None):
    """A layer's output for this rank's tokens, and gradients of tokens and parameters.

    Args:
        lengths: those of each of the tensors.
        grad: grad_output of the whole.
        options: options of the call. Tensors among them are divided like the first tensor. A mask that is all True is
            omitted.
        context: makes a context for the call of the layer.
        run: calls the layer with its arguments.
    """
    parallel.shard_sequences(layer, mesh=group)
    own = [part(group, each, x, 1).detach().clone().requires_grad_() for each, x in zip(lengths, tensors, strict=True)]
    options = {key: part(group, lengths[0], each, 1) for key, each in options.items()}
    if "mask" in options and options["mask"].all():
        del options["mask"]
    with context():
        out = layer(*own, **options) if run is None else run(layer, *own, **options)
    out.backward(part(group, lengths[0], grad, 1))
    grads = {
        name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in layer.named_parameters()
    }
    return out.detach(), [x.grad for x in own], grads


def second_derivatives(group, layer, lengths, tensors, grad):
    """Derivatives of the squared norm of the gradient of all ranks' tokens, with respect to this rank's."""
    parallel.shard_sequences(layer, mesh=group)
    own = [part(group, each, x, 1).detach().clone().requires_grad_() for each, x in zip(lengths, tensors, strict=True)]
    first = torch.autograd.grad(layer(*own), own, part(group, lengths[0], grad, 1), create_graph=True)
    return torch.autograd.grad(sum(each.square().sum() for each in first), own)


def reduced(group, layer, how, lengths, tensors, grad):
    """The output for this rank's tokens, and whole gradients of parameters as DDP or FSDP2 reduces them."""
    parallel.shard_sequences(layer, mesh=group)
    own = [part(group, each, x, 1) for each, x in zip(lengths, tensors, strict=True)]
    model = layer
    if how == "DDP":
        model = DistributedDataParallel(layer, process_group=group)
    else:
        mesh = DeviceMesh.from_group(group, torch.get_default_device().type)
        for each in layer.children():
            # Some of these have parameters that their layer uses directly.
            if how == "FSDP2 of parts" and type(each).__name__.startswith("Conditional"):
                fully_shard(each, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    out = model(*own)
    out.backward(part(group, lengths[0], grad, 1))
    return out.detach(), whole_gradients(layer)


def whole_gradients(layer):
    grads = {name: each.grad for name, each in layer.named_parameters()}
    return {key: each.full_tensor() if isinstance(each, DTensor) else each for key, each in grads.items()}


def reduced_over_batch_and_tokens(group, layer, how, lengths, x, grad):
    """The output for this rank's tokens of its half of the batch, and gradients reduced over all ranks."""
    mesh = init_device_mesh(torch.get_default_device().type, (2, 2), mesh_dim_names=("dp", "cp"))
    x, grad = (each.chunk(2)[mesh["dp"].get_local_rank()] for each in (x, grad))
    sequence = mesh["cp"].get_group()
    parallel.shard_sequences(layer, mesh=mesh["cp"])
    model = DistributedDataParallel(layer) if how == "DDP" else fully_shard(layer, mesh=mesh)
    out = model(part(sequence, lengths, x, 1))
    out.backward(part(sequence, lengths, grad, 1))
    return out.detach(), whole_gradients(layer)


class Made(TorchDispatchMode):
    """Allocations of operations from a size in bytes on."""

    def __init__(self, least):
        super().__init__()
        self.least, self.operations = least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and each.nbytes >= self.least and each.untyped_storage().data_ptr() not in held:
                self.operations.append(str(func))
        return out


def made_in_backward(group, lengths, x, tokens, options):
    """Operations that allocate tensors as large as this rank's tokens in a backward pass of `route`."""
    own = part(group, lengths, x, 1).clone().requires_grad_()
    out = parallel.route(own, tokens.clone().requires_grad_(), mesh=group, **options)
    loss = (out.tokens * out.weights.unsqueeze(-1)).sum()
    with Made(own.nbytes) as made:
        loss.backward()
    return made.operations


def call(group, layer, lengths, x, options):
    return parallel.shard_sequences(layer, mesh=group)(part(group, lengths, x, 1), **options)


def shard(group, model, times):
    for _ in range(times):
        parallel.shard_sequences(model, mesh=group)


def dry_runs(group, layer, x):
    """True if a call of a layer has a dry run, before the layer is sharded and after it."""
    return [_has_dry_run(layer, x), _has_dry_run(parallel.shard_sequences(layer, mesh=group), x)]


def _has_dry_run(layer, x):
    called = []

    def forward(layer, x):
        called.append(x)
        return x

    with announced(layer, forward, x):
        list(launches_of_layer()())
    return bool(called)


def with_an_absent_rank(group, leave, when, x):
    """A step in which the last rank does not take part in the forward or the backward pass."""
    is_last = group.rank() == group.size() - 1
    if is_last and when == "forward":
        leave()
    x = x.clone().requires_grad_()
    out = parallel.coor_descent(x, n_iters=3, k=2, mesh=group)
    if is_last:
        leave()
    out.sum().backward()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(3600)
