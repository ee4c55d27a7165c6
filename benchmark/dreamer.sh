#!/usr/bin/env bash
# The commands behind docs/dreamer.md, from the repository root; sizes takes the run folder whose replay the sizes learn from:
# bash benchmark/dreamer.sh cpu|pixels|small_batches|gpu|replay|sizes|speed|pictures [folder]
set -euo pipefail

cpu_sized() { # about 30 minutes on one core for each seed
  for seed in 1 2 3; do
    OMP_NUM_THREADS=1 python dreamer.py --env-id cartpole-swingup --obs-mode state --action-repeat 4 --seed "$seed" \
      --total-timesteps 150000 --batch-size 16 --batch-length 16 --deter-size 100 --dense-size 100 \
      --model-lr 1e-3 --actor-lr 1e-4 --value-lr 1e-4 --buffer-size 60000
  done
  python benchmark/export.py results/dreamer/cartpole-swingup.csv "bash benchmark/dreamer.sh cpu" runs/cartpole-swingup__dreamer__*
}

pixels() { # the laptop size: 3 to 4 hours of one thread for each seed, where the processor has bfloat16's arithmetic
  for seed in 1 2 3; do
    OMP_NUM_THREADS=1 python dreamer.py --env-id walker-walk --size laptop --compile --bfloat16 --seed "$seed" \
      --total-timesteps 200000 --checkpoint-frequency 5000
  done
}

small_batches() { # four times the updates, each of a quarter
  for seed in 1 2; do
    OMP_NUM_THREADS=1 python dreamer.py --env-id walker-walk --size laptop --compile --bfloat16 --seed "$seed" \
      --batch-size 8 --batch-length 16 --train-steps 400 --total-timesteps 100000 --checkpoint-frequency 5000
  done
}

gpu() { # both sizes; the published one needs OpenGL
  for seed in 1 2 3; do
    python dreamer.py --env-id walker-walk --size laptop --renderer raycast --seed "$seed" --total-timesteps 200000 \
      --num-envs 2 --train-frequency 10 --train-steps 1 --cudagraphs --buffer-size 150000 --eval-frequency 20000 --eval-episodes 5
    python dreamer.py --env-id walker-walk --size published --renderer gl --seed "$seed" \
      --num-envs 2 --train-frequency 10 --train-steps 1 --cudagraphs --buffer-size 150000 --eval-frequency 20000 --eval-episodes 5
  done
}

replay() { # minutes on one core for each run
  small="--batch-size 16 --batch-length 16 --deter-size 100 --dense-size 100 --model-lr 1e-3 --actor-lr 3e-4 --value-lr 3e-4"
  small+=" --buffer-size 60000 --no-cuda --checkpoint-frequency 0 --learning-starts 1000 --train-frequency 100 --train-steps 20"
  for seed in 1 2 3; do
    for way in episodes ends entries; do
      python benchmark/dreamer_replay.py $way --env-id CartPole-v1 --seed "$seed" $small --total-timesteps 12000 \
        --eval-frequency 1000 --expl-epsilon 0.4 0.1 12000
      python benchmark/dreamer_replay.py $way --env-id LunarLanderContinuous-v3 --action-repeat 4 --seed "$seed" $small \
        --total-timesteps 30000 --eval-frequency 3000
    done
  done
  python benchmark/dreamer_replay.py table runs/*
}

sizes() { # 40 minutes of one thread; a run that goes on would change its replay
  rm -rf frozen && cp -r "$1" frozen
  for flags in "" "--dense-size 400 --cnn-depth 32" "--batch-size 8" "--batch-size 8 --batch-length 16"; do
    OMP_NUM_THREADS=1 python benchmark/dreamer_sizes.py frozen --seconds 600 $flags
  done
}

speed() {
  for flags in "--size laptop" "" "--bfloat16" "--compile" "--size laptop --no-keep"; do
    python benchmark/dreamer_speed.py --batch-size 16 --batch-length 32 --threads 2 --no-cuda $flags
  done
}

pictures() {
  MUJOCO_GL=egl python benchmark/renderers.py docs/dreamer_renderers.png walker-walk cheetah-run cartpole-swingup \
    reacher-easy cup-catch finger-turn-hard hopper-hop humanoid-walk quadruped-walk fish-swim manipulator-bring-ball dog-walk
}

case "${1:-}" in
  cpu) cpu_sized ;;
  pixels) pixels ;;
  small_batches) small_batches ;;
  gpu) gpu ;;
  replay) replay ;;
  sizes) sizes "$2" ;;
  speed) speed ;;
  pictures) pictures ;;
  *) grep -m 1 "bash benchmark" "$0"; exit 2 ;;
esac
