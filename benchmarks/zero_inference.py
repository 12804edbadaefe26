# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of greedy generation: resident, ZeRO-3 with weights on the CPU, 4 and 8 bits, accelerate's offloading.

    python benchmarks/zero_inference.py [--size tiny|small|medium] [--dtype fp32|bf16] [--rounds 5] [--upstream PYTHON]

Contenders generate from the same Llama with random weights, in turns, so that a machine that changes speed changes all
of them; what counts is the ratio to the resident model of the same round. On a machine that others use as well, the CPU
seconds of the best round say more. `--upstream` names an interpreter with
upstream's package, which runs its rows, and its own resident one, right after. On a machine with a GPU, accelerate and
ZeRO bring the weights to it for each use.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

# width, inner width, layers, heads, batch
SIZES = {
    "tiny": (128, 384, 3, 4, 64),
    "small": (512, 1408, 6, 8, 16),
    "medium": (1024, 2816, 12, 16, 8),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARY, PROMPT = 688, 8


def model(args: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, inner, layers, heads, _ = SIZES[args.size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(DTYPES[args.dtype]).eval()


def zero(saved: Path, args: argparse.Namespace, bits: int | None) -> Any:
    from transformers import LlamaForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    import deepspeed

    width = SIZES[args.size][0]
    config: dict[str, Any] = {
        "train_batch_size": 1,
        "bf16": {"enabled": args.dtype == "bf16"},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 2 * width * width,
            "stage3_param_persistence_threshold": width,
            "stage3_max_live_parameters": 2 * width * width,
            "offload_param": {"device": "cpu", "pin_memory": torch.cuda.is_available()},
        },
    }
    if bits is not None:
        groups = {"num_bits": bits, "group_size": 64, "group_dim": 1, "symmetric": False}
        config["weight_quantization"] = {"quantized_initialization": groups}
    sharded_from_the_start = HfDeepSpeedConfig(config)
    net = LlamaForCausalLM.from_pretrained(saved, torch_dtype=DTYPES[args.dtype])
    del sharded_from_the_start
    return deepspeed.initialize(model=net, config=config)[0].module.eval()


def accelerated(net: Any, folder: str | None) -> Any:
    from accelerate import cpu_offload, disk_offload

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if folder is None:
        return cpu_offload(net, execution_device=device)
    return disk_offload(net, folder, execution_device=device)


def contenders(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    net = model(args)
    net.save_pretrained(folder / "saved")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {"resident": copy.deepcopy(net).to(device)}
    if not args.upstream_rows:
        rows["accelerate cpu"] = accelerated(copy.deepcopy(net), None)
        rows["accelerate disk"] = accelerated(copy.deepcopy(net), str(folder / "offloaded"))
    for name, bits in (("ZeRO-3 cpu", None), ("ZeRO-3 8 bits", 8), ("ZeRO-3 4 bits", 4)):
        rows[name] = zero(folder / "saved", args, bits)
    return rows


def work(args: argparse.Namespace) -> None:
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29617"
    )
    batch = SIZES[args.size][4]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(1, VOCABULARY, (batch, PROMPT), device=device)
    mask = torch.ones_like(ids)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows = contenders(args, Path(folder))
        times: dict[str, list[list[float]]] = {name: [] for name in rows}
        for round_ in range(args.rounds + 1):
            for name, net in rows.items():
                begin = time.perf_counter(), time.process_time()
                out = net.generate(
                    ids, attention_mask=mask, max_new_tokens=args.tokens, do_sample=False
                )
                out.cpu()
                if round_:
                    end = time.perf_counter(), time.process_time()
                    times[name].append([end[0] - begin[0], end[1] - begin[1]])
        Path(args.out).write_text(json.dumps(times), encoding="utf-8")


def run(python: str, args: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        command = [python, str(Path(__file__).resolve()), "--out", str(out), *extra]
        for name in ("size", "dtype", "rounds", "tokens", "threads"):
            command += [f"--{name}", str(getattr(args, name))]
        subprocess.run(command, check=True, cwd=folder)
        return json.loads(out.read_text(encoding="utf-8"))


def table(times: dict[str, Any], args: argparse.Namespace, label: str) -> None:
    tokens = SIZES[args.size][4] * args.tokens
    for name, rounds in times.items():
        ratio = statistics.median(
            base[0] / own[0] for base, own in zip(times["resident"], rounds, strict=True)
        )
        speed = tokens / statistics.median(wall for wall, _ in rounds)
        cpu = min(cpu for _, cpu in rounds)
        share = min(cpu for _, cpu in times["resident"]) / cpu
        print(
            f"{label + name:26} {speed:8.1f} tokens/s {ratio:6.2f} of resident"
            f"   {cpu:8.3f} CPU s {share:6.2f} of resident"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--upstream")
    parser.add_argument("--upstream-rows", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.out is not None:
        torch.set_num_threads(args.threads)
        work(args)
        return
    table(run(sys.executable, args, []), args, "")
    if args.upstream:
        table(run(args.upstream, args, ["--upstream-rows"]), args, "upstream's ")


if __name__ == "__main__":
    main()
