import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_world
from step_world import REWARDS, ToyConfig, assert_close, batch, sample_keys

from r0_jax.diffusion import rollout
from r0_jax.method import objective, reward_gradient
from r0_jax.method.objective import Objective
from r0_jax.method.reward_step import Drawn
from r0_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from r0_jax.rewards.reward import Reward

B = 3


# --- The gradient, against plain autodiff ---------------------------------------------------------


def fixed_normal(keys, tag, shape):
    """Known noise in place of random draws."""
    size = int(np.prod(shape))
    index = jnp.arange(len(keys) * size, dtype=jnp.float32).reshape(len(keys), *shape)
    return 1.4 * jnp.sin(1 + index * (1.7 + tag))


def decoded(world, x0):
    vae = world.pipeline.networks["vae"]
    return vae.apply(world.frozen["vae"], "decode", x0 / 0.5) / 2 + 0.5


def drawn_x0(world, params, eta):
    """Unroll section 2 of the method, written anew: LoRA, DDIM with eta."""
    base, network = dict(world.frozen["base"]), world.pipeline.networks["unet"]
    for name in params:
        if name.endswith("lora_A.kernel"):
            b = params[name.replace("lora_A", "lora_B")]
            target = name.replace("lora_A.", "")
            base[target] += (
                3.0
                / 2
                * jnp.einsum(
                    "...ir,...ro->...io",
                    params[name],
                    jnp.broadcast_to(b, (*params[name].shape[:-2], *b.shape[-2:])),
                )
            )
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    products = [*np.cumprod(1 - betas)[[999, 749, 499, 249]], 1.0]
    embeds = world.pipeline.networks["text_encoder"](
        world.frozen["text_encoder"], jnp.asarray(batch(B)["input_ids"])
    ).last_hidden_state

    of_empty = world.pipeline.encode_prompt(world.frozen, world.frozen["empty"])["prompt_embeds"]
    latents = fixed_normal(np.zeros(B), 0, (4, 4, 4))
    for i, t in enumerate([999, 749, 499, 249]):
        alpha, sigma = np.float32([products[i] ** 0.5, (1 - products[i]) ** 0.5])
        output = network(base, latents, jnp.full(B, float(t)), embeds)
        if (scale := world.config.sampler.guidance_scale) != 1:
            empty = network(base, latents, jnp.full(B, float(t)), of_empty)
            output = empty + scale * (output - empty)
        if world.objective.table.prediction_type == "epsilon":
            x0, epsilon = (latents - sigma * output) / alpha, output
        else:
            x0, epsilon = (alpha * latents - sigma * output, alpha * output + sigma * latents)
        epsilon = np.sqrt(1 - eta**2) * epsilon + eta * fixed_normal(np.zeros(B), i, (4, 4, 4))
        alpha, sigma = np.float32([products[i + 1] ** 0.5, (1 - products[i + 1]) ** 0.5])
        latents = alpha * x0 + sigma * epsilon
    return latents


def scores(reward, images):
    features = batch(B)["features/agreement"] if reward.name == "agreement" else None
    return [
        reward.score(
            reward.params,
            images[i : i + 1],
            None if features is None else jnp.asarray(features[i : i + 1]),
        )[0]
        for i in range(B)
    ]


def directions_by_hand(world, x0, normalization):
    """The rewards' pull at x0 by plain autodiff, one sample at a time."""
    pulls = []
    for i in range(B):
        images = decoded(world, x0)
        direction = 0.0
        for w, reward in zip((0.7, 1.3), REWARDS, strict=True):
            g = jax.grad(lambda x, i=i, reward=reward: scores(reward, x)[i])(images)[i]
            size = jnp.sqrt(jnp.sum(g * g)) + 1e-8 if normalization == "per_sample" else 1.0
            direction += w * g / size
        pull = jax.grad(lambda x, d=direction, i=i: jnp.sum(d * decoded(world, x)[i]))(x0)[i]
        pulls.append(pull / jnp.sqrt(jnp.sum(pull * pull)))
    return jnp.stack(pulls)


def loss_by_hand(params, world, eta, normalization):
    """-mean over samples of <pull, x0>: no scan, no checkpoint, the pull by plain autodiff."""
    x0 = drawn_x0(world, params, eta)
    pull = directions_by_hand(world, jax.lax.stop_gradient(x0), normalization)
    return -jnp.mean(jnp.sum(pull * x0, axis=(1, 2, 3)))


