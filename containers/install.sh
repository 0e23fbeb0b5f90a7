#!/bin/bash
# Install the versions that requirements.txt pins, in the environment at hand and the repository's root:
#
#   bash containers/install.sh 13                   # for a driver of the 580 series or newer
#   bash containers/install.sh 12 [TORCH_INDEX]     # for an older one
#
# TORCH_INDEX is one of PyTorch's indexes for CUDA 12: pytorch.org names the one that fits a driver.
set -euo pipefail

main() {
    local cuda=${1:-} index=${2:-https://download.pytorch.org/whl/cu126} pins
    pins=$(grep -v -e '^#' -e '^-e' requirements.txt)
    case $cuda in
        13) pip install --no-cache-dir -r /dev/stdin <<<"$pins" ;;
        12)
            grep '^torch' <<<"$pins" | pip install --no-cache-dir --index-url "$index" -r /dev/stdin
            # As the extra train-cuda12 has them. FAISS's GPU wheel is built for CUDA 13.
            sed -e '/^torch/d' -e 's/^nvidia-dali-cuda130/nvidia-dali-cuda120/' -e 's/^faiss-gpu/faiss-cpu/' <<<"$pins" |
                pip install --no-cache-dir -r /dev/stdin
            ;;
        *)
            echo "CUDA = $cuda: it is 13 or 12. nvidia-smi shows the driver; 13 needs the 580 series." >&2
            exit 2
            ;;
    esac
}

main "$@"; exit
