# SPDX-License-Identifier: Apache-2.0
"""How many bytes a run keeps, of what and where, computed before anything is allocated. No torch, no processes.

`memory_plan` answers for a row of the ZeRO table and a layout, as the optimizer would lay things out; the
`estimate_zero*` functions are the older rules of thumb that many guides quote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from deepspeed.utils.errors import DeepSpeedError, explain

from .layout import Layout
from .plan import WRITES_BEHIND, Placement, Plan

DEVICE, HOST = "device", "host"

# Of states in files: the part that is stepped, the next one, and the one before; see spill.py.
_PARTS_IN_MEMORY = 3
# Of parameters in files: a layer's slices that are read, and those that are written.
_SLICES_IN_MEMORY = 2
# Of gradients in files: those of the part that is stepped, and of the next one.
_GRADS_IN_MEMORY = 2


class DeepSpeedMemoryError(DeepSpeedError, MemoryError):
    """What the configuration needs does not fit; raised before anything is allocated."""


# - what is asked


@dataclass(frozen=True)
class ModelSize:
    """Elements of a model's parameters.

    Attributes:
        trainable: of each parameter that requires a gradient, in the model's order.
        frozen: of each other one.
        largest_layer: most elements that one module owns by itself.
    """

    trainable: tuple[int, ...]
    frozen: tuple[int, ...] = ()
    largest_layer: int = 0

    @classmethod
    def of_module(cls, model: Any) -> ModelSize:
        """The sizes of a torch module; sharded parameters count whole, shared ones once."""
        params = {id(p): p for p in model.parameters()}.values()
        return cls(
            tuple(_numel(p) for p in params if p.requires_grad),
            tuple(_numel(p) for p in params if not p.requires_grad),
            _largest_layer(model),
        )

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(self.trainable) + sum(self.frozen)


@dataclass(frozen=True)
class Widths:
    """Bytes per element.

    Attributes:
        param: of parameters and of the gradients autograd makes.
        master: of what the optimizer steps.
        grad: of gradients that add up.
        reduce: of gradients on the wire.
        state: of each optimizer state.
        states: how many states the optimizer keeps per element (Adam: 2).
    """

    param: int = 4
    master: int = 4
    grad: int = 4
    reduce: int = 4
    state: int = 4
    states: int = 2


@dataclass(frozen=True, kw_only=True)
class Run:
    """The rest of what memory depends on.

    Attributes:
        world: ranks of the data axis.
        shards: ranks that share sharded state, where these are not all of them (MiCS).
        second: ranks that share a second copy of sharded parameters (hpZ); 0 for none.
        accumulation: micro-batches per step.
        gathered: elements of sharded parameters that are whole at one time, at most (stage 3).
        in_place: the optimizer steps the module's own parameters (stage 0 in fp32).
        device_is_host: the model computes in host memory.
        beside: bytes per element that the order of the step keeps beside states in host memory.
    """

    world: int = 1
    shards: int | None = None
    second: int = 0
    accumulation: int = 1
    gathered: int | None = None
    in_place: bool = False
    device_is_host: bool = False
    beside: int = 0

    @property
    def sharing(self) -> int:
        """Ranks that share sharded state."""
        return self.world if self.shards is None else self.shards


# - what is answered


@dataclass(frozen=True)
class Row:
    """Bytes of one role in one tier, on each rank.

    Attributes:
        role: what is kept.
        tier: where.
        nbytes: how much.
        lasting: kept from step to step; otherwise only while a step is under way.
    """

    role: str
    tier: str
    nbytes: int
    lasting: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """What each rank keeps. `str()` gives the table.

    Attributes:
        title: the run in words.
        rows: the bytes, by role and tier.
    """

    title: str
    rows: tuple[Row, ...]

    @property
    def tiers(self) -> list[str]:
        """The tiers that hold anything."""
        return list(dict.fromkeys([DEVICE, HOST, *(row.tier for row in self.rows)]))

    def lasting(self, tier: str) -> int:
        """Bytes of `tier` that are held between steps."""
        return sum(row.nbytes for row in self.rows if row.tier == tier and row.lasting)

    def peak(self, tier: str) -> int:
        """Bytes of `tier` at the fullest moment of a step; activations are not among them."""
        return sum(row.nbytes for row in self.rows if row.tier == tier)

    def __str__(self) -> str:
        tiers = [tier for tier in self.tiers if self.peak(tier)] or [DEVICE]
        roles = list(dict.fromkeys(row.role for row in self.rows if row.nbytes))
        lines = [self.title, _line("each rank keeps", tiers)]
        for role in roles:
            cells = []
            for tier in tiers:
                held = sum(r.nbytes for r in self.rows if (r.role, r.tier) == (role, tier))
                cells.append(size_text(held) if held else "-")
            lines.append(_line(role, cells))
        lines.append(_line("between steps", [size_text(self.lasting(tier)) for tier in tiers]))
        lines.append(_line("at most", [size_text(self.peak(tier)) for tier in tiers]))
        return "\n".join(lines)


def memory_plan(model: ModelSize, plan: Plan, widths: Widths, run: Run) -> MemoryPlan:
    """Compute what each rank keeps of a model's state; activations, buffers and libraries come on top.

    Args:
        model: the parameters.
        plan: the ZeRO row.
        widths: bytes per element.
        run: ranks and the like.

    Example:
        >>> size = ModelSize((1_000_000,), largest_layer=1_000_000)
        >>> memory_plan(size, Plan.for_stage(2), Widths(param=2), Run(world=4)).lasting("device")
        6000000
    """
    shards = run.sharing if plan.states is Placement.SHARDED else 1
    cut = Layout.per_param if plan.params is Placement.SHARDED else Layout.contiguous
    shard = cut(model.trainable, shards).shard_numel
    rows = [
        *_param_rows(model, plan, widths, run),
        *_state_rows(model, plan, widths, run, shard),
        *_grad_rows(model, plan, widths, run, shard),
    ]
    if run.device_is_host:
        rows = [replace(row, tier=HOST) if row.tier == DEVICE else row for row in rows]
    kinds = f"{model.numel / 1e6:.1f} M params"
    if model.frozen:
        kinds += f", {sum(model.frozen) / 1e6:.1f} M of them frozen"
    title = f"ZeRO stage {plan.stage}, {run.world} rank{'s' * (run.world > 1)}, {kinds}"
    return MemoryPlan(title, tuple(row for row in rows if row.nbytes))


def check_fits(plan_table: MemoryPlan, available_bytes_by_tier: Mapping[str, int]) -> None:
    """Raise unless the plan fits.

    Args:
        plan_table: the plan of one rank.
        available_bytes_by_tier: tier -> bytes that one rank may use of it (ranks of a machine share its host memory:
            divide first). Tiers that are left out are not checked.

    Raises:
        DeepSpeedMemoryError: a MemoryError whose message holds the table.
    """
    short = {
        tier: (plan_table.peak(tier), available)
        for tier, available in available_bytes_by_tier.items()
        if plan_table.peak(tier) > available
    }
    if short:
        needs = ", ".join(
            f"{size_text(need)} of {tier} memory" for tier, (need, _) in short.items()
        )
        has = ", ".join(f"{size_text(have)} of {tier} memory" for tier, (_, have) in short.items())
        raise DeepSpeedMemoryError(
            explain(
                "this configuration does not fit, before activations are counted",
                got=f"a need of {needs} on each rank",
                expected=f"at most {has}",
                fix="Shard more (a higher stage, more ranks), or offload more (offload_optimizer, offload_param).",
            )
            + f"\n{plan_table}"
        )


def size_text(nbytes: float) -> str:
    """A number of bytes for people: `1.50 GB` is 1.5 * 2**30."""
    for unit in ("B", "KB", "MB"):
        if nbytes < 1024:
            return f"{nbytes:.2f} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1024
    return f"{nbytes:.2f} GB"


# - rows


def _param_rows(model: ModelSize, plan: Plan, widths: Widths, run: Run) -> Iterable[Row]:
    if plan.params is not Placement.SHARDED:
        shards = run.world if plan.states is Placement.SHARDED else 1
        slab = Layout.contiguous(model.trainable, shards).padded_numel
        held = sum(model.trainable) if run.in_place else slab
        yield Row("params", DEVICE, held * widths.param)
        yield Row("frozen params", DEVICE, sum(model.frozen) * widths.param)
        return
    tier = plan.param_tier.value
    for role, numels in (("params", model.trainable), ("frozen params", model.frozen)):
        own = Layout.per_param(numels, run.sharing).shard_numel
        yield Row(role, tier, own * widths.param)
    if run.second:
        near = Layout.per_param((*model.trainable, *model.frozen), run.second).shard_numel
        yield Row("second copy of params", DEVICE, near * widths.param)
    if run.sharing == 1 and tier in (DEVICE, HOST) and (run.device_is_host or tier == DEVICE):
        return  # a slice is all of its parameter, and where it computes
    gathered = 2 * model.largest_layer if run.gathered is None else run.gathered
    whole = min(model.numel, max(gathered, model.largest_layer))
    yield Row("gathered params", DEVICE, whole * widths.param, lasting=False)
    if tier not in (DEVICE, HOST):
        slices = _SLICES_IN_MEMORY * (-(-model.largest_layer // run.sharing))
        yield Row("buffers of params", HOST, slices * widths.param, lasting=False)


def _state_rows(
    model: ModelSize, plan: Plan, widths: Widths, run: Run, shard: int
) -> Iterable[Row]:
    for tier, length in _split(plan, shard):
        beside = run.device_is_host and {tier, plan.param_tier.value} <= {DEVICE, HOST}
        aliases = widths.master == widths.param and (beside or tier == plan.param_tier.value)
        if plan.masters_apart or not (run.in_place or aliases):
            yield Row("master weights", tier, length * widths.master)
        yield Row("optimizer states", tier, length * widths.state * widths.states)
        if tier == HOST:
            yield Row("copies for steps beside the training", HOST, length * run.beside)
        if tier not in (DEVICE, HOST):
            chunk = min(length, plan.part_of(length))
            each = widths.master + widths.state * widths.states
            rounds = min(_PARTS_IN_MEMORY, -(-length // max(1, chunk)))
            yield Row("buffers of states", HOST, rounds * chunk * each)
            grads = min(_GRADS_IN_MEMORY, rounds) * chunk * widths.grad
            yield Row("buffers of gradients", HOST, grads)


def _grad_rows(model: ModelSize, plan: Plan, widths: Widths, run: Run, shard: int) -> Iterable[Row]:
    total = sum(model.trainable)
    if run.in_place:
        yield Row("gradients", DEVICE, total * widths.param)
    else:
        # The shards that stage 1 reduces to are given back after each step.
        lasting = (
            plan.reduces_each_backward or run.world == 1 or plan.states is not Placement.SHARDED
        )
        for tier, length in _split(plan, shard):
            yield Row("gradients", tier, length * widths.grad, lasting)
            if tier not in (DEVICE, HOST):
                newest = max(model.trainable, default=0) // run.world * widths.grad
                yield Row("gradients to write", HOST, WRITES_BEHIND * newest, lasting=False)
        if not lasting and run.accumulation > 1:
            width = max(widths.param, widths.grad)
            yield Row("unreduced gradients", DEVICE, total * width, lasting=False)
    if run.sharing > 1 and plan.error_feedback is not None:
        yield Row("errors of codes", DEVICE, total * widths.reduce)
    largest = max(model.trainable, default=0)
    yield Row("newest gradient", DEVICE, largest * widths.param, lasting=False)
    if run.world > 1:
        yield from _wire_rows(total, max(plan.bucket_numel, largest), plan, widths, run)


def _wire_rows(total: int, bucket: int, plan: Plan, widths: Widths, run: Run) -> Iterable[Row]:
    """What carries gradients from rank to rank; `bucket` is the elements of the largest collective."""
    flying = plan.buckets_in_flight
    filled_apart = plan.states is Placement.SHARDED or widths.reduce != widths.grad
    if filled_apart or run.in_place:
        held = min(total, (1 + flying) * bucket)
        yield Row("reduce buckets", DEVICE, held * widths.reduce, lasting=False)
    arriving = min(total, max(1, flying) * bucket)
    if plan.params is Placement.SHARDED:
        yield Row("sums", DEVICE, arriving // run.world * widths.reduce, lasting=False)
    if run.device_is_host and plan.states is Placement.SHARDED:
        # gloo moves bytes; see comm/flat.py.
        yield Row("arriving gradients", DEVICE, arriving * widths.reduce, lasting=False)


def _split(plan: Plan, shard: int) -> Iterable[tuple[str, int]]:
    """The tiers over which a shard of states is cut, with the length of each part."""
    tier = plan.state_tier.value
    if tier == DEVICE:
        return [(DEVICE, shard)]
    away = round(shard * plan.host_ratio)
    return [(DEVICE, shard - away), (tier, away)] if away < shard else [(tier, shard)]


def _line(name: str, cells: Iterable[str]) -> str:
    return f"  {name:<20}" + "".join(f"{cell:>14}" for cell in cells)


def _numel(param: Any) -> int:
    return int(getattr(param, "ds_numel", param.numel()))


def _largest_layer(model: Any) -> int:
    return max(
        (sum(_numel(p) for p in module.parameters(recurse=False)) for module in model.modules()),
        default=0,
    )


# - the older rules of thumb


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """Bytes for mixed-precision Adam at stage 2: of host memory on each node, of each GPU."""
    gpus = num_nodes * num_gpus_per_node
    if cpu_offload:
        gpu = 2 * total_params
        cpu = total_params * max(4 * gpus, 16) * additional_buffer_factor
    else:
        gpu = 2 * total_params + 18 * total_params // gpus
        cpu = total_params * 4 * num_gpus_per_node * additional_buffer_factor
    return int(cpu), int(gpu)


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """Bytes for mixed-precision Adam at stage 3: of host memory on each node, of each GPU, of the largest layer."""
    gpus, share = num_nodes * num_gpus_per_node, 1 / num_nodes
    layer = 4 * largest_layer_params
    whole_models = total_params * 4 * num_gpus_per_node
    if cpu_offload:
        gpu = layer if cpu_offload_params else layer + 2 * total_params // gpus
        held = total_params * (18 if cpu_offload_params else 16) * share
        cpu = held if zero_init else max(whole_models, held)
    else:
        gpu = layer + 18 * total_params // gpus
        cpu = layer * num_gpus_per_node if zero_init else whole_models
    return int(cpu * additional_buffer_factor), int(gpu), layer


def estimate_zero2_model_states_mem_needs_all_live(
    model: Any,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the stage 2 table for a torch module."""
    estimate_zero2_model_states_mem_needs_all_cold(
        ModelSize.of_module(model).numel, num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the stage 2 table, with and without offload, for a number of parameters."""
    _print_head(num_gpus_per_node, num_nodes, f"{total_params / 1e6:.0f}M total params.")
    for offload in (True, False):
        cpu, gpu = estimate_zero2_model_states_mem_needs(
            total_params, num_gpus_per_node, num_nodes, offload, additional_buffer_factor
        )
        _print_row(cpu, gpu, f"offload_optimizer={_device(offload)}")


def estimate_zero3_model_states_mem_needs_all_live(
    model: Any,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the stage 3 table for a torch module."""
    size = ModelSize.of_module(model)
    estimate_zero3_model_states_mem_needs_all_cold(
        size.numel, size.largest_layer, num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the stage 3 table, with and without each offload and `zero.Init`, for a number of parameters."""
    _print_head(
        num_gpus_per_node,
        num_nodes,
        f"{total_params / 1e6:.0f}M total params, {largest_layer_params / 1e6:.0f}M largest layer params.",
    )
    for optimizer, params in ((True, True), (True, False), (False, False)):
        for init in (True, False):
            cpu, gpu, _ = estimate_zero3_model_states_mem_needs(
                total_params,
                largest_layer_params,
                num_gpus_per_node,
                num_nodes,
                optimizer,
                params,
                init,
                additional_buffer_factor,
            )
            choices = f"offload_param={_device(params)}, offload_optimizer={_device(optimizer)}"
            _print_row(cpu, gpu, f"{choices}, zero_init={int(init)}")


def _print_head(gpus: int, nodes: int, model: str) -> None:
    node, gpu = ("node", "nodes")[nodes > 1], ("GPU", "GPUs")[gpus > 1]
    print("Estimated memory needed for params, optim states and gradients for a:")
    print(f"HW: Setup with {nodes} {node}, {gpus} {gpu} per node.")
    print(f"SW: Model with {model}")
    print("  per CPU  |  per GPU |   Options")


def _print_row(cpu: int, gpu: int, options: str) -> None:
    print(f"  {cpu / 2**30:6.2f}GB | {gpu / 2**30:6.2f}GB | {options}")


def _device(offloaded: bool) -> str:
    return "cpu " if offloaded else "none"
