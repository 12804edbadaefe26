# SPDX-License-Identifier: Apache-2.0
"""`deepspeed.checkpointing`: blocks of a model that are computed again in the backward pass instead of being remembered.

`checkpoint` runs a block without a graph and back-propagates through a second run (an autograd function of its own);
`non_reentrant_checkpoint` leaves the graph in place and computes what it saved again when it is asked for it. Both
keep the block's inputs as `configure` says, and both draw the same random numbers in the second run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.mesh import Axis
from deepspeed.runtime.compiler import is_compiling
from deepspeed.runtime.torch_autocast import autocast_of
from deepspeed.utils import bwc
from deepspeed.utils.errors import explain
from deepspeed.utils.timer import SynchronizedWallClockTimer

from .rng import (
    MODEL_PARALLEL_STREAM,
    CudaRNGStatesTracker,
    RngSnapshot,
    get_cuda_rng_tracker,
)
from .saved import Arena, Kept, Policy

__all__ = [
    "CheckpointFunction",
    "CudaRNGStatesTracker",
    "checkpoint",
    "configure",
    "get_cuda_rng_tracker",
    "is_configured",
    "model_parallel_cuda_manual_seed",
    "model_parallel_reconfigure_tp_seed",
    "non_reentrant_checkpoint",
    "partition_activations_in_checkpoint",
    "reset",
    "set_num_layers",
]

_SEED_DISTANCE = 2718  # between the default stream and rank 0's model-parallel one; fixed by the checkpoints of others


@dataclass
class _Settings:
    """What `configure` was told."""

    configured: bool = False
    mpu: Any = None
    partition: bool = False
    contiguous: bool = False
    num_checkpoints: int | None = None
    on_host: bool = False
    synchronize: bool = False
    profile: bool = False


_settings = _Settings()
_arena: Arena | None = None
_timers = SynchronizedWallClockTimer()


# - settings


def configure(
    mpu_: Any,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Say how the inputs of checkpointed blocks are kept. Arguments that are not None win over the configuration.

    Args:
        mpu_: object that knows the model-parallel group, over which `partition_activations` cuts; or None.
        deepspeed_config: `DeepSpeedConfig`, dict or path; its section `activation_checkpointing` is read.
        partition_activations: each model-parallel rank keeps one part of each input.
        contiguous_checkpointing: keep the parts side by side in one buffer; needs `num_checkpoints`.
        num_checkpoints: checkpointed blocks of the model.
        checkpoint_in_cpu: keep inputs in CPU memory.
        synchronize: wait for the device at both ends of each block.
        profile: time each block, forward and backward.

    Raises:
        AssertionError: contiguous buffers without partitioned activations, or without the number of blocks.
    """
    global _settings
    new = _Settings(configured=True, mpu=mpu_)
    if deepspeed_config is not None:
        _read_section(new, _section(deepspeed_config, mpu_))
    given = {
        "partition": partition_activations,
        "contiguous": contiguous_checkpointing,
        "num_checkpoints": num_checkpoints,
        "on_host": checkpoint_in_cpu,
        "synchronize": synchronize,
        "profile": profile,
    }
    for name, value in given.items():
        if value is not None:
            setattr(new, name, value)
    _check(new)
    _settings = new
    reset()


def _read_section(settings: _Settings, section: Any) -> None:
    settings.partition = section.partition_activations
    settings.contiguous = section.contiguous_memory_optimization
    settings.num_checkpoints = section.number_checkpoints
    settings.on_host = section.cpu_checkpointing
    settings.synchronize = section.synchronize_checkpoint_boundary
    settings.profile = section.profile


def _check(settings: _Settings) -> None:
    if settings.contiguous and not settings.partition:
        raise AssertionError(
            explain(
                "contiguous checkpointing is only available with partitioned activations",
                got="partition_activations=False",
                fix="Set partition_activations to true.",
            )
        )
    if settings.contiguous and settings.num_checkpoints is None:
        raise AssertionError(
            explain(
                "contiguous checkpointing needs the number of layers that are checkpointed",
                got="num_checkpoints=None",
                fix="Set num_checkpoints (activation_checkpointing.number_checkpoints).",
            )
        )


def _section(config: Any, mpu: Any) -> Any:
    if not hasattr(config, "activation_checkpointing_config"):
        from deepspeed.runtime.config import DeepSpeedConfig

        config = DeepSpeedConfig(config, mpu=mpu)
    return config.activation_checkpointing_config


def is_configured() -> bool:
    """Whether `configure` has been called."""
    return _settings.configured


def reset() -> None:
    """Give up the contiguous buffers: call it when forward passes have no backward pass, as in evaluation."""
    global _arena
    _arena = None


