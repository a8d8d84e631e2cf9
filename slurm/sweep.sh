#!/usr/bin/env bash
# One run of a study for each job of an array: variants and seeds, one table.
#
#   sbatch slurm/sweep.sh [key=value ...]
#
# env.sh lists the variables that set the rest.
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
#
#   STUDY        the study, a YAML file
#   OUTPUT_DIR   of all runs; default runs/<name of STUDY>, the same for all jobs of the array
#   NPROC        ranks of each run; default: the GPUs of the node
#
# `pretrain sweep STUDY --array` tells how many runs there are: sbatch --array=0-11%4 slurm/sweep.sh. Without --array the
# job does all runs one after the other. A study with `budget: compute` first needs one job with --measure-only.

: "${STUDY:=}"
OUTPUT_DIR=${OUTPUT_DIR:-runs/$(basename "${STUDY%.yaml}")}
# Slurm runs a copy of this script in its own spool folder, so env.sh is found from where sbatch was called
shared=${SLURM_SUBMIT_DIR:-.}/slurm/env.sh
[ -r "$shared" ] || { echo "slurm: SLURM_SUBMIT_DIR: no $shared; call sbatch in the repository's folder" >&2; exit 2; }
# shellcheck source=slurm/env.sh
. "$shared"

need_file STUDY
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || set -- "$@" --index "$SLURM_ARRAY_TASK_ID"
code=0
on_ranks sweep "$STUDY" "${overrides[@]}" "$@" --output-dir "$OUTPUT_DIR" \
    --nproc "${NPROC:-${SLURM_GPUS_ON_NODE:-1}}" || code=$?
# 75: not finished, because the time is up; what failed by itself (1) would fail again
[ "$code" != 75 ] || put_back
exit "$code"
