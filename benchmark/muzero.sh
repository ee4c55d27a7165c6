#!/usr/bin/env bash
# Every command behind docs/muzero.md, from the repository root: bash benchmark/muzero.sh cartpole|pendulum|swingup|tables|physics|chain|boards|atari|speed
set -euo pipefail

cartpole() { # 40K steps, evaluated over 100 episodes every 10K: minutes on one core for each seed
  for seed in 1 2 3; do
    python muzero.py --seed "$seed" --eval-episodes 100
  done
  python benchmark/export.py results/muzero/CartPole-v1_10K.csv "bash benchmark/muzero.sh cartpole" runs/CartPole-v1__muzero__*
  for seed in 1 2 3; do
    python muzero.py --seed "$seed" --total-timesteps 20000 --eval-frequency 2000 --eval-episodes 20 --exp-name muzero_2K
  done
  python benchmark/export.py results/muzero/CartPole-v1_2K.csv "bash benchmark/muzero.sh cartpole" runs/CartPole-v1__muzero_2K__*
  python benchmark/curves.py muzero_cartpole
}

pendulum() { # continuous actions; 10K steps are minutes on one core for each seed
  for seed in 1 2 3; do
    python muzero.py --env-id Pendulum-v1 --seed "$seed" --eval-episodes 100
  done
  python benchmark/export.py results/muzero/Pendulum-v1.csv "muzero.py --env-id Pendulum-v1" runs/Pendulum-v1__muzero__*
}

swingup() { # dm_control from state, 100K steps: 16 minutes on one busy core for each seed
  for seed in 1 2 3; do
    python muzero.py --env-id cartpole-swingup --seed "$seed" --eval-episodes 5
  done
  python benchmark/export.py results/muzero/cartpole-swingup_repeat4.csv "muzero.py --env-id cartpole-swingup --eval-episodes 5" runs/cartpole-swingup__muzero__*
}

tables() { # FrozenLake and Taxi, a few minutes on one core for each seed
  for seed in 1 2 3; do
    python muzero.py --env-id FrozenLake-v1 --seed "$seed" --total-timesteps 20000 --eval-frequency 5000 --eval-episodes 100
    python muzero.py --env-id Taxi-v4 --seed "$seed" --eval-episodes 20
  done
}

physics() { # Acrobot, MountainCar and LunarLander
  for seed in 1 2 3; do
    python muzero.py --env-id MountainCar-v0 --seed "$seed" --eval-episodes 20
    python muzero.py --env-id Acrobot-v1 --seed "$seed" --eval-frequency 5000
    python muzero.py --env-id LunarLander-v3 --seed "$seed"
  done
}

boards() { # self-play, then random, perfect and MCTS players from both seats, and every reply in tic-tac-toe
  for game in tictactoe connect_four; do
    for seed in 1 2 3; do
      python muzero.py --env-id "$game" --seed "$seed" --eval-episodes 100
    done
    for run in runs/"${game}"__muzero__*; do
      python benchmark/muzero_boards.py "$run"
    done
  done
}

atari() { # needs a GPU
  for game in Pong Breakout; do
    python muzero.py --env-id "ALE/$game-v5" --total-timesteps 100000 --cudagraphs
  done
}

speed() {
  for flags in "" "--compile"; do
    python benchmark/muzero_speed.py $flags
  done
}

case "${1:-}" in
  cartpole) cartpole ;;
  pendulum) pendulum ;;
  swingup) swingup ;;
  tables) tables ;;
  physics) physics ;;
  chain) python benchmark/muzero_chain.py ;;
  boards) boards ;;
  atari) atari ;;
  speed) speed ;;
  *) grep -m 1 "bash benchmark" "$0"; exit 2 ;;
esac
