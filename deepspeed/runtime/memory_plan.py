# SPDX-License-Identifier: Apache-2.0
"""From a configuration and a model, or only its size, to the memory plan of a run; nothing is allocated."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import psutil

from deepspeed.accelerator import get_accelerator
from deepspeed.utils import env
from deepspeed.utils.errors import DeepSpeedError, explain

from .zero.estimate import (
    DEVICE,
    HOST,
    MemoryPlan,
    ModelSize,
    Run,
    Widths,
    check_fits,
    memory_plan,
)

# Optimizer states per element that are not Adam's two.
_STATES = {"adagrad": 1, "lion": 1, "muon": 1, "sgd": 0, "musgd": 0, "rmsprop": 1}
_NUMBER = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
# A transformer's width per layer, and its vocabulary, where only its size is known (GPT-3's and Llama's proportions).
_WIDTH_PER_LAYER, _VOCABULARY = 128, 50_000


def plan_for(
    config: Any, model: ModelSize, world: int = 1, device_is_host: bool = False
) -> MemoryPlan:
    """The memory plan of a parsed configuration.

    Args:
        config: a `DeepSpeedConfig`.
        model: sizes of the parameters.
        world: ranks of the data axis.
        device_is_host: the model computes in host memory.
    """
    from .build import build_plan
    from .build_order import bytes_beside

    plan, widths = build_plan(config), widths_of(config)
    run = Run(
        world=world,
        **_smaller_groups(config.zero_config, world),
        accumulation=config.gradient_accumulation_steps or 1,
        gathered=_gathered(config.zero_config, model),
        in_place=plan.stage == 0 and widths.param == 4,
        device_is_host=device_is_host,
        beside=bytes_beside(config.zero_config, widths),
    )
    return memory_plan(model, plan, widths, run)


def _smaller_groups(zero: Any, world: int) -> dict[str, Any]:
    """What MiCS and hpZ of stage 3 say of groups below all ranks."""
    if int(zero.stage) != 3:
        return {}
    mics, second = int(zero.mics_shard_size), int(zero.zero_hpz_partition_size)
    return {
        "shards": mics if 0 < mics < world else None,
        "second": second if 1 < second < world else 0,
    }


def refuse_what_cannot_fit(
    config: Any, model: Any, world: int, device: Any, optimizer: Any
) -> None:
    """Compare the memory plan of a run with the memory that is free now, before anything is allocated.

    Args:
        config: a `DeepSpeedConfig`.
        model: the torch module; the memory that it holds already counts as free.
        world: ranks of the data axis.
        device: where the model computes.
        optimizer: the caller's; None leaves it to the configuration.

    Raises:
        DeepSpeedMemoryError: a MemoryError whose message holds the table.
    """
    size = ModelSize.of_module(model)
    if optimizer is None and config.optimizer_name is None:
        size = ModelSize((), (*size.trainable, *size.frozen), size.largest_layer)
    plan = plan_for(config, size, world, device_is_host=device.type == "cpu")
    held = {"cpu": 0, device.type: 0}
    for param in model.parameters():
        if param.device.type in held:
            held[param.device.type] += param.numel() * param.element_size()
    ranks_here = env.LOCAL_SIZE.get() or 1
    free = {HOST: psutil.virtual_memory().available // ranks_here + held["cpu"]}
    if device.type != "cpu":
        free[DEVICE] = get_accelerator().available_memory() + held[device.type]
    check_fits(plan, free)


def _gathered(zero: Any, model: ModelSize) -> int:
    """Elements of sharded parameters that the residency rules of stage 3 keep whole at once, at most."""
    small = sum(
        n for n in (*model.trainable, *model.frozen) if n <= zero.param_persistence_threshold
    )
    ahead = int(zero.prefetch_bucket_size) + model.largest_layer
    # What forward leaves whole for backward: of each element the way back is as long as the way there.
    kept = int(zero.max_reuse_distance) // 2
    return small + min(int(zero.max_live_parameters), max(ahead, kept))


def widths_of(config: Any) -> Widths:
    """Bytes per element that a configuration leads to; a model of no configured precision counts as fp32."""
    import torch

    from .build import build_precision

    precision = build_precision(config)
    param = precision.compute or torch.float32
    options = config.optimizer_params or {}
    wide = options.get("fp32_optimizer_states", True) and not getattr(
        config.bfloat16_config, "bf16_optimizer_states", False
    )
    name = (config.optimizer_name or "adam").lower()
    master = precision.master_dtype(param)
    states = _STATES.get(name, 2)
    if name == "sgd" and options.get("momentum", 0):
        states = 1
    return Widths(
        param=param.itemsize,
        master=master.itemsize,
        grad=precision.accumulate_dtype(param).itemsize,
        reduce=precision.reduce_dtype(param).itemsize,
        state=master.itemsize if wide else 2,
        states=states,
    )


def read_config(source: Any) -> Any:
    """Parse a configuration for planning: batch sizes and every "auto" are left out, they do not matter here.

    Raises:
        DeepSpeedConfigError: and what else `DeepSpeedConfig` raises.
    """
    from .config import DeepSpeedConfig, load_config

    raw = _without_auto(load_config(source))
    accumulation = raw.get("gradient_accumulation_steps", 1)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "elasticity"):
        raw.pop(key, None)
    return DeepSpeedConfig(
        {**raw, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulation}
    )


# - the report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words that ask for a memory plan."""
    add = parser.add_argument
    add("--plan", metavar="CONFIG", help="print what a run of this configuration keeps in memory")
    add("--model-size", metavar="N", help="with --plan: number of parameters, such as 7B or 350M")
    add("--model", metavar="FILE", help="with --plan: model file or folder, instead of a number")
    add("--ranks", type=int, default=1, help="with --plan: data-parallel processes (default 1)")


