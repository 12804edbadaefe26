# SPDX-License-Identifier: Apache-2.0
"""The checkpoint format in words and patterns: every file name, every key, and what a tag may be.

Pure: imports neither torch nor the package, so that tools on a machine without either agree with the trainer. The
meaning of each key is written down once, in `Model`, `Optim` and `Zero`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath, PureWindowsPath

LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
MANIFEST = "manifest.json"
EXPORT_SCRIPT = "zero_to_fp32.py"

DATA_BEFORE_EXPERT = "use_data_before_expert_parallelism"
"""The key of the configuration that turns the numbering of expert-parallel ranks around."""

PARTIAL_SUFFIX = ".tmp"
"""A folder `<tag>.tmp` holds a save that was not published."""
PARTIAL_MARK = ".deepspeed_partial"
"""The file that tells our unpublished folders from a user's folder of the same name."""
REPLACED_SUFFIX = ".old"
"""A folder `<tag>.old` holds the tag's previous content while its new content is published."""
REPLACED_MARK = ".deepspeed_replaced"
"""The file that tells such a folder from a user's own copy under that name."""


class Model:
    """Keys of a model-states file."""

    MODULE = "module"
    BUFFER_NAMES = "buffer_names"
    OPTIMIZER = "optimizer"
    PARAM_SHAPES = "param_shapes"
    FROZEN_PARAM_SHAPES = "frozen_param_shapes"
    FROZEN_PARAM_FRAGMENTS = "frozen_param_fragments"
    SHARED_PARAMS = "shared_params"
    LR_SCHEDULER = "lr_scheduler"
    DATA_SAMPLER = "data_sampler"
    RANDOM_LTD = "random_ltd"
    SPARSE_MODULES = "sparse_tensor_module_names"
    SPARSE_MODULES_OLD = "csr_tensor_module_names"
    SKIPPED_STEPS = "skipped_steps"
    GLOBAL_STEPS = "global_steps"
    GLOBAL_SAMPLES = "global_samples"
    DP_WORLD_SIZE = "dp_world_size"
    MP_WORLD_SIZE = "mp_world_size"
    PARALLEL_DIMENSIONS = "checkpoint_parallel_dimensions"
    DS_CONFIG = "ds_config"
    DS_VERSION = "ds_version"
    NUM_EXPERTS = "num_experts"
    AUTOEP_LAYERS = "ds_autoep_layers"
    FOLDING = "folding"
    UNIVERSAL_INFO = "universal_checkpoint_info"
    RANDOM_STATES = "ds_random_states"
    """Ours: the states of the random generators of every rank."""
    LOADER_POSITION = "ds_loader_position"
    """Ours: where the training loader stands in its epoch."""


class Optim:
    """Keys of an optimizer shard file, outermost dict."""

    STATE = "optimizer_state_dict"
    DS_CONFIG = "ds_config"
    DS_VERSION = "ds_version"


class Zero:
    """Keys of `optimizer_state_dict` in a shard file, and of the inline optimizer of stage 0."""

    LOSS_SCALER = "loss_scaler"
    """Upstream: a pickled scaler object. We never write it (see `LOSS_SCALER_STATE`) and still read it."""
    LOSS_SCALER_STATE = "loss_scaler_state"
    """Ours: the scaler's attributes in a plain dict."""
    DYNAMIC_LOSS_SCALE = "dynamic_loss_scale"
    OVERFLOW = "overflow"
    CLIP_GRAD = "clip_grad"
    BASE_STATE = "base_optimizer_state"
    BASE_STATE_STEP = "base_optimizer_state_step"
    FP32_GROUPS = "single_partition_of_fp32_groups"
    STAGE = "zero_stage"
    GROUP_PADDINGS = "group_paddings"
    PARAM_PADDINGS = "param_alignment_paddings"
    PARTITION_COUNT = "partition_count"
    PARTITION_GROUPS = "ds_zero_partition_groups"
    EXPERT_FAMILY, REPLICATED_FAMILY = "autoep_expert", "replicated"
    """Kinds of parameters in those: an expert's, and the others."""
    SLICE_MAPPINGS = "param_slice_mappings"
    FP32_FLAT_GROUPS = "fp32_flat_groups"
    INNER = "optimizer_state_dict"
    WRAPPER_FLAT = "fp32_groups_flat"
    WRAPPER_LISTS = "fp32_groups"
    WRAPPER_NAMES = "fp32_group_names"
    """Ours: parameter names of each flat group of a stage 0 wrapper, in flat order."""


