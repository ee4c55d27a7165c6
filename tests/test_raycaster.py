"""The GL-free renderer of dreamer.py: what it must see, and where. No OpenGL needed."""

import mujoco
import numpy as np
import pytest
from dm_control import suite

from dreamer import DrawnTask, RayCaster

BALL = """<mujoco><visual><headlight ambient="1 1 1" diffuse="0 0 0"/></visual>
<asset><texture type="skybox" builtin="flat" rgb1="0 0 1" rgb2="0 0 1" width="64" height="384"/>
<material name="as in the suite"/></asset>
<worldbody><camera pos="0 0 0" xyaxes="1 0 0 0 0 1" fovy="45"/>
<body pos="0 3 0"><joint type="slide" axis="1 0 0"/><geom type="sphere" size=".5" rgba=".8 .4 .2 1" {0}/></body>
</worldbody></mujoco>"""


def load(domain, task):
    """Physics and ray-caster of a task, as the environment sets them up."""
    env = DrawnTask(f"{domain}-{task}", "raycast")
    env.reset(seed=1)
    env.render()
    return env.env.physics, env.ray_caster


def ball(extra="", size=64):
    model = mujoco.MjModel.from_xml_string(BALL.format(extra))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data, RayCaster(model, size, size, 0)


SAME_SCENE = [("dog", task) for task in ("walk", "trot", "run")]  # as dog-stand
QUICK = [task for task in suite.ALL_TASKS if task[0] != "dog"]  # which takes five seconds to compile
SLOW = [task for task in suite.ALL_TASKS if task not in QUICK + SAME_SCENE]


@pytest.mark.parametrize("domain,task", QUICK + [pytest.param(*task, marks=pytest.mark.slow) for task in SLOW])
def test_every_task(domain, task):
    """Every task of the suite has a picture with many colours, the same twice, and the model is left as it was."""
    physics, caster = load(domain, task)
    boxes = physics.model.ptr.bvh_aabb.copy()
    first, second = caster.render(physics.data.ptr), caster.render(physics.data.ptr)
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 10
    assert np.array_equal(first, second) and not np.shares_memory(first, second)
    assert np.array_equal(boxes, physics.model.ptr.bvh_aabb)


@pytest.mark.parametrize("domain,task", [("walker", "walk"), ("cartpole", "swingup"), ("ball_in_cup", "catch")])
def test_motion_moves_pixels(domain, task):
    """A joint that turns changes the picture."""
    physics, caster = load(domain, task)
    before = caster.render(physics.data.ptr).astype(int)
    with physics.reset_context():
        physics.data.qpos[-1] += 0.7
    assert (np.abs(caster.render(physics.data.ptr) - before).max(-1) > 20).sum() > 5


@pytest.mark.parametrize(
    "domain,task", [("finger", "turn_hard"), ("pendulum", "swingup"), ("manipulator", "bring_ball")]
)
def test_sees_what_single_rays_see(domain, task):
    """The batch of rays meets what single rays meet; its culling loses limbs without the grown boxes."""
    physics, caster = load(domain, task)
    model, data = physics.model.ptr, physics.data.ptr
    origin, frame = data.cam_xpos[caster.camera_id], data.cam_xmat[caster.camera_id].reshape(3, 3)
    rays, one = caster.rays @ frame.T, np.zeros(1, np.int32)
    for shift in (0.0, 0.9, 1.8):
        data.qpos[0] = shift
        mujoco.mj_forward(model, data)
        hits = caster._cast(data, origin, rays)[0]
        for i in range(0, len(rays), 5):
            mujoco.mj_ray(model, data, origin, rays[i], caster.groups, True, -1, one)
            assert hits[i] == one[0]


@pytest.mark.parametrize("extra", ["", 'contype="0" conaffinity="0"'])
def test_sphere(extra):
    """Colour, sky, projected radius and place of a ball, against the pinhole camera."""
    model, data, caster = ball(extra)
    image = caster.render(data)
    assert np.abs(image[32, 32] - 255 * np.array([0.8, 0.4, 0.2])).max() <= 1
    assert np.abs(image[0, 0] - np.array([0, 0, 255.0])).max() <= 1
    radius = np.sqrt((image[..., 0] > 100).sum() / np.pi)
    assert abs(radius - caster.focal * np.tan(np.arcsin(0.5 / 3))) < 1
    data.qpos[0] = 0.4  # to the right in the picture, by focal * x / depth
    mujoco.mj_forward(model, data)
    moved = np.argwhere(caster.render(data)[..., 0] > 100)
    assert abs(moved[:, 1].mean() + 0.5 - 32 - caster.focal * 0.4 / 3) < 1 and abs(moved[:, 0].mean() + 0.5 - 32) < 1


def test_site_sphere_is_drawn_and_hidden():
    """Sites, which rays do not meet, are drawn in front of bodies and not behind them."""
    sites = '<site pos="0 2 .5" size=".1" rgba="0 1 0 1"/><site pos="0 5 0" size=".1" rgba="0 1 0 1"/>'
    xml = BALL.format("").replace("<body", f"{sites}<body", 1)
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    caster = RayCaster(model, 64, 64, 0)
    image = caster.render(data)
    row = int(32 - caster.focal * 0.5 / 2)
    assert image[row, 32, 1] > 200 and image[row, 32, 0] < 20  # in front
    assert image[32, 32, 0] > 150  # the other one is behind the ball
