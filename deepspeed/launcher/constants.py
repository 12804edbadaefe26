# SPDX-License-Identifier: Apache-2.0
"""Names that the launcher's parts share."""

from __future__ import annotations

DEFAULT_HOSTFILE = "/job/hostfile"
DEEPSPEED_ENVIRONMENT_NAME = ".deepspeed_env"

PDSH_LAUNCHER = "pdsh"
SSH_LAUNCHER = "ssh"
OPENMPI_LAUNCHER = "openmpi"
MPICH_LAUNCHER = "mpich"
IMPI_LAUNCHER = "impi"
SLURM_LAUNCHER = "slurm"
MVAPICH_LAUNCHER = "mvapich"
LAUNCHERS = (
    PDSH_LAUNCHER,
    SSH_LAUNCHER,
    OPENMPI_LAUNCHER,
    MPICH_LAUNCHER,
    IMPI_LAUNCHER,
    SLURM_LAUNCHER,
    MVAPICH_LAUNCHER,
)
PDSH_MAX_FAN_OUT = 1024

# what the runner tells launch.py to say "no logs per rank" (a literal of the command line)
NO_RANK_LOG = "None"
