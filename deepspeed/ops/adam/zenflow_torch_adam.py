# SPDX-License-Identifier: Apache-2.0
"""AdamW on chosen columns of matrices, driven by attributes that are put on the params.

ZeRO's own ZenFlow does not need these optimizers; programs that choose columns by themselves do. On each param they read
``selected_indices`` (the columns), ``selected_grad`` (their gradients) and ``temp_selected_param`` (their values before
somebody wrote over them), and they clear the last two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZenFlowSelectiveAdamW(torch.optim.AdamW):
    """AdamW on the chosen columns of whole params; params of one dimension are stepped as a whole.

    Args:
        params: params or param groups.
        offload: keep the moments in CPU memory between steps, as ``exp_avg_cpu_data`` and ``exp_avg_sq_cpu_data`` of
            the params.
        bucket_size: elements of moments that are on the device at once, with ``offload``.
        options: as of `torch.optim.AdamW`.

    Raises:
        ValueError: ``amsgrad`` or ``maximize`` is asked for.
    """

    columns_first: ClassVar[bool] = False

    def __init__(
        self, params: Any, offload: bool = False, bucket_size: int = 500_000_000, **options: Any
    ) -> None:
        super().__init__(params, **options)
        if any(group["amsgrad"] or group["maximize"] for group in self.param_groups):
            raise ValueError("chosen columns have no AMSGrad and no maximize")
        self.offload, self.bucket_size = offload, bucket_size
        chosen = self._step_with_offload if offload else self._step_without_offload
        self.step = chosen  # type: ignore[method-assign]

    # - where the values are

    def _columns(self, param: Any) -> Tensor:
        """The param as a matrix of which whole columns can be chosen."""
        return param.data

    def _read(self, param: Any) -> Tensor:
        values = self._columns(param)
        if values.dim() == 1:
            return values.clone()
        return values.index_select(0 if self.columns_first else 1, param.selected_indices)

    def _write(self, param: Any, values: Tensor) -> None:
        whole = self._columns(param)
        if whole.dim() == 1:
            whole.copy_(values)
        else:
            place = 0 if self.columns_first else 1
            whole.index_copy_(place, param.selected_indices, values.to(whole.dtype))

    def _borrow(self, param: Any) -> bool:
        """Bring a param that lives in files; says whether it was brought."""
        return False

    def _give_back(self, param: Any, edited: bool) -> None:
        """Send it back."""

    # - steps

    @torch.no_grad()
    def _step_without_offload(self) -> None:
        for group, param in self._with_grads():
            self._step_one(group, param, param.temp_selected_param)
            param.temp_selected_param = None

    @torch.no_grad()
    def _step_with_offload(self) -> None:
        self._in_buckets(self._with_grads(), from_copies=True)

    @torch.no_grad()
    def group_step(self, group_to_paramlist: Mapping[int, Iterable[Any]] | Iterable[Any]) -> None:
        """Step the chosen columns of some params from the values that they have now.

        Args:
            group_to_paramlist: params by the number of their group; or params that know their ``group_id``.
        """
        found = list(self._numbered(group_to_paramlist))
        if self.offload:
            self._in_buckets(found, from_copies=False)
            return
        for group, param in found:
            self._step_one(group, param, None)

    @torch.no_grad()
    def temp_copy_param(
        self, group_to_paramlist: Mapping[int, Iterable[Any]] | Iterable[Any]
    ) -> None:
        """Keep the values of the chosen columns as ``temp_selected_param``."""
        for _, param in self._numbered(group_to_paramlist):
            borrowed = self._borrow(param)
            param.temp_selected_param = self._read(param)
            if borrowed:
                self._give_back(param, edited=False)

    def clear_selected_mv(self) -> None:
        """Zero all moments, for other columns."""
        for group in self.param_groups:
            for param in group["params"]:
                for name in _MOMENTS:
                    for values in (
                        self.state.get(param, {}).get(name),
                        getattr(param, f"{name}_cpu_data", None),
                    ):
                        if values is not None:
                            values.zero_()

    def _with_grads(self) -> Iterator[tuple[dict[str, Any], Any]]:
        for group in self.param_groups:
            for param in group["params"]:
                if getattr(param, "selected_grad", None) is not None:
                    yield group, param

    def _numbered(
        self, given: Mapping[int, Iterable[Any]] | Iterable[Any]
    ) -> Iterator[tuple[dict[str, Any], Any]]:
        if isinstance(given, Mapping):
            for number, params in given.items():
                yield from ((self.param_groups[number], param) for param in params)
            return
        for param in given:
            yield self.param_groups[getattr(param, "group_id", 0)], param

    def _in_buckets(self, found: Iterable[tuple[dict[str, Any], Any]], from_copies: bool) -> None:
        """Bring the moments of some params at a time, step those, and send the moments back."""
        bucket: list[tuple[dict[str, Any], Any]] = []
        size = 0
        for item in found:
            bucket.append(item)
            size += item[1].selected_grad.numel()
            if size >= self.bucket_size:
                self._step_bucket(bucket, from_copies)
                bucket, size = [], 0
        self._step_bucket(bucket, from_copies)

    def _step_bucket(self, bucket: list[tuple[dict[str, Any], Any]], from_copies: bool) -> None:
        for _, param in bucket:
            for name in _MOMENTS:
                kept = getattr(param, f"{name}_cpu_data", None)
                if kept is not None:
                    grad = param.selected_grad
                    brought = kept.to(grad.device, copy=True, non_blocking=True)
                    self.state[param][name] = brought.view(grad.shape)
        for group, param in bucket:
            self._step_one(group, param, param.temp_selected_param if from_copies else None)
            if from_copies:
                param.temp_selected_param = None
            for name in _MOMENTS:
                setattr(param, f"{name}_cpu_data", self.state[param].pop(name).cpu())

    def _step_one(self, group: dict[str, Any], param: Any, values: Tensor | None) -> None:
        borrowed = self._borrow(param)
        values = self._read(param) if values is None else values
        grad = param.selected_grad
        state = self.state[param]
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device="cpu"))
        for name in _MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(grad)
        state["step"] += 1
        _adamw(values, grad, state, group)
        self._write(param, values)
        param.selected_grad = None
        if borrowed:
            self._give_back(param, edited=True)


class ZenFlowSelectiveAdamW_stage3(ZenFlowSelectiveAdamW):
    """The same on a rank's slice of sharded params, which holds columns one behind the other.

    Of ``ds_tensor``, the slice, ``complete_numel`` elements from ``complete_column_offset`` on are whole columns of
    ``ds_shape[1]`` elements each. Slices in files come and go through the param's ``nvme_swapper``.
    """

    columns_first = True

    def _columns(self, param: Any) -> Tensor:
        values = param.ds_tensor.data
        if len(param.ds_shape) == 1:
            return values
        whole = values.view(-1).narrow(0, param.complete_column_offset, param.complete_numel)
        return whole.view(-1, param.ds_shape[1])

    def _borrow(self, param: Any) -> bool:
        swapper = getattr(param, "nvme_swapper", None)
        if swapper is None or param.ds_tensor.data.dim():
            return False
        swapper.swap_in([param], async_op=False)
        return True

    def _give_back(self, param: Any, edited: bool) -> None:
        if edited:
            param.nvme_swapper.swap_out_and_release([param])
        else:
            param.nvme_swapper.remove_partition_and_release_buffers([param])


def _adamw(values: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step of decoupled Adam, in the order of operations of torch's."""
    beta1, beta2 = group["betas"]
    step = int(state["step"])
    grad = grad.to(values.dtype)
    values.mul_(1 - float(group["lr"]) * group["weight_decay"])
    state["exp_avg"].lerp_(grad.to(state["exp_avg"].dtype), 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (state["exp_avg_sq"].sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    values.addcdiv_(state["exp_avg"], root, value=-float(group["lr"]) / (1 - beta1**step))
