#!/bin/bash
# MaPeT, ViT-L/16, on SLURM. Submit it from the repository's root, with the environment active in
# which `deepspeed` runs:
#
#   DATA=/data/imagenet/train RUN_DIR=/runs/vitl16 sbatch slurm/pretrain_vitl.sh [a.b=value ...]
#
# RUN_DIR is on a disk that all nodes share. CODEBOOK names a codebook to use; without it, the job
# fits one first and keeps it in RUN_DIR. ENGINE names another DeepSpeed JSON than
# ds_configs/zero2.json.
#
# The job queues itself again until it is done.
# Nodes x GPUs x train.micro_batch_size (64 here) must divide the batch of 2048.
#
# This is proven on a SLURM of one machine (docs/reliability.md), not yet on a real cluster.
#SBATCH --job-name=mapet_vitl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

cd "${SLURM_SUBMIT_DIR:?}" || exit # SLURM runs a copy of this file, from elsewhere
RECIPE=${RECIPE:-mapet_ds/recipes/mapet_vitl16.yaml} exec bash slurm/launch.sh "$@"
