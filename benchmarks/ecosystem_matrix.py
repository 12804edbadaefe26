# SPDX-License-Identifier: Apache-2.0
"""Every cell of the promise to other libraries: their training with our engine gives the losses that they give without.

    python benchmarks/ecosystem_matrix.py [--cells trainer,peft-3-bf16] [--ranks 1,2] [--write FILE]

A cell is a library (the Trainer, an accelerate loop, the Trainer with PEFT's adapters), a stage, a dtype, offloaded to
the CPU or not, on one or two ranks. It trains, saves half-way, resumes from there in new objects and exports. The same
run without DeepSpeed, on one process with the batches of all ranks, says what the losses and the weights should be. One
launch for each number of ranks does all its cells. Ends with status 1 when a cell misses a limit.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import os
import platform
import sys
import tempfile
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.helpers.libraries import VOCABULARY, forget, llama
from tests.helpers.ranks import RankError, RankPool

STEPS, SAVE_AT, ACCUMULATION, BATCH = 4, 2, 2, 2
# The largest distance of a loss: in fp32 it is the order of sums; in bf16 the run without
# DeepSpeed keeps fp32 weights under autocast, and ours computes with weights of eight bits.
LOSS_LIMIT = {"fp32": 1e-5, "bf16": 1e-2}
# The largest distance of an exported weight: Adam's first steps move each weight by about the learning rate, whatever
# the size of its gradient, so that a gradient near zero may turn a step round.
WEIGHT_LIMIT = {"fp32": 1e-4, "bf16": 3e-2}
RATE = 5e-3


class Cell(NamedTuple):
    """One combination; stage None is the run without DeepSpeed."""

    library: str
    stage: int | None
    dtype: str
    offload: bool = False

    @property
    def name(self) -> str:
        return f"{self.library}-{self.stage}-{self.dtype}" + "-offload" * self.offload


CELLS = [
    Cell(library, stage, dtype, offload)
    for library in ("trainer", "accelerate", "peft")
    for stage in (0, 1, 2, 3)
    for dtype in ("fp32", "bf16")
    for offload in ((False, True) if stage else (False,))
]


def clear() -> None:
    """Drop what the libraries keep of a run, and the run."""
    forget()
    gc.collect()


def zero_section(cell: Cell) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": cell.stage, "stage3_param_persistence_threshold": 0}
    section["stage3_gather_16bit_weights_on_model_save"] = True
    if cell.offload:
        section["offload_optimizer"] = {"device": "cpu"}
        if cell.stage == 3:
            section["offload_param"] = {"device": "cpu"}
    return section


def with_adapters(model: torch.nn.Module) -> torch.nn.Module:
    import peft

    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora)


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCABULARY, (64, 8), generator=generator)


# ------------------------------------------------------------------ the Trainer, with adapters or without
def make_trainer(cell: Cell, ranks: int, folder: Path) -> Any:
    import transformers

    clear()
    settings = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "zero_optimization": zero_section(cell),
    }
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        deepspeed=None if cell.stage is None else settings,
        bf16=cell.dtype == "bf16",
        per_device_train_batch_size=BATCH,
        # without DeepSpeed one process takes the batches of all ranks, one after the other
        gradient_accumulation_steps=ACCUMULATION * (ranks if cell.stage is None else 1),
        max_steps=STEPS,
        save_steps=SAVE_AT,
        logging_steps=1,
        learning_rate=RATE,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )
    data = [{"input_ids": row, "labels": row} for row in rows()]
    model = with_adapters(llama()) if cell.library == "peft" else llama()
    return transformers.Trainer(model=model, args=arguments, train_dataset=data)


def logged(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_by_trainer(cell: Cell, ranks: int, folder: Path) -> dict[str, Any]:
    run = make_trainer(cell, ranks, folder)
    run.train()
    run.save_model(str(folder / "model"))
    run.accelerator.wait_for_everyone()  # the first rank writes the model
    found = {"losses": logged(run), "weights": read_model(cell, folder / "model")}
    if cell.stage is None:
        return found
    if cell.stage:
        found["fp32"] = read_checkpoint(folder / f"checkpoint-{STEPS}", cell)
    again = make_trainer(cell, ranks, folder)
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVE_AT}"))
    found["resumed"] = logged(again)
    return found


def read_model(cell: Cell, folder: Path) -> dict[str, torch.Tensor]:
    """The exported weights; of adapters, only they are there."""
    from safetensors.torch import load_file

    name = "adapter_model.safetensors" if cell.library == "peft" else "model.safetensors"
    return {key: value.float() for key, value in load_file(folder / name).items()}


def read_checkpoint(folder: Path, cell: Cell) -> dict[str, torch.Tensor]:
    """The checkpoint's shards put together in fp32, under the names of the exported file."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    if cell.library == "peft":
        state = {name: value for name, value in state.items() if "lora_" in name}
    return {name.replace(".default.", "."): value.clone() for name, value in state.items()}


