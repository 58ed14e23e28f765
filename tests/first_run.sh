#!/usr/bin/env bash
# What an installed megatron-scalebio must do from any folder: prepare three files and learn a mixture.
#
#   tests/first_run.sh TOKENIZER
set -euo pipefail
mkdir raw
for name in one two goal; do
    for number in $(seq 12); do
        echo "{\"text\": \"$name spam $number eggs $number $name\"}"
    done > "raw/$name.jsonl"
done
megatron-scalebio --version
megatron-scalebio init raw
megatron-scalebio prepare --tokenizer "$1" --seq-length 16 --out data \
    --input one=raw/one.jsonl --input two=raw/two.jsonl --input goal=raw/goal.jsonl
megatron-scalebio reweight --config run.yaml --seq-length 16 --num-layers 1 --hidden-size 16 \
    --num-attention-heads 2 --train-iters 2 --global-batch-size 4 --micro-batch-size 2
megatron-scalebio status runs/first
test -s runs/first/report.html
