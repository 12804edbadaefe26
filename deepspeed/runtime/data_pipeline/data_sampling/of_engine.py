# SPDX-License-Identifier: Apache-2.0
"""What an engine's section ``data_sampling`` asks of its training loader."""

from __future__ import annotations

from typing import Any


def add_sampling(engine: Any, dataset: Any, batch_size: int, options: dict[str, Any]) -> None:
    """Put the section's settings, and the curriculum's sampler, into the arguments of a training loader.

    What the caller of `deepspeed_io` gave stays as it is.
    """
    if not (engine.data_efficiency_enabled() and engine.data_sampling_enabled()):
        return
    sampling = engine.data_sampling_config()
    options["pin_memory"] = bool(sampling["pin_memory"])
    if options["num_local_io_workers"] is None:
        options["num_local_io_workers"] = sampling["num_workers"]
    if options["data_sampler"] is None and engine.curriculum_learning_enabled():
        from .data_sampler import DeepSpeedDataSampler

        data = engine.mesh.data
        options["data_sampler"] = DeepSpeedDataSampler(
            engine.data_efficiency_config(),
            len(dataset),
            batch_size,
            data.rank,
            data.size,
            data.group,
            engine.gradient_accumulation_steps(),
            engine.global_rank,
            drop_last=engine.dataloader_drop_last(),
        )
