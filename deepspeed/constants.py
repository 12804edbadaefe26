# SPDX-License-Identifier: Apache-2.0
"""Constants of the whole package: the rendezvous port, the default timeout, the inference modes."""

from __future__ import annotations

from datetime import timedelta

from .utils import env

TORCH_DISTRIBUTED_DEFAULT_PORT = 29500

default_pg_timeout = timedelta(minutes=env.DEEPSPEED_TIMEOUT.get())
"""How long a collective may take before its process gives up."""

INFERENCE_GENERIC_MODE = "generic"
INFERENCE_SPECIALIZED_MODE = "specialized"

CROSS_RANK = "CROSS_RANK"
CROSS_SIZE = "CROSS_SIZE"
"""Environment variables: this machine's index among the machines of the job, and their number."""