# ------------------------------------------------------------------ a loop by accelerate
def make_loop(cell: Cell, ranks: int) -> tuple[Any, ...]:
    import accelerate

    clear()
    options: dict[str, Any] = {"cpu": True}
    if cell.stage is not None:
        config = {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": cell.dtype == "bf16"},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero_section(cell),
        }
        options = {"deepspeed_plugin": accelerate.DeepSpeedPlugin(hf_ds_config=config)}
        options["kwargs_handlers"] = [accelerate.InitProcessGroupKwargs(backend="gloo")]
    else:
        options["mixed_precision"] = "bf16" if cell.dtype == "bf16" else "no"
    runner = accelerate.Accelerator(gradient_accumulation_steps=ACCUMULATION, **options)
    net = llama()
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    batch = BATCH * (ranks if cell.stage is None else 1)
    loader = torch.utils.data.DataLoader(rows()[: STEPS * ACCUMULATION * BATCH * ranks], batch)
    # the scheduler goes on once a step of the optimizer, not once for each rank
    return runner, *runner.prepare(net, optimizer, loader), scheduler


def loop(steps: range, runner: Any, net: Any, optimizer: Any, loader: Any, scheduler: Any) -> list:
    """Train over the batches of these steps: the mean loss of each."""
    found: list[float] = []
    for index, batch in enumerate(loader):
        if index // ACCUMULATION not in steps:
            continue
        with runner.accumulate(net):
            loss = net(input_ids=batch, labels=batch).loss
            runner.backward(loss)
            if runner.sync_gradients:
                runner.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            if runner.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()
        found.append(runner.reduce(loss.detach().float(), "mean").item())
    return [
        sum(found[at : at + ACCUMULATION]) / ACCUMULATION
        for at in range(0, len(found), ACCUMULATION)
    ]


def train_by_accelerate(cell: Cell, ranks: int, folder: Path) -> dict[str, Any]:
    run = make_loop(cell, ranks)
    runner, net, scheduler = run[0], run[1], run[-1]
    runner.register_for_checkpointing(scheduler)
    losses = loop(range(SAVE_AT), *run)
    if cell.stage is not None:
        runner.save_state(str(folder / "state"))
    losses += loop(range(SAVE_AT, STEPS), *run)
    weights = runner.get_state_dict(net)  # on the first rank
    found: dict[str, Any] = {"losses": losses}
    if weights:
        found["weights"] = {name: value.float().clone() for name, value in weights.items()}
    if cell.stage is None:
        return found
    again = make_loop(cell, ranks)
    again[0].register_for_checkpointing(again[-1])
    again[0].load_state(str(folder / "state"))
    found["resumed"] = losses[:SAVE_AT] + loop(range(SAVE_AT, STEPS), *again)
    if cell.stage:
        again[0].save_state(str(folder / "end"))
        found["fp32"] = read_checkpoint(folder / "end", cell)
    return found


# ------------------------------------------------------------------ a cell, and all of them
def train(cell: Cell, ranks: int, folder: Path) -> dict[str, Any]:
    return (train_by_accelerate if cell.library == "accelerate" else train_by_trainer)(
        cell, ranks, folder
    )


def run_cell(rank: int, cell: Cell, ranks: int, folder: str) -> dict[str, Any]:
    """Train the cell on this rank; weights only from the first."""
    warnings.simplefilter("ignore")
    found = train(cell, ranks, Path(folder))
    clear()
    return {} if rank else found


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest distance of two states; names that only one has are an error, but for tied ones."""
    names = set(found) & set(wanted)
    other = {name for name in set(found) ^ set(wanted) if "lm_head" not in name}
    if other or not names:
        raise AssertionError(f"the export has other weights than the model: {sorted(other)[:4]}")
    return max((found[name] - wanted[name]).abs().max().item() for name in names)


def judge(cell: Cell, found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Distances of a cell from the run without DeepSpeed, and whether all are within their limits."""
    if len(found["losses"]) != STEPS or len(found["resumed"]) != STEPS:
        raise AssertionError(f"{len(found['losses'])} and {len(found['resumed'])} losses")
    losses = max(abs(a - b) for a, b in zip(found["losses"], wanted["losses"], strict=True))
    resumed = max(abs(a - b) for a, b in zip(found["resumed"], found["losses"], strict=True))
    exports = [apart(found[key], wanted["weights"]) for key in ("weights", "fp32") if key in found]
    good = losses <= LOSS_LIMIT[cell.dtype] and max(exports) <= WEIGHT_LIMIT[cell.dtype]
    good = good and resumed <= 1e-6
    return {"losses": losses, "resumed": resumed, "export": max(exports), "good": good}


