#!/usr/bin/env bash
# Submits the stages of a project as SLURM jobs, each of which starts once the one before succeeded.
#
#   launch/slurm/pipeline.sh [--stages prepare,reweight] [--dry-run] STAGES_FILE
#
# STAGES_FILE is sourced: an array for each stage's command and one for its sbatch options, as in
# launch/slurm/pipeline.example.sh. Without --stages all stages of the file run. Prints the job ids.
set -euo pipefail

refuse() { echo "pipeline.sh: error: $*" >&2; exit 2; }

ORDER=(prepare convert_import reweight sample train convert_export evaluate)
# For the stages file, which can say "$LAUNCH/reweight.sbatch" from wherever it is.
LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

asked='' dry_run='' file=''
while (($#)); do
    case $1 in
        --stages) asked=${2:-,}; shift $(($# > 1)) ;;
        --stages=*) asked=${1#*=} ;;
        --dry-run) dry_run=1 ;;
        -*) refuse "unknown option $1 (usage: pipeline.sh [--stages A,B] [--dry-run] STAGES_FILE)" ;;
        *) [[ -z $file ]] || refuse "two stages files: $file and $1"; file=$1 ;;
    esac
    shift
done
[[ -n $file ]] || refuse "no stages file (copy $LAUNCH/pipeline.example.sh and fill it in)"
[[ -r $file ]] || refuse "$file: no such file"

unset "${ORDER[@]}" # whatever the environment calls so
all_sbatch=()
# A file without a slash would be looked up on PATH.
# shellcheck source=launch/slurm/pipeline.example.sh
source "$(cd "$(dirname "$file")" && pwd)/$(basename "$file")"

defined() { [[ -n $(declare -p "$1" 2> /dev/null) ]]; }
for stage in "${ORDER[@]}"; do
    for name in "$stage" "${stage}_sbatch"; do
        ! defined "$name" || [[ $(declare -p "$name") == 'declare -a'* ]] ||
            refuse "$file: $name is not an array (write $name=(word word ...))"
    done
    ! defined "$stage" || [[ $(declare -p "$stage") != *'=()' ]] || refuse "$file: $stage is empty"
done
IFS=, read -r -a wanted <<< "$asked"
for stage in "${wanted[@]}"; do
    [[ " ${ORDER[*]} " == *" $stage "* ]] ||
        refuse "--stages: no stage '$stage' (stages: ${ORDER[*]})"
    defined "$stage" || refuse "--stages: $file does not define $stage"
done

# Words as one would type them.
shown() {
    local word line=''
    for word; do
        [[ $word == *[!A-Za-z0-9_./:=,@%+-]* || -z $word ]] && word=${word@Q}
        line+="$word "
    done
    echo "${line% }"
}

# sbatch's options for a stage, then what it runs: a batch script with arguments, or a command.
submission() {
    local -n command=$1
    local -a own=()
    if defined "$1_sbatch"; then
        local -n options=$1_sbatch
        own=("${options[@]}")
    fi
    sbatch=(sbatch --parsable --job-name="$1" "${all_sbatch[@]}" "${own[@]}")
    # afterok: only if it ended with 0. Without kill-on-invalid-dep the rest would wait for ever.
    [[ -z $previous ]] ||
        sbatch+=("--dependency=afterok:$previous" --kill-on-invalid-dep=yes)
    if [[ ${command[0]} == *.sbatch ]]; then
        sbatch+=("${command[@]}")
    else
        sbatch+=("--wrap=$(shown "${command[@]}")")
    fi
}

jobs=() previous=''
# All or none: a stage that sbatch refuses takes back those before it.
trap '((${#jobs[@]} == 0)) || { scancel "${jobs[@]}"; echo "cancelled ${jobs[*]}" >&2; }' ERR
for stage in "${ORDER[@]}"; do
    if ! defined "$stage" || [[ -n $asked && ",$asked," != *",$stage,"* ]]; then
        echo "$stage: left out"
        continue
    fi
    submission "$stage"
    if [[ -n $dry_run ]]; then
        echo "$stage: $(shown "${sbatch[@]}")"
        previous=$stage
        continue
    fi
    answer=$("${sbatch[@]}")
    previous=${answer%%;*} # of a federation it says "id;cluster"
    jobs+=("$previous")
    echo "$stage: $previous"
done
[[ -n $previous ]] || refuse "$file defines none of ${ORDER[*]}"
[[ -n $dry_run ]] || echo "stop them all: scancel ${jobs[*]}"
