# SPDX-License-Identifier: Apache-2.0
"""Weights for a model that was built without them: files found, read one at a time, and put into the meta params."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepspeed.checkpoint.reader import load_file
from deepspeed.runtime.state_dict_factory import merged_module
from deepspeed.utils.errors import DeepSpeedCheckpointError, explain

# what a folder may hold, in the order of preference: an index first, then whole files
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "mp_rank_00_model_states.pt", "*.bin", "*.pt")
# formats of the older checkpoint descriptions that are plain state dicts
_KINDS = ("ds_model", "pytorch", "huggingface", "bloom", "megatron", "")


@dataclass(frozen=True)
class Parts:
    """What an engine loads: files that follow one another, or that are joined because each is of one Megatron rank."""

    files: list[Path]
    megatron: bool = False
    version: float | None = None

    def read(self) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of each file in turn, or of all of them joined."""
        if not self.megatron:
            yield from map(read_tensors, self.files)
            return
        names = [str(path) for path in self.files]
        merged = merged_module(names, self.version, lambda name: load_file(Path(name)))
        yield {name: value for name, value in merged.items() if torch.is_tensor(value)}


def is_megatron(checkpoint: Any, base: str | Path = "") -> bool:
    """Whether a checkpoint is a description (a dict, or a JSON file) of the type "Megatron"."""
    return _kind(_told(checkpoint, base)) == "megatron"


def find_parts(checkpoint: Any, base: str | Path = "") -> Parts:
    """What is in a checkpoint; arguments and errors as of `find_files`."""
    files = find_files(checkpoint, base)
    if not is_megatron(checkpoint, base):
        return Parts(files)
    return Parts(files, megatron=True, version=_told(checkpoint, base).get("version"))


def _kind(told: Any) -> str:
    return str(told.get("type", "")).lower() if isinstance(told, Mapping) else ""


def _told(checkpoint: Any, base: str | Path) -> Any:
    if isinstance(checkpoint, (Mapping, list)) or checkpoint is None:
        return checkpoint
    path = Path(base) / checkpoint
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DeepSpeedCheckpointError(f"{path} is no JSON: {error}") from error


def find_files(checkpoint: Any, base: str | Path = "") -> list[Path]:
    """The files of a checkpoint.

    Args:
        checkpoint: a folder, one file of weights, a JSON file or dict with a list `checkpoints` (and perhaps
            `type`, `base_dir`), or an index of transformers.
        base: folder that relative paths start from; a description's own `base_dir` wins.

    Raises:
        DeepSpeedCheckpointError: there is no such file, or the description cannot be read.
    """
    if isinstance(checkpoint, Mapping):
        return _described(checkpoint, Path(base))
    path = Path(base) / checkpoint
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise DeepSpeedCheckpointError(
            explain("the checkpoint is not there", got=str(path), fix="Correct 'checkpoint'.")
        )
    if path.suffix != ".json":
        return [path]
    told = _told(checkpoint, base)
    if isinstance(told, dict) and "weight_map" in told:
        return _indexed(told, path)
    return _described(told, Path(base) if str(base) else path.parent)


def _in_folder(path: Path) -> list[Path]:
    for name in _INDEXES:
        if (path / name).is_file():
            return _indexed(json.loads((path / name).read_text(encoding="utf-8")), path / name)
    for pattern in _PATTERNS:
        files = sorted(path.glob(pattern))
        if files:
            return files
    raise DeepSpeedCheckpointError(
        explain(
            "the folder holds no weights",
            got=str(path),
            expected=f"files named {', '.join(_PATTERNS)}, or an index",
        )
    )


def _indexed(index: Mapping[str, Any], path: Path) -> list[Path]:
    return _existing(path.parent / name for name in sorted(set(index["weight_map"].values())))


