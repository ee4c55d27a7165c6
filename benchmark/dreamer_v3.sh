#!/usr/bin/env bash
# Every command behind docs/dreamer_v3.md, from the repository root: bash benchmark/dreamer_v3.sh cpu|walker|pixels|published|speed
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

walker() {
  for seed in 1 2 3; do laptop walker-walk 2 80000 "$seed" "$@"; done
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

speed() { # seconds of an update, median of 10
  python - "$@" <<'END'
import statistics, sys, time
import gymnasium as gym, numpy as np, torch, tyro
import dreamer_v3

torch.set_num_threads(1)
vector, image = gym.spaces.Box(-np.inf, np.inf, (24,), np.float32), gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
small = {"batch_length": 32, "imag_last": 8}
flags = tyro.cli(dreamer_v3.Args)
for size, space, settings in (
    ("laptop", vector, small), ("1m", vector, {}), ("laptop", image, small | {"batch_size": 8}), ("1m", image, {}),
):
    args = dreamer_v3.replace(flags, size=size, **settings)
    device, shape = dreamer_v3.choose_device(args), (args.batch_length, args.batch_size)
    agent = dreamer_v3.Agent(space, gym.spaces.Box(-1, 1, (6,), np.float32), args).to(device)
    update, generator = dreamer_v3.make_update(agent, dreamer_v3.LaProp(agent, args), args), torch.Generator(device)
    obs = torch.randint(256, (*shape, 64, 64, 3), dtype=torch.uint8) if space is image else torch.randn(*shape, 24)
    batch = {name: torch.ones(shape) for name in ("reward", "cont")} | {"is_first": torch.zeros(shape)}
    batch |= {"obs": obs, "action": torch.randn(*shape, 6), "deter": torch.zeros(args.batch_size, dreamer_v3.SIZES[size].deter)}
    batch["stoch"] = torch.zeros(args.batch_size, dreamer_v3.STOCH, dtype=torch.uint8)
    batch, seconds = {name: tensor.to(device) for name, tensor in batch.items()}, []
    for _ in range(16):
        start = time.perf_counter()
        metrics, _ = update(batch, dreamer_v3.draw_noise(agent, args, generator))
        metrics["losses/dyn_loss"].item()
        seconds.append(time.perf_counter() - start)
    kind = "pixels" if space is image else "state"
    print(f"{device} {size} {kind} {shape[1]} x {shape[0]}: {statistics.median(seconds[6:]):.4f} s")
END
}

case "${1:-}" in
  cpu | walker | pixels | published | speed) "$@" ;;
  *) grep -m 1 "bash benchmark" "$0"; exit 2 ;;
esac
