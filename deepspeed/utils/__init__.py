# SPDX-License-Identifier: Apache-2.0
"""Flat exports of the utilities, each looked up on first use."""

from .lazy import lazy_exports

# Not on first use: the function has its module's name, and Python would put the module there.
from .z3_leaf_module import z3_leaf_module as z3_leaf_module

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".logging": [
            "get_caller_func",
            "log_dist",
            "log_dist_once",
            "logger",
            "print_dist",
            "print_json_dist",
            "set_log_level_from_string",
            "warning_once",
        ],
        ".comms_logging": ["*"],
        ".groups": ["*"],
        ".debug": ["*"],
        ".init_on_device": ["OnDevice"],
        ".numa": ["get_numactl_cmd"],
        ".nvtx": ["instrument_w_nvtx"],
        ".torch": ["required_torch_version"],
        ".timer": ["NoopTimer", "SynchronizedWallClockTimer", "ThroughputTimer"],
        ".tensor_fragment": [
            "fragment_address",
            "get_full_hp_grad",
            "get_full_hp_param",
            "get_hp_fragment_mapping",
            "map_to_flat_opt_states",
            "safe_get_full_fp32_param",
            "safe_get_full_grad",
            "safe_get_full_optimizer_state",
            "safe_get_local_fp32_param",
            "safe_get_local_grad",
            "safe_get_local_optimizer_state",
            "safe_set_full_fp32_param",
            "safe_set_full_grad",
            "safe_set_full_optimizer_state",
            "safe_set_local_fp32_param",
            "safe_set_local_grad",
            "safe_set_local_optimizer_state",
            "safe_update_full_grad_vectorized",
            "set_full_hp_grad",
            "set_full_hp_param",
            "tensor_fragment",
        ],
        ".mixed_precision_linkage": ["lazy_init_hp_params_optimizer_state", "link_hp_params"],
        ".z3_leaf_module": [
            "get_z3_leaf_modules",
            "set_z3_leaf_module",
            "set_z3_leaf_modules",
            "set_z3_leaf_modules_by_name",
            "set_z3_leaf_modules_by_suffix",
            "unset_z3_leaf_modules",
            "z3_leaf_parameter",
        ],
        "deepspeed.comm": ["is_initialized"],
        "deepspeed.runtime.dataloader": ["RepeatingLoader"],
    },
)
