# SPDX-License-Identifier: Apache-2.0
"""Ten classes of 32×32 colour pictures: CIFAR-10 from disk where there is a copy, else shapes drawn here."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

SIDE = 32
CIFAR_NAMES = (
    *("plane", "car", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SHAPE_NAMES = (
    *("disc", "ring", "square", "frame", "triangle"),
    *("cross", "saltire", "bars", "columns", "checks"),
)


class _ArraysOnly(pickle.Unpickler):
    """CIFAR-10 comes as pickles; a pickle may name any function, so only numpy's array parts are let in."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"})

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a CIFAR-10 batch has no business with {module}.{name}")


def _members(folder: Path) -> dict[str, bytes]:
    """The batch files' bytes by name, from an unpacked folder or the .tar.gz as it is downloaded."""
    wanted = {*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"}
    found = {p.name: p.read_bytes() for p in sorted(folder.rglob("*_batch*")) if p.name in wanted}
    for archive in [] if found else sorted(folder.glob("cifar-10-python.tar.gz")):
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                content = tar.extractfile(member) if Path(member.name).name in wanted else None
                if content is not None:
                    found[Path(member.name).name] = content.read()
    return found


def cifar10(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """Train and test sets from a local copy of CIFAR-10 (python version, unpacked or not).

    Raises:
        FileNotFoundError: the folder holds no test batch or no training batch.
    """
    members = _members(folder)
    if "test_batch" not in members or len(members) < 2:
        raise FileNotFoundError(
            f"no CIFAR-10 in {folder}: expected cifar-10-python.tar.gz or its unpacked batches; "
            "leave --data out to train on pictures made here"
        )
    sets: dict[bool, list[tuple[np.ndarray, np.ndarray]]] = {True: [], False: []}
    for name, content in sorted(members.items()):
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        pixels = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, SIDE, SIDE)
        sets[name != "test_batch"].append((pixels, np.asarray(batch[b"labels"])))
    return _dataset(*map(np.concatenate, zip(*sets[True], strict=True))), _dataset(*sets[False][0])


def _masks(kind: int, dx: np.ndarray, dy: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Which pixels of each picture belong to the shape; dx, dy are pixels from its centre (n, 32, 32)."""
    far, near = np.maximum(np.abs(dx), np.abs(dy)), np.minimum(np.abs(dx), np.abs(dy))
    round_ = np.hypot(dx, dy)
    inside = far < size
    slanted = np.minimum(np.abs(dx - dy), np.abs(dx + dy)) < 0.35 * size
    stripe = np.maximum(2.0, size / 2.5)
    return (
        lambda: round_ < size,
        lambda: (round_ < size) & (round_ > 0.6 * size),
        lambda: inside,
        lambda: inside & (far > 0.6 * size),
        lambda: (np.abs(dx) < (dy + size) / 2) & (np.abs(dy) < size),
        lambda: inside & (near < 0.3 * size),
        lambda: inside & slanted,
        lambda: inside & (np.floor(dy / stripe) % 2 == 0),
        lambda: inside & (np.floor(dx / stripe) % 2 == 0),
        lambda: inside & ((np.floor(dx / stripe) + np.floor(dy / stripe)) % 2 == 0),
    )[kind]()


def drawn(count: int, seed: int) -> TensorDataset:
    """`count` noisy pictures of ten shapes at random places, sizes and colours; the same for the same seed."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % len(SHAPE_NAMES))
    row, column = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    pixels = np.empty((count, 3, SIDE, SIDE), dtype=np.uint8)
    for kind in range(len(SHAPE_NAMES)):
        chosen = np.flatnonzero(labels == kind)
        n = len(chosen)
        centre = random.uniform(11, 21, (2, n, 1, 1)).astype(np.float32)
        size = random.uniform(6, 10, (n, 1, 1)).astype(np.float32)
        mask = _masks(kind, column - centre[0], row - centre[1], size)[:, None]
        paint = random.uniform(0, 255, (2, n, 3, 1, 1)).astype(np.float32)
        clean = np.where(mask, paint[0], paint[1])
        noise = random.normal(0, 30, clean.shape).astype(np.float32)
        pixels[chosen] = np.clip(clean + noise, 0, 255).astype(np.uint8)
    return _dataset(pixels, labels)


def _dataset(pixels: np.ndarray, labels: np.ndarray) -> TensorDataset:
    """Pixels scaled to about [-1, 1] as (n, 3, 32, 32) float32, labels as int64."""
    images = torch.from_numpy(pixels).to(torch.float32).sub_(127.5).div_(64.0)
    return TensorDataset(images, torch.from_numpy(labels.astype(np.int64)))