def report(parser: argparse.ArgumentParser, words: argparse.Namespace, on_cpu: bool) -> None:
    """Print the memory plan that `words` ask for, touching no device; a mistake ends the program with one line."""
    if (words.model is None) == (words.model_size is None) or words.ranks < 1:
        parser.error("--plan needs one of --model-size and --model, and --ranks of at least 1")
    try:
        config = read_config(words.plan)
        if words.model is not None:
            size = read_model_size(words.model)
        else:
            size = typical_transformer(parse_number(words.model_size))
        table = plan_for(config, size, words.ranks, device_is_host=on_cpu)
    except (OSError, ValueError, TypeError, AssertionError, DeepSpeedError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if words.model is None:
        print("Only a number is known, so the layers of a typical transformer are assumed.")
    print(table)
    print(
        "Activations, buffers and libraries come on top; ranks of a machine share its host memory."
    )


# - sizes


def parse_number(text: str) -> int:
    """`7B`, `350M`, `1.3e9` or plain digits, as a number of parameters.

    Raises:
        ValueError: it is no number.
    """
    cleaned = text.strip().upper().replace("_", "").replace(",", "")
    unit = _NUMBER.get(cleaned[-1:], 1.0)
    try:
        number = round(float(cleaned[:-1] if unit != 1.0 else cleaned) * unit)
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise ValueError(
            explain(
                "this is no model size",
                got=text,
                expected="a number such as 7B, 350M or 1300000000",
            )
        )
    return number


def typical_transformer(numel: int) -> ModelSize:
    """A decoder of about `numel` parameters, in the proportions that published ones have."""
    width = max(1, round((numel * _WIDTH_PER_LAYER / 12) ** (1 / 3)))
    embedding = min(_VOCABULARY * width, numel // 2)
    block = 12 * width * width
    layers = max(1, round((numel - embedding) / block))
    rest = numel - embedding
    each, longer = divmod(rest, layers)
    parts: list[int] = [embedding] if embedding else []
    for layer in range(layers):
        size = each + (layer < longer)
        third = size // 3
        parts += [size - 2 * third, third, third]
    return ModelSize(tuple(p for p in parts if p), largest_layer=max(parts))


def read_model_size(path: str | Path) -> ModelSize:
    """The sizes of the tensors in a model file: safetensors (or its index), a torch checkpoint, or a folder of them.

    Only headers are read of safetensors, and no tensor data is kept of the others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of no known form.
    """
    shapes = dict(_shapes(Path(path)))
    owners: dict[str, int] = {}
    for name, shape in shapes.items():
        owner = name.rpartition(".")[0]
        owners[owner] = owners.get(owner, 0) + prod(shape)
    return ModelSize(
        tuple(prod(shape) for shape in shapes.values()),
        largest_layer=max(owners.values(), default=0),
    )


def _shapes(path: Path) -> Iterable[tuple[str, tuple[int, ...]]]:
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        if not files:
            raise ValueError(
                explain(
                    "the folder holds no model",
                    got=str(path),
                    expected="*.safetensors or *.bin in it",
                )
            )
        return [item for file in files for item in _shapes(file)]
    if path.name.endswith(".index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        files = sorted({path.parent / name for name in index["weight_map"].values()})
        return [item for file in files for item in _shapes(file)]
    if path.suffix == ".safetensors":
        return _safetensors_shapes(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return _torch_shapes(path)
    raise ValueError(
        explain(
            "unknown kind of model file",
            got=str(path),
            expected=".safetensors, .index.json, .bin, .pt, .pth or a folder of these",
        )
    )


def _safetensors_shapes(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(explain("damaged safetensors file", got=str(path)))
        header = json.loads(file.read(length))
    return [(n, tuple(v["shape"])) for n, v in header.items() if n != "__metadata__"]


def _torch_shapes(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    import torch

    loaded = torch.load(path, map_location="meta", weights_only=True)
    state = loaded.get("module", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping):
        raise ValueError(
            explain(
                "no state dict in the file", got=type(state).__name__, expected="name -> tensor"
            )
        )
    return [(str(n), tuple(v.shape)) for n, v in state.items() if torch.is_tensor(v)]


def _without_auto(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_auto(v) for k, v in value.items() if v != "auto"}
    return value
