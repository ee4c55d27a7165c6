#!/usr/bin/env bash
# Everything that is to be measured on a GPU, from the repository root: bash benchmark/gpu.sh FOLDER [PATTERN]
# With a pattern, a regular expression, only the lines whose names match it, as 'mbpo|machine'. Each line takes less than
# ten minutes, all of them an evening. Of each line NAME there are FOLDER/NAME.log, what it printed, and FOLDER/NAME.code,
# how it ended: 0 is well, 124 cut by the clock, which is fine for a run. The same command again goes on with the lines
# that have not ended so. The table, made in any case: FOLDER/table.md.
# DRY=40 bash benchmark/gpu.sh FOLDER: one of 40 steps of each line on a CPU, without --compile and --cudagraphs.
set -euo pipefail
folder=${1:-} pattern=${2:-}
[ -n "$folder" ] || { grep -m 1 "bash benchmark" "$0"; exit 2; }
mkdir -p "$folder"
: >"$folder/lines"

[ -z "${DRY:-}" ] || export OMP_NUM_THREADS=1
declare -A dry=( # what a dry run appends
  [mbpo.py]="--no-cuda --env-id InvertedPendulum-v5 --learning-starts 20 --rollout-batch-size 100 --model-max-epochs 1
    --updates-per-step 1"
  [dhmbpo.py]="--no-cuda --env-id InvertedPendulum-v5 --learning-starts 20 --model-train-frequency 20
    --model-max-epochs 1 --critic-warmup 1 --rollout-length 2"
  [dreamer.py]="--no-cuda --env-id CartPole-v1 --size laptop --batch-size 2 --batch-length 8 --learning-starts 40
    --pretrain-steps 1 --dense-size 8"
  [dreamer_v3.py]="--no-cuda --env-id CartPole-v1 --size laptop --batch-size 2 --batch-length 8 --learning-starts 8
    --train-ratio 4"
  [muzero.py]="--no-cuda --num-envs 1 --learning-starts 20 --num-simulations 2 --hidden-size 8"
  [world_models.py]="--no-cuda --vae-depth 2 --vae-batch-size 8 --hidden-size 8 --sequence-length 8 --model-updates 2
    --population 4 --episodes 1 --generations 1 --dream-length 4"
  [benchmark/dreamer_speed.py]="--no-cuda --size laptop --batch-size 2 --batch-length 4 --updates 1"
  [benchmark/muzero_speed.py]="--no-cuda --batches 1 --simulations 2 --hidden 8 --no-whole --stretches 1"
  [benchmark/mbpo_speed.py]=--help [benchmark/dhmbpo_speed.py]=--help [benchmark/world_models_speed.py]=--help
  [benchmark/dreamer_v3_speed.py]="--no-cuda --batch-size 2 --batch-length 4 --updates 1" [-m]=--collect-only [-c]=""
)

line() { # a name, group.way; updates for each environment step, or -; the command
  local name=$1 code=0 words=() before=""
  echo "$name $2" >>"$folder/lines"
  if [[ ! $name =~ $pattern ]] || grep -qsxE "0|124" "$folder/$name.code"; then return 0; fi
  shift 2
  if [ -n "${DRY:-}" ]; then
    for word in "$@"; do
      [ "$before" != --total-timesteps ] || word=$((word / DRY))
      case "$word" in --compile | --cudagraphs | --bfloat16) ;; *) words+=("$word") ;; esac
      before=$word
    done
    # shellcheck disable=SC2206  # words
    words+=(${dry[$2]})
    set -- "${words[@]}"
  fi
  echo "$name: $*"
  timeout -s TERM -k 30 570 "$@" >"$folder/$name.log" 2>&1 || code=$?
  echo "$code" >"$folder/$name.code"
}

ways() { # a line as it is, with CUDA graphs, compiled, and both
  line "$1.eager" "${@:2}"
  line "$1.graphs" "${@:2}" --cudagraphs
  line "$1.compile" "${@:2}" --compile
  line "$1.compile_graphs" "${@:2}" --compile --cudagraphs
}

