#!/bin/bash
# Train on the machines of a cloud. Start it once on each, in the repository's root:
#
#   bash containers/train.sh --config RECIPE --deepspeed_config JSON run_dir=DIR [a.b=value ...]
#
# One machine needs nothing else. Several need torchrun's own variables: PET_NNODES, PET_NODE_RANK,
# PET_MASTER_ADDR and PET_MASTER_PORT. Without PET_NPROC_PER_NODE there is a rank on each GPU.
#
# The exit code says whether the same command, started again, would go on:
#
#   0    no: the run is at its end, or somebody touched DIR/STOP
#   2    no: a setting or a path must be corrected
#   75   yes: this machine or another was asked to stop, and all ranks have saved
#   else perhaps: ranks died; their reason is in the output
set -euo pipefail

main() {
    local run_dir='' word child='' asked='' code=0
    for word in "$@"; do
        [[ $word != run_dir=* ]] || run_dir=${word#run_dir=}
    done
    if [[ -z $run_dir ]]; then
        echo "No run_dir=DIR is given: name the folder this run writes, on a disk that outlives the machines." >&2
        exit 2
    fi

    trap 'asked=1; [[ -z $child ]] || kill -TERM "$child" || :' TERM INT USR1
    python mapet_ds/pretrain.py --check "$@" || exit
    rm -f "$run_dir/DONE" "$run_dir/STOP"
    if [[ -z $asked ]]; then
        PET_NPROC_PER_NODE=${PET_NPROC_PER_NODE:-gpu} torchrun --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
            --shutdown-timeout 300 mapet_ds/pretrain.py "$@" &
        child=$!
        while :; do # a signal ends a wait
            code=0
            wait "$child" || code=$?
            kill -0 "$child" 2>/dev/null || break
        done
    fi

    ls "$run_dir" > /dev/null 2>&1 || : # a file system of the network looks anew where a folder is listed
    if [[ -f $run_dir/DONE ]]; then
        echo "$(date): done, $(cat "$run_dir/DONE")"
    elif [[ -f $run_dir/STOP ]]; then
        echo "$(date): stopped by $run_dir/STOP; the same command continues."
    elif [[ -n $asked || $code == 0 ]]; then
        echo "$(date): asked to stop; the same command continues."
        exit 75
    else
        echo "$(date): the ranks ended before the last step (torchrun's exit code $code); their reason is above." >&2
        exit "$code"
    fi
}

main "$@"; exit
