#!/usr/bin/env bash
# Write a run's weights as a folder that stock timm loads.
#
#   sbatch slurm/export.sh [--weights student ...]
#
# env.sh lists the variables that set the rest.
#SBATCH --job-name=export
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=00:30:00
#SBATCH --output=%x-%j.out
#
#   RUN   the run folder, or one checkpoint
#   OUT   where to write; default RUN/exported

# Slurm runs a copy of this script in its own spool folder, so env.sh is found from where sbatch was called
shared=${SLURM_SUBMIT_DIR:-.}/slurm/env.sh
[ -r "$shared" ] || { echo "slurm: SLURM_SUBMIT_DIR: no $shared; call sbatch in the repository's folder" >&2; exit 2; }
# shellcheck source=slurm/env.sh
. "$shared"

need RUN "a run folder or a checkpoint"
on_ranks export "$RUN" "${overrides[@]}" "$@" --out "${OUT:-$RUN/exported}"
