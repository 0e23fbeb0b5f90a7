#!/bin/bash
# This is the body of the SLURM scripts. It makes codebook and ids if there are none, trains, and
# requeues the job where it must. slurm/ranks.sh starts the ranks: by ssh, or by srun (LAUNCHER=srun).
#
# It needs RECIPE, DATA and RUN_DIR in the environment; CODEBOOK and ENGINE have defaults. Arguments
# are overrides, a.b=value.
#
# Training stops in order when SLURM warns of the time limit (USR1) or takes the nodes away (TERM).
# RUN_DIR/STOP makes the ranks save and leave, and the job is queued again unless SLURM is ending it
# already.
#
# The trainer writes RUN_DIR/DONE after its last step: that is the proof of success. The launcher's
# exit code proves nothing, since deepspeed returns 0 for some failures.
set -euo pipefail

# Bash reads a script as it goes. In a function, a script that is edited while the job runs stays
# what it was.
main() {
    : "${RECIPE:?is set by slurm/pretrain_*.sh}"
    : "${DATA:?name the folder of images or shards: DATA=/data/imagenet/train sbatch ...}"
    : "${RUN_DIR:?name the folder this run writes, on a disk all nodes share: RUN_DIR=/runs/l16 sbatch ...}"
    CODEBOOK=${CODEBOOK:-$RUN_DIR/codebook.safetensors}
    ENGINE=${ENGINE:-ds_configs/zero2.json}
    mkdir -p "$RUN_DIR"
    rm -f "$RUN_DIR/DONE" "$RUN_DIR/STOP"

    gpus=${SLURM_GPUS_ON_NODE:?no GPUs are allocated: the script needs --gpus-per-node}
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | wc -l)
    # One task of an array has the array's own number: only both numbers name a task.
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:?}}
    job=${job:-$SLURM_JOB_ID}

    # Stop and requeue. STOP is touched again and again, because ranks that are still starting
    # remove an old one.
    child='' stopping='' preparing=''
    # shellcheck disable=SC2317 # called by a trap
    ask_to_stop() {
        [[ -z $stopping ]] || return 0
        echo "$(date): asked to stop; the ranks save and leave."
        while :; do touch "$RUN_DIR/STOP" && sleep 2; done &
        stopping=$!
        [[ -z $preparing || -z $child ]] || kill "$child" # only training looks for STOP
    }
    leave() {
        [[ -z $stopping ]] || kill "$stopping" 2>/dev/null || :
        rm -f "$RUN_DIR/STOP"
    }
    trap ask_to_stop USR1 TERM
    trap leave EXIT

    # Run a command in the background, since bash takes signals only while it waits.
    code=0
    launch() {
        "$@" &
        child=$!
        while :; do
            code=0
            wait "$child" || code=$?
            kill -0 "$child" 2>/dev/null || break
        done
    }

    settings=("data.train=$DATA" "tokenizer.path=$CODEBOOK" "$@")
    ready=1 preparing=1 written=${IDS:+$IDS/ids.json}
    if [[ ! -f $CODEBOOK && ! -f $written ]] && python tools/fit_codebook.py --is_needed --config "$RECIPE" "${settings[@]}"; then
        launch bash slurm/ranks.sh "$nodes" tools/fit_codebook.py --config "$RECIPE" "${settings[@]}"
        [[ -f $CODEBOOK ]] || ready=
    fi
    settings+=(${IDS:+"tokenizer.ids=$IDS"})
    if [[ -n $written && ! -f $written && -n $ready && -z $stopping ]]; then
        launch bash slurm/ranks.sh "$nodes" tools/tokenize_images.py --config "$RECIPE" "${settings[@]}"
        [[ -f $written ]] || ready=
    fi
    preparing=
    if [[ -n $ready && -z $stopping ]]; then
        # A preemption sends TERM to every process of the job. A launcher would die of it, or kill the ranks,
        # while they save.
        IGNORE_TERM=1 launch bash slurm/ranks.sh "$nodes" \
            mapet_ds/pretrain.py --config "$RECIPE" --deepspeed_config "$ENGINE" \
            "run_dir=$RUN_DIR" "train.world_size=$((nodes * gpus))" "${settings[@]}"
    fi

    if [[ -f $RUN_DIR/DONE ]]; then
        echo "$(date): done, $(cat "$RUN_DIR/DONE")"
    elif [[ -n $stopping ]]; then
        trap '' USR1 TERM
        leave
        if [[ $(squeue --noheader --jobs "$job" --format %T) == RUNNING ]]; then
            echo "$(date): stopped in order; job $job goes back into the queue."
            scontrol requeue "$job"
        else # cancelled by its user, or preempted, which queues it again without our help
            echo "$(date): stopped in order; SLURM is ending job $job."
        fi
    elif [[ -f $RUN_DIR/STOP ]]; then
        echo "$(date): stopped by $RUN_DIR/STOP; submit the same job again to continue."
    else
        echo "$(date): the ranks ended before the last step (launcher's exit code $code); their reason is above." >&2
        exit $((code == 0 ? 1 : code))
    fi
}

main "$@"; exit
