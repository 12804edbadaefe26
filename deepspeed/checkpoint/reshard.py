# SPDX-License-Identifier: Apache-2.0
"""A saved optimizer seen parameter by parameter, whatever number of ranks, stage or wrapper wrote it.

Each saved form (shards of stages 1 and 2, of stage 3, the flat or separate tensors of a stage 0 wrapper, a torch
optimizer's own state) is a different placement of the same things: for each parameter a master weight, some
element-wise states and some numbers. `SavedState` answers for a run of a parameter's elements where they are; a loader
copies just the runs that its rank owns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..runtime.zero.layout import Layout
from ..utils.errors import DeepSpeedCheckpointError, explain
from .format import SCALER_FIELDS, Zero
from .model_states import expert_renumbered, experts_by_layer

FP32 = "fp32"
"""The key under which the master weights are found among the element-wise states."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `[param_start, param_start + length)` of a parameter: at `start` of tensor slot `slot` of shard `rank`."""

    param_start: int
    rank: int
    slot: int
    start: int
    length: int


@dataclass
class Slot:
    """One flat tensor of a shard with the states that go with it.

    Attributes:
        tensors: element-wise values by state key, flat; `FP32` for the master weights.
        numbers: states that are one value for the whole slot (`step`).
    """

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass
class SavedState:
    """A saved optimizer by parameter name.

    Attributes:
        pieces: where the elements of each parameter are.
        hyper: the param group options that each parameter was stepped with.
        scaler: attributes of the loss scaler.
        stage: the ZeRO stage that wrote it.
        world: over how many ranks it is spread.
        has_masters: whether it holds master weights.
        open_shard: gives the slots of a rank's shard (called for the ranks that are needed only).
        kept_open: most shards that are held open at once.
        shapes: shape of each parameter, where the saved form tells.
    """

    pieces: dict[str, list[Piece]]
    hyper: dict[str, Mapping[str, Any]]
    scaler: dict[str, Any]
    stage: int
    world: int
    has_masters: bool
    open_shard: Callable[[int], list[Slot]]
    kept_open: int = 1 << 30
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    _shards: OrderedDict[int, list[Slot]] = field(default_factory=OrderedDict, repr=False)

    def slots(self, rank: int) -> list[Slot]:
        """The slots of a rank's shard, opened once (as long as no more than `kept_open` are asked for)."""
        if rank not in self._shards:
            self._shards[rank] = self.open_shard(rank)
            if len(self._shards) > self.kept_open:
                self._shards.popitem(last=False)
        return self._shards[rank]

    def under_names(self, saved_names: Mapping[str, str]) -> SavedState:
        """The same with other names: `saved_names` has those in the file by those that are asked for."""
        known = {mine: theirs for mine, theirs in saved_names.items() if theirs in self.pieces}
        return replace(
            self,
            pieces={mine: self.pieces[theirs] for mine, theirs in known.items()},
            hyper={mine: self.hyper[n] for mine, n in known.items() if n in self.hyper},
            shapes={mine: self.shapes[n] for mine, n in known.items() if n in self.shapes},
        )

    def with_states_named(self, keys: Mapping[str, str]) -> SavedState:
        """The same with other keys of element-wise states: `keys` has those that are asked for by those in the files."""

        def open_shard(rank: int) -> list[Slot]:
            return [
                Slot(
                    {keys.get(key, key): value for key, value in slot.tensors.items()}, slot.numbers
                )
                for slot in self.slots(rank)
            ]

        return replace(self, open_shard=open_shard, _shards=OrderedDict())

    def shares(self, wanted: Mapping[str, tuple[int, torch.Size]]) -> SavedState:
        """The same with parts of some parameters: those of `wanted`, from an element on and of a shape."""
        pieces, shapes = dict(self.pieces), dict(self.shapes)
        for name in wanted.keys() & pieces.keys():
            start, shape = wanted[name]
            end, shapes[name], whole, pieces[name] = start + shape.numel(), shape, pieces[name], []
            for piece in whole:
                lo, hi = (
                    max(start, piece.param_start),
                    min(end, piece.param_start + piece.length),
                )
                if lo < hi:
                    begin = piece.start + lo - piece.param_start
                    pieces[name].append(Piece(lo - start, piece.rank, piece.slot, begin, hi - lo))
        return replace(self, pieces=pieces, shapes=shapes)

    def close(self) -> None:
        """Let go of all shards (and of the files behind them)."""
        self._shards.clear()

    def numel(self, name: str) -> int:
        """Elements of a parameter."""
        return sum(piece.length for piece in self.pieces[name])

    def first_slot(self, name: str) -> Slot | None:
        """The slot that holds a parameter's first element; None for a parameter without elements."""
        pieces = self.pieces[name]
        return self.slots(pieces[0].rank)[pieces[0].slot] if pieces else None

    def runs(self, name: str, start: int, length: int) -> Iterator[tuple[int, Slot, int, int]]:
        """Where `[start, start + length)` of a parameter is: `(offset in the run, slot, start in slot, length)`."""
        for piece in self.pieces[name]:
            lo = max(start, piece.param_start)
            hi = min(start + length, piece.param_start + piece.length)
            if lo < hi:
                slot = self.slots(piece.rank)[piece.slot]
                yield lo - start, slot, piece.start + lo - piece.param_start, hi - lo

    def full(self, name: str, key: str = FP32) -> torch.Tensor | None:
        """All elements of one state of a parameter, flat; None when it was not saved."""
        first = self.first_slot(name)
        if first is None or key not in first.tensors:
            return None
        whole = torch.empty(self.numel(name), dtype=first.tensors[key].dtype, device="cpu")
        for offset, slot, start, length in self.runs(name, 0, whole.numel()):
            whole.narrow(0, offset, length).copy_(slot.tensors[key].narrow(0, start, length))
        return whole


