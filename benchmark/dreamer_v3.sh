#!/usr/bin/env bash
# Every command behind docs/dreamer_v3.md, from the repository root: bash benchmark/dreamer_v3.sh cpu|walker|cpu_pixels|pixels|published|speed|laptop_speed
set -euo pipefail

laptop() { # task, action repeat, steps, seed: 0.16 s for an update on one core of a two-core machine
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python dreamer_v3.py --env-id "$1" --obs-mode state --size laptop --action-repeat "$2" \
    --total-timesteps "$3" --seed "$4" --batch-length 32 --imag-last 8 --train-ratio 256 --learning-rate 3e-4 --warmup 200 \
    --buffer-size 100000 --eval-frequency 20000 "${@:5}"
}

cpu() { # 20,000 updates each
  for seed in 1 2 3; do laptop cartpole-swingup 4 160000 "$seed" "$@"; done
  python benchmark/export.py results/dreamer_v3/cartpole-swingup.csv "bash benchmark/dreamer_v3.sh cpu" runs/cartpole-swingup__dreamer_v3__*
  python benchmark/curves.py dreamer_v3_returns
}

walker() { # 20,000 updates each
  for seed in 1 2 3; do laptop walker-walk 2 80000 "$seed" --eval-frequency 10000 --eval-episodes 5 "$@"; done
  for kind in "" _training; do
    python benchmark/export.py results/dreamer_v3/walker-walk_state$kind.csv "bash benchmark/dreamer_v3.sh walker" runs/walker-walk__dreamer_v3__*
  done
}

cpu_pixels() { # 12,400 updates of 0.64 s
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python dreamer_v3.py --env-id walker-walk --size laptop --total-timesteps 100000 --batch-size 8 \
    --batch-length 32 --train-ratio 64 --learning-rate 3e-4 --warmup 200 --buffer-size 60000 --eval-frequency 10000 \
    --eval-episodes 3 "$@"
}

pixels() { # the smallest published size, half the batch and updates as long apart as published; needs a GPU
  python dreamer_v3.py --env-id walker-walk --size 1m --num-envs 2 --total-timesteps 100000 --batch-length 32 --train-ratio 256 \
    --learning-rate 3e-4 --warmup 200 --buffer-size 60000 --eval-frequency 10000 --cudagraphs "$@"
}

published() { # the settings of the published curves; needs a GPU and OpenGL
  for seed in 1 2 3; do
    python dreamer_v3.py --env-id walker-walk --obs-mode state --seed "$seed" --num-envs 4 --bfloat16 --cudagraphs
    python dreamer_v3.py --env-id walker-walk --obs-mode pixels --seed "$seed" --num-envs 4 --bfloat16 --cudagraphs
  done
}

speed() { # seconds of an update; beside others: speed --r2dreamer FOLDER --sheeprl
  for mode in state pixels; do python benchmark/dreamer_v3_speed.py --obs-mode "$mode" "$@"; done
}

laptop_speed() { # of the CPU-sized recipe
  set -- --size laptop --batch-length 32 --imag-last 8 "$@"
  python benchmark/dreamer_v3_speed.py --obs-mode state "$@"
  python benchmark/dreamer_v3_speed.py --obs-mode pixels --batch-size 8 "$@"
}

case "${1:-}" in
  cpu | walker | cpu_pixels | pixels | published | speed | laptop_speed) "$@" ;;
  *) grep -m 1 "bash benchmark" "$0"; exit 2 ;;
esac
