# SPDX-License-Identifier: Apache-2.0
"""Copies a tag folder in the form that upstream's own loader of stage 3 needs: with a pickled loss scaler.

    python -m deepspeed.checkpoint.to_upstream --input_folder ckpt/global_step10 --output_folder ckpt/for_upstream

Upstream's stage 3 takes the object in `loss_scaler` as its scaler and calls its methods. No pickle that
`torch.load(weights_only=True)` accepts holds an object with such methods, so the checkpoints of this package have none;
at stages 0 to 2 upstream does without. A copy made here loads there, and here; it is no longer free of classes. (A
universal checkpoint is, and loads in upstream at every stage that has shards.)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from ..utils.errors import DeepSpeedCheckpointError, explain
from .atomic import Crew, Entry, publish
from .format import LATEST, SCALER_FIELDS, Optim, Zero, is_own_file
from .reader import Folder
from .reshard import scaler_numbers
from .writer import save_file

_DYNAMIC_DEFAULTS: Mapping[str, Any] = {
    "cur_iter": 0,
    "last_overflow_iter": -1,
    "scale_factor": 2.0,
    "scale_window": 1000,
    "min_scale": 1,
    "delayed_shift": 1,
    "cur_hysteresis": 1,
    "consecutive_hysteresis": False,
    "raise_error_at_min_scale": True,
}


def scaler_object(numbers: Mapping[str, Any]) -> Any:
    """A loss scaler with the attributes that upstream's has."""
    kind = DynamicLossScaler if numbers.get("dynamic") else LossScaler
    made = object.__new__(kind)
    found = {key: numbers[key] for key in SCALER_FIELDS if key in numbers}
    if kind is LossScaler:
        vars(made).update(cur_scale=float(found.get("cur_scale", 1.0)), dynamic=False)
    else:
        vars(made).update({**_DYNAMIC_DEFAULTS, **found, "dtype": torch.float16})
    return made


def convert(input_folder: str | Path, output_folder: str | Path) -> Path:
    """Write the copy.

    Args:
        input_folder: a tag's folder.
        output_folder: the folder to make; replaced as a whole if it is there.

    Returns:
        The made folder. `latest` beside it names it if nothing was named there before.

    Raises:
        DeepSpeedCheckpointError: files are damaged or refused.
        FileNotFoundError: it is no tag's folder.
    """
    folder, output = Folder(Path(input_folder)), Path(output_folder).resolve()
    files = [name for name in folder.glob("*.pt") if is_own_file(name)]
    if not files:
        raise FileNotFoundError(explain(f"there are no checkpoint files in {folder.path}"))

    def write(target: Path) -> list[Entry]:
        return [
            replace(save_file(target / name, _with_scaler(folder.load(name))), name=name)
            for name in files
        ]

    size = sum((folder.path / name).stat().st_size for name in files)
    pointer = None if (output.parent / LATEST).exists() else LATEST
    return publish(output.parent, output.name, Crew(), write, needed=size, latest=pointer)


def _with_scaler(content: Any) -> Any:
    state = content.get(Optim.STATE) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or Zero.STAGE not in state:
        return content
    scaler = scaler_object(scaler_numbers(state))
    return {**content, Optim.STATE: {**state, Zero.LOSS_SCALER: scaler}}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deepspeed.checkpoint.to_upstream",
        description="Copy a checkpoint in the form that upstream's stage 3 loads.",
    )
    parser.add_argument("--input_folder", required=True, help="a tag's folder")
    parser.add_argument("--output_folder", required=True, help="the folder to make")
    args = parser.parse_args(arguments)
    try:
        print(f"checkpoint for upstream in {convert(args.input_folder, args.output_folder)}")
    except (ValueError, OSError, DeepSpeedCheckpointError) as error:
        sys.exit(f"to_upstream: {error}")


if __name__ == "__main__":
    main()
