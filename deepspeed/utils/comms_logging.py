# SPDX-License-Identifier: Apache-2.0
"""Records how long collectives take and how much they move, and prints a table of it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

from .logging import get_caller_func, logger

__all__ = ["CommsLogger", "calc_bw_log", "convert_size", "get_caller_func"]


def convert_size(size_bytes: int) -> str:
    """Return a size in the largest unit that leaves it at 1 or more: ``"1.5 KB"``."""
    units = ("B", "KB", "MB", "GB", "TB", "PB")
    power = min(int(math.log(size_bytes, 1024)), len(units) - 1) if size_bytes > 0 else 0
    return f"{round(size_bytes / 1024**power, 2)} {units[power]}"


def calc_bw_log(comm_op: str, size: int, duration: float, world: int) -> tuple[float, float]:
    """Return a collective's throughput, and the traffic of the busiest link, in Gbit/s.

    Args:
        comm_op: its name.
        size: bytes of the message (of the whole result for gathers).
        duration: seconds.
        world: ranks taking part.
    """
    if duration <= 0:
        return 0.0, 0.0
    rate = size * 8 / duration / 1e9
    share = (world - 1) / world
    if "all_reduce" in comm_op:  # every byte travels twice: reduce-scatter, then all-gather
        return 2 * rate, 2 * rate * share
    if any(word in comm_op for word in ("gather", "scatter", "all_to_all")):
        return rate, rate * share
    return rate, rate


class CommsLogger:
    """The recorder. Its switches are set by `deepspeed.comm.configure` or the configuration.

    Attributes:
        enabled: record at all.
        prof_all: record every operation; else those of ``prof_ops``, and calls with ``prof=True``.
        prof_ops: names of operations.
        verbose: log each operation as it ends.
        debug: add the caller's name to the operation's.
        comms_dict: operation -> message size -> [count, latencies (ms), throughputs, bus rates].
    """

    def __init__(self) -> None:
        self.enabled = False
        self.prof_all = True
        self.prof_ops: list[str] = []
        self.verbose = False
        self.debug = False
        self.comms_dict: dict[str, dict[int, list[Any]]] = {}

    def configure(self, comms_config: Any) -> None:
        """Take the switches from the configuration's ``comms_logger`` section."""
        section = getattr(comms_config, "comms_logger", comms_config)
        for name in ("enabled", "prof_all", "prof_ops", "verbose", "debug"):
            setattr(self, name, getattr(section, name))

    def start_profiling_comms(self) -> None:
        """Record every operation."""
        self.prof_all = True

    def stop_profiling_comms(self) -> None:
        """Record only the chosen operations."""
        self.prof_all = False

    def start_profiling_op(self, op_name_list: Sequence[str]) -> None:
        """Add operations to the chosen ones."""
        self.prof_ops = sorted({*self.prof_ops, *op_name_list})

    def stop_profiling_op(self, op_name_list: Sequence[str]) -> None:
        """Take operations out of the chosen ones."""
        self.prof_ops = [name for name in self.prof_ops if name not in op_name_list]

    def records(self, name: str, prof: bool) -> bool:
        """Say whether a call of the operation ``name`` is recorded."""
        return self.enabled and (self.prof_all or prof or name in self.prof_ops)

    def append(
        self,
        raw_name: str,
        record_name: str,
        latency: float,
        msg_size: int,
        ranks: int | None = None,
    ) -> None:
        """Record one call.

        Args:
            raw_name: the operation, which decides how throughput is computed.
            record_name: the name to record it under.
            latency: milliseconds.
            msg_size: bytes.
            ranks: ranks taking part; None means all.
        """
        world = ranks or _world_size()
        throughput, bus = calc_bw_log(raw_name, msg_size, latency / 1e3, world)
        row = self.comms_dict.setdefault(record_name, {}).setdefault(msg_size, [0, [], [], []])
        row[0] += 1
        for column, value in zip(row[1:], (latency, throughput, bus), strict=True):
            column.append(value)
        if self.verbose:
            logger.info(
                "comm op: %s | time (ms): %.2f | msg size: %s | algbw (Gbps): %.2f | busbw (Gbps): %.2f",
                record_name,
                latency,
                convert_size(msg_size),
                throughput,
                bus,
            )

    def get_raw_data(self) -> dict[str, dict[int, list[Any]]]:
        """Return a copy of the records."""
        return {
            name: {
                size: [row[0], *(list(column) for column in row[1:])] for size, row in sizes.items()
            }
            for name, sizes in self.comms_dict.items()
        }

    def has_data(self) -> bool:
        """Say whether anything was recorded."""
        return bool(self.comms_dict)

    def reset_data(self) -> None:
        """Forget the records."""
        self.comms_dict.clear()

    def get_operation_names(self) -> list[str]:
        """Return the names of the recorded operations."""
        return list(self.comms_dict)

    def get_total_operations(self) -> int:
        """Return the number of recorded calls."""
        return sum(row[0] for sizes in self.comms_dict.values() for row in sizes.values())

    def get_operation_summary(self, operation_name: str) -> dict[int, dict[str, Any]]:
        """Return the summary of one operation by message size; empty when it was not recorded."""
        return {
            size: _summary(size, row)
            for size, row in self.comms_dict.get(operation_name, {}).items()
        }

    def log_all(
        self, print_log: bool = True, show_straggler: bool = False, return_dict: bool = False
    ) -> dict[str, Any] | None:
        """Print the table, and return it when asked. Collective with ``show_straggler``."""
        stragglers = self._stragglers() if show_straggler else None
        if print_log:
            print(self._table(stragglers))
        if not return_dict:
            return None
        return {
            "summary": {name: self.get_operation_summary(name) for name in self.comms_dict},
            "straggler_analysis": stragglers,
            "metadata": {"world_size": _world_size(), "rank": _rank(), "timestamp": time.time()},
        }

    def _stragglers(self) -> dict[str, Any]:
        """Compare each operation's total time with that of the rank which waited least: the straggler."""
        totals = {
            (name, size): sum(row[1])
            for name, sizes in self.comms_dict.items()
            for size, row in sizes.items()
        }
        told = _of_all_ranks(totals)
        result: dict[str, Any] = {}
        for (name, size), total in totals.items():
            least, rank = min(
                (other[name, size], rank)
                for rank, other in enumerate(told)
                if (name, size) in other  # ranks need not have taken part in the same ones
            )
            result.setdefault(name, {})[size] = {
                "count": self.comms_dict[name][size][0],
                "total_comm_lat_ms": least,
                "total_straggler_ms": total - least,
                "straggler_rank": rank,
            }
        return result

    def _table(self, stragglers: dict[str, Any] | None) -> str:
        head = f"{'op':<28}{'size':>12}{'count':>8}{'total ms':>12}{'avg ms':>10}{'Gbps':>10}{'bus Gbps':>10}"
        lines = [head + ("   straggler ms  rank" if stragglers else "")]
        for name, sizes in self.comms_dict.items():
            for size, row in sorted(sizes.items()):
                one = _summary(size, row)
                line = (
                    f"{name:<28}{one['msg_size_str']:>12}{one['count']:>8}"
                    f"{one['total_latency_ms']:>12.2f}{one['avg_latency_ms']:>10.3f}"
                    f"{one['tput_avg_gbps']:>10.2f}{one['busbw_avg_gbps']:>10.2f}"
                )
                if stragglers:
                    waits = stragglers[name][size]
                    line += f"{waits['total_straggler_ms']:>15.2f}{waits['straggler_rank']:>6}"
                lines.append(line)
        return "\n".join(lines)