class Universal:
    """Names inside a universal checkpoint, and keys of its state files."""

    FOLDER = "zero"
    PARAM = "param"
    CAT_DIM = "cat_dim"
    N_SUB_PARAMS = "param_n_sub_params"
    SUB_PARAM_SHAPE = "sub_param_shape"
    VOCAB = "vocab_tensor"
    IS_EXPERT = "ep_is_expert_param"
    NUM_EXPERTS = "ep_num_experts"


def universal_state_file(name: str, state: str) -> str:
    """Path of one state of a parameter inside a universal folder."""
    return f"{Universal.FOLDER}/{name}/{state}.pt"


SCALER_FIELDS = (
    "cur_scale",
    "dynamic",
    "cur_iter",
    "last_overflow_iter",
    "scale_factor",
    "scale_window",
    "min_scale",
    "delayed_shift",
    "cur_hysteresis",
    "consecutive_hysteresis",
    "raise_error_at_min_scale",
)
"""Attributes of a loss scaler that a checkpoint carries (dtype is the run's own)."""

RESERVED_CLIENT_KEYS = frozenset(
    {Model.PARALLEL_DIMENSIONS, Model.RANDOM_STATES, Model.LOADER_POSITION}
)
RESERVED_CLIENT_KEYS_MOE = RESERVED_CLIENT_KEYS | {
    "ds_autoep_layers",
    "autoep_layers",
    Model.UNIVERSAL_INFO,
    "folding",
}

KEYS_NOT_IN_CLIENT_STATE = frozenset(
    {
        Model.MODULE,
        Model.SPARSE_MODULES,
        Model.SKIPPED_STEPS,
        Model.GLOBAL_STEPS,
        Model.DP_WORLD_SIZE,
        Model.MP_WORLD_SIZE,
        Model.DATA_SAMPLER,
        Model.RANDOM_LTD,
        Model.RANDOM_STATES,
        Model.LOADER_POSITION,
    }
)
"""What `load_checkpoint` keeps for itself; every other key is returned to the caller."""


def model_file(mp_rank: int = 0) -> str:
    """Model states of stages 0 to 2."""
    return f"mp_rank_{mp_rank:02d}_model_states.pt"


def zero3_model_file(dp_rank: int, mp_rank: int = 0) -> str:
    """Model states of stage 3, one for each data-parallel rank."""
    return f"zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_model_states.pt"


LAYER_FILES = "layer_*-model_states.pt"
"""A pipeline's layers (experts' files have no dash)."""
MODEL_FILES = ("mp_rank_*_model_states.pt", "zero_pp_rank_0_*_model_states.pt")
"""Patterns of the first data-parallel rank's model states, stages 0 to 2 before stage 3."""


def optim_file(dp_rank: int, mp_rank: int = 0, *, bf16: bool = False) -> str:
    """One rank's shard of the ZeRO optimizer."""
    prefix = "bf16_" if bf16 else ""
    return f"{prefix}zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt"


def optim_file_candidates(dp_rank: int, mp_rank: int = 0, *, bf16: bool = False) -> tuple[str, ...]:
    """Names under which a shard may be found: this precision's, the other's, and their old spelling."""
    names = tuple(optim_file(dp_rank, mp_rank, bf16=b) for b in (bf16, not bf16))
    return names + tuple(name.replace("_optim_states", "optim_states") for name in names)


