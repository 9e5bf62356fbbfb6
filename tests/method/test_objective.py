import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_world
from step_world import REWARDS, ToyConfig, assert_close, batch, sample_keys

from r0_jax.diffusion import rollout
from r0_jax.method import objective, reward_gradient
from r0_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from r0_jax.rewards.reward import Reward

B = 3


# --- The gradient, against plain autodiff ---------------------------------------------------------


def fixed_normal(keys, tag, shape):
    """Known noise in place of random draws."""
    size = int(np.prod(shape))
    index = jnp.arange(len(keys) * size, dtype=jnp.float32).reshape(len(keys), *shape)
    return 1.4 * jnp.sin(1 + index * (1.7 + tag))


def drawn_images(world, params, eta):
    """Method.md section 2 unrolled and written anew: LoRA, DDIM with eta, decode."""
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

    latents = fixed_normal(np.zeros(B), 0, (4, 4, 4))
    for i, t in enumerate([999, 749, 499, 249]):
        alpha, sigma = np.float32([products[i] ** 0.5, (1 - products[i]) ** 0.5])
        output = network(base, latents, jnp.full(B, float(t)), embeds)
        if world.objective.table.prediction_type == "epsilon":
            x0, epsilon = (latents - sigma * output) / alpha, output
        else:
            x0, epsilon = (alpha * latents - sigma * output, alpha * output + sigma * latents)
        epsilon = np.sqrt(1 - eta**2) * epsilon + eta * fixed_normal(np.zeros(B), i, (4, 4, 4))
        alpha, sigma = np.float32([products[i + 1] ** 0.5, (1 - products[i + 1]) ** 0.5])
        latents = alpha * x0 + sigma * epsilon
    return (
        world.pipeline.networks["vae"].apply(world.frozen["vae"], "decode", latents / 0.5) / 2 + 0.5
    )


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


def plain_loss(params, world, eta):
    """-mean over samples of sum_i w_i r_i: no scan, no checkpoint, no surrogate."""
    images = drawn_images(world, params, eta)
    weighted = [w * jnp.stack(scores(r, images)) for w, r in zip((0.7, 1.3), REWARDS, strict=True)]
    return -jnp.mean(sum(weighted))


def normalized_loss(params, world, eta):
    images = drawn_images(world, params, eta)
    loss = 0.0
    for i in range(B):
        direction = 0.0
        for w, reward in zip((0.7, 1.3), REWARDS, strict=True):
            g = jax.grad(lambda x, i=i, reward=reward: scores(reward, x)[i])(images)[i]
            direction += w * g / (jnp.sqrt(jnp.sum(g * g)) + 1e-8)
        loss -= jnp.sum(jax.lax.stop_gradient(direction) * images[i]) / B
    return loss


@pytest.mark.parametrize(
    ("normalization", "prediction_type", "written_anew"),
    [("none", "v_prediction", plain_loss), ("per_sample", "epsilon", normalized_loss)],
)
def test_gradient_equals_plain_autodiff(monkeypatch, normalization, prediction_type, written_anew):
    monkeypatch.setattr(rollout, "normal", fixed_normal)
    world = step_world.make(
        {"objective.normalization": normalization, "sampler.eta": 0.6, "sampler.random_eta": False},
        prediction_type=prediction_type,
    )
    params = world.params()
    (_, metrics), grads = world.value_and_grad(params, batch(B), last=3)
    expected = jax.jit(jax.grad(lambda p: written_anew(p, world, 0.6)))
    assert_close(grads, expected(params), 2e-4 if prediction_type == "epsilon" else 2e-5)
    images = jax.jit(lambda p: drawn_images(world, p, 0.6))(params)
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
    assert_close(found, r0.value_and_grad(params, batch(B), last=3), 1e-6)
    earlier = r0plus.value_and_grad(params, batch(B), last=1)
    norm = {name: np.linalg.norm(x) for name, x in earlier[1].items()}
    assert all(
        np.linalg.norm(x - found[1][name]) > 0.1 * norm[name] for name, x in earlier[1].items()
    )


def test_r0_rewards_the_last_step_and_r0plus_any(r0plus):
    assert step_world.make().objective.draw_last(jax.random.key(0)) == 3
    draws = [int(r0plus.objective.draw_last(jax.random.key(i))) for i in range(40)]
    assert set(draws) == {0, 1, 2, 3}


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


