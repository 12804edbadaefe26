# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that the package reads: its name, type, default and meaning, declared once here.

No other module (but the launcher, which builds its children's environment) touches ``os.environ``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

from .errors import explain

T = TypeVar("T")

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})


def _bool(text: str) -> bool:
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError("one of 1, true, yes, on, 0, false, no, off")


class EnvVar(Generic[T]):
    """One environment variable.

    Attributes:
        name: its name in the environment.
        default: what ``get`` returns when it is not set.
        doc: its meaning, one sentence.
    """

    def __init__(self, name: str, parse: Callable[[str], T], default: T, doc: str) -> None:
        self.name = name
        self.parse = parse
        self.default = default
        self.doc = doc
        _DECLARED[name] = self

    def raw(self) -> str | None:
        """Return the text in the environment, or None when it is not set."""
        return os.environ.get(self.name)

    def is_set(self) -> bool:
        """Say whether the variable is in the environment (an empty text counts)."""
        return self.name in os.environ

    def get(self) -> T:
        """Return the parsed value, or the default when the variable is not set.

        Raises:
            ValueError: the text is not of the variable's type.
        """
        text = self.raw()
        if text is None:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ValueError(
                explain(
                    f"environment variable {self.name} cannot be read",
                    got=repr(text),
                    expected=getattr(self.parse, "__name__", "a value").strip("_"),
                    fix=f"{self.doc} Unset it or correct it.",
                )
            ) from error

    def set(self, value: object) -> None:
        """Put ``str(value)`` in this process's environment (and its future children's)."""
        os.environ[self.name] = str(value)

    def unset(self) -> None:
        """Remove the variable from this process's environment; not being there is fine."""
        os.environ.pop(self.name, None)

    def __repr__(self) -> str:
        return f"EnvVar({self.name}={self.raw()!r})"


_DECLARED: dict[str, EnvVar] = {}


def declared() -> dict[str, EnvVar]:
    """Return every declared variable by name, in the order of declaration."""
    return dict(_DECLARED)