def expert_file(layer: int, expert: int, mp_rank: int = 0) -> str:
    """One expert of one MoE layer."""
    return f"layer_{layer}_expert_{expert}_mp_rank_{mp_rank:02d}_model_states.pt"


def old_expert_file(expert: int, mp_rank: int = 0) -> str:
    """One expert, as written before layers were told apart (read only)."""
    return f"expert_{expert}_mp_rank_{mp_rank:02d}_model_states.pt"


def expert_files(mp_rank: int | None = None) -> tuple[str, str]:
    """Patterns of experts' files, of one model-parallel rank or of all."""
    rank = "*" if mp_rank is None else f"{mp_rank:02d}"
    return f"layer_*_expert_*_mp_rank_{rank}_*.pt", f"expert_*_mp_rank_{rank}_*.pt"


def expert_of(file: str) -> int | None:
    """The number over all ranks of the expert that a file holds, None for a file of something else."""
    match = re.match(r"(?:layer_\d+_)?expert_(\d+)_", file)
    return None if match is None else int(match[1])


def expert_optim_file(expp_rank: int, mp_rank: int = 0) -> str:
    """Optimizer of a mixture-of-experts model without ZeRO."""
    return f"expp_rank_{expp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt"


_OWN_FILE = re.compile(
    r"(?:(?:bf16_|fp16_)?zero_pp_rank_\d+_)?mp_rank_\d{2,}_(?:model|optim)_states\.pt"
    r"|layer_\d+(?:-[\w-]+)?-model_states\.pt"
    r"|(?:layer_\d+_)?expert_\d+_mp_rank_\d{2,}_model_states\.pt"
    r"|expp_rank_\d+_mp_rank_\d{2,}_optim_states\.pt"
    rf"|{re.escape(MANIFEST)}|{re.escape(PARTIAL_MARK)}|{re.escape(REPLACED_MARK)}"
)


def is_own_file(name: str) -> bool:
    """Whether a file name inside a tag folder belongs to the format (so that a new save may replace it)."""
    return _OWN_FILE.fullmatch(name) is not None


def natural_key(name: str) -> list[int | str]:
    """Sort key that puts `rank_10` after `rank_9`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


_DEVICES = frozenset(
    {"con", "prn", "aux", "nul"} | {f"{kind}{n}" for kind in ("com", "lpt") for n in range(1, 10)}
)
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*]')


def tag_problem(tag: str) -> str | None:
    """Say why `tag` cannot name a folder below the save folder on every system; None when it can.

    A tag is a relative path (usually one component). It must stay inside the save folder, be writable on Windows as
    on Linux, and not collide with the names this format gives a meaning.
    """
    if not tag.strip():
        return "it is empty"
    if PurePosixPath(tag).is_absolute() or PureWindowsPath(tag).anchor:
        return "it is an absolute path"
    parts = re.split(r"[\\/]", tag)
    if found := next((part for part in parts if part in ("", ".", "..")), None):
        return f"it has the component {found!r}"
    if "" in parts:
        return "it has an empty component"
    if _FORBIDDEN.search(tag):
        return 'it has a control character or one of <>:"|?*'
    if tag in (LATEST, LATEST_UNIVERSAL, EXPORT_SCRIPT):
        return "the name has a meaning of its own in a checkpoint folder"
    return next(filter(None, map(_part_problem, parts)), None)


def _part_problem(part: str) -> str | None:
    if part.split(".")[0].lower() in _DEVICES:
        return f"{part!r} is a device name on Windows"
    if part.endswith((" ", ".")):
        return f"{part!r} ends in a dot or a space, which Windows drops"
    if part.endswith((PARTIAL_SUFFIX, REPLACED_SUFFIX)):
        return f"{PARTIAL_SUFFIX} and {REPLACED_SUFFIX} mark unfinished saves"
    return None


def missing_keys(found: Iterable[str], needed: Iterable[str]) -> list[str]:
    """The needed keys that were not found, in the order of `needed`."""
    have = set(found)
    return [key for key in needed if key not in have]
