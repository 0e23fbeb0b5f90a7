# shellcheck shell=bash
# What differs from cluster to cluster; the only lines a site edits. Read by slurm/launch.sh, which hands every variable
# exported here to all hosts. One `export NAME=value` a line.

# The ranks are started over ssh, which brings no environment: the head node's own PATH finds nvcc and ninja everywhere.
export PATH="$PATH"
# export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}"
# export CUDA_HOME=/usr/local/cuda

# FusedAdam is compiled at the first start, once on each node: keep this on a disk of the node, never on a shared one.
export TORCH_EXTENSIONS_DIR="/tmp/${USER:-$(id -un)}/torch_extensions"
export OMP_NUM_THREADS=1

# The interface that carries NCCL's and gloo's connections; `ip -brief address` lists them. Left out, both guess.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0

# InfiniBand: the adapters NCCL may use (`ibstat -l`; = for an exact name), and the GID index for RoCE.
# export NCCL_IB_HCA==mlx5_0,mlx5_1,mlx5_2,mlx5_3
# export NCCL_IB_GID_INDEX=3
# No InfiniBand at all:
# export NCCL_IB_DISABLE=1

# First thing to switch on when a start hangs; the log then names interfaces and adapters.
# export NCCL_DEBUG=INFO