table() {
  python - "$folder" <<'END'
import json, re, statistics, sys
from pathlib import Path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RATE = r'"(?:sac_updates|updates|model_sequences)_per_s": ([\d.e+-]+)'
TIMES = {r'"(?:update_)?seconds_median": ([\d.e+-]+)': 1, r'"update_ms": ([\d.e+-]+)': 1000}
folder, eager, nan = Path(sys.argv[1]), {}, float("nan")


def measured(log: str, per_step: str) -> tuple[float, float]:
    """Environment steps and updates per second of a line, nan where it does not say."""
    rates = [float(number) for number in re.findall(RATE, log)]
    rates += [unit / float(number) for text, unit in TIMES.items() for number in re.findall(text, log)]
    run = re.search(r"--resume '?(\S*?)'?$", log, re.M)
    if run and not rates:  # a whole run: the median report of its second half
        events = EventAccumulator(run[1], size_guidance={"scalars": 0})
        events.Reload()
        tagged = "charts/SPS" in events.Tags()["scalars"]
        speeds = [event.value for event in events.Scalars("charts/SPS")] if tagged else [nan]
        speed = statistics.median(speeds[len(speeds) // 2 :])
        return speed, nan if per_step == "-" else speed * float(per_step)
    return nan, rates[0] if rates else nan


print("| line | code | steps/s | updates/s | of eager |\n|---|---|---|---|---|")
for line in (folder / "lines").read_text().splitlines():
    name, per_step = line.split()
    code, log = (Path(folder, f"{name}.{kind}") for kind in ("code", "log"))
    steps, updates = measured(log.read_text(), per_step) if log.exists() else (nan, nan)
    group, way = name.split(".")
    speed = steps if updates != updates else updates
    eager |= {group: speed} if way == "eager" else {}
    numbers = (f"{x:.4g}" if x == x else "" for x in (steps, updates, speed / eager.get(group, nan)))
    print("|", " | ".join([name, code.read_text().strip() if code.exists() else "not run", *numbers]), "|")
END
}

trap 'table | tee "$folder/table.md"' EXIT
trap 'exit 130' INT TERM

# the machine, and the tests that are skipped without a GPU
line machine.gpu - python -c "import os, torch; print(torch.__version__); os.system('nvidia-smi')"
line machine.tests - python -m pytest -q tests -k "on_a_gpu or cuda_graph or captured_model"

# one update at the published sizes, and its parts
ways update_dreamer - python benchmark/dreamer_speed.py
line update_dreamer.bfloat16 - python benchmark/dreamer_speed.py --bfloat16
line update_dreamer.bfloat16_graphs - python benchmark/dreamer_speed.py --bfloat16 --cudagraphs
ways update_dreamer_laptop - python benchmark/dreamer_speed.py --size laptop
ways update_dreamer_v3_state - python benchmark/dreamer_v3_speed.py --obs-mode state
ways update_dreamer_v3_pixels - python benchmark/dreamer_v3_speed.py --obs-mode pixels
line update_dreamer_v3_pixels.bfloat16_graphs - python benchmark/dreamer_v3_speed.py --obs-mode pixels --bfloat16 --cudagraphs
ways update_mbpo - python benchmark/mbpo_speed.py --no-loop
line update_dhmbpo.eager - python benchmark/dhmbpo_speed.py
line update_muzero.graphs - python benchmark/muzero_speed.py --batches 1 64 256 1024 --hidden 64
line update_muzero.compile_graphs - python benchmark/muzero_speed.py --batches 1 64 256 --hidden 64 --compile
line update_world_models.eager - python benchmark/world_models_speed.py

# whole runs that learn, early and often
ways mbpo 20 python mbpo.py --env-id Hopper-v5 --learning-starts 1000 --total-timesteps 2000 --model-max-epochs 20 \
  --eval-frequency 0 --checkpoint-frequency 0
dhmbpo=(python dhmbpo.py --env-id Hopper-v5 --learning-starts 1000 --total-timesteps 4000 --first-block 1 \
  --eval-frequency 0 --checkpoint-frequency 0)
line dhmbpo.eager 1 "${dhmbpo[@]}"
line dhmbpo.graphs 1 "${dhmbpo[@]}" --cudagraphs
ways dreamer 0.1 python dreamer.py --env-id walker-walk --size published --renderer raycast --learning-starts 1000 \
  --total-timesteps 8000 --train-frequency 10 --train-steps 1 --eval-frequency 0 --checkpoint-frequency 0
ways dreamer_v3 0.25 python dreamer_v3.py --env-id walker-walk --obs-mode state --learning-starts 64 \
  --total-timesteps 4000 --eval-frequency 0 --checkpoint-frequency 0
ways muzero 0.25 python muzero.py --env-id CartPole-v1 --total-timesteps 4000 --eval-frequency 0 --checkpoint-frequency 0
line world_models.eager - python world_models.py --env-id CarRacing-v3 --controller-env dream --total-timesteps 3000 \
  --vae-epochs 2 --model-updates 300 --generations 5 --eval-generations 5 --eval-episodes 1

# a run that changes its device: begun on a CPU, continued with graphs, ended on a CPU
moved=(python mbpo.py --exp-name "moved-$(basename "$folder")" --resume auto --env-id Hopper-v5 --learning-starts 1000 \
  --model-max-epochs 20 --eval-frequency 0)
line moved.begun_on_cpu - "${moved[@]}" --total-timesteps 1300 --no-cuda
line moved.on_gpu - "${moved[@]}" --total-timesteps 1600 --cuda --cudagraphs
line moved.back_on_cpu - "${moved[@]}" --total-timesteps 1700 --no-cuda --no-cudagraphs
