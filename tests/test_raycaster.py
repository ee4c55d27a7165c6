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


FROM_ABOVE = """<mujoco><statistic extent="4" center="0 0 0"/>
<visual><headlight ambient="{ambient} {ambient} {ambient}" diffuse="0 0 0"/></visual>
<asset><texture type="skybox" builtin="flat" rgb1="0 0 1" rgb2="0 0 1" width="64" height="384"/>
<texture name="four" type="2d" builtin="flat" rgb1="1 1 1" width="40" height="40"/>
<material name="plain"/><material name="tiled" texture="four" texuniform="{uniform}"/></asset>
<worldbody><camera pos="0 0 4" fovy="90"/><geom type="plane" size="4 4 1" material="{floor}"/>{world}</worldbody>
{rest}</mujoco>"""
FLOOR = np.stack(
    np.meshgrid((np.arange(64) - 31.5) / 8, (31.5 - np.arange(64)) / 8), -1
)  # (64, 64, 2): x, y of a pixel


def from_above(world="", rest="", ambient=1.0, floor="plain", uniform="false"):
    """Model and its state of a white floor from -4 to 4, which fills the picture of a camera four units above it."""
    settings = {"world": world, "rest": rest, "ambient": ambient, "floor": floor, "uniform": uniform}
    model = mujoco.MjModel.from_xml_string(FROM_ABOVE.format(**settings))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


LIGHTS = {
    "above": ('pos="0 0 3" dir="0 0 -1"', (0, 0, 3)),
    "aslant": ('pos="-2 1 4" dir="2 -1 -4"', (-2, 1, 4)),
    "directional": ('directional="true" dir="1 0 -1"', (-1e4, 0, 1e4)),
}


@pytest.mark.parametrize("light", LIGHTS)
def test_shadow_of_a_ball(light):
    """Dark is where the line from floor to light passes the ball; elsewhere the floor is lit by Lambert's cosine."""
    words, source = LIGHTS[light]
    world = f'<light {words} cutoff="90" exponent="0" diffuse=".5 .5 .5" ambient="0 0 0"/>'
    world += '<geom type="sphere" size=".5" pos="0 0 1" rgba="1 0 0 1"/>'
    model, data = from_above(world, ambient=0.25)
    image = RayCaster(model, 64, 64, 0).render(data)
    points = np.concatenate([FLOOR, np.zeros((64, 64, 1))], -1)
    to = (source - points) / np.linalg.norm(source - points, axis=-1, keepdims=True)
    passes = np.linalg.norm(np.cross([0, 0, 1] - points, to), axis=-1)  # how far from the ball's centre
    wanted = 255 * np.where(passes < 0.5, 0.25, 0.25 + 0.5 * to[..., 2])
    floor = (image[..., 1] > 0) & (np.abs(passes - 0.5) > 0.03)  # the ball is red, and hides some of it
    assert np.abs(image[floor] - wanted[floor, None]).max() < 2
    assert (floor & (passes < 0.5)).sum() > 20


@pytest.mark.parametrize("uniform", ["false", "true"])
def test_texture_of_a_floor(uniform):
    """An image of four colours lies with its first row at +y and its first column at -x, as bright as it is.

    It covers the floor once, or two by two units where it is uniform.
    """
    model, data = from_above(floor="tiled", uniform=uniform)
    four = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 80, 255], [200, 200, 0]]], np.uint8)
    model.tex_data[model.tex_adr[1] :][: 40 * 40 * 3] = four.repeat(20, 0).repeat(20, 1).ravel()
    wanted = (
        four.repeat(32, 0).repeat(32, 1) if uniform == "false" else np.tile(four.repeat(8, 0).repeat(8, 1), (4, 4, 1))
    )
    np.testing.assert_allclose(RayCaster(model, 64, 64, 0).render(data), wanted, atol=1)


def test_tendon_is_drawn_between_its_sites():
    """As wide as it is; one below the floor is hidden."""
    sites = {"a": "-2 -1 1", "b": "2 .5 1", "c": "-2 1 -1", "d": "2 1 -1"}
    world = "".join(f'<site name="{name}" pos="{pos}" rgba="0 0 0 0"/>' for name, pos in sites.items())
    tendon = '<spatial width=".2" rgba="0 1 0 1"><site site="{}"/><site site="{}"/></spatial>'
    model, data = from_above(world, f"<tendon>{tendon.format('a', 'b')}{tendon.format('c', 'd')}</tendon>")
    image = RayCaster(model, 64, 64, 0).render(data)
    near = FLOOR * 3 / 4  # where the pixels' rays are at the height of the tendon
    a, b = np.array([-2, -1]), np.array([2, 0.5])
    along = np.clip((near - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)[..., None]
    distance = np.linalg.norm(near - a - along * (b - a), axis=-1)
    pixel = 3 / 32
    assert (image[distance < 0.2 - pixel / 2] == [0, 255, 0]).all() and (image[distance > 0.2 + pixel / 2] == 255).all()
