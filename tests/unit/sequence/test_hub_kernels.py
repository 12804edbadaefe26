# SPDX-License-Identifier: Apache-2.0
"""Attention functions that transformers only knows once it has loaded them."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from deepspeed.runtime.sequence_parallel import ulysses_sp


class Functions(dict):
    valid_keys = dict.keys


def test_a_kernel_of_the_hub_is_loaded_before_it_is_called_unknown(monkeypatch):
    functions, loaded = Functions(sdpa=len), []

    def load(name):
        loaded.append(name)
        if name == "owner/kernel":
            functions[name] = len

    utils = ModuleType("transformers.modeling_flash_attention_utils")
    utils.lazy_import_flash_attention = load
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    config = SimpleNamespace()
    config.get_text_config = lambda: config
    model = SimpleNamespace(config=config)
    for name in ("sdpa", "owner/kernel", "owner/kernel"):
        assert ulysses_sp._config_of(model, name, functions) is config
    assert loaded == ["owner/kernel"]
    with pytest.raises(ValueError, match="unknown attention function: got 'owner/other'"):
        ulysses_sp._config_of(model, "owner/other", functions)
    del utils.lazy_import_flash_attention
    with pytest.raises(ValueError, match="unknown attention function"):
        ulysses_sp._config_of(model, "owner/third", functions)
