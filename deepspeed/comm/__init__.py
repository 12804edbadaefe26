# SPDX-License-Identifier: Apache-2.0
"""Communication between processes: ``import deepspeed.comm as dist``."""

from typing import Any

from deepspeed.utils.lazy import lazy_exports

_find, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".comm": [
            "ProcessGroup",
            "ReduceOp",
            "all_gather",
            "all_gather_coalesced",
            "all_gather_into_tensor",
            "all_gather_object",
            "all_reduce",
            "all_reduce_coalesced",
            "all_to_all",
            "all_to_all_single",
            "allgather_fn",
            "barrier",
            "batch_isend_irecv",
            "broadcast",
            "broadcast_object_list",
            "destroy_process_group",
            "enable_symm_mem_for_group",
            "gather",
            "get_all_ranks_from_group",
            "get_backend",
            "get_global_rank",
            "get_local_rank",
            "get_rank",
            "get_world_group",
            "get_world_size",
            "has_all_gather_into_tensor",
            "has_all_reduce_coalesced",
            "has_coalescing_manager",
            "has_reduce_scatter_tensor",
            "inference_all_reduce",
            "init_deepspeed_backend",
            "init_distributed",
            "initialize_mesh_device",
            "irecv",
            "is_available",
            "is_initialized",
            "isend",
            "log_summary",
            "monitored_barrier",
            "new_group",
            "recv",
            "reduce",
            "reduce_scatter",
            "reduce_scatter_fn",
            "reduce_scatter_tensor",
            "scatter",
            "send",
            "set_backend",
        ],
        ".profiling": [
            "comms_logger",
            "configure",
            "get_comm_operation_count",
            "get_logged_comm_ops",
            "has_comm_data",
            "reset_log",
        ],
        ".rendezvous": [
            "in_aml",
            "in_aws_sm",
            "in_dlts",
            "mpi_discovery",
            "patch_aml_env_for_torch_nccl_backend",
            "patch_aws_sm_env_for_torch_nccl_backend",
        ],
        ".torch": ["TorchBackend"],
        ".utils": [
            "get_local_rank_from_launcher",
            "get_world_rank_from_launcher",
            "get_world_size_from_launcher",
        ],
        "torch.distributed": ["P2POp"],
        "deepspeed.constants": ["TORCH_DISTRIBUTED_DEFAULT_PORT", "default_pg_timeout"],
    },
)


def __getattr__(name: str) -> Any:
    if name == "cdb":  # changes over time, so it is never stored here
        from . import comm

        return comm.cdb
    return _find(name)