Results = list[tuple[Cell, int, dict[str, Any]]]


def run_plain(cells: list[Cell], ranks: int) -> dict[tuple[str, str], dict[str, Any]]:
    """What the cells' runs without DeepSpeed find."""
    found = {}
    for library, dtype in dict.fromkeys((cell.library, cell.dtype) for cell in cells):
        with tempfile.TemporaryDirectory() as folder:
            found[library, dtype] = train(Cell(library, None, dtype), ranks, Path(folder))
        clear()
    return found


def run_on(ranks: int, cells: list[Cell], plain: dict, timeout: float) -> Results:
    """Every cell on so many ranks, in one launch (in another after a failure), with what it was found to be."""
    results = []
    with RankPool(ranks) as pool:
        for cell in cells:
            try:
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                    found = pool.run(run_cell, cell, ranks, folder, timeout=timeout)[0]
                row = judge(cell, found, plain[cell.library, cell.dtype])
            except (RankError, AssertionError):
                row = {"good": False, "error": traceback.format_exc()}
            results.append((cell, ranks, row))
            print(f"{cell.name}, {ranks} rank(s):", row.get("error", row), flush=True)
    return results


def run_all(cells: list[Cell], counts: list[int], timeout: float) -> Results:
    """Every cell on every number of ranks; the numbers run side by side."""
    warnings.simplefilter("ignore")
    plain = {ranks: run_plain(cells, ranks) for ranks in counts}
    with ThreadPoolExecutor(len(counts)) as threads:
        runs = [threads.submit(run_on, n, cells, plain[n], timeout) for n in counts]
    return [result for run in runs for result in run.result()]


def table(results: Results, command: str) -> str:
    """The Markdown file of a run."""
    packages = ("torch", "transformers", "accelerate", "peft", "deepspeed")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    good = sum(row["good"] for _, _, row in results)
    lines = [
        f"# Other libraries with the engine and without it ({datetime.date.today().isoformat()})",
        "",
        f"{versions}; Python {platform.python_version()}, {platform.system()}, CPU. Written by `{command}`.",
        "",
        f"**{good} of {len(results)} cells are within the limits.** Each trains {STEPS} steps of a small Llama, saves at {SAVE_AT}, resumes in new",
        "objects and exports. Columns: the largest distance of a step's loss from the run without DeepSpeed; of a resumed",
        "run's loss from the run that went on (limit 0.000001); of a weight of the exported model, and of the fp32 weights put",
        "together from the checkpoint's shards, from the model trained without DeepSpeed. bf16 without DeepSpeed is autocast",
        "over fp32 weights.",
        "",
        "| limits | loss | weight |",
        "|---|---|---|",
        *(f"| {key} | {LOSS_LIMIT[key]:g} | {WEIGHT_LIMIT[key]:g} |" for key in LOSS_LIMIT),
        "",
        "| library | stage | dtype | offload | ranks | losses | resumed | export | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, ranks, row in results:
        numbers = [
            f"{row[key]:.1e}" if key in row else "" for key in ("losses", "resumed", "export")
        ]
        fields = [cell.library, cell.stage, cell.dtype, "cpu" if cell.offload else "", ranks]
        verdict = "good" if row["good"] else "**fails**"
        lines.append(f"| {' | '.join(map(str, [*fields, *numbers, verdict]))} |")
    return "\n".join(lines) + "\n"


def chosen(text: str) -> list[Cell]:
    """Cells whose names begin with one of the given words."""
    return [cell for cell in CELLS if cell.name.startswith(tuple(text.split(",")))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=chosen, default=CELLS, help="names begin so")
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[1])
    parser.add_argument("--timeout", type=float, default=120, help="seconds for a cell")
    parser.add_argument("--write", type=Path, help="write the table there")
    args = parser.parse_args()
    results = run_all(args.cells, args.ranks, args.timeout)
    if args.write is not None:
        command = f"python benchmarks/ecosystem_matrix.py --ranks {','.join(map(str, args.ranks))}"
        args.write.write_text(table(results, command), encoding="utf-8")
    sys.exit(not all(row["good"] for _, _, row in results))


if __name__ == "__main__":
    main()