def set_num_layers(nlayers: int) -> None:
    """Set the number of checkpointed blocks, for contiguous buffers."""
    _settings.num_checkpoints = nlayers
    reset()


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Cut saved inputs over the model-parallel ranks from now on, or stop doing so."""
    _settings.partition = partition_activation


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the device: `seed` everywhere, and a stream of its own for each model-parallel rank.

    The stream `model-parallel-rng` of `get_cuda_rng_tracker()` starts from `seed + 2718 + model-parallel rank`.
    """
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    get_accelerator().manual_seed(seed)
    tracker.add(MODEL_PARALLEL_STREAM, _model_parallel_seed(seed))


def _set_cuda_rng_state(new_state: torch.Tensor, device: int = -1) -> None:
    """Set the random state of a device, by default the current one (Megatron's name for it)."""
    get_accelerator().set_rng_state(new_state, None if device == -1 else device)


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Seed the model-parallel stream again, and nothing else."""
    with get_cuda_rng_tracker().fork():
        get_accelerator().manual_seed(_model_parallel_seed(seed))


def _model_parallel_seed(seed: int) -> int:
    return seed + _SEED_DISTANCE + bwc.bwc_tensor_model_parallel_rank(_settings.mpu)


def _policy() -> Policy:
    global _arena
    axis = Axis.alone()
    if _settings.partition and bwc.bwc_tensor_model_parallel_world_size(_settings.mpu) > 1:
        axis = Axis.of_group(bwc.bwc_tensor_model_parallel_group(_settings.mpu))
    if _settings.contiguous and _arena is None:
        _arena = Arena(int(_settings.num_checkpoints or 0))
    arena = _arena if _settings.contiguous else None
    return Policy(axis, _settings.on_host, arena)


# - the two ways


class _Recorder:
    """Hooks that keep what autograd saves of one block's inputs as the policy says.

    They act only once the block has run: what the block itself may save inside is not theirs.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.armed = False
        self._count = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        if not self.armed:
            return tensor
        self._count += 1
        return Kept(tensor, self.policy, self._count)

    def unpack(self, kept: Any) -> torch.Tensor:
        return kept.restore() if isinstance(kept, Kept) else kept


class CheckpointFunction(torch.autograd.Function):
    """A block as one node of the graph: forward without a graph, backward through a second run.

    `apply(function, outputs, *args)`: `function` takes `args`, which may hold tensors and anything else, side by
    side; what it returns that is a tensor comes back from `apply`, and the list `outputs` receives the flat result
    with the tensors left out (None in their places) and the tree it came from.
    """

    @staticmethod
    def forward(ctx: Any, run_function: Callable[..., Any], all_outputs: list, *args: Any) -> Any:
        """Run the block without recording a graph."""
        ctx.run_function = run_function
        ctx.places = [i for i, arg in enumerate(args) if torch.is_tensor(arg)]
        tensors = [args[i] for i in ctx.places]
        ctx.others = [None if torch.is_tensor(arg) else arg for arg in args]
        ctx.wants_grad = [t.requires_grad for t in tensors]
        ctx.snapshot = RngSnapshot.take(tensors)
        ctx.autocast = _autocast_state()
        ctx.set_materialize_grads(False)
        outputs, tree = pytree.tree_flatten(run_function(*args))
        ctx.save_for_backward(*tensors)
        found = tuple(out for out in outputs if torch.is_tensor(out))
        ctx.mark_non_differentiable(*(t for t in found if not _differentiable(t)))
        all_outputs.append(
            ([None if torch.is_tensor(o) else o for o in outputs], _mask(outputs), tree)
        )
        return found

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        """Run the block again, with a graph, and back-propagate through it.

        Raises:
            RuntimeError: reached through torch.autograd.grad() or backward(inputs=...).
        """
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                explain(
                    "checkpoint() accumulates gradients of parameters in its backward pass",
                    got="a call of torch.autograd.grad(), or of backward() with inputs=",
                    expected="loss.backward()",
                    fix="Use deepspeed.checkpointing.non_reentrant_checkpoint instead.",
                )
            )
        with _boundary("backward"):
            leaves = list(ctx.others)
            for place, tensor, wanted in zip(
                ctx.places, ctx.saved_tensors, ctx.wants_grad, strict=True
            ):
                leaves[place] = tensor.detach().requires_grad_(wanted)
            with ctx.snapshot.restored(), torch.enable_grad(), _autocast(ctx.autocast):
                outputs, _ = pytree.tree_flatten(ctx.run_function(*leaves))
            found = [out for out in outputs if torch.is_tensor(out)]
            pairs = [
                (out, grad)
                for out, grad in zip(found, grads, strict=True)
                if grad is not None and out.requires_grad
            ]
            if pairs:
                torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        own = [leaf.grad if torch.is_tensor(leaf) else None for leaf in leaves]
        return (None, None, *own)


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compute `function(*args, **kwargs)` and remember only its inputs; the rest is computed again in backward.

    Arguments and results may be tensors, anything else, and tuples, lists and dicts of these. Gradients flow to
    parameters used inside even where no input asks for one.

    Returns:
        What `function` returns.

    Example:
        >>> block = torch.nn.Linear(8, 8)
        >>> deepspeed.checkpointing.checkpoint(block, torch.randn(2, 8)).sum().backward()
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if is_compiling():
        return torch_checkpoint(function, *args, use_reentrant=False, **kwargs)
    leaves, tree = pytree.tree_flatten((args, kwargs))
    if not any(torch.is_tensor(leaf) and leaf.requires_grad for leaf in leaves):
        # An autograd function is only called backward if an input of it asks for a gradient.
        return non_reentrant_checkpoint(function, *args, **kwargs)
    policy = _policy()
    recorder = _Recorder(policy)

    def run(*flat: Any) -> Any:
        inner_args, inner_kwargs = pytree.tree_unflatten(list(flat), tree)
        result = function(*inner_args, **inner_kwargs)
        recorder.armed = True
        return result

    hooks = contextlib.nullcontext()
    if not policy.is_plain:
        hooks = torch.autograd.graph.saved_tensors_hooks(recorder.pack, recorder.unpack)
    received: list[Any] = []
    with _boundary("forward"), hooks:
        found = CheckpointFunction.apply(run, received, *leaves)
    ((others, mask, out_tree),) = received
    tensors = iter(found)
    outputs = [next(tensors) if is_tensor else o for is_tensor, o in zip(mask, others, strict=True)]
    return pytree.tree_unflatten(outputs, out_tree)