def _described(told: Any, base: Path) -> list[Path]:
    names = told.get("checkpoints") if isinstance(told, Mapping) else told
    if isinstance(names, Mapping):  # split into non-transformer and tensor-parallel parts
        raise DeepSpeedCheckpointError(
            explain(
                "the checkpoint is split for tensor parallelism, which is not available",
                got=f"parts {', '.join(map(str, names))}",
                expected="a list of files",
            )
        )
    kind = _kind(told)
    if not isinstance(names, list) or not names or kind not in _KINDS:
        raise DeepSpeedCheckpointError(
            explain(
                "the description of the checkpoint cannot be used",
                got=f"type {kind or 'not given'}, checkpoints {type(names).__name__}",
                expected=f"a list of files under 'checkpoints', and a type among {_KINDS}",
            )
        )
    if isinstance(told, Mapping) and told.get("base_dir"):
        base = Path(told["base_dir"])
    return _existing(base / str(name) for name in names)


def _existing(paths: Iterator[Path]) -> list[Path]:
    found = list(paths)
    missing = [str(path) for path in found if not path.is_file()]
    if missing:
        raise DeepSpeedCheckpointError(
            explain("files of the checkpoint are missing", got=", ".join(missing))
        )
    return found


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read one file of weights: safetensors, or a pickle of tensors, of which nothing is run."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file as load_safetensors

        return load_safetensors(path)
    state = load_file(path)
    while isinstance(state, Mapping) and isinstance(state.get("module"), Mapping):
        state = state["module"]
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


def is_meta(model: nn.Module) -> bool:
    """Whether a model was built without (some of) its weights."""
    return any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def load_model_with_checkpoint(model: nn.Module, parts: Parts, dtype: torch.dtype) -> None:
    """Give a model the weights of some files; each is let go of before the next is read.

    Args:
        model: params on the meta device get memory as their values come; others are overwritten.
        parts: as `find_parts` returns them.
        dtype: of floating-point values on the meta device.

    Raises:
        DeepSpeedCheckpointError: a shape does not fit, or a param got no value.
    """
    prefix = getattr(model, "base_model_prefix", "")
    loaded: set[str] = set()
    places = _places(model)
    files = parts.files
    for tensors in parts.read():
        for name, value in tensors.items():
            place = next(
                (
                    key
                    for key in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
                    if key in places
                ),
                None,
            )
            if place is not None:
                _put(model, place, value, dtype)
                loaded.add(place)
    _restore_buffers(model)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    missing += [name for name, value in model.named_buffers() if value.is_meta]
    if missing:
        raise DeepSpeedCheckpointError(
            explain(
                "the checkpoint has no value for some of the model's weights",
                got=", ".join(missing[:8]) + (" ..." if len(missing) > 8 else ""),
                expected=f"all of them in {', '.join(path.name for path in files)}",
            )
        )
    if not loaded:
        raise DeepSpeedCheckpointError(
            explain("no name in the checkpoint is one of the model's", got=str(files[0]))
        )


def _places(model: nn.Module) -> set[str]:
    return {
        name
        for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    }


def _put(model: nn.Module, name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    *path, last = name.split(".")
    owner = model.get_submodule(".".join(path))
    old = getattr(owner, last)
    if old.shape != value.shape:
        raise DeepSpeedCheckpointError(
            explain(
                f"the checkpoint's {name} does not fit the model",
                got=tuple(value.shape),
                expected=tuple(old.shape),
            )
        )
    if not old.is_meta:
        with torch.no_grad():
            old.copy_(value)
        return
    # a copy always: a view would keep all of the file's memory
    value = value.to(dtype if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(old, nn.Parameter):
        setattr(owner, last, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        owner._buffers[last] = value


def _restore_buffers(model: nn.Module) -> None:
    """Compute buffers that no checkpoint holds (masks, rotary frequencies) as the constructors do."""
    lacking = [name for name, value in model.named_buffers() if value.is_meta]
    config = getattr(model, "config", None)
    if not lacking or config is None:
        return
    with _params_without_memory():
        fresh = dict(type(model)(config).named_buffers())
    for name in lacking:
        *path, last = name.split(".")
        if name in fresh:
            model.get_submodule(".".join(path))._buffers[last] = fresh[name]
    for module in model.modules():  # what rotary embeddings keep beside their buffer
        if getattr(getattr(module, "original_inv_freq", None), "is_meta", False):
            module.original_inv_freq = module.inv_freq


@contextlib.contextmanager
def _params_without_memory() -> Iterator[None]:
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
