# SPDX-License-Identifier: Apache-2.0
"""The engine's side of AutoEP: experts of a Hugging Face model are spread over ranks before anything else is built."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from deepspeed import comm as dist
from deepspeed.checkpoint import autoep_metadata
from deepspeed.checkpoint import format as names
from deepspeed.utils import groups
from deepspeed.utils.errors import explain

from . import module_prep, sharding


class ExpertControl:
    """What an engine does for experts that are spread over ranks."""

    _config: Any
    mpu: Any
    module: torch.nn.Module
    _autoep_folding_spec: Any = None

    # - construction

    def _prepare_experts(self, model: torch.nn.Module) -> tuple[bool, list[int]]:
        """Spread the experts where that is asked for, and join the ranks that share any."""
        self._configure_expert_parallel(model)
        return module_prep.prepare_moe(model, self._config, self.mpu)

    def _configure_expert_parallel(self, model: torch.nn.Module) -> None:
        """Replace the model's layers of experts by such as hold this rank's share. Collective.

        Raises:
            ValueError: settings that cannot be, or do not fit the job or the model.
        """
        section = self._config.expert_parallel_config
        if not section.enabled:
            return
        # here, as few engines have experts to spread; and looked up anew, as callers replace these
        from deepspeed.module_inject import auto_ep, auto_ep_config, auto_ep_folding

        sizes = self._expert_parallel_sizes()
        more = self._folding_settings() if sizes["tp_size"] > 1 else {}
        auto_ep_config.validate_autoep_config(section, **sizes, **more)
        found = auto_ep.AutoEP(model, section)
        specs = found.ep_parser()
        auto_ep_config.validate_autoep_post_detection(section, specs)
        spec = None
        if sizes["tp_size"] > 1:
            world, pipe, tensor = (sizes[key] for key in ("world_size", "pp_size", "tp_size"))
            spec = auto_ep_folding.build_folding_spec(world, pipe, tensor, section.autoep_size)
        groups._create_expert_and_data_parallel(
            expert_parallel_size_=section.autoep_size,
            mp_size=max(sizes["tp_size"], sizes["sp_size"]),
            pp_size=sizes["pp_size"],
            mp_mode="sp" if sizes["sp_size"] > 1 else "tp",
            use_data_before_expert_parallel_=self._config.use_data_before_expert_parallel_,
            folding_spec=spec,
        )
        name = f"ep_size_{section.autoep_size}"
        rank = dist.get_rank(group=groups._get_expert_parallel_group(name))
        handles = None if spec is None else _folding_handles(spec, name)
        self._autoep_folding_spec = spec
        for layer_spec in specs:
            layer = found.replace_moe_layer(layer_spec, ep_size=section.autoep_size, ep_rank=rank)
            layer.experts.grad_share = self._expert_grad_share(name)
            if handles is not None:
                layer.set_deepspeed_parallelism(folding_group_handles=handles)
        if specs and self._config.zero_optimization_stage == 3:
            _refuse_at_stage_3(self, model)

    def _expert_parallel_sizes(self) -> dict[str, int]:
        mpu, tensor = self.mpu, self.autotp_size()  # type: ignore[attr-defined]
        theirs = _answer(
            mpu, "get_tensor_model_parallel_world_size", "get_model_parallel_world_size"
        )
        if max(tensor, 1) == 1 and theirs > 1:
            raise ValueError(
                explain(
                    "AutoEP does not know layers that an mpu divides",
                    got=f"bwc_tensor_model_parallel_world_size={theirs}",
                    expected="tensor_parallel.autotp_size, or no tensor parallelism",
                )
            )
        return {
            "world_size": dist.get_world_size(),
            "pp_size": _answer(mpu, "get_pipe_parallel_world_size"),
            "tp_size": max(tensor, 1),
            "sp_size": self._autoep_sequence_parallel_world_size(),
        }

    def _folding_settings(self) -> dict[str, Any]:
        config: Any = self._config
        compiled = getattr(config, "compile_config", None)
        return {
            "zero_stage": self.zero_optimization_stage(),  # type: ignore[attr-defined]
            "zero_offload_optimizer": _offloads(self.zero_offload_optimizer()),  # type: ignore[attr-defined]
            "zero_offload_param": _offloads(self.zero_offload_param()),  # type: ignore[attr-defined]
            "mpu": None if self.mpu is groups else self.mpu,
            "tp_preset_model": getattr(config.tensor_parallel_config, "preset_model", None),
            "use_data_before_expert_parallel": config.use_data_before_expert_parallel_,
            "deepcompile_enabled": bool(getattr(compiled, "deepcompile", False)),
        }

    def _autoep_sequence_parallel_world_size(self) -> int:
        own = getattr(self.mpu, "get_sequence_parallel_world_size", None)
        if callable(own):
            return int(own())
        wanted = (
            getattr(self._config, "sequence_parallel_size", None)
            if hasattr(self, "_config")
            else None
        )
        return int(wanted or groups._get_sequence_parallel_world_size())

    def _expert_grad_share(self, name: str) -> float:
        """What an expert's gradient is multiplied by, so that the reducer's average makes it that of all samples.

        Ranks that share experts add up the gradients of all their samples; the reducer then averages over the ranks
        with the same experts only.
        """
        config = self._config
        if config.gradient_allreduce_op == "sum":
            return 1.0
        mesh = groups.current_mesh()
        copies = mesh.expert_data[name].size
        samples = mesh.sequence_data.size
        sharded = config.zero_optimization_stage == 3
        summed = 1 if sharded else mesh.sequence.size  # see Plan.summed_ranks
        averaged = copies / summed if copies > 1 else 1.0
        return averaged * summed / samples

    def _share_expert_grads(self) -> None:
        """Tell layers of spread experts what their gradients are multiplied by."""
        for layer in module_prep.moe_layers(self.module):
            if getattr(layer, "ep_size", 1) > 1 and hasattr(layer, "grad_share"):
                layer.grad_share = self._expert_grad_share(layer.ep_group_name)

    # - ZeRO stage 3

    def _shard_params(self) -> Any:
        """At stage 3, cut the parameters, and say over which ranks each was cut."""
        residency = sharding.shard_params(self)
        if residency is not None and self._has_autoep_layers():
            self._resolve_zero3_param_placement()
        return residency

    def _has_autoep_layers(self) -> bool:
        return any(getattr(m, "_is_autoep_layer", False) for m in self.module.modules())

    def _validate_zero3_moe_compatibility(self) -> None:
        """Refuse what does not go with spread experts at ZeRO stage 3.

        Raises:
            AssertionError: naming it.
        """
        _refuse_at_stage_3(self, self.module)

    def _resolve_zero3_param_placement(self) -> None:
        """Note at each parameter over which ranks ZeRO stage 3 cuts it.

        Raises:
            AssertionError: an expert is cut over ranks that hold other experts.
        """
        for param in self.module.parameters():
            group = getattr(param, "ds_process_group", None)
            if getattr(param, "ds_zero_placement_family", None) == names.Zero.EXPERT_FAMILY:
                name = param.ds_zero_partition_group_name
                own = groups._get_expert_data_parallel_group(name)
                if group is not None and group is not own:
                    raise AssertionError(
                        explain(
                            "an expert is already ZeRO-partitioned over a non-expert process group",
                            expected=f"the ranks that hold the same experts, of {name}",
                            fix="pass the model to deepspeed.initialize before its experts are sharded",
                        )
                    )
                group = own
            elif group is None:
                group = groups._get_sequence_data_parallel_group()
            param.ds_process_group = group
            param.ds_zero_partition_process_group = group
            param.ds_zero_partition_world_size = dist.get_world_size(group=group)
            param.ds_zero_partition_rank = dist.get_rank(group=group)

    def _raise_if_autoep_zero3_consolidated_export(self, what: str) -> None:
        """Refuse to put weights together that ZeRO stage 3 has cut over the ranks of each expert.

        Raises:
            NotImplementedError: the model has such.
        """
        if self.zero_optimization_partition_weights() and self._has_autoep_layers():  # type: ignore[attr-defined]
            raise NotImplementedError(
                explain(
                    f"{what} cannot put spread experts of ZeRO stage 3 together",
                    fix="save a checkpoint and convert it with ds_to_universal.py",
                )
            )

    # - checkpoints: names that callers know

    @staticmethod
    def _get_expert_ckpt_name(
        checkpoints_path: str,
        layer_id: int,
        expert_id: int,
        tag: str,
        mpu: Any = None,
        checkpoint_mp_rank: int | None = None,
    ) -> str:
        """Path of an expert's file; of layer -1, that of older versions."""
        rank = checkpoint_mp_rank
        if rank is None:
            rank = 0 if mpu is None else mpu.get_model_parallel_rank()
        if layer_id <= -1:
            file = names.old_expert_file(expert_id, rank)
        else:
            file = names.expert_file(layer_id, expert_id, rank)
        return os.path.join(checkpoints_path, str(tag), file)

    @staticmethod
    def load_moe_state_dict(
        checkpoint_path: str,
        tag: str,
        state_dict: dict[str, Any],
        old_moe_load: bool,
        model: Any = None,
        mpu: Any = None,
        num_experts: int = 1,
        checkpoint_engine: Any = None,
        autoep_layers: Any = None,
    ) -> None:
        """Check what a checkpoint says of spread experts; `load_checkpoint` reads the files of experts.

        Raises:
            RuntimeError: it is malformed, or fields are missing.
        """
        autoep_metadata.check_entries(autoep_layers)

    @staticmethod
    def _validate_autoep_folding_checkpoint_metadata(
        state: Mapping[str, Any], folding_spec: Any = None, **expected: Any
    ) -> Any:
        """Compare what a file says of the ranks that shared experts with this run's; see `checkpoint.autoep_universal`."""
        from deepspeed.checkpoint.autoep_universal import check_folding

        return check_folding(state, folding_spec, **expected)


