# SPDX-License-Identifier: Apache-2.0
"""The inference engine: a model in its dtype and place, with a fused decoder where its family has one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.lowp_products import products_context
from deepspeed.module_inject import generation
from deepspeed.module_inject.decoder import Decoder
from deepspeed.module_inject.replace_module import inject
from deepspeed.runtime import module_prep
from deepspeed.runtime.tensor_parallel.division import check_inputs_once
from deepspeed.utils.errors import DeepSpeedConfigError, explain
from deepspeed.utils.logging import logger

from .config import DeepSpeedInferenceConfig
from .graphs import ForwardGraphs
from .loading import find_parts, is_megatron, is_meta, load_model_with_checkpoint
from .tensor_parallel import divide_for_inference, ranks_of, share_random_state

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class InferenceEngine(nn.Module):
    """Wraps a model for inference; see `deepspeed.init_inference`. Collective where layers are divided over ranks.

    Args:
        model: any module; it is cast, divided and moved in place, and put into evaluation mode.
        config: what to do with it.

    Raises:
        DeepSpeedConfigError: the configuration asks for something that is not built, or that this machine has not.
        DeepSpeedCheckpointError: the weights cannot be loaded.
        ValueError: the model was built without weights, and no checkpoint is given.
    """

    def __init__(self, model: nn.Module, config: DeepSpeedInferenceConfig) -> None:
        super().__init__()
        refuse(config)
        self._config = config
        self.module = model
        self.dtype = config.dtype
        self._load(model)
        self._cast(model)
        self.tp_axis = ranks_of(config)
        self.mp_group = self.tp_axis.group
        if self.tp_axis.size > 1:
            divide_for_inference(model, config, self.tp_axis)
            check_inputs_once(model, self.tp_axis)
        self.device = self._place(model)
        model.eval()
        self.training = False
        if hasattr(model, "config"):
            self.config = model.config
        graphs = config.enable_cuda_graph
        self.decoder = self._inject(model) if config.replace_with_kernel_inject else None
        self._graphs = ForwardGraphs(model) if graphs and self.decoder is None else None
        self._products = products_context(model, self.device)
        self._is_compiled = False
        self._times: list[float] | None = None

    # - construction

    def _load(self, model: nn.Module) -> None:
        config = self._config
        checkpoint = config.checkpoint or config.checkpoint_config.checkpoint_dir
        if checkpoint is None:
            if is_meta(model):
                raise ValueError(
                    explain(
                        "the model was built without weights (on the meta device)",
                        fix="Give init_inference a checkpoint: a folder, a file or a description.",
                    )
                )
            return
        base = config.base_dir or config.checkpoint_config.base_dir or ""
        self.load_model_with_checkpoint(model, checkpoint, base)

    def load_model_with_checkpoint(
        self, model: nn.Module, checkpoint: Any, base_dir: str | Path = ""
    ) -> None:
        """Fill a model with a checkpoint's weights; see `inference.loading`."""
        load_model_with_checkpoint(model, find_parts(checkpoint, base_dir), self.dtype)

    def _cast(self, model: nn.Module) -> None:
        rotary = [
            (module, name, values)
            for module in model.modules()
            for name, values in module._buffers.items()
            if name.endswith("inv_freq") and values is not None
        ]
        model.to(self.dtype)
        for module, name, values in rotary:
            module._buffers[name] = values  # angles of far positions need all of their bits

    def _place(self, model: nn.Module) -> torch.device:
        if self._config.keep_module_on_host:
            return torch.device("cpu")
        device = torch.device(get_accelerator().current_device_name())
        model.to(device)
        return device

    def _inject(self, model: nn.Module) -> Decoder | None:
        if self.tp_axis.size > 1:
            logger.warning(
                "no fused decoder for a model that is divided over ranks, it runs as it is"
            )
            return None
        return inject(model, self._config.enable_cuda_graph)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is not None and hasattr(module, name):
                return getattr(module, name)
            raise AttributeError(
                f"'{type(self).__name__}' object has no attribute '{name}'"
            ) from None

    # - use

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the module; returns what it returns."""
        with self._timed(), self._products:
            return (self._graphs or self.module)(*inputs, **kwargs)

    def generate(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the model's `generate`, or do its work by the fused decoder where that gives the same.

        Greedy search and plain sampling (temperature, top-k, top-p) of a prompt are done by the decoder; everything
        else that `generate` can do is left to it.

        Raises:
            AttributeError: the model cannot generate.
            NotImplementedError: beams are asked for, and the layers are replaced by kernels.
            RuntimeError: a prompt is longer than `max_out_tokens`.
        """
        if not hasattr(self.module, "generate"):
            raise AttributeError(f"class {type(self.module).__name__} has no method generate")
        self._check_beams(kwargs)
        self._check_length(inputs, kwargs)
        share_random_state(self.tp_axis)
        with self._products:
            if self.decoder is not None:
                limit = self.decoder.weights.positions
                request = generation.understand(self.module, limit, inputs, kwargs)
                if request is not None:
                    return generation.generate(self.decoder, request)
            return self.module.generate(*inputs, **kwargs)

    def _check_beams(self, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config") or getattr(self.module, "generation_config", None)
        beams = kwargs.get("num_beams", getattr(config, "num_beams", 1))
        if self._config.replace_with_kernel_inject and beams is not None and beams > 1:
            raise NotImplementedError(
                explain(
                    "InferenceEngine.generate searches with one beam only where kernels are injected",
                    got=f"num_beams={beams}",
                    fix="Call engine.module.generate(...) for beams.",
                )
            )

    def _check_length(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = inputs[0] if inputs else kwargs.get("input_ids", kwargs.get("inputs"))
        if torch.is_tensor(ids) and ids.dim() == 2 and ids.shape[1] > self._config.max_out_tokens:
            raise RuntimeError(
                explain(
                    "the prompt is longer than the engine was set up for",
                    got=f"{ids.shape[1]} tokens",
                    expected=f"at most max_out_tokens={self._config.max_out_tokens}",
                    fix="Increase max_tokens in the call of init_inference.",
                )
            )

    # - time

    def profile_model_time(self, use_cuda_events: bool = True) -> None:
        """Measure each forward pass from now on.

        Args:
            use_cuda_events: kept for callers; the device is waited for before and after each pass.
        """
        self._times = []

    def model_times(self) -> list[float]:
        """Milliseconds of each forward pass since the last call.

        Raises:
            AssertionError: `profile_model_time` was not called.
        """
        if self._times is None:
            raise AssertionError("model profiling is not enabled: call profile_model_time() first")
        times, self._times = self._times, []
        return times

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if self._times is None:
            yield
            return
        get_accelerator().synchronize()
        began = time.perf_counter()
        yield
        get_accelerator().synchronize()
        self._times.append((time.perf_counter() - began) * 1000.0)

    # - compilation and lifetime

    def compile(
        self, backend: str | None = None, compile_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Compile the module in place with `torch.compile`; a second call does nothing."""
        if not self._is_compiled:
            module_prep.compile_module(self.module, backend, compile_kwargs or {}, None, False)
            self._is_compiled = True

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._is_compiled

    def destroy(self) -> None:
        """Free the decoder's cache and what was captured; the module stays usable."""
        if self.decoder is not None:
            self.decoder.release()
        self._graphs = None
        self._products.release()


def _requests(config: DeepSpeedInferenceConfig) -> Iterator[tuple[str, str]]:
    """What a configuration asks for that cannot be done here, and what to do instead."""
    if config.dtype not in _DTYPES:
        yield f"dtype={config.dtype}", "Use fp32, fp16 or bf16."
    if config.enable_cuda_graph and get_accelerator()._name != "cuda":
        yield "enable_cuda_graph without a CUDA device", "Set it to false."
    if config.enable_cuda_graph and config.tensor_parallel.tp_size > 1:
        yield (
            "enable_cuda_graph with tensor_parallel.tp_size above 1",
            "Set one of them to its default.",
        )
    if config.use_triton:
        yield "use_triton", "Set it to false."
    if config.moe.ep_size > 1:
        yield f"moe.ep_size={config.moe.ep_size}", "Set it to 1."
    if config.zero.stage > 0:
        yield "zero", "Use deepspeed.initialize with stage 3, which does ZeRO-Inference."
    if config.training_mp_size > 1 and not is_megatron(config.checkpoint, config.base_dir):
        yield (
            "training_mp_size",
            'Describe the checkpoint: {"type": "Megatron", "checkpoints": [...]}.',
        )
    if config.save_mp_checkpoint_path or config.checkpoint_config.save_mp_checkpoint_path:
        yield "save_mp_checkpoint_path", "Save the model with its own save_pretrained."
    weight = config.quant.weight
    if weight.quantized_initialization or weight.post_init_quant:
        yield "quant.weight", "Use section weight_quantization of deepspeed.initialize at stage 3."
    if config.set_empty_params:
        yield "set_empty_params", "Build the model on the meta device and give a checkpoint."


def refuse(config: DeepSpeedInferenceConfig) -> None:
    """Raise for what would be ignored.

    Raises:
        DeepSpeedConfigError: each request that cannot be met is named.
    """
    found = [f"{what} is not available. {instead}" for what, instead in _requests(config)]
    if found:
        raise DeepSpeedConfigError("init_inference: " + "\n".join(found))


def merge(config: Any, kwargs: dict[str, Any]) -> DeepSpeedInferenceConfig:
    """One configuration of a dict or a JSON file, and of the call's own words.

    Raises:
        ValueError: a key is in both, with different values; or the configuration is of another kind.
        pydantic.ValidationError: an unknown key, or a value that does not fit.
    """
    if isinstance(config, DeepSpeedInferenceConfig):
        config = config.model_dump(exclude_unset=True)
    if isinstance(config, (str, Path)):
        import hjson

        config = hjson.loads(Path(config).read_text(encoding="utf-8"))
    if config is not None and not isinstance(config, dict):
        raise ValueError(
            explain(
                "unknown kind of inference configuration",
                got=type(config).__name__,
                expected="a dict or the path of a JSON file",
            )
        )
    merged = dict(config or {})
    for key, value in kwargs.items():
        if key in merged and merged[key] != value:
            raise ValueError(
                f"Conflicting argument '{key}' in 'config':{merged[key]} and kwargs:{value}"
            )
        merged[key] = value
    return DeepSpeedInferenceConfig(**merged)
