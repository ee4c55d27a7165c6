#!/usr/bin/env bash
# Every command behind docs/mbpo.md, from the repository root: bash benchmark/mbpo.sh cheap|hopper|no_model|gpu|speed
set -euo pipefail

cheap() { # with and without a model: 10 to 15 minutes on one core for each run
  for seed in 1 2 3 4 5; do
    OMP_NUM_THREADS=1 python mbpo.py --env-id InvertedPendulum-v5 --total-timesteps 5000 --seed "$seed" \
      --eval-frequency 250
    OMP_NUM_THREADS=1 python mbpo.py --env-id InvertedPendulum-v5 --total-timesteps 5000 --seed "$seed" \
      --eval-frequency 250 --real-ratio 1 --exp-name sac
  done
  for seed in 1 2 3; do
    OMP_NUM_THREADS=1 python mbpo.py --env-id Pendulum-v1 --total-timesteps 2500 --seed "$seed" --eval-frequency 250
  done
  for task in InvertedPendulum-v5 Pendulum-v1; do
    python benchmark/export.py "results/mbpo/$task.csv" "bash benchmark/mbpo.sh cheap" runs/"$task"__mbpo__*
  done
  python benchmark/export.py results/mbpo/InvertedPendulum-v5_no_model.csv "bash benchmark/mbpo.sh cheap" runs/InvertedPendulum-v5__sac__*
  python benchmark/curves.py mbpo_cheap
}

hopper() { # an hour and more on one core
  OMP_NUM_THREADS=1 python mbpo.py --env-id Hopper-v5 --total-timesteps 20000 --eval-frequency 1000
  python benchmark/export.py results/mbpo/Hopper-v5.csv "bash benchmark/mbpo.sh hopper" runs/Hopper-v5__mbpo__*
  python benchmark/curves.py mbpo_hopper
}

no_model() { # soft actor-critic, an update a step: 19 minutes on one core
  OMP_NUM_THREADS=1 python mbpo.py --env-id HalfCheetah-v5 --real-ratio 1 --updates-per-step 1 --exp-name sac \
    --eval-frequency 5000 --total-timesteps 100000
  python benchmark/export.py results/mbpo/HalfCheetah-v5_no_model.csv "bash benchmark/mbpo.sh no_model" runs/HalfCheetah-v5__sac__*
  python benchmark/curves.py dhmbpo_returns
}

gpu() { # the published settings to the end
  for task in Hopper-v5 HalfCheetah-v5; do
    for seed in 1 2 3; do
      python mbpo.py --env-id "$task" --seed "$seed" --eval-frequency 1000 --cudagraphs
    done
    python benchmark/export.py "results/mbpo/${task}_full.csv" "bash benchmark/mbpo.sh gpu" runs/"$task"__mbpo__*
  done
}

speed() {
  python benchmark/mbpo_speed.py --threads 2 --no-cuda
  python benchmark/mbpo_speed.py --threads 2 --no-cuda --compile --no-loop
}

case "${1:-}" in
  cheap) cheap ;;
  hopper) hopper ;;
  no_model) no_model ;;
  gpu) gpu ;;
  speed) speed ;;
  *) grep -m 1 "bash benchmark" "$0"; exit 2 ;;
esac
