# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps and norms of many CUDA tensors in one launch.

Each function returns False, None or NotImplemented where no kernel serves the call (no route on this machine, strides
or dtypes that the kernels lack); the caller then goes its own way in torch. Nothing here waits for the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspeed.ops import cuda
from deepspeed.ops.packing import DTYPE_CODES, NARROW_CODES, _is_dense
from deepspeed.utils.errors import explain

CHUNK = 8192  # elements a block: eight rounds of 256 threads with four elements each
_TABLES_KEPT = 32


class TensorLists(NamedTuple):
    """The tensors of one launch, one list a role, all of one length and device; fp32, bf16 or fp16 in any mix.

    Attributes:
        params: updated in place.
        grads: as many elements as the param each.
        first: first moments (the only ones of Lion; the sums of squares of Adagrad).
        second: second moments of Adam and LAMB, or None.
        lows: also receive the new params, rounded to their dtype; None, or a list that may hold None.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    first: Sequence[Tensor]
    second: Sequence[Tensor] | None = None
    lows: Sequence[Tensor | None] | None = None


class Gradients(NamedTuple):
    """What happens to the gradients on the way.

    Attributes:
        scale: they are multiplied by it (unscaling).
        factor: and by this fp32 tensor of one element on the device (clipping without a synchronisation).
        noop: an int32 tensor of one element; any number but 0 leaves everything as it is.
    """

    scale: float = 1.0
    factor: Tensor | None = None
    noop: Tensor | None = None


class AdamRule(NamedTuple):
    """Numbers of one Adam or AdamW (decoupled) step; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    step: int
    decoupled: bool
    bias_correction: bool = True


