#!/bin/bash
# Start the ranks of a program, one on each GPU, on the first NODES hosts of this job:
#
#   bash slurm/ranks.sh NODES PROGRAM [argument ...]
#
# LAUNCHER says how. ssh (the default): the deepspeed launcher, over ssh and pdsh. srun: SLURM starts a
# torchrun on each host, without any ssh.
#
# The environment must hold RUN_DIR, a folder that all hosts share. IGNORE_TERM=1 makes launcher and
# ranks deaf to TERM: they look for RUN_DIR/STOP instead.
set -euo pipefail

# The site's variables, and those that libraries read, reach every host: through the file that deepspeed
# reads, or by srun, which hands on the whole environment. ssh shows them to other users of the hosts, so
# HF_TOKEN stays here.
carry_environment() {
    # shellcheck source=slurm/cluster.env.sh
    source slurm/cluster.env.sh
    export DS_ENV_FILE
    DS_ENV_FILE=$(realpath "$RUN_DIR")/deepspeed_env
    {
        sed -n 's/^export \([A-Za-z_][A-Za-z0-9_]*\)=.*/\1/p' slurm/cluster.env.sh
        compgen -e | grep -E '^(HF|NCCL|GLOO|TRITON|TORCHINDUCTOR)_' | grep -v TOKEN || :
    } | sort -u | while read -r name; do
        [[ ${!name} == *$'\n'* ]] || echo "$name=${!name}"
    done >"$DS_ENV_FILE"
}

main() {
    local nodes=$1 gpus hosts head_node port ignore=()
    shift
    gpus=${SLURM_GPUS_ON_NODE:?no GPUs are allocated: the script needs --gpus-per-node}
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n "$nodes")
    head_node=${hosts%%$'\n'*}
    port=$((10000 + SLURM_JOB_ID % 20000))
    carry_environment
    if [[ -n ${IGNORE_TERM:-} ]]; then
        ignore=(python -c '
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.execvp(sys.argv[1], sys.argv[1:])')
    fi

    case ${LAUNCHER:=ssh} in
        ssh)
            local launcher=(--hostfile "$RUN_DIR/hostfile" --master_addr "$head_node" --master_port "$port")
            sed "s/\$/ slots=$gpus/" <<<"$hosts" >"$RUN_DIR/hostfile"
            if ((nodes == 1)); then
                launcher+=(--no_ssh_check)
            elif [[ $PWD == *[[:space:]]* ]]; then
                echo "$PWD has a space in it, which deepspeed's remote shells split: move the repository." >&2
                exit 2
            fi
            exec "${ignore[@]}" deepspeed "${launcher[@]}" "$@"
            ;;
        srun)
            # A step has all cores of its hosts, and --cpu-bind=none leaves them to all ranks. A host whose
            # ranks die ends the others.
            local step=(--nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --nodelist="${hosts//$'\n'/,}")
            # shellcheck disable=SC2016 # the number of a host is known there only
            exec "${ignore[@]}" srun "${step[@]}" --cpu-bind=none --kill-on-bad-exit=1 "${ignore[@]}" \
                bash -c 'exec torchrun --node_rank="$SLURM_NODEID" "$@"' torchrun --nnodes="$nodes" \
                --nproc_per_node="$gpus" --master_addr="$head_node" --master_port="$port" "$@"
            ;;
        *)
            echo "LAUNCHER=$LAUNCHER is not known: it is ssh or srun." >&2
            exit 2
            ;;
    esac
}

main "$@"; exit
