# SPDX-License-Identifier: Apache-2.0
"""Adam on a GPU: our kernel against torch's fused and foreach paths and the copy roofline, and the cost of a launch.

``python benchmarks/cuda_optimizers.py [--numel 268435456] [--tensors 148]`` prints one table. All rows of a table are
taken in one run, one after the other in turns, as the median of the rounds: compare rows of one run only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from deepspeed.ops import cuda, cuda_optim
from deepspeed.ops.cuda_optim import AdamRule, TensorLists


def timed(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median device time of each function in seconds, taken in turns after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 2):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            if round_ >= 2:
                times[name].append(start.elapsed_time(end) / 1000)
    return {name: statistics.median(taken) for name, taken in times.items()}


def params_of(numel: int, tensors: int, dtype: torch.dtype) -> list[torch.Tensor]:
    each = numel // tensors
    made = [torch.randn(each, device="cuda").to(dtype) for _ in range(tensors)]
    for param in made:
        param.grad = torch.randn_like(param)
    return made


def adam_rows(numel: int, tensors: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    params = params_of(numel, tensors, dtype)
    fused = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in params], fused=True)
    foreach = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in params], foreach=True)
    for optimizer in (fused, foreach):
        for mine, param in zip(optimizer.param_groups[0]["params"], params, strict=True):
            mine.grad = param.grad
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    lists = TensorLists(params, [p.grad for p in params], *moments)
    rule = AdamRule(1e-3, 0.9, 0.999, 1e-8, 0.01, 10, True)
    if not cuda_optim.multi_tensor_adam(lists, rule):
        raise SystemExit("no kernel route: " + "; ".join(sorted({r.reason for r in cuda.routes()})))
    return {
        "deepspeed multi_tensor_adam": lambda: cuda_optim.multi_tensor_adam(lists, rule),
        "torch AdamW fused": fused.step,
        "torch AdamW foreach": foreach.step,
    }


def host_seconds(function: Callable[[], object], calls: int = 2000) -> float:
    """Return the host time of one call while the device keeps up (tiny tensors)."""
    for _ in range(100):
        function()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    taken = (time.perf_counter() - begin) / calls
    torch.cuda.synchronize()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=1 << 28)
    parser.add_argument("--tensors", type=int, default=148)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    version = torch.__version__
    print(f"{torch.cuda.get_device_name()}, torch {version}, {given.numel} elements, medians")
    route = next(r for r in cuda.routes() if r.name == "adam_step")
    print(f"route: {route.route} ({route.reason})\n")
    print("| dtype | tensors | what | ms | GB/s | of copy |\n|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        size = torch.finfo(dtype).bits // 8
        source = torch.empty(given.numel, dtype=dtype, device="cuda")
        target = torch.empty_like(source)
        for tensors in (1, given.tensors):
            rows = adam_rows(given.numel, tensors, dtype)
            found = timed({"copy": lambda t=target, s=source: t.copy_(s), **rows}, given.rounds)
            # copy moves two elements each, Adam seven: reads p, g, m, v; writes p, m, v
            rates = {
                name: (2 if name == "copy" else 7) * given.numel * size / taken / 1e9
                for name, taken in found.items()
            }
            for name, taken in found.items():
                share = rates[name] / rates["copy"]
                print(
                    f"| {str(dtype)[6:]} | {tensors} | {name} | {taken * 1e3:.3f} "
                    f"| {rates[name]:.0f} | {share:.2f} |"
                )
    print("\nhost time of a call on tiny tensors:")
    for tensors in (1, 100):
        rows = adam_rows(tensors * 16, tensors, torch.float32)
        for name, function in rows.items():
            print(f"  {name}, {tensors} tensors: {host_seconds(function) * 1e6:.1f} us")
    x = torch.zeros(4, device="cuda")
    launch = cuda.find("fake_quantize", x)
    if launch is not None:
        arguments = (1, x.data_ptr(), 0, 1, 4, 8, 0, 0, 0)
        print(f"  bare launch: {host_seconds(lambda: launch(*arguments)) * 1e6:.1f} us")


if __name__ == "__main__":
    main()