class LambRule(NamedTuple):
    """Numbers of one LAMB step; the ratio of norms is kept within [least, most]."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    step: int
    least: float
    most: float
    eps_inside: bool = False
    bias_correction: bool = True


class _Table(NamedTuple):
    """A launch table on the device: its tensor, rows, blocks of the grid, and which tensors have a row."""

    tensor: Tensor
    rows: int
    blocks: int
    filled: tuple[int, ...]

    def head(self) -> tuple[int, int, int]:
        """The first arguments of every multi-tensor kernel."""
        return self.tensor.data_ptr(), self.rows, CHUNK


_ONE = Gradients()
_tables: OrderedDict[Any, _Table] = OrderedDict()


def multi_tensor_adam(lists: TensorLists, rule: AdamRule, gradients: Gradients = _ONE) -> bool:
    """Make one Adam or AdamW step of all params in one launch; False where no kernel serves.

    Raises:
        ValueError: the tensors of one param differ in size or device.
    """
    bias1 = 1 - rule.beta1**rule.step if rule.bias_correction else 1.0
    bias2 = 1 - rule.beta2**rule.step if rule.bias_correction else 1.0
    return _sweep(
        "adam_step",
        lists,
        gradients,
        0.0 if rule.decoupled else rule.decay,
        1 - rule.lr * rule.decay if rule.decoupled else 1.0,
        1 - rule.beta1,
        rule.beta2,
        1 - rule.beta2,
        bias2**0.5,
        rule.eps,
        rule.lr / bias1,
    )


def multi_tensor_adagrad(
    lists: TensorLists, lr: float, eps: float, decay: float, gradients: Gradients = _ONE
) -> bool:
    """Make one Adagrad step of all params in one launch; False where no kernel serves.

    Raises:
        ValueError: the tensors of one param differ in size or device.
    """
    return _sweep("adagrad_step", lists, gradients, decay, eps, lr)


def multi_tensor_lion(
    lists: TensorLists,
    lr: float,
    betas: tuple[float, float],
    decay: float,
    gradients: Gradients = _ONE,
) -> bool:
    """Make one Lion step of all params in one launch; False where no kernel serves.

    Raises:
        ValueError: the tensors of one param differ in size or device.
    """
    keep = 1 - lr * decay
    return _sweep("lion_step", lists, gradients, keep, 1 - betas[0], 1 - betas[1], lr)


def multi_tensor_lamb(
    lists: TensorLists, rule: LambRule, gradients: Gradients = _ONE
) -> Tensor | None:
    """Make one LAMB step of all params in three launches; returns the fp32 ratio of norms of each, or None.

    Moments of 16 bits are rounded before the update is computed from them.

    Raises:
        ValueError: the tensors of one param differ in size or device.
    """
    table = _table(lists)
    first = lists.params[0] if lists.params else None
    if table is None or first is None:
        return None
    launches = [cuda.find(name, first) for name in ("lamb_moments", "lamb_ratio", "lamb_apply")]
    if any(launch is None for launch in launches):
        return None
    ratios = torch.ones(len(lists.params), dtype=torch.float32, device=first.device)
    if not table.rows:
        return ratios
    noop, factor = _address(gradients.noop), _address(gradients.factor)
    partial = torch.empty(2 * table.blocks, dtype=torch.float64, device=first.device)
    found = torch.empty(table.rows, dtype=torch.float32, device=first.device)
    inside = int(rule.eps_inside)
    size = rule.lr
    if rule.bias_correction:
        size *= (1 - rule.beta2**rule.step) ** 0.5 / (1 - rule.beta1**rule.step)
    moments, ratio, apply = launches
    betas = (1 - rule.beta1, rule.beta2, 1 - rule.beta2)
    shape = (rule.eps, rule.decay, inside)
    parts, head = partial.data_ptr(), table.head()
    moments(table.blocks, *head, noop, factor, parts, gradients.scale, *betas, *shape)
    bounds = (rule.least, rule.most)
    ratio(table.rows, head[0], table.rows, table.blocks, noop, parts, found.data_ptr(), *bounds)
    apply(table.blocks, *head, noop, found.data_ptr(), size, *shape)
    if table.rows == len(lists.params):
        return found
    ratios[list(table.filled)] = found
    return ratios


def squared_norms(tensors: Sequence[Tensor], bad: Tensor | None = None) -> Tensor | None:
    """Return the sum of squares of each tensor, float64 on their device, in two launches; None without a kernel.

    Args:
        tensors: of one device, any size, fp32, bf16, fp16 or fp64.
        bad: int32 tensor of one element that is increased by the number of tensors with a NaN or infinity.
    """
    table = _table(TensorLists(tensors, (), ()), DTYPE_CODES)
    if table is None or not tensors:
        return None
    names = ("squared_norm_parts", "squared_norm_sums")
    launches = [cuda.find(name, tensors[0]) for name in names]
    if any(launch is None for launch in launches):
        return None
    device = tensors[0].device
    sums = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    if not table.rows:
        return sums
    partial = torch.empty(table.blocks, dtype=torch.float64, device=device)
    whole = table.rows == len(tensors)
    found = sums if whole else sums.new_empty(table.rows)
    parts, head = partial.data_ptr(), table.head()
    launches[0](table.blocks, *head, parts)
    numbers = (head[0], table.rows, table.blocks, parts)
    launches[1](table.rows, *numbers, found.data_ptr(), _address(bad))
    if not whole:
        sums[list(table.filled)] = found
    return sums


def step_together(
    optimizer: Any, params: Sequence[Tensor], launch: Callable[[TensorLists, int], bool]
) -> list[Tensor]:
    """Step the params of an optimizer that kernels can serve, those of one device and step count in one launch.

    Args:
        optimizer: an `ElementwiseOptimizer`; its states are made and counted here.
        params: each with a gradient.
        launch: makes the step of so many tensors, given the number of the step; False where no kernel serves.

    Returns:
        The params that are still to be stepped.
    """
    rest, batches = [], {}
    for param in params:
        if not cuda.on_device(param) or param.grad is None or param.grad.is_sparse:
            rest.append(param)
            continue
        state = optimizer.state[param]
        if not state:
            optimizer._init_state(param, state)
        batches.setdefault((param.device, state["step"] + 1), []).append(param)
    for (_, step), batch in batches.items():
        states = [optimizer.state[param] for param in batch]
        moments = [[state[name] for state in states] for name in optimizer.moments]
        tensors = [param.detach() for param in batch]
        if not launch(TensorLists(tensors, [param.grad for param in batch], *moments), step):
            rest += batch
            continue
        for param, state in zip(batch, states, strict=True):
            state["step"] = step
            torch.autograd.graph.increment_version(param)
    return rest


# ---------------------------------------------------------------- the ops of deepspeed.ops.rules and norms


def adam_step(*args: Any) -> Any:
    """Serve the op ``adam_step`` on CUDA tensors; NotImplemented leaves it to the reference."""
    param, exp_avg, exp_avg_sq, grad, low, lr, beta1, beta2, eps, decay, step, *more = args
    decoupled, correct, scale = more
    rule = AdamRule(lr, beta1, beta2, eps, decay, step, decoupled, correct)
    lists = TensorLists([param], [grad], [exp_avg], [exp_avg_sq], [low])
    return None if multi_tensor_adam(lists, rule, Gradients(scale)) else NotImplemented


def adagrad_step(*args: Any) -> Any:
    """Serve the op ``adagrad_step`` on CUDA tensors; NotImplemented leaves it to the reference."""
    param, exp_avg_sq, grad, low, lr, eps, decay, scale = args
    lists = TensorLists([param], [grad], [exp_avg_sq], None, [low])
    served = multi_tensor_adagrad(lists, lr, eps, decay, Gradients(scale))
    return None if served else NotImplemented


def lion_step(*args: Any) -> Any:
    """Serve the op ``lion_step`` on CUDA tensors; NotImplemented leaves it to the reference."""
    param, exp_avg, grad, low, lr, beta1, beta2, decay, scale = args
    lists = TensorLists([param], [grad], [exp_avg], None, [low])
    served = multi_tensor_lion(lists, lr, (beta1, beta2), decay, Gradients(scale))
    return None if served else NotImplemented


def squared_norm(x: Tensor) -> Any:
    """Serve the op ``squared_norm`` on a CUDA tensor; NotImplemented leaves it to the reference."""
    sums = squared_norms([x])
    return NotImplemented if sums is None else sums[0]


# ---------------------------------------------------------------- the table


def _sweep(name: str, lists: TensorLists, gradients: Gradients, *numbers: float) -> bool:
    if not lists.params:
        return True
    launch = cuda.find(name, lists.params[0])
    table = None if launch is None else _table(lists)
    if launch is None or table is None:
        return False
    if table.rows:
        noop, factor = _address(gradients.noop), _address(gradients.factor)
        launch(table.blocks, *table.head(), noop, factor, gradients.scale, *numbers)
    return True


def _table(lists: TensorLists, codes: dict[torch.dtype, int] = NARROW_CODES) -> _Table | None:
    """Return the launch table of the tensors, kept from the last call with the same ones; None: not served."""
    numbers: list[int] = []
    filled = []
    block = 0
    for index, param in enumerate(lists.params):
        buffers = [
            _at(role, index) for role in (lists.first, lists.second, lists.grads, lists.lows)
        ]
        numel = _numel(param, buffers)
        if numel < 0:
            return None
        if not numel:
            continue
        packed = 0
        for slot, buffer in enumerate((param, *buffers)):
            if buffer is not None:
                code = codes.get(buffer.dtype)
                if code is None:
                    return None
                packed |= code << 4 * slot
        addresses = (_address(buffer) for buffer in (param, *buffers))
        numbers += (block, numel, *addresses, packed)
        filled.append(index)
        block += -(-numel // CHUNK)
    if block > cuda.BLOCK_LIMIT:
        return None
    if not filled:
        return _Table(torch.empty(0, device="cpu"), 0, 0, ())
    first = lists.params[0]
    key = (cuda.stream_key(first), *numbers)
    table = _tables.get(key)
    if table is None:
        # From pageable memory the driver may wait for the stream first (seen on an H100); torch keeps the
        # pinned buffer until its copy is done.
        pinned = first.is_cuda
        host = torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=pinned)
        rows = host.to(first.device, non_blocking=True)
        table = _tables[key] = _Table(rows, len(filled), block, tuple(filled))
        while len(_tables) > _TABLES_KEPT:
            _tables.popitem(last=False)
    return table


def _at(role: Sequence[Tensor | None] | None, index: int) -> Tensor | None:
    return role[index] if role else None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _numel(param: Tensor, others: Sequence[Tensor | None]) -> int:
    """Return the elements of buffers that can be walked side by side, or -1 where strides forbid it."""
    numel, device = param.numel(), param.device
    plain = param.is_contiguous()
    same = True
    for other in others:
        if other is None:
            continue
        if other.numel() != numel or other.device != device:
            raise ValueError(
                explain(
                    "the tensors of one param must match",
                    got=f"{tuple(other.shape)} on {other.device}",
                    expected=f"{numel} elements on {device}",
                )
            )
        plain = plain and other.is_contiguous()
        same = same and other.stride() == param.stride()
    return numel if plain or (same and _is_dense(param)) else -1
