#!/bin/sh
# The next default generator, step by step (docs/research.md, 22 to 25); resumes what was stopped. The first command, which
# made the one that ships, is eight minutes on an H200 and a day on two CPU cores; the others took three and a half hours
# there. Options such as `--device cuda` are handed on to training.
set -e
cd "$(dirname "$0")/.."
hyperlora train train/default.yaml --steps 648 -o runs/default "$@"
hyperlora train train/beside.yaml -o runs/beside "$@"
python train/mean.py runs/default/generator runs/beside/generator -o runs/half --share 0.5
hyperlora train train/salience.yaml --steps 80 -o runs/salience "$@"
hyperlora train train/recall.yaml -o runs/recall "$@"
python train/mean.py runs/recall/generator runs/salience/generator -o runs/recalled --share 0.5
python train/mean.py runs/recalled runs/default/generator -o runs/mixed --share 0.5 --only adapter
