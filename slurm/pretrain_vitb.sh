#!/usr/bin/env bash
# Pretrain a ViT-B/16 on ImageNet-1k, all six tasks: 2 nodes of 8 GPUs, one task per GPU.
#
#   sbatch slurm/pretrain_vitb.sh [key=value ...]
#
# env.sh lists the variables that set the rest.
#SBATCH --job-name=pretrain_vitb
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

CONFIG=${CONFIG:-configs/imagenet_vitb16_multitask.yaml}
# Slurm runs a copy of this script in its own spool folder, so env.sh is found from where sbatch was called
shared=${SLURM_SUBMIT_DIR:-.}/slurm/env.sh
[ -r "$shared" ] || { echo "slurm: SLURM_SUBMIT_DIR: no $shared; call sbatch in the repository's folder" >&2; exit 2; }
# shellcheck source=slurm/env.sh
. "$shared"

train "$@"
