# SPDX-License-Identifier: Apache-2.0
"""What torch itself calls plain content of a file."""

from __future__ import annotations

import functools
import io
import pickle
from pathlib import Path

import torch

from deepspeed.checkpoint.reader import load_file


@functools.cache
def _torch_knows_sets() -> bool:
    file = io.BytesIO()
    torch.save({"names"}, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def check_plain(path: Path) -> None:
    """Raise unless torch reads the file with ``weights_only``.

    The first versions of torch with that flag refuse a set, which the format has (names of sparse modules): there the
    file is to pass our own reader, which runs nothing either.
    """
    if _torch_knows_sets():
        torch.load(path, weights_only=True)
    else:
        load_file(path)