@pytest.mark.parametrize(
    ("normalization", "prediction_type", "scale"),
    [("none", "v_prediction", 1.0), ("per_sample", "epsilon", 1.0), ("none", "v_prediction", 2.5)],
)
def test_gradient_equals_plain_autodiff(monkeypatch, normalization, prediction_type, scale):
    monkeypatch.setattr(rollout, "normal", fixed_normal)
    world = step_world.make(
        {
            "objective.normalization": normalization,
            "sampler.eta": 0.6,
            "sampler.random_eta": False,
            "sampler.guidance_scale": scale,
        },
        prediction_type=prediction_type,
    )
    params = world.params()
    (loss, metrics), grads = world.value_and_grad(params, batch(B), last=3)
    by_hand = jax.jit(jax.value_and_grad(lambda p: loss_by_hand(p, world, 0.6, normalization)))
    expected_loss, expected = by_hand(params)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-4)
    assert_close(grads, expected, 2e-4 if prediction_type == "epsilon" else 2e-5)
    np.testing.assert_allclose(metrics["norm/x0/rewards"], 1.0, rtol=1e-5)
    images = jax.jit(lambda p: decoded(world, drawn_x0(world, p, 0.6)))(params)
    for reward in REWARDS:
        expected = np.mean(scores(reward, images))
        np.testing.assert_allclose(metrics[f"reward/{reward.name}"], expected, rtol=1e-4)


# --- R0 and R0+ -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def r0plus():
    return step_world.make({"objective.method": "r0plus"})


def test_r0plus_at_the_last_step_is_r0_with_one_step_of_gradient(r0plus):
    r0 = step_world.make({"objective.grad_steps": 1})
    params = r0.params()
    found = r0plus.value_and_grad(params, batch(B), last=3)
    (loss, metrics), grads = r0.value_and_grad(params, batch(B), last=3)
    gain = r0plus.objective.gains[3]  # by which R0+ divides the pull
    np.testing.assert_allclose(found[0][0] * gain, loss, rtol=1e-5)
    assert_close(found[0][1], metrics, 1e-6)
    assert_close(jax.tree.map(lambda x: x * gain, found[1]), grads, 1e-5)
    earlier = r0plus.value_and_grad(params, batch(B), last=1)
    norm = {name: np.linalg.norm(x) for name, x in earlier[1].items()}
    assert all(
        np.linalg.norm(x - found[1][name]) > 0.1 * norm[name] for name, x in earlier[1].items()
    )


def test_r0_rewards_the_last_step_and_r0plus_any(r0plus):
    assert step_world.make().objective.draw(jax.random.key(0)).last == 3
    draws = [int(r0plus.objective.draw(jax.random.key(i)).last) for i in range(40)]
    assert set(draws) == {0, 1, 2, 3}


def test_a_bound_limits_what_flows_to_earlier_steps():
    usual = {"sampler.random_eta": False, "sampler.eta": 1.0}
    free, params = step_world.make(usual), step_world.make(usual).params()
    expected = free.value_and_grad(params, batch(B), last=3)[1]

    def grads(**changes):
        return step_world.make(usual | changes).value_and_grad(params, batch(B), last=3)[1]

    assert_close(grads(**{"objective.bound": 1e6}), expected, 1e-6)  # it is never reached
    alone = grads(**{"objective.grad_steps": 1})
    assert_close(grads(**{"objective.bound": 1e-9}), alone, 1e-5)  # nothing flows
    some = grads(**{"objective.bound": 0.3})
    assert all(np.linalg.norm(x - expected[name]) > 0 for name, x in some.items())
    assert all(np.linalg.norm(x - alone[name]) > 0 for name, x in some.items())


def test_draft_lv_rewards_the_last_step_and_copies_of_it_under_fresh_noise():
    settings = {"objective.grad_steps": 1, "sampler.random_eta": False, "sampler.eta": 0.0}
    plain = step_world.make(settings)
    world = step_world.make(settings | {"objective.noises": 2})
    params, keys = world.params(), sample_keys(B)

    def rewarded(params, world=world):
        conditioning = world.pipeline.encode_prompt(world.frozen, batch(B))
        drawn = world.objective.draw(jax.random.key(0))
        return world.objective._rollout(params, world.frozen, conditioning, keys, drawn)

    found = jax.jit(rewarded)(params)
    of_sample = np.asarray(found.x0).reshape(B, 3, *found.x0.shape[1:])
    first = jax.jit(lambda p: rewarded(p, world=plain))(params)
    np.testing.assert_allclose(of_sample[:, 0], first.x0, atol=1e-5)
    noise = (found.latents - found.alpha * np.repeat(first.x0, 3, axis=0)) / found.sigma
    noise = np.asarray(noise).reshape(of_sample.shape)[:, 1:]
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.15
    assert len({round(float(x), 4) for x in noise[..., 0, 0, 0].ravel()}) == 2 * B
    # A third of the loss is the plain one's; the batch's mean is over all predictions.
    (_, metrics), grads = world.value_and_grad(params, batch(B), last=3)
    (_, one), alone = plain.value_and_grad(params, batch(B), last=3)
    assert abs(metrics["reward/agreement"] - one["reward/agreement"]) > 1e-5
    assert all(np.linalg.norm(x - alone[name]) > 0 for name, x in grads.items())
    assert metrics["norm/x0/rewards"] == pytest.approx(1.0, rel=1e-4)


