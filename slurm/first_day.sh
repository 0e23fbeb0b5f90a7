#!/bin/bash
# The first job on a cluster: hosts, weights, storage, 20 steps on one node and on all, all-reduce,
# a benchmark, a plan. docs/first_day.md tells what each is for. Submit it from the repository's root:
#
#   RECIPE=mapet_ds/recipes/mapet_vitb16.yaml DATA=/data/imagenet/train RUN_DIR=/runs/first_day \
#       sbatch slurm/first_day.sh [a.b=value ...]
#
# RUN_DIR is on a disk that all nodes share. LAUNCHER=srun starts ranks by SLURM instead of ssh.
# Submitted again, it does only what has not passed yet.
#SBATCH --job-name=first_day
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

main() {
    cd "${SLURM_SUBMIT_DIR:?}"
    : "${RECIPE:?names the recipe to try: RECIPE=mapet_ds/recipes/mapet_vitb16.yaml sbatch ...}"
    : "${DATA:?name the folder of images or shards: DATA=/data/imagenet/train sbatch ...}"
    : "${RUN_DIR:?name a folder on a disk that all nodes share: RUN_DIR=/runs/first_day sbatch ...}"
    export RUN_DIR
    mkdir -p "$RUN_DIR"
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | wc -l)
    python tools/trial.py cluster "$RUN_DIR" --config "$RECIPE" --data "$DATA" \
        --deepspeed_config "${ENGINE:-ds_configs/zero2.json}" --nodes "$nodes" \
        --gpus_per_node "${SLURM_GPUS_ON_NODE:?no GPUs are allocated: the script needs --gpus-per-node}" "$@"
    echo "All steps that can run here have passed. The real run is submitted so:"
    echo "  LAUNCHER=${LAUNCHER:-ssh} RECIPE=$RECIPE DATA=$DATA RUN_DIR=/runs/NAME" \
        "sbatch --nodes=$nodes slurm/pretrain_vitb.sh $*"
}

main "$@"; exit
