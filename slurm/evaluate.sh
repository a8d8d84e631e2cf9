#!/usr/bin/env bash
# Measure what features are worth, on one GPU.
#
#   sbatch slurm/evaluate.sh [flags of `pretrain evaluate`]
#
# env.sh lists the variables that set the rest.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
#
#   KIND      knn (default), linear, summary, finetune or head
#   WEIGHTS   an exported folder, or a run
#   TRAIN, TEST   folders of shards, as DIR or DIR:split; a `head` needs TEST alone
#   OUT       where to write the result as JSON; default: what `pretrain evaluate KIND` takes

# Slurm runs a copy of this script in its own spool folder, so env.sh is found from where sbatch was called
shared=${SLURM_SUBMIT_DIR:-.}/slurm/env.sh
[ -r "$shared" ] || { echo "slurm: SLURM_SUBMIT_DIR: no $shared; call sbatch in the repository's folder" >&2; exit 2; }
# shellcheck source=slurm/env.sh
. "$shared"

: "${KIND:=knn}"
need WEIGHTS "an exported folder or a run"
need TEST "a folder of shards"
sets=(--test "$TEST")
if [ "$KIND" != head ]; then
    need TRAIN "a folder of shards"
    sets+=(--train "$TRAIN")
fi
on_ranks evaluate "$KIND" "$WEIGHTS" "${overrides[@]}" "$@" "${sets[@]}" ${OUT:+--out "$OUT"}