def from_shards(
    open_dict: Callable[[int], Mapping[str, Any]],
    shapes: Sequence[Mapping[str, torch.Size]],
    near: int = 0,
    data_first: bool = False,
    stacks: Mapping[str, int] | None = None,
    lanes: tuple[int, int] = (1, 0),
) -> SavedState:
    """See the shard files of ZeRO stages 1, 2 or 3 as one state. Experts have the numbers of all ranks in their names.

    Args:
        open_dict: gives the `optimizer_state_dict` of a rank's file.
        shapes: `param_shapes` of the model file: names and shapes in flat order, one mapping a group.
        near: a rank whose file is certainly at hand; what all shards have in common is read from it.
        data_first: ranks with the same experts, not those that share a set, were numbered side by side.
        stacks: names of weights in which experts are stacked, with the number of ranks that share these; the state has
            them whole.
        lanes: where stacked experts are spread over tensor-parallel ranks as well: their number, and the one whose
            shapes these are. Ranks are numbered over all of them then.

    Raises:
        DeepSpeedCheckpointError: the shards and the shapes contradict each other.
    """
    head = open_dict(near)
    # the bf16 wrapper of older versions writes shards without a stage; they are laid out as stage 1
    stage = int(head.get(Zero.STAGE, 1))
    if stage == 3:
        layouts, names = _zero3_layouts(head, shapes)
    else:
        layouts, names = _zero12_layouts(head, shapes)
    stacks = stacks or {}
    world = max(
        layout.world * max((stacks.get(name or "", 1) for name in in_order), default=1)
        for layout, in_order in zip(layouts, names, strict=True)
    )
    local = {name: torch.Size(shape) for group in shapes for name, shape in group.items()}
    pieces, sizes, kinds = _places(layouts, names, local, world, stacks, data_first, lanes)
    numels = [layout.shard_numel for layout in layouts]
    inner = _inner_state(head)
    return SavedState(
        pieces=pieces,
        hyper=hyper_by_name(inner, kinds),
        scaler=scaler_numbers(head),
        stage=stage,
        world=world,
        has_masters=True,
        open_shard=lambda rank: _shard_slots(open_dict(rank), numels),
        shapes=sizes,
        # it was read already; only here, where `close` lets go of it
        _shards=OrderedDict({near: _shard_slots(head, numels)}),
    )


