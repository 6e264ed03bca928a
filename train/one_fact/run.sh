#!/bin/sh
# Learning curves of the generator families at equal parameters, three seeds each; resumes what was stopped. Options such
# as `--dtype bfloat16` are handed on.
set -e
cd "$(dirname "$0")/../.."
for seed in 0 1 2; do
    for family in associative hybrid perceiver memory_tokens; do
        hyperlora train "train/one_fact/$family.yaml" --seed "$seed" -o "runs/one_fact/$family-$seed" "$@"
    done
done
python eval/learning_curves.py runs/one_fact -o eval/results/one_fact
