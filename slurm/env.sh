# shellcheck shell=bash
# What the job scripts beside this file share: they source it. docs/cluster.md is the guide.
#
# `sbatch` flags on the command line replace the #SBATCH lines of a script (--nodes, --time, --partition ...); what stands
# after the script is handed to pretrain; everything else is a variable, set when the job is submitted:
#
#   OUTPUT_DIR=runs/first sbatch --nodes=4 --partition=gpu slurm/pretrain_vitb.sh optim.base_lr=1e-3
#
#   CONFIG        the run, a YAML file; each pretrain_*.sh has its own default
#   OUTPUT_DIR    the run folder, on a file system that all nodes share; default runs/JOBNAME-JOBID, which stays the same
#                 when the job is requeued
#   OVERRIDES     further `key=value` settings and flags, separated by blanks
#   VENV          the environment that holds pretrain; default .venv
#   CONTAINER     an image for pyxis (`srun --container-image`), used instead of VENV; `python3` in it has pretrain
#   CONTAINER_MOUNTS   default: the submission folder, at the same place
#   MASTER_PORT   where rank 0 listens; default 20000 to 29999, by job id and restart, so that no two starts on a node meet
#   OMP_NUM_THREADS    default 1: the other cores of a task decode images
#   EXIT_SECONDS  after the first rank has ended, the others have this long to end too; default 60
#   PRETRAIN_REQUEUE_ON_FAILURE   1 (default): a run that fails goes back into the queue; 0: it ends
#   PRETRAIN_MAX_RESTARTS         a run that fails after so many restarts of its job ends; default 100
#
# GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and whatever else NCCL reads reach the ranks as they were set.

refuse() { # TEXT: wrong input, which another start would not mend
    echo "slurm: $1" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || refuse "SLURM_JOB_ID: not set; start this script with sbatch"
cd "$SLURM_SUBMIT_DIR" || refuse "SLURM_SUBMIT_DIR: '$SLURM_SUBMIT_DIR' is not on $(hostname); submit from a shared folder"

: "${OUTPUT_DIR:=runs/${SLURM_JOB_NAME:-pretrain}-$SLURM_JOB_ID}"
: "${VENV:=.venv}" "${EXIT_SECONDS:=60}" "${PRETRAIN_REQUEUE_ON_FAILURE:=1}" "${PRETRAIN_MAX_RESTARTS:=100}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# a node that was cut off may still run the rank 0 of this job's start before
export MASTER_PORT="${MASTER_PORT:-$((20000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 10000))}"
# of an earlier launcher in the shell that submitted: every task would take them for its own
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE

case $MASTER_PORT in
    *[!0-9]*) refuse "MASTER_PORT: '$MASTER_PORT' is not a number; leave it unset, or give a free port" ;;
esac
case $EXIT_SECONDS in
    *[!0-9]* | 0) refuse "EXIT_SECONDS: '$EXIT_SECONDS' is not a number of seconds above 0" ;;
esac
case $PRETRAIN_REQUEUE_ON_FAILURE in
    0 | 1) ;;
    *) refuse "PRETRAIN_REQUEUE_ON_FAILURE: '$PRETRAIN_REQUEUE_ON_FAILURE' is neither 0 nor 1" ;;
esac
case $PRETRAIN_MAX_RESTARTS in
    *[!0-9]*) refuse "PRETRAIN_MAX_RESTARTS: '$PRETRAIN_MAX_RESTARTS' is not a number of restarts" ;;
esac
# since Slurm 22.05 srun does not take it from the job
[ -n "${SLURM_CPUS_PER_TASK:-}" ] || refuse "SLURM_CPUS_PER_TASK: not set; give sbatch --cpus-per-task"

if [ -n "${CONTAINER:-}" ]; then
    in_container=(--container-image="$CONTAINER" --container-workdir="$PWD"
        --container-mounts="${CONTAINER_MOUNTS:-$PWD:$PWD}")
    python=python3
else
    in_container=()
    python=$VENV/bin/python
    [ -x "$python" ] || refuse "VENV: no $python in $PWD on $(hostname); run \`make setup\`, or set VENV or CONTAINER"
fi
overrides=()
# no glob is expanded this way: a setting may hold [0.2,1.0]
read -r -d '' -a overrides <<< "${OVERRIDES:-}" || true