def _places(
    layouts: Sequence[Layout],
    names: Sequence[Sequence[str | None]],
    local: Mapping[str, torch.Size],
    world: int,
    stacks: Mapping[str, int],
    data_first: bool,
    lanes: tuple[int, int],
) -> tuple[dict[str, list[Piece]], dict[str, torch.Size], list[list[str]]]:
    """Where each parameter's elements are, its whole shape, and the names of each group; see `from_shards`."""
    here = experts_by_layer(local)
    pieces: dict[str, list[Piece]] = OrderedDict()
    sizes: dict[str, torch.Size] = {}
    kinds = [[n for n in group if n is not None] for group in names]
    for slot, (layout, in_order) in enumerate(zip(layouts, names, strict=True)):
        # the ranks are cut into as many sets of experts as make up for the group's smaller world
        sets = world // layout.world
        for index, name in enumerate(in_order):
            if name is not None and name not in stacks and lanes[0] > 1:
                turns = range(lanes[1], lanes[1] + 1)  # of other lanes it is another part
            else:
                turns = range(sets if name is not None else 0)
            for own in turns:
                name_there = expert_renumbered(name, lambda layer: own * here[layer])  # noqa: B023
                stride, start = (1, own * layout.world) if data_first else (sets, own)
                shape = local[name]
                before = own * shape.numel() if name in stacks else 0
                found = [
                    Piece(
                        before + s.param_start,
                        start + s.rank * stride,
                        slot,
                        s.shard_start,
                        s.length,
                    )
                    for s in layout.param_segments(index)
                ]
                pieces[name_there] = pieces[name] + found if before else found
                sizes[name_there] = shape
                if name in stacks:
                    sizes[name] = torch.Size((shape[0] * sets, *shape[1:]))
                if own and name_there != name:
                    kinds[slot].append(name_there)
    return pieces, sizes, kinds


def from_inline(
    saved: Mapping[str, Any], names: Sequence[Sequence[str]], shapes: Mapping[str, torch.Size]
) -> SavedState:
    """See the optimizer that a stage 0 model file carries as one state.

    Args:
        saved: the `optimizer` entry: a torch state dict, or that of an fp16/bf16 wrapper.
        names: parameter names of each param group in order, used where the file has none.
        shapes: shape of each parameter.
    """
    names = saved.get(Zero.WRAPPER_NAMES) or names
    if Zero.WRAPPER_FLAT in saved:
        slots, pieces = _flat_slots(saved, names, shapes)
    else:
        slots, pieces = _param_slots(saved, names, shapes)
    inner = saved.get(Zero.INNER, saved)
    return SavedState(
        pieces=pieces,
        hyper=hyper_by_name(inner, names, by_param=Zero.WRAPPER_FLAT not in saved),
        scaler=scaler_numbers(saved),
        stage=0,
        world=1,
        has_masters=Zero.WRAPPER_FLAT in saved or Zero.WRAPPER_LISTS in saved,
        open_shard=lambda rank: slots,
        shapes=shapes,
    )


