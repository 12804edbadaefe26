# SPDX-License-Identifier: Apache-2.0
"""``ds_elastic``: show the batch size and device counts of an elastic configuration."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from ..runtime.config import load_config
from ..utils.errors import DeepSpeedConfigError
from .elasticity import compute_elastic_config


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="ds_elastic", description="Show what batch sizes an elastic job would use."
    )
    parser.add_argument("-c", "--config", required=True, help="path of the DeepSpeed JSON config")
    parser.add_argument(
        "-w", "--world-size", type=int, default=0, help="devices to compute the micro batch for"
    )
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Print the section and what follows from it; return 0, or 1 with one line of error."""
    options = build_parser().parse_args(args)
    try:
        config = load_config(options.config)
        found = compute_elastic_config(config, world_size=options.world_size)
    except (DeepSpeedConfigError, ValidationError, NotImplementedError) as error:
        print(f"ds_elastic: {error}", file=sys.stderr)
        return 1
    print("Elasticity section of the config:")
    print(json.dumps(config["elasticity"], indent=4))
    rule = "-" * 42
    print(f"{rule}\nCalculated results (and chosen values)\n{rule}")
    print(f"final_batch_size .... {found[0]}")
    print(f"valid_gpus .......... {found[1]}")
    if len(found) == 3:
        print(f"micro_batch_size .... {found[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