def _answer(mpu: Any, *methods: str) -> int:
    """What an mpu says, by the first of the methods that it has; 1 without."""
    for method in methods:
        if callable(found := getattr(mpu, method, None)):
            return int(found())
    return 1


def _offloads(section: Any) -> bool:
    return section is not None and str(getattr(section.device, "value", section.device)) != "none"


def _folding_handles(spec: Any, name: str) -> Any:
    from deepspeed.module_inject.auto_ep_folding import (
        FoldingGroupHandles,
        assert_group_matches_spec,
        local_folding_ranks,
    )

    ranks = local_folding_ranks(dist.get_rank(), spec)
    spread = groups._get_expert_parallel_group_ranks(name)
    copies = groups._get_expert_data_parallel_group_ranks(name)
    assert_group_matches_spec(([spread], [copies]), spec)
    return FoldingGroupHandles(
        spec=spec,
        tp_group=groups.get_tensor_model_parallel_group(),
        dense_dp_group=groups._get_data_parallel_group(),
        ep_group=groups._get_expert_parallel_group(name),
        edp_group=groups._get_expert_data_parallel_group(name),
        ep_group_name=name,
        tp_ranks=ranks["tp"],
        dense_dp_ranks=ranks["dense_dp"],
        ep_ranks=ranks["ep"],
        edp_ranks=ranks["edp"],
    )