def scaler_numbers(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The loss scaler's numbers, from whichever form they were saved in."""
    kept = saved.get(Zero.LOSS_SCALER_STATE)
    if kept is None and Zero.LOSS_SCALER in saved:
        kept = vars(saved[Zero.LOSS_SCALER])
    if kept is None:
        kept = {"dynamic": saved.get(Zero.DYNAMIC_LOSS_SCALE, False), **saved}
    return {
        key: kept[key] for key in SCALER_FIELDS if isinstance(kept.get(key), (bool, int, float))
    }


def _zero12_layouts(
    head: Mapping[str, Any], shapes: Sequence[Mapping[str, torch.Size]]
) -> tuple[list[Layout], list[list[str | None]]]:
    worlds = head[Zero.PARTITION_COUNT]
    worlds = [worlds] * len(shapes) if isinstance(worlds, int) else worlds
    paddings = head.get(Zero.PARAM_PADDINGS) or [None] * len(shapes)
    masters, tails = head[Zero.FP32_GROUPS], head.get(Zero.GROUP_PADDINGS) or [0] * len(shapes)
    if not len(worlds) == len(masters) == len(shapes):
        raise _contradiction(f"{len(masters)} flat groups", f"{len(shapes)} groups of shapes")
    layouts, names = [], []
    for group, world, padding, master, tail in zip(
        shapes, worlds, paddings, masters, tails, strict=True
    ):
        numels, in_order = _padded(group, padding)
        layout = Layout.contiguous(numels, world)
        held = master.numel()
        # padding is left out at the end of the last ranks' shards; the bf16 wrapper keeps it in
        if layout.shard_numel not in (held, held + tail):
            raise _contradiction(f"a shard of {held} + {tail} elements", f"{layout.shard_numel}")
        layouts.append(layout)
        names.append(in_order)
    return layouts, names


def _padded(
    group: Mapping[str, torch.Size], padding: Sequence[int] | None
) -> tuple[list[int], list[str | None]]:
    """Sizes and names in flat order, with nameless entries for alignment gaps after single parameters."""
    numels: list[int] = []
    names: list[str | None] = []
    for name, shape, gap in zip(group, group.values(), padding or [0] * len(group), strict=True):
        numels.append(torch.Size(shape).numel())
        names.append(name)
        if gap:
            numels.append(int(gap))
            names.append(None)
    return numels, names


def _zero3_layouts(
    head: Mapping[str, Any], shapes: Sequence[Mapping[str, torch.Size]]
) -> tuple[list[Layout], list[list[str | None]]]:
    count, flats = head[Zero.PARTITION_COUNT], head[Zero.FP32_FLAT_GROUPS]
    count = max(count) if isinstance(count, list) else count
    apart = {g["sub_group"]: g["partition_count"] for g in head.get(Zero.PARTITION_GROUPS) or ()}
    pairs = [(name, torch.Size(shape).numel()) for group in shapes for name, shape in group.items()]
    layouts, names = [], []
    # sub-groups are cut from the parameters in order, wherever their sizes add up
    for number, flat in enumerate(flats):
        world = apart.get(number, count)
        held, taken = 0, []
        while (
            pairs
            and held + -(-pairs[0][1] // world) <= flat.numel()
            and (held < flat.numel() or pairs[0][1] == 0)
        ):
            taken.append(pairs.pop(0))
            held += -(-taken[-1][1] // world)
        if held != flat.numel():
            raise _contradiction(
                f"a sub-group of {flat.numel()} elements", f"{held} of whole parameters"
            )
        layouts.append(Layout.per_param([numel for _, numel in taken], world))
        names.append([name for name, _ in taken])
    if pairs:
        raise _contradiction(
            f"shapes for {len(pairs)} more parameters", "as many as the shards hold"
        )
    return layouts, names


def _contradiction(got: str, expected: str) -> DeepSpeedCheckpointError:
    return DeepSpeedCheckpointError(
        explain(
            "the optimizer shards do not fit the parameter shapes saved with them",
            got=got,
            expected=expected,
            fix="The files come from different saves, or from a format that this version does not know.",
        )
    )


def _inner_state(saved: Mapping[str, Any]) -> Any:
    return saved.get(Zero.BASE_STATE, saved.get(Zero.INNER))


def hyper_by_name(
    inner: Any, names: Sequence[Sequence[str]], by_param: bool = False
) -> dict[str, Mapping[str, Any]]:
    """The param group options of each parameter.

    `params` of a saved group are indices of flat groups, or with `by_param` of single parameters in group order.
    """
    groups = inner.get("param_groups", []) if isinstance(inner, Mapping) else []
    units: list[Sequence[str]] = (
        [[name] for group in names for name in group] if by_param else list(names)
    )
    found = {}
    for number, group in enumerate(groups):
        options = {key: value for key, value in group.items() if key != "params"}
        indices = [
            i for i in group.get("params", [number]) if isinstance(i, int) and i < len(units)
        ]
        found.update((name, options) for i in indices for name in units[i])
    return found


def _shard_slots(saved: Mapping[str, Any], shard_numels: Sequence[int]) -> list[Slot]:
    masters = saved.get(Zero.FP32_GROUPS, saved.get(Zero.FP32_FLAT_GROUPS))
    inner = _inner_state(saved)
    if isinstance(inner, list):  # elastic form: a list with a state for each group, steps beside it
        states = dict(enumerate(inner))
        step = {"step": saved[Zero.BASE_STATE_STEP]} if Zero.BASE_STATE_STEP in saved else {}
    else:
        states, step = inner.get("state", {}), {}
    slots = []
    for index, (master, numel) in enumerate(zip(masters, shard_numels, strict=True)):
        slot = _slot({**step, **states.get(index, {})}, master.numel(), numel)
        slot.tensors[FP32] = master.detach()
        slots.append(slot)
    return slots


def _slot(state: Mapping[str, Any], *flat_numels: int, wide: Collection[str] = ()) -> Slot:
    """Tell the element-wise entries of a torch optimizer's state from the numbers; those of `wide` may be 0-dim."""
    slot = Slot({})
    for key, value in state.items():
        element_wise = (
            isinstance(value, torch.Tensor)
            and (value.dim() > 0 or key in wide)
            and value.numel() in flat_numels
        )
        if element_wise:
            slot.tensors[key] = value.detach().reshape(-1)
        else:
            slot.numbers[key] = value
    return slot


def _flat_slots(
    saved: Mapping[str, Any], names: Sequence[Sequence[str]], shapes: Mapping[str, torch.Size]
) -> tuple[list[Slot], dict[str, list[Piece]]]:
    states = saved[Zero.INNER].get("state", {})
    slots, pieces = [], OrderedDict()
    for index, (flat, in_order) in enumerate(zip(saved[Zero.WRAPPER_FLAT], names, strict=True)):
        slot = _slot(states.get(index, {}), flat.numel())
        slot.tensors[FP32] = flat.detach().reshape(-1)
        slots.append(slot)
        start = 0
        for name in in_order:
            numel = shapes[name].numel()
            pieces[name] = [Piece(0, 0, index, start, numel)] if numel else []
            start += numel
    return slots, pieces


def _param_slots(
    saved: Mapping[str, Any], names: Sequence[Sequence[str]], shapes: Mapping[str, torch.Size]
) -> tuple[list[Slot], dict[str, list[Piece]]]:
    states = saved.get(Zero.INNER, saved).get("state", {})
    masters = [m for group in saved.get(Zero.WRAPPER_LISTS, []) for m in group]
    # A 0-dim parameter's moments look like numbers; the other parameters' say what they are.
    entries = [entry for state in states.values() for entry in state.items()]
    wide = {key for key, value in entries if isinstance(value, torch.Tensor) and value.dim() > 0}
    slots, pieces = [], OrderedDict()
    for index, name in enumerate(name for group in names for name in group):
        state = states.get(index, {})
        numel = masters[index].numel() if masters else shapes[name].numel()
        slot = _slot(state, numel, wide=wide)
        if masters:
            slot.tensors[FP32] = masters[index].detach().reshape(-1)
        slots.append(slot)
        pieces[name] = [Piece(0, 0, index, 0, numel)] if numel else []
    return slots, pieces