def test_drtune_trains_by_the_outputs_of_the_steps_it_draws(calls):
    changes = {"objective.method": "drtune", "objective.grad_steps": 2, "objective.late_steps": 2}
    world = step_world.make(changes)
    params, keys = world.params(), sample_keys(B)
    for last, graded in [(3, [1, 3]), (2, [0, 1])]:
        calls.clear()
        drawn = Drawn(jnp.asarray(last), jnp.asarray(graded))
        found = world.program()(params, world.frozen, batch(B), keys, drawn, {})
        jax.block_until_ready(found)
        jax.effects_barrier()
        times = np.array([999, 749, 499, 249])
        # A step that is drawn is run once more, and again on the way back.
        assert sorted(calls) == sorted([*times[: last + 1], *2 * list(times[graded])])
        assert all(np.linalg.norm(x) > 0 for x in found[1].values())


@pytest.fixture
def calls(monkeypatch):
    """The timesteps of the network calls that are really executed."""
    made, denoise = [], StableDiffusionPipeline.denoise

    def counted(self, unet, latents, timesteps, conditioning):
        jax.debug.callback(lambda t: made.append(int(t)), timesteps[0])
        return denoise(self, unet, latents, timesteps, conditioning)

    monkeypatch.setattr(StableDiffusionPipeline, "denoise", counted)
    return made


def test_r0plus_runs_only_the_steps_it_needs(calls):
    world = step_world.make({"objective.method": "r0plus"})
    for last in range(4):
        calls.clear()
        jax.block_until_ready(world.value_and_grad(world.params(), batch(B), last=last))
        jax.effects_barrier()
        # The graded step is run a second time on the way back: it was rematerialized.
        assert sorted(calls) == sorted([*[999, 749, 499, 249][: last + 1], 999 - 250 * last])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_drawn_step_does_not_change_the_size_of_the_gradient(monkeypatch, prediction_type):
    """What reaches the network's output is the pull itself, at every step.

    |d x0 / d output| of epsilon is 14.6 at the first step and 0.7 at the last.
    """
    # A decoder and a reward that are linear pull to one side, wherever x0 is.
    monkeypatch.setattr(Objective, "_decode", lambda self, frozen, x0: 0.5 + 1e-4 * x0[..., :3])
    slope = jnp.sin(jnp.arange(48.0)).reshape(4, 4, 3)
    linear = Reward("brightness", {}, lambda p, x, f: jnp.einsum("bhwc,hwc->b", x, slope), None)
    world = step_world.make(
        {"objective.method": "r0plus", "lora.rank": 0},
        prediction_type=prediction_type,
        rewards=[linear],
    )
    params = {k: jnp.asarray(v) for k, v in world.frozen["base"].items()}
    grads = [world.value_and_grad(params, batch(B), last=i)[1]["conv_out.bias"] for i in range(4)]
    assert np.abs(grads[0]).max() > 1e-3
    for after in grads[1:]:
        np.testing.assert_allclose(np.abs(after), np.abs(grads[0]), rtol=1e-3, atol=1e-6)


def test_the_floor_is_where_the_drawn_step_ends(r0plus):
    np.testing.assert_allclose(r0plus.objective.floors, [0.75, 0.5, 0.25, 0.0], atol=2e-3)


# --- Terms: exactly absent, and each changing the gradient ----------------------------------------

# With other options than the defaults, and one network call, to compile fast.
ON = {
    "output": {"weight": 0.5},
    "feature": {"weight": 0.7, "least": 0.1, "most": 0.4},
    "guidance": {"weight": 0.9, "scale": 5.0, "least": 0.1},
    "consistency": {"weight": 0.6, "skip": 0.1, "c": 0.1},
    "score": {"weight": 0.4, "scale": 2.0, "rank": 2},
    "gradient": {"weight": 0.5, "samples": 2, "std": 0.2},
}
ONE_STEP = {"sampler.num_steps": 1, "objective.grad_steps": 1, "objective.normalization": "none"}


