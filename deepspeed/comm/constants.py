# SPDX-License-Identifier: Apache-2.0
"""Names of the backends."""

NCCL_BACKEND = "nccl"
CCL_BACKEND = "ccl"
MPI_BACKEND = "mpi"
HCCL_BACKEND = "hccl"
SCCL_BACKEND = "sccl"
GLOO_BACKEND = "gloo"

DEFAULT_AML_MASTER_PORT = "54965"
DEFAULT_AML_NCCL_SOCKET_IFNAME = "^docker0,lo"
