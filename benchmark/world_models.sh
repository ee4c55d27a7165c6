#!/usr/bin/env bash
# Every command behind docs/world_models.md, from the repository root:
#   bash benchmark/world_models.sh small [SEED]|car|takecover|car_dream ROUNDS [SEED]|published|temperature RUN|speed
set -euo pipefail

car() { # CarRacing with C in the real environment, sized for two cores; pip install envpool first
  export PYTHONPATH=benchmark
  OMP_NUM_THREADS=1 python world_models.py --env-id envpool_car:EnvPool/CarRacing-v3 --no-cuda --num-envs 6 \
    --total-timesteps 100000 --vae-depth 16 --vae-epochs 1 --vae-lr 1e-3 \
    --sequence-length 128 --model-batch-size 32 --model-updates 336 \
    --population 24 --episodes 2 --idle-limit 100 --generations 45 --eval-generations 5 --eval-episodes 20
}

takecover() { # TakeCover in the dream, sized for two cores: a good hour of processor time
  OMP_NUM_THREADS=1 python world_models.py --env-id VizdoomTakeCover-v1 --no-cuda --num-envs 2 \
    --total-timesteps 400000 --vae-depth 16 --vae-epochs 3 --vae-lr 5e-4 \
    --hidden-size 256 --model-batch-size 50 --sequence-length 200 --model-updates 1600 \
    --generations 100 --eval-generations 20 --eval-episodes 50
}

car_dream() { # CarRacing with C in dreams alone, from random recordings: $1 rounds, three minutes of one core each
  local rounds=$1 seed=$2
  export PYTHONPATH=benchmark SDL_VIDEODRIVER=dummy
  OMP_NUM_THREADS=1 python world_models.py --env-id world_models_car:Fast/CarRacing-v3 --controller-env dream \
    --action-repeat 4 --total-timesteps 40000 --max-hold 3 --idle-limit 25 \
    --rounds "$rounds" --round-timesteps 12000 --record-sigma 0.05 --explore 0.1 \
    --vae-depth 16 --vae-epochs 8 --vae-lr 1e-3 --kl-tolerance 1 \
    --hidden-size 128 --sequence-length 250 --model-batch-size 8 --model-updates 600 --reward-window 3 \
    --population 64 --episodes 8 --generations 15 --eval-generations 10000 --eval-episodes 10 --seed "$seed"
}

small() { # a tiny task whose picture shows the right action: a minute or two of one core, both scores printed; $1 seed
  export PYTHONPATH=tests
  OMP_NUM_THREADS=1 python world_models.py --env-id fake_envs:TinyPixels-v0 --no-cuda --total-timesteps 6000 \
    --vae-depth 8 --vae-batch-size 32 --vae-epochs 12 --vae-lr 1e-3 --hidden-size 32 --num-mixtures 3 \
    --sequence-length 24 --model-batch-size 16 --model-updates 3000 --model-lr 3e-3 --model-lr-decay 0.999 \
    --temperature 1 --population 24 --episodes 8 --generations 200 --sigma 0.3 --eval-generations 50 --eval-episodes 20 \
    --seed "$1"
}

published() { # the settings of the paper and its code; needs a GPU, the car many cores
  python world_models.py --env-id VizdoomTakeCover-v1 --num-envs 16 --eval-generations 25 --eval-episodes 100
  python world_models.py --env-id CarRacing-v3 --num-envs 64 --eval-generations 25 --eval-episodes 100
}

temperature() { # the paper's table, from a run that has finished M
  python benchmark/world_models_temperature.py "$1"
}

speed() {
  OMP_NUM_THREADS=1 python benchmark/world_models_speed.py --no-cuda --env-id envpool_car:EnvPool/CarRacing-v3
}

case "${1:-}" in
  car) car ;;
  takecover) takecover ;;
  car_dream) car_dream "${2:-40}" "${3:-1}" ;;
  small) small "${2:-1}" ;;
  published) published ;;
  temperature) temperature "$2" ;;
  speed) speed ;;
  *) grep -m 1 "bash benchmark" "$0"; exit 2 ;;
esac