need_file() { # NAME: of a variable that names a file
    [ -n "${!1:-}" ] || refuse "$1: not set; it names a file"
    [ -r "${!1}" ] || refuse "$1: '${!1}' cannot be read in $PWD; paths are relative to where sbatch was called"
}

need() { # NAME WHAT: of a variable that has no default
    [ -n "${!1:-}" ] || refuse "$1: not set; it names $2"
}

on_ranks() { # ARGUMENTS of pretrain...: in every task
    # Not --kill-on-bad-exit=1: it stops the other ranks the moment one ends with an error. The one that names the cause
    # may be among them, so may rank 0 with a checkpoint half written, and srun's exit code is then that of the killing
    # (143) and no longer 2 or 75.
    srun --kill-on-bad-exit=0 --wait="$EXIT_SECONDS" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        "${in_container[@]}" "$python" -m pretrain "$@"
}

put_back() { # this job into the queue
    local job=$SLURM_JOB_ID
    # the id of one element of an array is also the id of the whole array
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    # what was cancelled, or is back in the queue already, does not run any more
    [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ] || return 0
    scontrol requeue "$job"
}

train() { # ARGUMENTS of `pretrain train` beside the config...: does not return
    need_file CONFIG
    # SLURM_TASKS_PER_NODE is such as 8(x2); where nodes differ, 8(x2),4
    [[ ${SLURM_TASKS_PER_NODE:-} =~ ^([0-9]+)(\(x[0-9]+\))?$ ]] ||
        refuse "SLURM_TASKS_PER_NODE: '${SLURM_TASKS_PER_NODE:-}' is not the same on every node; give --nodes and --ntasks-per-node"
    local num_tasks=${BASH_REMATCH[1]} num_gpus=${SLURM_GPUS_ON_NODE:-0}
    [ "$num_gpus" = 0 ] || [ "$num_gpus" = "$num_tasks" ] ||
        refuse "SLURM_GPUS_ON_NODE: $num_gpus GPUs for $num_tasks tasks on a node; give --ntasks-per-node and --gpus-per-node the same number"
    MASTER_ADDR=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | head -n 1)
    [ -n "$MASTER_ADDR" ] || refuse "SLURM_JOB_NODELIST: '${SLURM_JOB_NODELIST:-}' names no node"
    export MASTER_ADDR

    echo "slurm: job $SLURM_JOB_ID ($SLURM_JOB_NAME), restarted ${SLURM_RESTART_COUNT:-0} times, on $SLURM_JOB_NODELIST"
    echo "slurm: $SLURM_JOB_NUM_NODES nodes x $num_tasks tasks, $num_gpus GPUs a node, $SLURM_CPUS_PER_TASK CPUs a task; rank 0 at $MASTER_ADDR:$MASTER_PORT"
    echo "slurm: $CONFIG with ${CONTAINER:-$python} into $OUTPUT_DIR"

    local code=0 output=/proc/$$/fd/2 before=0
    [ ! -f "$output" ] || before=$(stat --dereference --format=%s "$output")
    on_ranks train "$CONFIG" "${overrides[@]}" "$@" --output-dir "$OUTPUT_DIR" --resume auto || code=$?
    said() { # PATTERN: in the output of this start
        [ -f "$output" ] && tail --bytes=+$((before + 1)) "$output" | grep -q "$1"
    }
    # srun's code is the highest of all ranks: 137 of one that it had to kill, as it waited for the one that knows (2)
    if [ "$code" != 0 ] && said 'srun: error: .*: Exited with exit code 2$'; then
        code=2
    fi
    case $code in
        0) ;;
        2) echo "slurm: wrong input: not requeued" >&2 ;;
        75)
            echo "slurm: stopped early, can be continued" >&2
            # rank 0 has asked to be requeued if that is right; a container may have no scontrol to ask with
            ! said ' could not be requeued: ' || put_back
            ;;
        *)
            echo "slurm: failed with exit code $code" >&2
            # a run that fails again without progress ends with 2; one on a full disk cannot count its starts
            if [ "$PRETRAIN_REQUEUE_ON_FAILURE" = 1 ]; then
                if [ "${SLURM_RESTART_COUNT:-0}" -lt "$PRETRAIN_MAX_RESTARTS" ]; then
                    put_back
                else
                    echo "slurm: not requeued after $SLURM_RESTART_COUNT restarts (PRETRAIN_MAX_RESTARTS)" >&2
                fi
            fi
            ;;
    esac
    exit "$code"
}