def regularized(name, **changes):
    fields = ON[name] | changes
    return step_world.make(ONE_STEP | {f"regularizers.{name}.{k}": v for k, v in fields.items()})


def text(world):
    """The program as it goes to the compiler."""
    arguments = world.params(), world.frozen, batch(B), sample_keys(B), Drawn(0), {}
    return world.program().lower(*arguments).as_text()


@pytest.mark.parametrize("name", ON)
def test_weight_0_leaves_nothing_in_the_program(monkeypatch, name):
    off, on = text(regularized(name, weight=0.0)), text(regularized(name))
    monkeypatch.setattr(objective, "DIRECTIONS", {})
    monkeypatch.setattr(reward_gradient, "_smoothed", lambda *a: a[2])
    assert off == text(step_world.make(ONE_STEP))
    assert on != off


@pytest.fixture(scope="module")
def bare():
    world = step_world.make(ONE_STEP)
    return world.value_and_grad(world.params(), batch(B), last=0)


@pytest.mark.parametrize("name", ON)
def test_each_regularizer_changes_the_gradient(bare, name):
    world = regularized(name)
    start, away = world.params(noise=0.0), world.params()
    (_, metrics), grads = world.value_and_grad(away, batch(B), last=0)
    (_, bare_metrics), bare_grads = bare
    change = {k: np.linalg.norm(grads[k] - bare_grads[k]) for k in grads}
    assert max(change.values()) > 1e-3 * max(np.linalg.norm(x) for x in bare_grads.values())
    if name == "gradient":
        assert set(metrics) == set(bare_metrics)
        return
    own = {"train/fake_loss"} if name == "score" else set()
    assert set(metrics) - set(bare_metrics) == own | {
        f"norm/x0/{name}",
        f"cosine/x0/rewards~{name}",
    }
    assert metrics[f"norm/x0/{name}"] > 1e-3
    assert -1 <= metrics[f"cosine/x0/rewards~{name}"] <= 1
    if name == "output":  # where training starts, the generator is its base
        (_, metrics), _ = world.value_and_grad(start, batch(B), last=0)
        assert metrics["norm/x0/output"] < 1e-5


def test_terms_without_rewards_are_an_objective():
    """The control without rewards: only what keeps the generator near its base pulls."""
    world = step_world.make(ONE_STEP | {"regularizers.guidance.weight": 0.9}, rewards=[])
    (_, metrics), grads = world.value_and_grad(world.params(), batch(B), last=0)
    assert set(metrics) == {"norm/x0/guidance"}
    assert max(np.abs(g).max() for g in grads.values()) > 0


# --- One unit: a weight means the same for every size ---------------------------------------------


FAMILIES = {
    "epsilon": (step_world.SCHEDULER, "epsilon"),
    "v_prediction": (step_world.SCHEDULER, "v_prediction"),
    "flow": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "epsilon"),
}


