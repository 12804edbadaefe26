# SPDX-License-Identifier: Apache-2.0
"""The public collectives over torch.distributed, with what gloo lacks put in their place.

On gloo, reduce-scatter, sums of bf16 and fp16, averages and CUDA tensors take the way of
[Note: gloo moves bytes] in flat.py; everything else is torch's own call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from deepspeed.utils.errors import DeepSpeedCommError, explain

from . import flat
from .backend import Backend
from .mesh import Axis
from .reduce_op import ReduceOp
from .rendezvous import World, default_timeout, join

_LOW = (torch.float16, torch.bfloat16)


class TorchBackend(Backend):
    """torch.distributed. Joins the processes when they are not joined yet.

    Every collective has the arguments of its namesake in `deepspeed.comm`.
    """

    def __init__(
        self,
        backend: str,
        timeout: timedelta | None = None,
        init_method: str | None = None,
        rank: int = -1,
        world_size: int = -1,
        name: str = "torch",
    ) -> None:
        super().__init__(name=name)
        if not dist.is_initialized():
            world = World(max(rank, 0), max(world_size, 1))
            join(backend, world, timeout or default_timeout(), init_method)
        self.initialized = True
        self.rank_id = dist.get_rank()
        self.world_size = dist.get_world_size()

    def is_initialized(self) -> bool:
        """Say whether torch's default group is there (somebody may have destroyed it)."""
        return self.initialized and dist.is_initialized()

    # ------------------------------------------------------------------ who is there
    def new_group(self, ranks: Sequence[int]) -> Any:
        return dist.new_group(list(ranks))

    def get_rank(self, group: Any = None) -> int:
        return dist.get_rank(group=group)

    def get_world_size(self, group: Any = None) -> int:
        return dist.get_world_size(group=group)

    def get_backend(self, group: Any = None) -> str:
        return dist.get_backend(group=group)

    def get_global_rank(self, group: Any, group_rank: int) -> int:
        return dist.get_global_rank(group, group_rank)

    def get_all_ranks_from_group(self, group: Any = None) -> list[int]:
        return dist.get_process_group_ranks(dist.group.WORLD if group is None else group)

    def get_world_group(self) -> Any:
        return dist.group.WORLD

    def destroy_process_group(self, group: Any = None) -> None:
        dist.destroy_process_group(group=group)
        if group is None or not dist.is_initialized():
            self.initialized = False

    # ------------------------------------------------------------------ reductions
    def all_reduce(
        self,
        tensor: torch.Tensor,
        op: Any = ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        name = _op_name(op)
        if _on_gloo(group) and (name == "AVG" or tensor.dtype in _LOW or tensor.is_cuda):
            if name not in ("SUM", "AVG", "MAX", "MIN"):
                return self._launch(
                    lambda ins, outs: dist.all_reduce(
                        outs[0], op=_torch_op(op), group=group, async_op=True
                    ),
                    [tensor],
                    [tensor],
                    async_op,
                )
            axis = Axis.of_group(group)
            verb = "sum" if name == "AVG" else name.lower()
            work = flat.all_reduce_(tensor, axis, op=verb, async_op=True)
            return _finish(work, async_op, _divider(tensor, axis.size) if name == "AVG" else None)
        return dist.all_reduce(tensor, op=_torch_op(op), group=group, async_op=async_op)

    def all_reduce_coalesced(
        self,
        tensors: Sequence[torch.Tensor],
        op: Any = ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        works = [self.all_reduce(tensor, op, group, async_op=True) for tensor in tensors]
        return _finish(flat._Pending(works), async_op)

    def reduce(
        self,
        tensor: torch.Tensor,
        dst: int,
        op: Any = ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if _on_gloo(group) and (tensor.dtype in _LOW or tensor.is_cuda or _op_name(op) == "AVG"):
            return self.all_reduce(tensor, op, group, async_op)
        return dist.reduce(tensor, dst, op=_torch_op(op), group=group, async_op=async_op)

    def reduce_scatter_tensor(
        self,
        output_tensor: torch.Tensor,
        tensor: torch.Tensor,
        op: Any = ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if not _on_gloo(group):
            return flat._reduce_scatter(
                output_tensor, tensor, op=_torch_op(op), group=group, async_op=async_op
            )
        name = _op_name(op)
        if name not in ("SUM", "AVG"):
            raise DeepSpeedCommError(
                explain("reduce_scatter over gloo", got=f"ReduceOp.{name}", expected="SUM or AVG")
            )
        if not output_tensor.is_contiguous():
            raise DeepSpeedCommError(
                explain("reduce_scatter needs a contiguous output", got=output_tensor.stride())
            )
        axis = Axis.of_group(group)
        shard, full = output_tensor.view(-1), tensor.contiguous().view(-1)
        work = flat.reduce_scatter_into(shard, full, axis, async_op=True)
        return _finish(
            work, async_op, _divider(output_tensor, axis.size) if name == "AVG" else None
        )

    def reduce_scatter(
        self,
        output: torch.Tensor,
        input_list: Sequence[torch.Tensor],
        op: Any = ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if _on_gloo(group):
            full = torch.cat([tensor.reshape(-1) for tensor in input_list])
            return self.reduce_scatter_tensor(output, full, op, group, async_op)
        return dist.reduce_scatter(
            output, list(input_list), op=_torch_op(op), group=group, async_op=async_op
        )

    # ------------------------------------------------------------------ copies
    def broadcast(
        self, tensor: torch.Tensor, src: int, group: Any = None, async_op: bool = False
    ) -> Any:
        return self._launch(
            lambda ins, outs: dist.broadcast(outs[0], src=src, group=group, async_op=True),
            [tensor],
            [tensor],
            async_op,
        )

    def broadcast_object_list(
        self, object_list: list[Any], src: int, group: Any = None, device: Any = None
    ) -> None:
        return dist.broadcast_object_list(object_list, src=src, group=group, device=device)

    def all_gather(
        self,
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return self._launch(
            lambda ins, outs: dist.all_gather(outs, ins[0], group=group, async_op=True),
            [tensor],
            tensor_list,
            async_op,
        )

    def all_gather_object(self, object_list: list[Any], obj: Any, group: Any = None) -> None:
        return dist.all_gather_object(object_list, obj, group=group)

    def all_gather_into_tensor(
        self,
        output_tensor: torch.Tensor,
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return self._launch(
            lambda ins, outs: flat._all_gather(outs[0], ins[0], group=group, async_op=True),
            [tensor],
            [output_tensor],
            async_op,
        )

    def all_gather_coalesced(
        self,
        output_tensors: Sequence[torch.Tensor],
        input_tensors: Sequence[torch.Tensor],
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        works = [
            self.all_gather_into_tensor(output, tensor, group, async_op=True)
            for output, tensor in zip(output_tensors, input_tensors, strict=True)
        ]
        return _finish(flat._Pending(works), async_op)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return self._launch(
            lambda ins, outs: dist.all_to_all_single(
                outs[0],
                ins[0],
                output_split_sizes=output_split_sizes,
                input_split_sizes=input_split_sizes,
                group=group,
                async_op=True,
            ),
            [tensor],
            [output],
            async_op,
        )

    def all_to_all(
        self,
        output_tensor_list: Sequence[torch.Tensor],
        input_tensor_list: Sequence[torch.Tensor],
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if not _on_gloo(group):
            return dist.all_to_all(
                list(output_tensor_list), list(input_tensor_list), group=group, async_op=async_op
            )
        # gloo has only the flat form
        sizes_in = [tensor.numel() for tensor in input_tensor_list]
        sizes_out = [tensor.numel() for tensor in output_tensor_list]
        packed = torch.cat([tensor.reshape(-1) for tensor in input_tensor_list])
        inbox = packed.new_empty(sum(sizes_out))
        work = self.all_to_all_single(inbox, packed, sizes_out, sizes_in, group, async_op=True)

        def unpack() -> None:
            for target, part in zip(output_tensor_list, inbox.split(sizes_out), strict=True):
                target.copy_(part.view(target.shape))

        return _finish(work, async_op, unpack)

    def gather(
        self,
        tensor: torch.Tensor,
        gather_list: list[torch.Tensor] | None = None,
        dst: int = 0,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return self._launch(
            lambda ins, outs: dist.gather(
                ins[0], outs or None, dst=dst, group=group, async_op=True
            ),
            [tensor],
            gather_list or [],
            async_op,
        )

    def scatter(
        self,
        tensor: torch.Tensor,
        scatter_list: list[torch.Tensor] | None = None,
        src: int = 0,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return self._launch(
            lambda ins, outs: dist.scatter(
                outs[0], ins or None, src=src, group=group, async_op=True
            ),
            scatter_list or [],
            [tensor],
            async_op,
        )

    # ------------------------------------------------------------------ point to point
    def send(self, tensor: torch.Tensor, dst: int, group: Any = None, tag: int = 0) -> None:
        self.isend(tensor, dst, group, tag).wait()

    def recv(
        self, tensor: torch.Tensor, src: int | None = None, group: Any = None, tag: int = 0
    ) -> Any:
        if tensor.is_cuda and _on_gloo(group):
            host = torch.empty_like(tensor, device="cpu")
            sender = dist.recv(host, src=src, group=group, tag=tag)
            tensor.copy_(host)
            return sender
        return dist.recv(tensor, src=src, group=group, tag=tag)

    def isend(self, tensor: torch.Tensor, dst: int, group: Any = None, tag: int = 0) -> Any:
        if tensor.is_cuda and _on_gloo(group):
            tensor = tensor.cpu()
        return flat._Pending([dist.isend(tensor, dst, group=group, tag=tag)], keep=tensor)

    def irecv(
        self, tensor: torch.Tensor, src: int | None = None, group: Any = None, tag: int = 0
    ) -> Any:
        return self._launch(
            lambda ins, outs: dist.irecv(outs[0], src=src, group=group, tag=tag),
            [],
            [tensor],
            True,
        )

    def batch_isend_irecv(self, p2p_op_list: Sequence[Any]) -> list[Any]:
        return dist.batch_isend_irecv(list(p2p_op_list))

    # ------------------------------------------------------------------ waiting for each other
    def barrier(self, group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        if device_ids is None and self.get_backend(group) == "nccl":
            device_ids = [torch.cuda.current_device()]  # else NCCL guesses, and warns
        return dist.barrier(group=group, async_op=async_op, device_ids=device_ids)

    def monitored_barrier(
        self, group: Any = None, timeout: Any = None, wait_all_ranks: bool = False
    ) -> None:
        if self.get_backend(group) != "gloo":
            return self.barrier(group)
        return dist.monitored_barrier(group=group, timeout=timeout, wait_all_ranks=wait_all_ranks)

    def init_device_mesh(self, mesh_shape: Sequence[int], mesh_dim_names: Sequence[str]) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        device = "cuda" if self.get_backend() == "nccl" else "cpu"
        return init_device_mesh(device, tuple(mesh_shape), mesh_dim_names=tuple(mesh_dim_names))

    # ------------------------------------------------------------------ inside
    def _launch(
        self,
        call: Callable[[list[torch.Tensor], list[torch.Tensor]], Any],
        ins: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        async_op: bool,
    ) -> Any:
        """Start ``call``; CUDA tensors of a gloo group take part through host copies."""
        if not any(tensor.is_cuda for tensor in (*ins, *outs)) or not self._stages:
            return _finish(call(list(ins), list(outs)), async_op)
        host = {id(tensor): flat._host(tensor) for tensor in (*ins, *outs)}

        def copy_back() -> None:
            for tensor in outs:
                tensor.detach().copy_(host[id(tensor)])

        work = call([host[id(t)] for t in ins], [host[id(t)] for t in outs])
        return _finish(work, async_op, copy_back)

    @property
    def _stages(self) -> bool:
        return dist.get_backend() == "gloo"


def _finish(work: Any, async_op: bool, after: Callable[[], None] | None = None) -> Any:
    """Return torch's own work, or a handle that also does ``after``; None when it is to be waited for."""
    if after is not None:
        work = flat._Pending([work], after)
    if async_op:
        return work
    if work is not None:
        work.wait()
    return None


def _divider(tensor: torch.Tensor, size: int) -> Callable[[], None]:
    def divide() -> None:
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            tensor.detach().div_(size)
        else:
            tensor.detach().div_(size, rounding_mode="floor")

    return divide


def _on_gloo(group: Any) -> bool:
    return dist.get_backend(group) == "gloo"


def _op_name(op: Any) -> str:
    """Return the name of our, or of torch's, reduction."""
    if isinstance(op, ReduceOp):
        return op.name
    return str(op).rpartition(".")[2]


def _torch_op(op: Any) -> Any:
    """Translate our reduction to torch's; torch's own passes through."""
    if not isinstance(op, ReduceOp):
        return op
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return getattr(dist.ReduceOp, op.name)
