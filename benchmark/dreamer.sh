#!/usr/bin/env bash
# Every command behind docs/dreamer.md, from the repository root: bash benchmark/dreamer.sh cpu|gpu|speed|pictures
set -euo pipefail

cpu_sized() { # about 30 minutes on one core for each seed
  for seed in 1 2 3; do
    OMP_NUM_THREADS=1 python dreamer.py --env-id cartpole-swingup --obs-mode state --action-repeat 4 --seed "$seed" \
      --total-timesteps 150000 --batch-size 16 --batch-length 16 --deter-size 100 --dense-size 100 \
      --model-lr 1e-3 --actor-lr 1e-4 --value-lr 1e-4 --buffer-size 60000
  done
  python benchmark/curves.py docs/dreamer_cpu.png runs/cartpole-swingup__dreamer__*
}

published() { # the published settings; needs a GPU and OpenGL
  for seed in 1 2 3; do
    python dreamer.py --env-id walker-walk --renderer gl --seed "$seed" --num-envs 8 --train-frequency 10 --train-steps 1 \
      --bfloat16 --cudagraphs
  done
  python benchmark/curves.py docs/dreamer_walker_walk.png runs/walker-walk__dreamer__*
}

speed() {
  for flags in "" "--bfloat16" "--compile"; do
    python benchmark/dreamer_speed.py --batch-size 16 --batch-length 32 --threads 2 --no-cuda $flags
  done
}

pictures() {
  MUJOCO_GL=egl python benchmark/renderers.py docs/dreamer_renderers.png walker-walk cheetah-run cartpole-swingup \
    reacher-easy cup-catch finger-turn-hard hopper-hop humanoid-walk quadruped-walk fish-swim manipulator-bring-ball dog-walk
}

case "${1:-}" in
  cpu) cpu_sized ;;
  gpu) published ;;
  speed) speed ;;
  pictures) pictures ;;
  *) grep -m 1 "bash benchmark" "$0"; exit 2 ;;
esac