# --- Penalties: exactly absent, and each changing the gradient ------------------------------------

# With other options than the defaults, and one network call, to compile fast.
ON = {
    "weight": {"weight": 0.3},
    "output": {"weight": 0.5},
    "feature": {"weight": 0.7, "least": 0.1, "most": 0.4},
    "guidance": {"weight": 0.9, "scale": 5.0, "least": 0.1},
    "gradient": {"weight": 0.5, "samples": 2, "std": 0.2, "clip": 1.0},
}
ONE_STEP = {"sampler.num_steps": 1, "objective.grad_steps": 1, "objective.normalization": "none"}


def regularized(name, **changes):
    fields = ON[name] | changes
    return step_world.make(ONE_STEP | {f"regularizers.{name}.{k}": v for k, v in fields.items()})


def text(world):
    """The program as it goes to the compiler."""
    arguments = world.params(), world.frozen, batch(B), sample_keys(B), 0, {}
    return world.program().lower(*arguments).as_text()


@pytest.mark.parametrize("name", ON)
def test_weight_0_leaves_nothing_in_the_program(monkeypatch, name):
    off, on = text(regularized(name, weight=0.0)), text(regularized(name))
    monkeypatch.setattr(objective, "PENALTIES", {})
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
    (loss, metrics), grads = world.value_and_grad(away, batch(B), last=0)
    (bare_loss, bare_metrics), bare_grads = bare
    change = {k: np.linalg.norm(grads[k] - bare_grads[k]) for k in grads}
    assert max(change.values()) > 1e-3 * max(np.linalg.norm(x) for x in bare_grads.values())
    if name == "gradient":
        assert set(metrics) == set(bare_metrics)
        return
    assert set(metrics) - set(bare_metrics) == {f"penalty/{name}"}
    penalty = metrics[f"penalty/{name}"]
    assert penalty > 1e-4
    np.testing.assert_allclose(loss, bare_loss + ON[name]["weight"] * penalty, rtol=1e-5)

    if name == "guidance":  # of the empty prompt over itself
        same = batch(B) | {"input_ids": np.repeat(world.frozen["empty"]["input_ids"], B, axis=0)}
        (_, metrics), _ = world.value_and_grad(away, same, last=0)
    else:  # where training starts, the generator is its base
        (_, metrics), _ = world.value_and_grad(start, batch(B), last=0)
    assert metrics[f"penalty/{name}"] < 1e-10


# --- Memory, constants, dtypes --------------------------------------------------------------------

LARGE = ToyConfig(sample_size=16, width=32, depth=4)


def temporary_bytes(steps, method="r0"):
    world = step_world.make(
        {"sampler.num_steps": steps, "objective.grad_steps": steps, "objective.method": method},
        LARGE,
    )
    shapes = jax.eval_shape(world.params)
    last = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = world.program().lower(shapes, world.frozen, batch(8), sample_keys(8), last, {})
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


def test_memory_of_r0plus_does_not_grow_with_the_steps():
    two, four = temporary_bytes(2, "r0plus"), temporary_bytes(4, "r0plus")
    assert four <= 1.01 * two


def test_frozen_weights_are_arguments_not_constants():
    on = {f"regularizers.{name}.weight": 0.5 for name in ON}
    world = step_world.make(on, ToyConfig(width=32))
    assert max(x.size for x in world.frozen["base"].values()) > 5000
    program = world.program().lower(world.params(), world.frozen, batch(B), sample_keys(B), 3, {})
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
            "regularizers.weight.weight": 1.0,
        },
        rewards=[reward],
    )
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, world.frozen
    )
    (loss, metrics), grads = jax.eval_shape(
        world.program(), world.params(), half, batch(B), sample_keys(B), 3, {}
    )
    assert loss.dtype == jnp.float32 and {x.dtype for x in metrics.values()} == {loss.dtype}
    assert {x.dtype for x in grads.values()} == {loss.dtype}
    assert set(dtypes) == {jnp.dtype(jnp.float32)}
    program = str(
        jax.make_jaxpr(world.objective.loss)(world.params(), half, batch(B), sample_keys(B), 3, {})
    )
    convolutions = re.findall(r":(\w+)\[[^]]*\] = conv_general_dilated", program)
    assert convolutions and set(convolutions) == {"bf16"}
