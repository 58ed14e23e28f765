#!/usr/bin/env bash
# Runs `megatron-scalebio reweight` (or another distributed command) on this machine's GPUs.
#
#   launch/local.sh --config run.yaml --output runs/first        a rank per visible GPU, else one
#   launch/local.sh -n 2 train --config train.yaml               two ranks
#
# Ctrl-C or SIGTERM saves after the current step; started again the run goes on.
set -euo pipefail

refuse() { echo "local.sh: error: $*" >&2; exit 2; }

ranks=''
if [[ ${1:-} == -n ]]; then
    ranks=${2:-}
    [[ $ranks =~ ^[1-9][0-9]*$ ]] || refuse "-n ${ranks:-(nothing)}: not a number of ranks"
    shift 2
fi
command=reweight
if [[ ${1:--} != -* ]]; then
    command=$1
    shift
fi
previous=''
for word in "$@"; do
    [[ $previous != --config || -f $word ]] || refuse "--config $word: no such file"
    previous=$word
done
type -P torchrun > /dev/null || refuse "torchrun is not on PATH (activate the environment first)"
# torch counts what CUDA_VISIBLE_DEVICES leaves, as the ranks will.
ranks=${ranks:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}

# For the reasons see launch/slurm/reweight.sbatch.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

exec torchrun --standalone --nproc_per_node "$ranks" -m megatron_scalebio "$command" "$@"
