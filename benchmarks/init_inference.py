# SPDX-License-Identifier: Apache-2.0
"""Milliseconds a token of greedy decoding: transformers' `generate`, `init_inference` without and with fused decoders.

    python benchmarks/init_inference.py [--model gpt2|opt|llama] [--dtype fp32|bf16] [--batch 1] [--threads 2]

All contenders decode the same prompt with the same random weights of GPT-2's size, in turns, so that a machine that
changes speed changes all of them. The wall clock is the median of the rounds' ratios to `generate`; on a machine that
others use as well, the CPU time of each contender's best round says more. Tokens are compared as well. On a GPU the
step of the fused decoder is captured as a CUDA graph.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import deepspeed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPT = 32


def model(kind: str) -> Any:
    """A model with random weights, of the width and depth of GPT-2."""
    import transformers

    torch.manual_seed(0)
    none = {"eos_token_id": None, "bos_token_id": None}
    wide = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**none))
    if kind == "opt":
        config = transformers.OPTConfig(**wide, ffn_dim=3072, word_embed_proj_dim=768, **none)
        return transformers.OPTForCausalLM(config)
    config = transformers.LlamaConfig(
        **wide, intermediate_size=2048, num_key_value_heads=4, vocab_size=32000, **none
    )
    return transformers.LlamaForCausalLM(config)


def contenders(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = model(args.model).to(device=device, dtype=DTYPES[args.dtype]).eval()
    options = {"dtype": DTYPES[args.dtype], "max_tokens": 2048}
    fused = {"replace_with_kernel_inject": True, "enable_cuda_graph": device == "cuda"}
    return {
        "generate": net,
        "init_inference": deepspeed.init_inference(copy.deepcopy(net), **options),
        "init_inference, fused": deepspeed.init_inference(copy.deepcopy(net), **options, **fused),
    }


def timed(work: Callable[[], torch.Tensor]) -> tuple[float, float, torch.Tensor]:
    wall, cpu = time.perf_counter(), time.process_time()
    out = work().cpu()
    return time.perf_counter() - wall, time.process_time() - cpu, out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("gpt2", "opt", "llama"), default="gpt2")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    rows = contenders(args)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 30000, (args.batch, PROMPT), generator=generator)
    ids = ids.to(next(rows["generate"].parameters()).device)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": args.tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    tokens = {}
    for round_ in range(args.rounds + 1):
        for name, net in rows.items():
            wall, cpu, tokens[name] = timed(lambda net=net: net.generate(ids, **options))
            if round_:  # the first warms up
                times[name].append((wall, cpu))
    print(f"{args.model}, {args.dtype}, batch {args.batch}, {args.threads} threads\n")
    print(
        "| | wall, ms a token | speed, of generate | CPU, ms a token | of generate | same tokens |"
    )
    print("|---|---|---|---|---|---|")
    base = times["generate"]
    for name, found in times.items():
        wall = statistics.median(w for w, _ in found) / args.tokens * 1000
        speed = statistics.median(b[0] / w for b, (w, _) in zip(base, found, strict=True))
        cpu = min(c for _, c in found)
        share = min(c for _, c in base) / cpu
        same = "yes" if torch.equal(tokens[name], tokens["generate"]) else "no"
        cells = f"{wall:.1f} | {speed:.2f} | {cpu / args.tokens * 1000:.1f} | {share:.2f} | {same}"
        print(f"| {name} | {cells} |")


if __name__ == "__main__":
    main()
