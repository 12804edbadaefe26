# SPDX-License-Identifier: Apache-2.0
"""The engine's loaders and batch sizes."""

from __future__ import annotations

from typing import Any

from . import build, dataloader


class DataControl:
    """Methods of the engine that make loaders and change batch sizes."""

    _config: Any
    collate_fn: Any
    mesh: Any
    training_dataloader: Any

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Any = None,
        num_local_io_workers: int | None = None,
    ) -> Any:
        """A loader over `dataset` for this data-parallel rank; see `runtime.dataloader`."""
        return build.build_loader(
            self,
            dataset,
            batch_size=batch_size,
            route=route,
            pin_memory=pin_memory,
            data_sampler=data_sampler,
            collate_fn=collate_fn or self.collate_fn,
            num_local_io_workers=num_local_io_workers,
        )

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the global batch size by changing the number of accumulated micro-batches.

        Raises:
            ValueError: if it is no multiple of micro-batch size times data-parallel ranks.
        """
        build.resize_batch(self._config, train_batch_size, self.mesh.data.size)
        self.clock.accumulation = self._config.gradient_accumulation_steps

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the micro-batch size; the accumulation stays. Existing loaders are not touched."""
        self._config.train_batch_size = (
            micro_batch_size * self.gradient_accumulation_steps() * self.mesh.data.size
        )
        self._config.train_micro_batch_size_per_gpu = micro_batch_size

    def set_data_post_process_func(self, post_process_func: Any) -> None:
        """Have the training loader pass every batch through `post_process_func`."""
        if self.training_dataloader is not None:
            self.training_dataloader.post_process_func = post_process_func

    def set_dataloader(self, loader: Any) -> None:
        """Use `loader` as `training_dataloader`."""
        self.training_dataloader = loader

    def set_custom_curriculum_learning_schedule(self, schedule_func_dict: dict[str, Any]) -> None:
        """Pass a curriculum's own schedules to the training loader's sampler, if it has a curriculum."""
        sampler = getattr(self.training_dataloader, "data_sampler", None)
        if hasattr(sampler, "set_custom_curriculum_learning_schedule"):
            sampler.set_custom_curriculum_learning_schedule(schedule_func_dict)

    is_map_style_dataset = staticmethod(dataloader.is_map_style_dataset)
    is_iterable_style_dataset = staticmethod(dataloader.is_iterable_style_dataset)
