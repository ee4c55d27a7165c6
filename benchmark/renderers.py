"""Frames of dm_control tasks by OpenGL and by the ray-caster, side by side, with their mean absolute difference.

Run:  MUJOCO_GL=egl python benchmark/renderers.py docs/dreamer_renderers.png walker-walk cheetah-run reacher-easy
"""

import sys
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dreamer


def frame(env_id: str, renderer: str) -> tuple[np.ndarray, float]:
    """The picture after 20 random steps, and milliseconds per frame."""
    env = dreamer.DrawnTask(env_id, renderer)
    env.reset(seed=1)
    env.action_space.seed(1)
    for _ in range(20):
        env.step(env.action_space.sample())
    env.render()
    start = time.perf_counter()
    for _ in range(20):
        image = env.render()
    return image, (time.perf_counter() - start) / 20 * 1e3


def main(picture: str, tasks: list[str]) -> None:
    columns = min(len(tasks), 4)
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.4 * columns, 1.95 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    print("| task | mean absolute difference (of 255) | GL ms | ray-cast ms |\n|---|---|---|---|")
    for axis, env_id in zip(axes, tasks, strict=False):
        (gl, gl_ms), (ray, ray_ms) = frame(env_id, "gl"), frame(env_id, "raycast")
        axis.imshow(np.concatenate([gl, np.full((64, 2, 3), 255, np.uint8), ray], 1))
        axis.set_title(env_id, fontsize=9)
        difference = np.abs(gl.astype(int) - ray).mean()
        print(f"| {env_id} | {difference:.1f} | {gl_ms:.1f} | {ray_ms:.1f} |")
    for axis in figure.axes:
        axis.set_axis_off()
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
