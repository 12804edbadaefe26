# SPDX-License-Identifier: Apache-2.0
"""Batches of about as many tokens each: sequences packed by length, and learning rates that follow the batch's size.

A pack holds sequences of together at most ``max_tokens``. A step takes ``effective_batch_size`` packs, so its number of
sequences varies; the learning rate is scaled by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.errors import explain

from ...config_errors import ConfigValueError
from . import metric_files
from .data_analyzer import DistributedDataAnalyzer
from .indexed_dataset import MMapIndexedDataset
from .packs import Pack, batch_by_seqlens
from .variable_lr import Constant, VariableBatchSizeLR
from .variable_lr import scale_lr as scale_lr

_METRIC = "seqlen"
_ENABLE = "enable data_efficiency and data_sampling.dynamic_batching in its configuration"


class _PackCollate:
    """Joins the samples of packs to one batch; a class, so that worker processes get it."""

    def __init__(
        self,
        dataset: Any,
        longest: Sequence[int],
        collate_fn: Callable[..., Any] | None,
        padding_fn: Callable[[Any, int], Any] | None,
    ) -> None:
        self.dataset, self.longest = dataset, [int(tokens) for tokens in longest]
        self.collate_fn, self.padding_fn = collate_fn, padding_fn

    def __call__(self, packs: list[Pack]) -> Any:
        samples = []
        for step, ids in packs:
            found = [self.dataset[number] for number in ids]
            if self.padding_fn is not None:
                found = [self.padding_fn(sample, self.longest[step]) for sample in found]
            samples += found
        return self.collate_fn(samples) if self.collate_fn is not None else samples


def dataloader_for_variable_batch_size(
    dataset: Any,
    microbatch_ids: Sequence[Pack],
    batch_max_seqlens: Sequence[int],
    dataloader_rank: int = 0,
    dataloader_batch_size: int = 1,
    dataloader_num_replicas: int = 1,
    dataloader_collate_fn: Callable[..., Any] | None = None,
    dataloader_num_workers: int = 2,
    dataloader_pin_memory: bool = False,
    required_microbatches_of_same_seqlen: bool = False,
    sample_padding_fn: Callable[[Any, int], Any] | None = None,
) -> tuple[DataLoader, dict[str, Any]]:
    """A loader of packs for one rank.

    Args:
        dataset: what the packs' numbers are of.
        microbatch_ids: the packs of `batch_by_seqlens`.
        batch_max_seqlens: the longest sequence of each step.
        dataloader_rank: this data-parallel rank.
        dataloader_batch_size: packs that are joined to a micro batch.
        dataloader_num_replicas: data-parallel ranks.
        dataloader_collate_fn: makes a batch of a list of samples; None leaves the list.
        dataloader_num_workers: worker processes.
        dataloader_pin_memory: put batches into pinned memory.
        required_microbatches_of_same_seqlen: pad all samples of a step to its longest one.
        sample_padding_fn: pads a sample to a number of tokens.

    Returns:
        The loader, and the arguments with which `engine.deepspeed_io` makes the like.

    Raises:
        ValueError: padding is required and there is no function for it.
    """
    padding = _padding(required_microbatches_of_same_seqlen, sample_padding_fn)
    packs = list(microbatch_ids)
    sampler: DistributedSampler = DistributedSampler(
        packs,  # type: ignore[arg-type]
        num_replicas=dataloader_num_replicas,
        rank=dataloader_rank,
        shuffle=False,
    )
    collate = _PackCollate(dataset, batch_max_seqlens, dataloader_collate_fn, padding)
    options = {
        "dataset": packs,
        "batch_size": dataloader_batch_size,
        "pin_memory": dataloader_pin_memory,
        "data_sampler": sampler,
        "collate_fn": collate,
        "num_local_io_workers": dataloader_num_workers,
    }
    loader: DataLoader = DataLoader(
        packs,  # type: ignore[arg-type]
        batch_size=dataloader_batch_size,
        sampler=sampler,
        num_workers=dataloader_num_workers,
        collate_fn=collate,
        pin_memory=dataloader_pin_memory,
    )
    return loader, options


def _padding(required: bool, sample_padding_fn: Callable[[Any, int], Any] | None) -> Any:
    if required and sample_padding_fn is None:
        raise ConfigValueError(
            explain(
                "samples of one length need a function that pads them", fix="give sample_padding_fn"
            )
        )
    return sample_padding_fn if required else None


def lr_scheduler_for_variable_batch_size(
    base_batch_size: int,
    batch_sizes: Sequence[int],
    dataloader: Any,
    lr_scheduler_or_optimizer: Any,
    lr_scaling_method: str | None = "linear",
    verbose: bool = False,
) -> VariableBatchSizeLR:
    """A `VariableBatchSizeLR` over a schedule, or over the learning rates that an optimizer has."""
    base = lr_scheduler_or_optimizer
    if isinstance(base, VariableBatchSizeLR):
        base = base.base_lr_scheduler
    if not (hasattr(base, "step") and hasattr(base, "get_last_lr")):
        base = Constant(base)
    return VariableBatchSizeLR(
        base, base_batch_size, batch_sizes, dataloader, lr_scaling_method, verbose=verbose
    )


def get_dataloader_and_lr_scheduler_for_variable_batch_size(
    dataset: Any,
    dataset_seqlens: Sequence[int] | torch.Tensor | np.ndarray,
    max_tokens: int,
    effective_batch_size: int,
    dataset_filter_ids: Sequence[int] | None = None,
    lr_scaling_method: str | None = "linear",
    min_batch_size: int = 1,
    max_batch_size: int | None = None,
    sequence_picking_order: str = "dataloader",
    dataloader_batch_size: int = 1,
    dataloader_rank: int = 0,
    dataloader_num_replicas: int = 1,
    dataloader_num_workers: int = 0,
    dataloader_collate_fn: Callable[..., Any] | None = None,
    dataloader_pin_memory: bool = False,
    lr_scheduler_or_optimizer: Any = None,
    required_microbatches_of_same_size: bool = False,
    required_microbatches_of_same_seqlen: bool = False,
    sample_padding_fn: Callable[[Any, int], Any] | None = None,
    verbose: bool = False,
    seed: int | None = None,
) -> tuple[DataLoader, VariableBatchSizeLR | None, dict[str, Any]]:
    """Pack a dataset, and make the loader and the learning rates for it.

    Args are those of `batch_by_seqlens`, `dataloader_for_variable_batch_size` and `VariableBatchSizeLR`, and:

    Args:
        dataset_seqlens: tokens of each sample of the dataset.
        effective_batch_size: packs of a step, and the number of sequences that the learning rates are for.
        dataset_filter_ids: the samples to use; None means all.
        lr_scheduler_or_optimizer: what the learning rates come from; None for no schedule.

    Returns:
        The loader, the schedule (or None) and the arguments for `engine.deepspeed_io`.

    Raises:
        ValueError: a micro batch of all ranks is no part of a step.
    """
    step = dataloader_batch_size * dataloader_num_replicas
    if effective_batch_size % step:
        raise ConfigValueError(
            explain(
                "the packs of a step must be a multiple of those of a micro batch of all ranks",
                got=effective_batch_size,
                expected=f"a multiple of {step}",
            )
        )
    ids = list(range(len(dataset_seqlens)) if dataset_filter_ids is None else dataset_filter_ids)
    packs, sizes, longest = batch_by_seqlens(
        [int(dataset_seqlens[number]) for number in ids],
        max_tokens,
        ids,
        min_batch_size,
        max_batch_size,
        sequence_picking_order,
        effective_batch_size,
        required_microbatches_of_same_size,
        verbose,
        seed,
    )
    loader, options = dataloader_for_variable_batch_size(
        dataset,
        packs,
        longest,
        dataloader_rank,
        dataloader_batch_size,
        dataloader_num_replicas,
        dataloader_collate_fn,
        dataloader_num_workers,
        dataloader_pin_memory,
        required_microbatches_of_same_seqlen,
        sample_padding_fn,
    )
    scheduler = None
    if lr_scheduler_or_optimizer is not None:
        scheduler = lr_scheduler_for_variable_batch_size(
            effective_batch_size,
            sizes,
            loader,
            lr_scheduler_or_optimizer,
            lr_scaling_method,
            verbose,
        )
    return loader, scheduler, options


def get_dataloader_and_lr_scheduler_for_variable_batch_size_deepspeed(
    dataset: Any,
    engine: Any,
    dataset_seqlens: Sequence[int] | torch.Tensor | np.ndarray | None = None,
    dataset_filter_ids: Sequence[int] | None = None,
    dataloader_collate_fn: Callable[..., Any] | None = None,
    sample_padding_fn: Callable[[Any, int], Any] | None = None,
    batch_seqlens_fn: Callable[[Any], Any] | None = None,
) -> tuple[Any, VariableBatchSizeLR | None, dict[str, Any]]:
    """Pack a dataset as the section ``dynamic_batching`` of an engine's configuration says.

    Args:
        dataset: map-style dataset.
        engine: of `deepspeed.initialize`.
        dataset_seqlens: tokens of each sample; None reads them from ``metrics_path``, or measures and writes them there.
        dataset_filter_ids: the samples to use; None means all.
        dataloader_collate_fn: makes a batch of a list of samples.
        sample_padding_fn: pads a sample to a number of tokens; pipelines need it.
        batch_seqlens_fn: the tokens of each sample of a batch; needed to measure.

    Returns:
        The loader, the schedule to set as ``engine.lr_scheduler``, and the arguments that the loader was made with.

    Raises:
        ValueError: ``dynamic_batching`` is not enabled, or lengths are not known and cannot be measured.
    """
    sampling = engine.data_sampling_config()
    section, data = sampling["dynamic_batching"], engine.mesh.data
    if not (engine.data_efficiency_enabled() and section["enabled"]):
        raise ConfigValueError(
            explain("the engine was not configured for batches of variable size", fix=_ENABLE)
        )
    if dataset_seqlens is None:
        dataset_seqlens = _measured(dataset, section, dataloader_collate_fn, batch_seqlens_fn)
    pipeline = bool(engine.pipeline_parallelism)
    _, scheduler, options = get_dataloader_and_lr_scheduler_for_variable_batch_size(
        dataset,
        dataset_seqlens,
        section["max_tokens"],
        engine.train_batch_size(),
        dataset_filter_ids,
        section["lr_scaling_method"],
        section["min_batch_size"],
        section["max_batch_size"],
        section["sequence_picking_order"],
        engine.train_micro_batch_size_per_gpu(),
        data.rank,
        data.size,
        sampling["num_workers"],
        dataloader_collate_fn,
        sampling["pin_memory"],
        engine.lr_scheduler or engine.optimizer,
        pipeline,
        pipeline,
        sample_padding_fn,
        section["verbose"],
        engine.data_efficiency_config()["seed"],
    )
    return engine.deepspeed_io(**options), scheduler, options


def _measured(
    dataset: Any,
    section: dict[str, Any],
    collate_fn: Callable[..., Any] | None,
    batch_seqlens_fn: Callable[[Any], Any] | None,
) -> np.ndarray:
    """The lengths in the folder ``metrics_path``; they are measured on all ranks if there are none yet."""
    if "metrics_path" not in section:
        raise ConfigValueError(
            explain(
                "the samples' lengths are not known",
                fix="set dynamic_batching.metrics_path, or give dataset_seqlens",
            )
        )
    folder = Path(section["metrics_path"])
    fname = str(folder / _METRIC / f"{_METRIC}_sample_to_metric")
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    if world > 1:
        dist.barrier()  # nobody looks while another one writes
    if not MMapIndexedDataset.exists(fname):
        if batch_seqlens_fn is None:
            raise ConfigValueError(
                explain(
                    "the samples' lengths are not known and cannot be measured",
                    got=f"no {fname}.idx",
                    fix="give batch_seqlens_fn or dataset_seqlens",
                )
            )
        if world > 1:
            dist.barrier()  # all have looked
        on_host = world == 1 or dist.get_backend() == "gloo"
        DistributedDataAnalyzer(
            dataset,
            num_workers=world,
            worker_id=rank,
            metric_names=[_METRIC],
            metric_functions=[batch_seqlens_fn],
            metric_types=[metric_files.SINGLE],
            save_path=str(folder),
            collate_fn=collate_fn,
            device="cpu" if on_host else get_accelerator().current_device_name(),
        ).run_map_reduce()
    lengths = metric_files.read_values(fname)
    if len(lengths) != len(dataset):
        raise ConfigValueError(
            explain(
                f"the lengths in {folder} are of another dataset",
                got=f"{len(lengths)} samples",
                expected=f"{len(dataset)}",
                fix="delete the folder, or set another metrics_path",
            )
        )
    return lengths
