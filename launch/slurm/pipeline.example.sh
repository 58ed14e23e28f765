# shellcheck shell=bash disable=SC2034  # pipeline.sh reads these
# The stages of one project for launch/slurm/pipeline.sh: copy it, and leave out what you don't need.
#
# STAGE=(command)                  what to run, word by word; a path to an .sbatch file is submitted
#                                  with the words after it, anything else is wrapped in a job
# STAGE_sbatch=(options)           sbatch options of that stage
# all_sbatch=(options)             sbatch options of every stage
#
# It is plain bash, so variables serve.

run=runs/first
model=models/Llama-3-8B
eight_gpus=(--nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8)

all_sbatch=(--account=my-account --partition=batch --output=%x-%j.out)

prepare=(
    megatron-scalebio prepare --tokenizer "$model" --seq-length 1024 --out data
    --input alpaca=raw/alpaca.json --input math=raw/math --input goal=raw/goal.jsonl
    --input test=raw/test.jsonl
)
prepare_sbatch=(--cpus-per-task=16 --time=2:00:00)

convert_import=(megatron-scalebio convert import --hf "$model" --save checkpoints/base)
convert_import_sbatch=(--mem=100G --time=1:00:00)

# Distributed stages: one task per rank, saved and requeued at the time limit.
reweight=("$LAUNCH/reweight.sbatch" --config run.yaml --output "$run")
reweight_sbatch=("${eight_gpus[@]}" --time=4:00:00)

sample=(
    megatron-scalebio sample --weights "$run" --num-samples 10000 --out data/mixed
    --exclude raw/test.jsonl
)
sample_sbatch=(--cpus-per-task=8 --time=1:00:00)

train=("$LAUNCH/reweight.sbatch" train --config train.yaml --output runs/mixed)
train_sbatch=("${eight_gpus[@]}" --time=4:00:00)

convert_export=(
    megatron-scalebio convert export --load runs/mixed/best --hf-reference "$model"
    --save models/mixed
)
convert_export_sbatch=(--mem=100G --time=1:00:00)

evaluate=("$LAUNCH/reweight.sbatch" evaluate --config evaluate.yaml)
evaluate_sbatch=(--ntasks=1 --gpus-per-node=1 --time=2:00:00)