def _refuse_at_stage_3(engine: Any, model: torch.nn.Module) -> None:
    config = engine._config
    zero = getattr(config, "zero_config", None)
    sequence = engine.__dict__.get("sequence_parallel_size")
    if sequence is None:
        sequence = engine._autoep_sequence_parallel_world_size()
    native = any(hasattr(module, "deepspeed_moe") for module in model.modules())
    rules = (
        (native, "Native DeepSpeed MoE layers do not go with AutoEP at ZeRO stage 3"),
        (sequence > 1, "sequence parallelism does not go with AutoEP at ZeRO stage 3"),
        (
            config.tensor_parallel_config.autotp_size > 1,
            "AutoTP does not go with AutoEP at ZeRO stage 3",
        ),
        (
            getattr(config, "mics_shard_size", 0) > 0,
            "MiCS (mics_shard_size) does not go with AutoEP",
        ),
        (
            getattr(zero, "zero_hpz_partition_size", 1) > 1,
            "hpZeRO (zero_hpz_partition_size) does not go with AutoEP",
        ),
        (
            not native and engine.zero_quantized_gradients(),
            "zero_quantized_gradients does not go with AutoEP",
        ),
    )
    for broken, what in rules:
        if broken:
            raise AssertionError(explain(what, fix="remove one of the two, or use ZeRO stage 2"))