def _summary(size: int, row: list[Any]) -> dict[str, Any]:
    count, latencies, throughputs, buses = row
    return {
        "count": count,
        "total_latency_ms": sum(latencies),
        "avg_latency_ms": _middle_mean(latencies),
        "tput_avg_gbps": _middle_mean(throughputs),
        "busbw_avg_gbps": _middle_mean(buses),
        "msg_size_bytes": size,
        "msg_size_str": convert_size(size),
    }


def _middle_mean(values: list[float]) -> float:
    """Return the mean without the tenth at either end: the first calls set up connections."""
    cut = int(len(values) * 0.1)
    kept = sorted(values)[cut : len(values) - cut]
    return sum(kept) / len(kept) if kept else 0.0


def _distributed() -> Any:
    module: Any = sys.modules.get("torch.distributed")
    return module if module and module.is_available() and module.is_initialized() else None


def _of_all_ranks(own: dict[tuple[str, int], float]) -> list[dict[tuple[str, int], float]]:
    module = _distributed()
    if module is None:
        return [own]
    gathered: list[Any] = [None] * module.get_world_size()
    module.all_gather_object(gathered, own)
    return gathered


def _world_size() -> int:
    module = _distributed()
    return module.get_world_size() if module else 1


def _rank() -> int:
    module = _distributed()
    return module.get_rank() if module else 0