def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As `checkpoint`, with the graph of the first run kept: torch.autograd.grad and nested hooks work as without it.

    Returns:
        What `function` returns.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    leaves, tree = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if torch.is_tensor(leaf)]
    policy, snapshot = _policy(), RngSnapshot.take(tensors)
    kept = [
        (Kept(leaf, policy, i), leaf.requires_grad) if torch.is_tensor(leaf) else (leaf, None)
        for i, leaf in enumerate(leaves)
    ]
    pending = [leaves]
    del leaves, tensors, args, kwargs  # or the closure below would hold what is to be let go

    def run() -> Any:
        if pending:
            inner_args, inner_kwargs = pytree.tree_unflatten(pending.pop(), tree)
            with _boundary("forward"):
                return function(*inner_args, **inner_kwargs)
        again = [
            value if wanted is None else value.restore().detach().requires_grad_(wanted)
            for value, wanted in kept
        ]
        inner_args, inner_kwargs = pytree.tree_unflatten(again, tree)
        with _boundary("backward"), snapshot.restored():
            return function(*inner_args, **inner_kwargs)

    return torch_checkpoint(run, use_reentrant=False, preserve_rng_state=False)


# - helpers


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _mask(values: Sequence[Any]) -> list[bool]:
    return [torch.is_tensor(value) for value in values]


@contextlib.contextmanager
def _boundary(which: str) -> Iterator[None]:
    """What happens at both ends of a block: waiting for the device, and timing."""
    if _settings.synchronize:
        get_accelerator().synchronize()
    if _settings.profile:
        _timers(which).start()
    try:
        yield
    finally:  # torch ends a second run early by raising
        if _settings.profile:
            _timers(which).stop()
            _timers.log([which])
    if _settings.synchronize:
        get_accelerator().synchronize()


def _autocast_state() -> list[tuple[str, bool, torch.dtype, bool]]:
    """`(device type, enabled, dtype, cache)` of the CPU and of the accelerator."""
    kinds = dict.fromkeys(["cpu", get_accelerator().device_name()])
    cache = torch.is_autocast_cache_enabled()
    return [(kind, *autocast_of(kind), cache) for kind in kinds]


@contextlib.contextmanager
def _autocast(states: list[tuple[str, bool, torch.dtype, bool]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for kind, enabled, dtype, cache in states:
            stack.enter_context(
                torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=cache)
            )
        yield


# - settings as the module's own variables

# the variables that programs of upstream read and set -> ours
_VARIABLES = {
    "deepspeed_checkpointing_enabled": "configured",
    "mpu": "mpu",
    "PARTITION_ACTIVATIONS": "partition",
    "CONTIGUOUS_CHECKPOINTING": "contiguous",
    "num_layers": "num_checkpoints",
    "CPU_CHECKPOINT": "on_host",
    "SYNCHRONIZE": "synchronize",
    "PROFILE_TIME": "profile",
}


class _WithVariables(ModuleType):
    """This module, whose variables are the fields of `_settings`."""


def _variable(field: str) -> property:
    def read(_: ModuleType) -> Any:
        return getattr(_settings, field)

    def write(_: ModuleType, value: Any) -> None:
        setattr(_settings, field, value)

    return property(read, write)


for _name, _field in _VARIABLES.items():
    setattr(_WithVariables, _name, _variable(_field))
sys.modules[__name__].__class__ = _WithVariables