@contextmanager
def overlaid(values: Mapping[str, str]) -> Iterator[None]:
    """Have the environment hold ``values`` too while entered: processes started meanwhile inherit it."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _text(name: str, doc: str, default: str | None = None) -> EnvVar[str | None]:
    return EnvVar(name, str, default, doc)


def _integer(name: str, doc: str) -> EnvVar[int | None]:
    return EnvVar(name, int, None, doc)


def _switch(name: str, doc: str, default: bool = False) -> EnvVar[bool]:
    return EnvVar(name, _bool, default, doc)


# ------------------------------------------------------------------ who am I (set by a launcher)
RANK = _integer("RANK", "This process's index among all processes of the job.")
WORLD_SIZE = _integer("WORLD_SIZE", "Number of processes of the job.")
LOCAL_RANK = _integer("LOCAL_RANK", "This process's index on its machine.")
LOCAL_SIZE = _integer("LOCAL_SIZE", "Processes on this machine; device_count of the CPU.")
LOCAL_WORLD_SIZE = _integer("LOCAL_WORLD_SIZE", "torchrun's name of LOCAL_SIZE.")
CROSS_RANK = _integer("CROSS_RANK", "This machine's index among the machines of the job.")
CROSS_SIZE = _integer("CROSS_SIZE", "Number of machines of the job.")
MASTER_ADDR = _text("MASTER_ADDR", "Host where rank 0 listens for the others.")
MASTER_PORT = _integer("MASTER_PORT", "Port where rank 0 listens for the others.")
OMPI_RANK = _integer("OMPI_COMM_WORLD_RANK", "Open MPI's name of RANK.")
OMPI_SIZE = _integer("OMPI_COMM_WORLD_SIZE", "Open MPI's name of WORLD_SIZE.")
OMPI_LOCAL_RANK = _integer("OMPI_COMM_WORLD_LOCAL_RANK", "Open MPI's name of LOCAL_RANK.")
OMPI_LOCAL_SIZE = _integer("OMPI_COMM_WORLD_LOCAL_SIZE", "Open MPI's name of LOCAL_SIZE.")
PMI_SIZE = _integer("PMI_SIZE", "MPICH's name of WORLD_SIZE.")
MV2_SIZE = _integer("MV2_COMM_WORLD_SIZE", "MVAPICH2's name of WORLD_SIZE.")
MV2_RANK = _integer("MV2_COMM_WORLD_RANK", "MVAPICH2's name of RANK.")
MV2_LOCAL_RANK = _integer("MV2_COMM_WORLD_LOCAL_RANK", "MVAPICH2's name of LOCAL_RANK.")
SLURM_STEP_NUM_TASKS = _integer("SLURM_STEP_NUM_TASKS", "Slurm: processes of this srun step.")
SLURM_PROCID = _integer("SLURM_PROCID", "Slurm's name of RANK.")
SLURM_LOCALID = _integer("SLURM_LOCALID", "Slurm's name of LOCAL_RANK.")
GLOO_SOCKET_IFNAME = _text("GLOO_SOCKET_IFNAME", "Network interface that gloo uses.")
ELASTIC_RUN_ID = _text("ELASTIC_RUN_ID", "Run id of the elastic agent.", "123456789")
CUDA_VISIBLE_DEVICES = _text("CUDA_VISIBLE_DEVICES", "CUDA devices that this process may use.")

# ------------------------------------------------------------------ clouds
AZUREML_EXPERIMENT_ID = _text("AZUREML_EXPERIMENT_ID", "Set inside an Azure ML job.")
AZ_BATCH_MASTER_NODE = _text("AZ_BATCH_MASTER_NODE", "Azure ML: host:port of the first node.")
AZ_BATCHAI_MPI_MASTER_NODE = _text("AZ_BATCHAI_MPI_MASTER_NODE", "Azure ML: first node.")
SM_TRAINING_ENV = _text("SM_TRAINING_ENV", "Set inside an Amazon SageMaker job.")
SM_CURRENT_HOST = _text("SM_CURRENT_HOST", "SageMaker: name of this host.")
DLTS_JOB_ID = _text("DLTS_JOB_ID", "Set inside a DLTS job.")

# ------------------------------------------------------------------ choices of the user
DS_ACCELERATOR = _text("DS_ACCELERATOR", "Accelerator to use: cpu or cuda; unset chooses.")
DEEPSPEED_TIMEOUT = EnvVar(
    "DEEPSPEED_TIMEOUT", float, 10.0, "Time limit of process groups, in minutes."
)
DS_ENV_FILE = _text("DS_ENV_FILE", "Name of the launcher's env file.", ".deepspeed_env")
DEEPSPEED_ELASTICITY_CONFIG = _text(
    "DEEPSPEED_ELASTICITY_CONFIG", "Elastic configuration (JSON) set by a scheduler."
)
DS_PIN_MEMORY_BACKEND = _text("DS_PIN_MEMORY_BACKEND", "Who pins host memory: native or torch.")
DS_LOWP_PRODUCTS = _text(
    "DS_LOWP_PRODUCTS", "bf16/fp16 products through fp32 on the CPU: 0 never, 1 always, unset auto."
)
DS_NUM_THREADS = _integer("DS_NUM_THREADS", "Threads of the native CPU ops; unset asks torch.")
OMP_NUM_THREADS = _text("OMP_NUM_THREADS", "Threads of torch's CPU operators.")
KMP_AFFINITY = _text("KMP_AFFINITY", "How Intel's OpenMP pins threads; clashes with core binding.")

DS_TRUST_CHECKPOINTS = _switch(
    "DS_TRUST_CHECKPOINTS",
    "1 lets checkpoint files run any code they contain (unrestricted pickles).",
)
DS_VERIFY_CHECKPOINTS = _switch(
    "DS_VERIFY_CHECKPOINTS",
    "0 skips the check of sizes and hashes when a checkpoint is read.",
    True,
)
DS_RESUME_POSITION = _switch(
    "DS_RESUME_POSITION",
    "0 leaves random generators and the training loader as they are when a checkpoint is loaded.",
    True,
)

# ------------------------------------------------------------------ native code
DS_CPU_ISA = _text(
    "DS_CPU_ISA",
    "Path of CPU ops: avx512, avx2, neon, scalar or reference (torch); unset takes the best.",
)
DS_NATIVE_LIBRARY = _text("DS_NATIVE_LIBRARY", "Path of the native library to load instead.")
DS_AIO_BACKEND = _text(
    "DS_AIO_BACKEND", "File I/O by io_uring, iocp, threads or python; unset picks."
)
DS_PIN_MEMORY_BACKEND = _text(
    "DS_PIN_MEMORY_BACKEND", "Who page-locks host memory: torch (the default) or native."
)
DS_DISABLE_NATIVE = _switch("DS_DISABLE_NATIVE", "1 runs every op by its torch reference.")
DS_KERNEL_SOURCE = _switch("DS_KERNEL_SOURCE", "1 compiles CUDA kernels from source at load.")
DS_KERNEL_PACK = _text("DS_KERNEL_PACK", "Path of the pack of CUDA kernels to load instead.")
DS_KERNEL_CACHE = _text("DS_KERNEL_CACHE", "Folder of CUDA kernels compiled on this machine.")
DS_SKIP_CUDA_CHECK = _switch("DS_SKIP_CUDA_CHECK", "1 accepts a CUDA toolkit unlike torch's.")
CUDA_HOME = _text("CUDA_HOME", "Where the CUDA toolkit is.")
CXX = _text("CXX", "The C++ compiler, with its first words, for the ops of a user.")

# ------------------------------------------------------------------ torch's own
USE_LIBUV = _text("USE_LIBUV", "torch: whether the TCP rendezvous store uses libuv.")
TORCH_EXTENSIONS_DIR = _text("TORCH_EXTENSIONS_DIR", "torch: folder of compiled C++ extensions.")
TORCH_CUDA_ARCH_LIST = _text(
    "TORCH_CUDA_ARCH_LIST", "torch: GPUs to compile for, as in 8.0;9.0+PTX."
)
PYTORCH_NVML_BASED_CUDA_CHECK = _text(
    "PYTORCH_NVML_BASED_CUDA_CHECK", "torch: look for CUDA through NVML, without initialising it."
)
