# SPDX-License-Identifier: Apache-2.0
"""`zero.Init`: modules built inside it keep slices of their parameters from the start.

While it is active, the end of every module's `__init__` cuts the module's own parameters, and tensor constructors make
their tensors on the accelerator in the wanted dtype. All of it is undone on leaving, also after an exception.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Any

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm as dist
from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis
from deepspeed.ops.group_quant import GroupScheme
from deepspeed.utils import groups
from deepspeed.utils.env import WORLD_SIZE
from deepspeed.utils.errors import explain

from . import constructors
from .codec import QUANTIZED_MODULES, GroupCodec, initial_scheme
from .sharded_param import shard_param
from .slice_forms import keep_quantized, keep_second, send_quantized
from .spill import SpillFolder, open_folder, together
from .tiers import tier_for
from .utils import is_zero_param

_CONSTRUCTORS = ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn", "rand")

_numbers = itertools.count()
# Contexts that are active, outermost first.
_active: list[InitContext] = []


class DeepSpeedTensorOverride(Enum):
    """What tensor constructors decide by themselves inside `zero.Init`, where the caller does not."""

    dtype = 1
    """Floating tensors have the dtype of the parameters."""
    device = 2
    """Tensors are made on the accelerator."""


class InitContext:
    """Context in which modules are built with sharded parameters; `zero.Init` is its public form.

    Args:
        module: an existing module to shard at once.
        data_parallel_group: process group to cut over; None is all data-parallel ranks.
        mem_efficient_linear: accepted; letting go of gathered values needs no other linear layer here.
        remote_device: None, "cpu" or "nvme" (files in the configuration's `offload_param.nvme_path`): where slices live.
        pin_memory: page-locked slices, beside a GPU.
        config_dict_or_path: configuration that decides on dtype and place where the arguments do not.
        config: older name of it.
        enabled: False makes it do nothing.
        dtype: dtype of the parameters.
        mpu: object that knows the data-parallel group.
        zero_param_parallel_group: neighbours that share a second copy (hpZ).
        zero_quantized_weights: gathers carry 8-bit codes of matrices (qwZ).
        zero_quantized_nontrainable_weights: matrices that require no gradient when their module is built are kept as codes.
        sequence_data_parallel_group: older name of `data_parallel_group`.
        param_swapper: not used.
        tensor_overrides: what tensor constructors decide by themselves; None is all of it.

    Raises:
        DeepSpeedConfigError: NVMe without a folder.
        OSError: the folder cannot be used.
        RuntimeError: WORLD_SIZE says that there are several processes, and torch.distributed knows only this one.
        DeepSpeedCommError: `mics_shard_size` of the configuration does not divide the ranks.
    """

    def __init__(
        self,
        module: torch.nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
        tensor_overrides: Any = None,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        if not dist.is_initialized():
            dist.init_distributed()
        chosen = data_parallel_group or sequence_data_parallel_group
        wrong = single_rank_error(
            dist.get_world_size(), chosen, {WORLD_SIZE.name: WORLD_SIZE.raw()}
        )
        if wrong is not None:
            raise RuntimeError(wrong)
        settings = _settings(config_dict_or_path if config_dict_or_path is not None else config)
        self.home = _axis(chosen, mpu)
        self.axis = self.home
        if settings.mics_shard_size > 0:
            self.axis, _ = self.home.split(settings.mics_shard_size, groups.current_mesh().world)
        self.second = (
            None if zero_param_parallel_group is None else Axis.of_group(zero_param_parallel_group)
        )
        self.sends_quantized = zero_quantized_weights
        self.keeps_quantized = zero_quantized_nontrainable_weights
        self.overrides = frozenset(
            DeepSpeedTensorOverride if tensor_overrides is None else tensor_overrides
        )
        self.device = torch.device(get_accelerator().current_device_name())
        self.dtype = dtype or settings.dtype
        self.scheme, self.checks_sanity = settings.scheme, settings.checks_sanity
        place = remote_device or settings.param_device
        self.tier = tier_for(
            self.device, place in ("cpu", "nvme"), pin_memory or settings.pin_memory
        )
        self.folder = None if place != "nvme" else self._open_folder(settings)
        self._undo: list[Callable[[], None]] = []
        self._depth: dict[int, int] = {}
        if module is not None:
            for each in module.modules():
                self._shard_own(each)

    def __enter__(self) -> InitContext:
        if self.enabled:
            _active.append(self)
            if len(_active) == 1:
                self._patch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.enabled and self in _active:
            _active.remove(self)
            if not _active:
                self._unpatch()

    # - what the public form decides

    def wrap_constructor(
        self, constructor: Callable[..., torch.Tensor]
    ) -> Callable[..., torch.Tensor]:
        """What replaces a tensor constructor."""
        raise NotImplementedError

    def whole(self, params: list[torch.nn.Parameter]) -> contextlib.AbstractContextManager:
        """Context in which `params` are whole and the first rank's edits of them are kept."""
        raise NotImplementedError

    # - what is replaced meanwhile

    def _patch(self) -> None:
        for cls in _all_subclasses(torch.nn.Module):
            self._wrap_class(cls)
        self._replace(torch.nn.Module, "__init_subclass__", self._on_new_class())
        self._replace(torch.nn.Module, "apply", self._apply_whole(torch.nn.Module.apply))
        for name in _CONSTRUCTORS:
            constructors.remember(name)
            self._replace(torch, name, self.wrap_constructor(getattr(torch, name)))

    def _unpatch(self) -> None:
        while self._undo:
            self._undo.pop()()
        constructors.forget()
        self._depth.clear()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        had, old = name in vars(owner), vars(owner).get(name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, old) if had else delattr(owner, name))

    def _apply_whole(self, plain: Any) -> Any:
        """`Module.apply` with every module's own parameters whole while the function sees it."""

        @functools.wraps(plain)
        def apply(
            module: torch.nn.Module, fn: Callable[[torch.nn.Module], None]
        ) -> torch.nn.Module:
            for child in module.children():
                child.apply(fn)
            with self.whole(list(module.parameters(recurse=False))):
                fn(module)
            return module

        return apply

    def _on_new_class(self) -> Any:
        """`Module.__init_subclass__` that wraps the class; Python 3.10 hands a bound method no class."""

        @classmethod
        def wrap(cls: type, **kwargs: Any) -> None:
            super(torch.nn.Module, cls).__init_subclass__(**kwargs)
            self._wrap_class(cls)

        return wrap

    def _wrap_class(self, cls: type) -> None:
        if "__init__" not in vars(cls):
            return
        plain = cls.__init__

        @functools.wraps(plain)
        def build(module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            self._depth[id(module)] = self._depth.get(id(module), 0) + 1
            try:
                plain(module, *args, **kwargs)
            finally:
                self._depth[id(module)] -= 1
            if self._depth[id(module)] == 0:
                del self._depth[id(module)]
                (_active[-1] if _active else self)._shard_own(module)

        self._replace(cls, "__init__", build)

    def _open_folder(self, settings: _Settings) -> SpillFolder:
        # Not the engine's folder, which begins empty.
        kind = str(self.dtype).removeprefix("torch.")
        names = ("zero_stage_3", f"{kind}params", f"init{next(_numbers)}")
        world = groups.current_mesh().world
        return open_folder(settings.nvme_path, names, settings.aio, world)

    @constructors.plain_constructors()
    def _shard_own(self, module: torch.nn.Module) -> None:
        """Cut a module's own parameters."""
        quantized = isinstance(module, QUANTIZED_MODULES) and self.scheme is not None
        for name, param in module.named_parameters(recurse=False):
            if param.is_meta:
                param = self._materialize(module, name)
            if not is_zero_param(param):
                self._shard(param, self.scheme if quantized and name == "weight" else None)

    def _materialize(self, module: torch.nn.Module, name: str) -> torch.nn.Parameter:
        """Give a parameter that was made without memory some (`torch.nn.utils.skip_init` does so afterwards)."""
        old = module._parameters[name]
        assert old is not None
        new = torch.nn.Parameter(
            torch.empty_like(old, device=self.device), requires_grad=old.requires_grad
        )
        new.__dict__.update(old.__dict__)
        held = module._parameters.items()  # perhaps under several names
        module._parameters.update({key: new for key, value in held if value is old})
        return new

    def _shard(self, param: torch.nn.Parameter, scheme: GroupScheme | None) -> None:
        """Give a parameter the first rank's values, and cut it."""
        floating = param.is_floating_point()
        target = self.dtype if self.dtype is not None and floating else param.dtype
        param.data = param.data.to(device=self.device, dtype=target)
        flat.broadcast_(param.data, self.home)
        codec = None if scheme is None or not floating else GroupCodec.of(scheme, param)
        with self._files_together():
            shard_param(param, self.axis, self.device, self.tier, self.folder, codec, self.home)
        param.ds_enable_sanity_checks = self.checks_sanity
        if self.sends_quantized:
            send_quantized(param)
        if self.keeps_quantized and not param.requires_grad:
            keep_quantized(param, self.tier)
        if self.second is not None:
            keep_second(param, self.second)

    def _files_together(self) -> contextlib.AbstractContextManager:
        if self.folder is None:
            return contextlib.nullcontext()
        return together(self.home, "write its params")


@dataclass(frozen=True)
class _Settings:
    """What a configuration says of sharded construction."""

    dtype: torch.dtype
    param_device: str | None = None
    pin_memory: bool = False
    scheme: GroupScheme | None = None
    mics_shard_size: int = -1
    nvme_path: Any = None
    aio: dict[str, Any] = field(default_factory=dict)
    checks_sanity: bool = False


def _settings(config: Any) -> _Settings:
    if config is None:
        return _Settings(torch.float16 if get_accelerator().is_fp16_supported() else torch.float32)
    from deepspeed.runtime.config import load_config
    from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config
    from deepspeed.runtime.swap_tensor.aio_config import get_aio_config

    from .config import get_zero_config

    config = load_config(config)
    dtype = torch.float32
    if get_bfloat16_config(config).enabled:
        dtype = torch.bfloat16
    elif get_float16_config(config).enabled:
        dtype = torch.float16
    zero = get_zero_config(config)
    offload = zero.offload_param
    device = None if offload is None else str(getattr(offload.device, "value", offload.device))
    pin_memory = False if offload is None else offload.pin_memory
    scheme = initial_scheme(config.get("weight_quantization"))
    return _Settings(
        dtype,
        device,
        pin_memory,
        scheme,
        zero.mics_shard_size,
        None if offload is None else offload.nvme_path,
        get_aio_config(config),
        zero.enable_sanity_checks,
    )


def single_rank_error(
    dp_world_size: int, explicit_process_group: Any, env: Mapping[str, str | None]
) -> str | None:
    """What is wrong with parameters cut over one process of several: they would be whole on each, and drift apart.

    Args:
        dp_world_size: processes that the parameters are cut over.
        explicit_process_group: the group that the caller chose, None if it is the default one.
        env: the environment; a WORLD_SIZE that is no number says nothing.
    """
    text = env.get(WORLD_SIZE.name) or ""
    expected = int(text) if text.strip().isdecimal() else 1
    if dp_world_size > 1 or explicit_process_group is not None or expected <= 1:
        return None
    return explain(
        "zero.Init found a process group of one process in a job of several",
        got=f"WORLD_SIZE={expected}, torch.distributed with 1 process",
        expected=f"{expected} processes in the default group",
        fix="call deepspeed.init_distributed() before anything else makes a group, or unset WORLD_SIZE",
    )


def _axis(group: Any, mpu: Any) -> Axis:
    if group is None and mpu is not None and hasattr(mpu, "get_data_parallel_group"):
        group = mpu.get_data_parallel_group()
    return groups.current_mesh().sequence_data if group is None else Axis.of_group(group)


def _all_subclasses(cls: type) -> Iterator[type]:
    seen: set[type] = set()
    todo = [cls]
    while todo:
        for sub in todo.pop().__subclasses__():
            if sub not in seen:
                seen.add(sub)
                todo.append(sub)
                yield sub


def shutdown_init_context() -> None:
    """Suspend the active contexts (an engine is being built); `restore_init_context` resumes them."""
    if _active:
        _active[0]._unpatch()


def restore_init_context() -> None:
    """Resume what `shutdown_init_context` suspended."""
    if _active:
        _active[0]._patch()


def init_is_active() -> bool:
    """Whether modules built now are sharded."""
    return bool(_active)
