#!/usr/bin/env bash
# Every command behind docs/mbpo.md, from the repository root: bash benchmark/mbpo.sh cheap|hopper|gpu|speed
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
  python benchmark/curves.py docs/mbpo_cheap.png runs/{InvertedPendulum-v5,Pendulum-v1}__{mbpo,sac}__*
}

hopper() { # an hour and more on one core
  OMP_NUM_THREADS=1 python mbpo.py --env-id Hopper-v5 --total-timesteps 20000 --eval-frequency 1000
  python benchmark/curves.py docs/mbpo_hopper.png runs/Hopper-v5__mbpo__*
}

gpu() { # the published settings to the end
  for task in Hopper-v5 HalfCheetah-v5; do
    for seed in 1 2 3; do
      python mbpo.py --env-id "$task" --seed "$seed" --eval-frequency 1000 --cudagraphs
    done
  done
  python benchmark/curves.py docs/mbpo_mujoco.png runs/{Hopper-v5,HalfCheetah-v5}__mbpo__*
}

speed() {
  python benchmark/mbpo_speed.py --threads 2 --no-cuda
  python benchmark/mbpo_speed.py --threads 2 --no-cuda --compile --no-loop
}

case "${1:-}" in
  cheap) cheap ;;
  hopper) hopper ;;
  gpu) gpu ;;
  speed) speed ;;
  *) grep -m 1 "bash benchmark" "$0"; exit 2 ;;
esac
