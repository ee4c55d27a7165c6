#!/usr/bin/env bash
# Every command behind docs/dyna_q.md, from the repository root: bash benchmark/dyna_q.sh figures|tasks|speed
set -euo pipefail

figures() { # Sutton & Barto, chapter 8: a quarter of an hour, nearly all of it prioritized sweeping
  python benchmark/dyna_q_figures.py 8.2 docs/dyna_q_8_2.png
  python benchmark/dyna_q_figures.py 8.4 docs/dyna_q_8_4.png
  python benchmark/dyna_q_figures.py 8.5 docs/dyna_q_8_5.png
  python benchmark/dyna_q_figures.py sweeping docs/dyna_q_sweeping.png
}

tasks() { # Gymnasium's tables, about half an hour
  python benchmark/dyna_q_figures.py tasks
  python benchmark/dyna_q_figures.py ice
}

speed() {
  python benchmark/dyna_q_speed.py
  time python benchmark/dyna_q_figures.py 8.2 docs/dyna_q_8_2.png
}

case "${1:-}" in
  figures) figures ;;
  tasks) tasks ;;
  speed) speed ;;
  *) grep -m 1 "bash benchmark" "$0"; exit 2 ;;
esac
