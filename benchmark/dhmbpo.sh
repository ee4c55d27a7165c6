#!/usr/bin/env bash
# The commands behind docs/dhmbpo.md, from the repository root; the last two take the run folder of a checkpoint:
# bash benchmark/dhmbpo.sh pendulum|hopper|halfcheetah|humanoid|laptop|gpu|figure|speed|ensemble|rounding [folder]
set -euo pipefail
export OMP_NUM_THREADS=1
small=(--model-batch-size 512 --model-patience 25 --model-max-epochs 125 --holdout-rows 4096)

run() { # task seed steps and further flags
  python dhmbpo.py --env-id "$1" --seed "$2" --total-timesteps "$3" --eval-frequency 1000 \
    --checkpoint-frequency 2000 "${@:4}"
}

case "${1:-}" in
  pendulum) run InvertedPendulum-v5 1 3000 --eval-frequency 250 "${small[@]}" ;;
  hopper) for seed in 1 2 3; do run Hopper-v5 "$seed" 60000 "${small[@]}"; done ;;
  halfcheetah) run HalfCheetah-v5 1 100000 "${small[@]}" ;;
  humanoid) run Humanoid-v5 1 100000 "${small[@]}" ;;
  laptop)
    for task in HalfCheetah-v5 Humanoid-v5; do
      run "$task" 1 100000 --eval-frequency 5000 --bfloat16 --model-max-epochs 40 --holdout-rows 4096
    done
    ;;
  gpu)
    flags=(--cudagraphs --no-save-buffer --eval-frequency 5000 --eval-episodes 5)
    for task in Hopper-v5 HalfCheetah-v5 Humanoid-v5; do
      for seed in 1 2 3; do run "$task" "$seed" 100000 "${flags[@]}"; done
      run "$task" 1 100000 "${flags[@]}" "${small[@]}"
    done
    ;;
  figure) python benchmark/curves.py dhmbpo_returns ;;
  speed)
    for _ in 1 2; do
      python benchmark/dhmbpo_speed.py --threads 1 --no-cuda
      python benchmark/dhmbpo_speed.py --threads 1 --no-cuda --bfloat16
    done
    ;;
  ensemble)
    judge() { python benchmark/dhmbpo_ensemble.py "$1" --seconds 160 "${@:2}"; }
    judge "$2"
    judge "$2" --model-patience 100 --model-max-epochs 250
    judge "$2" --model-patience 100 --model-max-epochs 250 --model-lr 3e-4
    judge "$2" --model-batch-size 2048 --model-patience 50
    ;;
  rounding)
    python benchmark/dhmbpo_bfloat16.py "$2"
    for flag in --bfloat16 --no-bfloat16; do python benchmark/dhmbpo_ensemble.py "$2" --seconds 1000 --model-max-epochs 20 $flag; done
    ;;
  *) grep -m 1 "bash benchmark" "$0"; exit 2 ;;
esac
