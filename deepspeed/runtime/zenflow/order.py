# SPDX-License-Identifier: Apache-2.0
"""ZenFlow: the columns that matter most are stepped at once, the rest now and then, beside the training if that is asked for.

[Note: Two clocks of one Adam]
Every element has one master weight and one pair of moments, whichever side steps it. While columns are chosen, theirs
are in small vectors of their own (on the device, unless `offload`), and what the flat master and moments hold in their
places means nothing; `at_home` brings them back for whoever reads. The chosen count every step, the rest every update.
Where the choice ends, the chosen columns' moments are scaled so that their bias-corrected values stay as they are under
the count of the rest. With an update at each step both counts are equal, and the whole is plain Adam, bit for bit.

[Note: When the rest arrives]
Gradients of the rest add up (scaled and clipped as in their own step) and their mean makes one step. With `overlap` a
thread makes it while training goes on, and the parameters get its result at the next update, never when the thread
happens to be done: a run can be repeated, and all ranks do the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.comm import flat
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.norms import squared_norm
from deepspeed.utils.errors import DeepSpeedConfigError, explain
from deepspeed.utils.numa import available_cores

from ..zero.host_worker import HostWorker, split_cores
from ..zero.plan import TierKind
from ..zero.shard_group import ShardGroup, ShardPart
from ..zero.step_order import KEPT, StepOrder
from .columns import Block, Columns, blocks_of, column_squares, top_columns, width_of
from .settings import AUTO_LONGEST_WAIT, Settings

if TYPE_CHECKING:
    from ..zero.optimizer import ZeroOptimizer

_MOMENTS = DeepSpeedCPUAdam.moments
_PIECE = 128 * 1024
_MASK, _REST, _COUNTS = (f"{KEPT}{name}" for name in ("chosen", "rest", "counts"))


@dataclass
class Counts:
    """What has been counted.

    Attributes:
        steps: all steps, of the warm-up too.
        waiting: gradients that the rest's sums hold.
        since, updates: steps, and updates of the rest, since columns were chosen.
    """

    steps: int = 0
    waiting: int = 0
    since: int = 0
    updates: int = 0


@dataclass
class Split:
    """A part, divided into chosen columns and the rest.

    Attributes:
        columns: where the chosen elements lie; None before a choice.
        weights: their master weights.
        has_rest: whether the part's group has columns that are not chosen.
        rest: where the gradients of the rest add up; those of the chosen do, too, and mean nothing.
        spare: the other one of two such buffers, which the thread may read.
    """

    group: ShardGroup
    part: ShardPart
    blocks: list[Block] = field(repr=False)
    columns: Columns | None = None
    weights: torch.nn.Parameter | None = None
    has_rest: bool = True
    rest: torch.Tensor | None = None
    spare: torch.Tensor | None = None


class ZenFlow(StepOrder):
    """The order of ZenFlow (arXiv:2505.12242).

    Args:
        owner: an optimizer whose states are in host memory and whose rule is `DeepSpeedCPUAdam`'s.
        settings: what the configuration says.

    Raises:
        DeepSpeedConfigError: another place of states or parameters, or another rule.
    """

    keeps_more = True

    def __init__(self, owner: ZeroOptimizer, settings: Settings) -> None:
        super().__init__(owner)
        self.adam = _adam_of(owner)
        self.settings = settings
        self.counts = Counts()
        self.splits = [Split(g, p, blocks_of(g, p)) for g, p in owner._parts()]
        mode = bool(self.adam.adam_w_mode)
        self.fast = FusedAdam([torch.nn.Parameter(torch.empty(0, device="cpu"))], adam_w_mode=mode)
        self.device = torch.device("cpu") if settings.offload else owner.device
        self.worker: HostWorker | None = None
        if settings.overlap:
            self.worker = HostWorker(len(split_cores(available_cores(), settings.reserved)[0]))
        self._pending: Future[Any] | None = None

    # - a step

    def step(self, grad_scale: float) -> None:
        """Step the chosen columns, and the rest if it is its turn."""
        counts = self.counts
        counts.steps += 1
        if counts.steps <= self.settings.warm_up:
            super().step(grad_scale)
            return
        if self.splits[0].columns is None:
            self._choose()
        for split in self.splits:
            self._step_chosen(split, grad_scale)
            if split.has_rest:
                self._add_to_rest(split, grad_scale)
        counts.waiting += 1
        counts.since += 1
        if self._is_due(grad_scale):
            self._update()
        self.adam._opt_called = True  # type: ignore[attr-defined]

    def _choose(self) -> None:
        """Choose the columns with the largest gradients, over all ranks that share them; a collective."""
        for group in self.owner.groups:
            widths = [width_of(param) for param in group.params]
            squares = torch.cat(column_squares(group)).to(self.owner.device)
            if squares.numel():
                flat.all_reduce_(squares, group.shard_axis)
            found = squares.cpu().split(widths)
            chosen = [top_columns(values, self.settings.topk_ratio) for values in found]
            has_rest = any(len(c) < width for c, width in zip(chosen, widths, strict=True))
            for split in self.splits:
                if split.group is group:
                    self._start(split, Columns.of_params(split.blocks, chosen), has_rest)
        self.counts.since = self.counts.updates = 0

    def _start(self, split: Split, columns: Columns, has_rest: bool) -> None:
        """Take the chosen columns' weights and moments out of the flat ones."""
        split.columns, split.has_rest = columns, has_rest
        master = split.part.master
        state = self.adam.state[master]
        if not state:
            self.adam._init_state(master, state)
        taken = columns.take(master.data).to(self.device)
        split.weights = torch.nn.Parameter(taken)
        moments = {name: columns.take(state[name]).to(self.device) for name in _MOMENTS}
        self.fast.state[split.weights] = {"step": state["step"], **moments}

    def _step_chosen(self, split: Split, grad_scale: float) -> None:
        columns, weights, part = split.columns, split.weights, split.part
        assert columns is not None and weights is not None
        grad = columns.take(split.group.grad_of(part)).to(weights.device)
        self.fast.step_shard(self.options_now(split.group), weights, grad, None, grad_scale)
        columns.put(part.master.data if part.low is None else part.low, weights.data)
        if not split.has_rest:
            self.adam.state[part.master]["step"] = self.fast.state[weights]["step"]

    def _add_to_rest(self, split: Split, grad_scale: float) -> None:
        grad = split.group.grad_of(split.part)
        if split.rest is None:
            dtype = torch.promote_types(split.part.master.dtype, torch.float32)
            split.rest = split.part.tier.alloc(split.part.length, dtype)
        if self.counts.waiting:
            _add(split.rest, grad, grad_scale)
        else:
            split.rest.copy_(grad).mul_(grad_scale)

    def _is_due(self, grad_scale: float) -> bool:
        if self.settings.update_every:
            return self.counts.waiting >= self.settings.update_every
        chosen, rest = self._mean_squares(grad_scale)
        outgrown = rest >= self.settings.auto_ratio**2 * chosen
        return outgrown or self.counts.waiting >= AUTO_LONGEST_WAIT

    def _mean_squares(self, grad_scale: float) -> tuple[float, float]:
        """Mean square of the chosen elements' gradients, and of the rest's sums, over all ranks; a collective of them."""
        sums = torch.zeros(4, dtype=torch.float64, device="cpu")
        for split in self.splits:
            columns, part = split.columns, split.part
            assert columns is not None
            grads = columns.take(split.group.grad_of(part))
            sums[0] += squared_norm(grads).cpu() * grad_scale**2
            sums[1] += columns.numel
            if split.has_rest and split.rest is not None:
                of_chosen = squared_norm(columns.take(split.rest))
                sums[2] += (squared_norm(split.rest) - of_chosen).clamp(min=0).cpu()
                sums[3] += sum(b.rows * b.width for b in split.blocks) - columns.numel
        sums = sums.to(self.owner.device)
        flat.all_reduce_(sums, self.owner.mesh.world)
        chosen, chosen_count, rest, rest_count = sums.tolist()
        return chosen / max(chosen_count, 1.0), rest / max(rest_count, 1.0)

    def _update(self) -> None:
        """Step the rest by the mean of its gradients, here or in the thread."""
        self._land()
        counts, settings = self.counts, self.settings
        scale, counts.waiting = 1.0 / counts.waiting, 0
        counts.updates += 1
        again = counts.since >= settings.choose_every or counts.updates >= settings.choose_updates
        mine = [split for split in self.splits if split.has_rest]
        jobs = [(self.options_now(s.group), s.part.master, s.rest) for s in mine]
        read = self._copies_read()
        if self.worker is not None and not again:
            self._pending = self.worker.start(self._step_rest, jobs, scale, read)
            for split in mine:
                split.rest, split.spare = split.spare, split.rest
            return
        self._step_rest(jobs, scale, read)
        for split in mine:
            self._lower(split)
        if again:
            for split in self.splits:
                self._release(split)

    def _copies_read(self) -> Any:
        """What to wait for before masters change, which copies to the device may still read; None without a device."""
        if self.owner.device.type == "cpu":
            return None
        event = get_accelerator().Event()
        event.record()
        return event

    def _step_rest(self, jobs: Iterable[tuple[Any, ...]], scale: float, read: Any) -> None:
        if read is not None:
            read.synchronize()
        for options, master, rest in jobs:
            self.adam.step_shard(options, master, rest, None, scale)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _land(self) -> None:
        """Bring what the thread has stepped into the parameters."""
        if self._pending is not None:
            self._wait()
            self._pending = None
            for split in self.splits:
                if split.has_rest:
                    self._lower(split)

    def _lower(self, split: Split) -> None:
        if split.columns is not None and split.weights is not None:
            split.columns.put(split.part.master.data, split.weights.data)
        split.group.lower(split.part)

    # - the chosen columns' way home

    def _put_home(self, split: Split) -> None:
        columns, weights = split.columns, split.weights
        if columns is None or weights is None:
            return
        columns.put(split.part.master.data, weights.data)
        for name in _MOMENTS:
            columns.put(self.adam.state[split.part.master][name], self.fast.state[weights][name])

    def _release(self, split: Split) -> None:
        """End the choice; see [Note: Two clocks of one Adam]."""
        if split.columns is None or split.weights is None:
            return
        options, state = self.options_now(split.group), self.adam.state[split.part.master]
        fast = self.fast.state[split.weights]
        if options["bias_correction"] and 0 < state["step"] != fast["step"]:
            for name, beta in zip(_MOMENTS, options["betas"], strict=True):
                fast[name].mul_((1 - beta ** state["step"]) / (1 - beta ** fast["step"]))
        self._put_home(split)
        del self.fast.state[split.weights]
        split.columns = split.weights = None

    @contextlib.contextmanager
    def at_home(self) -> Iterator[None]:
        """Extent in which the flat masters and moments hold the chosen columns' as well; edits count."""
        self._wait()
        for split in self.splits:
            self._put_home(split)
        try:
            yield
        finally:
            for split in self.splits:
                if split.columns is not None and split.weights is not None:
                    state = self.adam.state[split.part.master]
                    split.weights.data.copy_(split.columns.take(split.part.master.data))
                    for name in _MOMENTS:
                        taken = split.columns.take(state[name])
                        self.fast.state[split.weights][name].copy_(taken)

    # - checkpoints

    @contextlib.contextmanager
    def packed(self, loading: bool = False) -> Iterator[None]:
        """Extent in which states hold the choice, the sums of the rest and all counts, too."""
        if loading:
            self._pending = None
            for split in self.splits:
                self._release(split)
            yield
            self._unpack()
            return
        self._pack()
        try:
            yield
        finally:
            self._pop_all()

    def _pack(self) -> None:
        for split in self.splits:
            state = self.adam.state.get(split.part.master)
            if state and split.columns is not None:
                state[_MASK] = split.columns.mask(split.part.length)
            if state and split.has_rest and self.counts.waiting and split.rest is not None:
                state[_REST] = split.rest
        first = self.splits[0]
        fast = 0 if first.weights is None else self.fast.state[first.weights]["step"]
        for number, options in enumerate(self.owner.param_groups):
            mine = [split for split in self.splits if split.group.param_group_index == number]
            waits = {id(split.group): int(split.has_rest) for split in mine}
            counts = {**asdict(self.counts), "fast": fast, "has_rest": list(waits.values())}
            options[_COUNTS] = counts

    def _pop_all(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Take what is packed out of the states of each split, and out of the param groups."""
        states = [self.adam.state.get(split.part.master, {}) for split in self.splits]
        found = [{k: state.pop(k) for k in list(state) if k.startswith(KEPT)} for state in states]
        return found, [options.pop(_COUNTS, {}) for options in self.owner.param_groups]

    def _unpack(self) -> None:
        """Go on as the saved states say; those of plain Adam begin with a choice."""
        found, options = self._pop_all()
        counts = dict(options[0])
        fast = counts.pop("fast", 0)
        counts.pop("has_rest", None)
        steps = [state.get("step", 0) for state in self.adam.state.values()]
        self.counts = Counts(**counts) if counts else Counts(steps=max(steps, default=0))
        chosen = any(_MASK in saved for saved in found) and bool(counts)
        for split, saved in zip(self.splits, found, strict=True):
            if chosen:
                mask = saved.get(
                    _MASK, torch.zeros(split.part.length, dtype=torch.bool, device="cpu")
                )
                columns = Columns.of_mask(split.blocks, mask.cpu())
                self._start(split, columns, self._had_rest(split, options))
                self.fast.state[split.weights]["step"] = fast
            if _REST in saved:
                split.rest = saved[_REST]

    def _had_rest(self, split: Split, options: list[dict[str, Any]]) -> bool:
        number = split.group.param_group_index
        mine = [group for group in self.owner.groups if group.param_group_index == number]
        flags = options[number].get("has_rest", [])
        at = mine.index(split.group)
        return bool(flags[at]) if at < len(flags) else True

    def settle(self) -> None:
        """Bring what the thread has stepped into the parameters; a collective."""
        if self._pending is not None:
            self._wait()
            self._pending = None
            self.owner.update_lp_params()

    def close(self) -> None:
        """Wait for the thread, and end it."""
        if self.worker is not None:
            self.worker.close()


def _add(total: torch.Tensor, values: torch.Tensor, scale: float) -> None:
    """Add `values * scale`; a sum of mixed dtypes is several times as fast by pieces that fit a cache."""
    if values.dtype == total.dtype:
        total.add_(values, alpha=scale)
        return
    for part, piece in zip(total.split(_PIECE), values.split(_PIECE), strict=True):
        part.add_(piece.to(total.dtype), alpha=scale)


def _adam_of(owner: ZeroOptimizer) -> DeepSpeedCPUAdam:
    """The inner optimizer, if ZenFlow can serve it and finds everything in memory."""
    plan = owner.plan
    in_memory = plan.state_tier is TierKind.HOST and plan.param_tier is not TierKind.FILE
    if not in_memory or plan.host_ratio < 1.0:
        raise DeepSpeedConfigError(
            explain(
                "ZenFlow needs all optimizer states in host memory, and parameters in memory",
                got=f"{plan.host_ratio:.0%} of the states in {plan.state_tier.value} memory, "
                f"parameters in {plan.param_tier.value} memory",
                expected="offload_optimizer.device cpu with ratio 1, and offload_param.device none or cpu",
                fix="change the two sections, or remove 'zero_optimization.zenflow'",
            )
        )
    inner = owner.optimizer
    if not isinstance(inner, DeepSpeedCPUAdam) or inner.stochastic_rounding:
        raise DeepSpeedConfigError(
            explain(
                "ZenFlow steps by Adam in host memory only",
                got=type(inner).__name__,
                expected="optimizer.type Adam or AdamW, or deepspeed.ops.adam.ZenFlowCPUAdam",
                fix="change the optimizer, or remove 'zero_optimization.zenflow'",
            )
        )
    return inner