def copies(small, large):
    """Parameters of a network that is as many copies of a smaller one, side by side, as fit.

    Copies share no weights of a kernel that grows on both sides; else they see the same inputs.
    """
    params = {}
    for name, value in small.items():
        shape = large[name].shape
        times = [after // before for before, after in zip(value.shape, shape, strict=True)]
        if name.endswith("kernel") and times[-2] > 1 and times[-1] > 1:
            one = jnp.einsum("ab,...io->...aibo", jnp.eye(times[-1]), value)
            params[name] = one.reshape(shape)
        else:
            params[name] = jnp.tile(value, times)
    return params


@pytest.mark.parametrize("changes", [{"sample_size": 64}, {"in_channels": 16, "width": 32}])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_means_the_same_at_any_resolution_and_number_of_channels(family, changes):
    """The ratio of every two terms at x0 stays within 5 %."""
    on = {f"regularizers.{name}.weight": 1.0 for name in ("output", "guidance", "feature")}
    size, (scheduler, prediction_type) = 32, FAMILIES[family]
    toy = ToyConfig(sample_size=size)
    small, large = (
        step_world.make(ONE_STEP | {"lora.rank": 0} | on, one, prediction_type, scheduler=scheduler)
        for one in (toy, toy._replace(**changes))
    )
    norms = []
    for world in (small, large):
        frozen = world.frozen | {
            part: copies(small.frozen[part], world.frozen[part]) for part in ("base", "vae")
        }
        params = copies(small.params(), world.params())
        found = world._replace(frozen=frozen).value_and_grad(params, batch(16), last=0)
        norms.append({k: float(v) for k, v in found[0][1].items() if k.startswith("norm/x0/")})
    first, second = norms
    assert len(first) == 4 and first["norm/x0/rewards"] == pytest.approx(1)
    for name in first:
        assert second[name] == pytest.approx(first[name], rel=0.05), name


# --- Memory, constants, dtypes --------------------------------------------------------------------

LARGE = ToyConfig(sample_size=16, width=32, depth=4)


def temporary_bytes(steps, method="r0", grad_steps=None):
    world = step_world.make(
        {
            "sampler.num_steps": steps,
            "objective.grad_steps": grad_steps or steps,
            "objective.method": method,
            "objective.late_steps": 1,
        },
        LARGE,
    )
    shapes = jax.eval_shape(world.params)
    drawn = jax.eval_shape(world.objective.draw, jax.random.key(0))
    lowered = world.program().lower(shapes, world.frozen, batch(8), sample_keys(8), drawn, {})
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_of_r0_grows_by_latents_only(monkeypatch):
    latents = 8 * 16 * 16 * 4 * 4  # bytes of one batch of latents
    one, four = temporary_bytes(1), temporary_bytes(4)
    assert four - one <= 3 * 2.2 * latents  # of each step: its input and its prediction
    assert four < 1.5 * one
    monkeypatch.setattr(jax, "checkpoint", lambda f: f)
    assert temporary_bytes(4) > 2 * four


def test_unrolled_is_the_same_step():
    losses, grads = [], []
    for unroll in (False, True):
        world = step_world.make(
            {"sampler.num_steps": 3, "objective.grad_steps": 3, "objective.unroll": unroll}
        )
        (loss, _), gradient = world.value_and_grad(world.params(), batch(B), last=2)
        losses.append(loss)
        grads.append(gradient)
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert_close(*grads, 1e-4)


def test_memory_of_drtune_grows_by_latents_of_the_graded_steps_only():
    latents = 8 * 16 * 16 * 4 * 4
    few, many = (temporary_bytes(steps, "drtune", grad_steps=3) for steps in (4, 50))
    assert abs(many - few) < 0.5 * latents
    assert many - temporary_bytes(50, "drtune", grad_steps=1) <= 2 * 2.2 * latents


def test_memory_of_r0plus_does_not_grow_with_the_steps():
    two, four = temporary_bytes(2, "r0plus"), temporary_bytes(4, "r0plus")
    assert four <= 1.01 * two


def test_frozen_weights_are_arguments_not_constants():
    on = {f"regularizers.{name}.weight": 0.5 for name in ON}
    world = step_world.make(on, ToyConfig(width=32))
    assert max(x.size for x in world.frozen["base"].values()) > 5000
    program = world.program().lower(
        world.params(), world.frozen, batch(B), sample_keys(B), Drawn(3), {}
    )
    # Arrays that are not one number repeated.
    shapes = re.findall(r'constant dense<["\[].*> : tensor<([^>]*)>', program.as_text())
    sizes = [np.prod([int(n) for n in shape.split("x")[:-1]]) for shape in shapes]
    assert max(sizes) == 1000  # the table of noise levels, and nothing larger


@pytest.mark.parametrize("rank", [0, 2])
def test_half_precision_networks_train_float32_parameters(rank):
    dtypes = []

    def score(params, images, features):
        dtypes.append(images.dtype)
        return images.mean((1, 2, 3))

    reward = Reward("brightness", {}, score, None)
    world = step_world.make(
        {
            "dtype": "bfloat16",
            "lora.rank": rank,
            "regularizers.guidance.weight": 1.0,
            "regularizers.output.weight": 1.0,
        },
        rewards=[reward],
    )
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, world.frozen
    )
    (loss, metrics), grads = jax.eval_shape(
        world.program(), world.params(), half, batch(B), sample_keys(B), Drawn(3), {}
    )
    assert loss.dtype == jnp.float32 and {x.dtype for x in metrics.values()} == {loss.dtype}
    assert {x.dtype for x in grads.values()} == {loss.dtype}
    assert set(dtypes) == {jnp.dtype(jnp.float32)}
    program = str(
        jax.make_jaxpr(world.objective.loss)(
            world.params(), half, batch(B), sample_keys(B), Drawn(3), {}
        )
    )
    convolutions = re.findall(r":(\w+)\[[^]]*\] = conv_general_dilated", program)
    assert convolutions and set(convolutions) == {"bf16"}
