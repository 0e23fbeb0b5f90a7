# shellcheck shell=bash
# A site edits these lines only: they differ from cluster to cluster. slurm/launch.sh reads them and
# hands every variable exported here to all hosts. Write one `export NAME=value` a line.

# The ranks are started over ssh, which brings no environment. The head node's own PATH finds nvcc
# and ninja everywhere.
export PATH="$PATH"
# export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}"
# export CUDA_HOME=/usr/local/cuda

# FusedAdam is compiled at the first start, once on each node. Keep this on a disk of the node,
# never on a shared one.
export TORCH_EXTENSIONS_DIR="/tmp/${USER:-$(id -un)}/torch_extensions"
export OMP_NUM_THREADS=1

# This interface carries NCCL's and gloo's connections; `ip -brief address` lists the interfaces.
# Without these lines, both guess.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0

# With InfiniBand, these are the adapters that NCCL may use (`ibstat -l` lists them; = asks for an
# exact name), and the GID index for RoCE.
# export NCCL_IB_HCA==mlx5_0,mlx5_1,mlx5_2,mlx5_3
# export NCCL_IB_GID_INDEX=3
# Without any InfiniBand:
# export NCCL_IB_DISABLE=1

# Switch this on first when a start hangs; the log then names interfaces and adapters.
# export NCCL_DEBUG=INFO
