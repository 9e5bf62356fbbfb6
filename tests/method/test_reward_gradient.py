import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_world import REWARDS, batch, config, sample_keys

from r0_jax.method.reward_gradient import reward_gradient
from r0_jax.rewards.reward import Reward

PARAMS = {reward.name: reward.params for reward in REWARDS}
FEATURES = {"agreement": jnp.asarray(batch(3)["features/agreement"])}
IMAGES = jax.random.uniform(jax.random.key(0), (3, 4, 5, 3))
KEYS = sample_keys(3)


SPREADS = {reward.name: jnp.asarray(x) for reward, x in zip(REWARDS, (0.2, 5.0), strict=True)}


def run(images=IMAGES, rewards=REWARDS, **changes):
    settings = config({name.replace("__", "."): value for name, value in changes.items()})
    return reward_gradient(rewards, PARAMS, images, FEATURES, KEYS, SPREADS, settings)


def one_by_one(images):
    """{reward: (scores, gradients)}, sample by sample with jax.grad."""
    found = {}
    for reward in REWARDS:
        scores, gradients = [], []
        for i in range(len(images)):

            def score(image, i=i, reward=reward):
                features = FEATURES[reward.name][i : i + 1] if reward.text_features else None
                return reward.score(reward.params, image[None], features)[0]

            score, gradient = jax.value_and_grad(score)(images[i])
            scores.append(score)
            gradients.append(gradient)
        found[reward.name] = np.asarray(scores), np.asarray(gradients)
    return found


def test_per_sample_normalization_is_the_formula():
    delta = 0.05  # large enough to show
    found = run(objective__normalization="per_sample", objective__delta=delta)
    expected = np.zeros(IMAGES.shape, np.float32)
    for name, (scores, gradients) in one_by_one(IMAGES).items():
        np.testing.assert_allclose(found.scores[name], scores, rtol=1e-5)
        weight = {"brightness": 0.7, "agreement": 1.3}[name]
        for i, gradient in enumerate(gradients):
            norm = np.linalg.norm(gradient.ravel())
            np.testing.assert_allclose(found.norms[name][i], norm, rtol=1e-5)
            expected[i] += weight * gradient / (norm + delta)
    np.testing.assert_allclose(found.images, expected, rtol=1e-4, atol=1e-6)


def test_normalization_makes_rewards_equally_strong():
    norms = run().norms
    assert min(norms["agreement"]) > 100 * max(norms["brightness"])
    for i in (0, 1):
        found = run(rewards=REWARDS[i : i + 1]).images
        norm = np.linalg.norm(found.reshape(3, -1), axis=-1)
        np.testing.assert_allclose(norm, (0.7, 1.3)[i], rtol=1e-5)


def test_without_normalization_it_is_the_weighted_sum():
    parts = one_by_one(IMAGES)
    expected = 0.7 * parts["brightness"][1] + 1.3 * parts["agreement"][1]
    found = run(objective__normalization="none")
    np.testing.assert_allclose(found.images, expected, rtol=1e-4, atol=1e-5)
    for name in parts:
        norm = np.linalg.norm(parts[name][1].reshape(3, -1), axis=-1)
        np.testing.assert_allclose(found.norms[name], norm, rtol=1e-5)


@pytest.mark.parametrize("delta", [0.0, 0.05])
def test_the_running_spread_divides_all_samples_alike(delta):
    parts = one_by_one(IMAGES)
    expected = 0.7 * parts["brightness"][1] / (0.2 + delta)
    expected += 1.3 * parts["agreement"][1] / (5.0 + delta)
    found = run(objective__normalization="running_std", objective__delta=delta)
    np.testing.assert_allclose(found.images, expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_zero_stays_zero():
    flat = Reward(
        "brightness", {}, lambda params, images, features: 0 * images.mean((1, 2, 3)), None
    )
    assert jnp.all(run(rewards=[flat]).images == 0)


def test_pixels_out_of_range_are_only_pulled_back():
    images = jnp.stack([jnp.full((4, 5, 3), x) for x in (-0.3, 1.4, 0.5)])
    seen = []

    def score(params, images, features):
        seen.append(np.asarray(jax.lax.stop_gradient(images)))
        return REWARDS[0].score(PARAMS["brightness"], images, features)

    # Up everywhere: it pulls the image below 0 back, and would push the one above 1 on.
    up = Reward("brightness", {}, lambda params, images, features: images.sum((1, 2, 3)), None)
    down = Reward("brightness", {}, lambda params, images, features: -images.sum((1, 2, 3)), None)
    gradients = [np.asarray(run(images, [reward]).images[:, 0, 0, 0]) for reward in (up, down)]
    step = 0.7 / np.sqrt(4 * 5 * 3)
    np.testing.assert_allclose(gradients, [[step, 0, step], [0, -step, -step]], rtol=1e-5)

    run(images, [Reward("brightness", {}, score, None)])
    assert seen and all(x.min() >= 0 and x.max() <= 1 for x in seen)  # rewards see them clipped


def test_at_the_edge_of_the_range_nothing_is_dropped():
    images = jnp.stack([jnp.zeros((4, 5, 3)), jnp.ones((4, 5, 3)), jnp.ones((4, 5, 3))])
    up = Reward("brightness", {}, lambda params, images, features: images.sum((1, 2, 3)), None)
    assert jnp.all(run(images, [up]).images > 0)


SMOOTH = {
    "regularizers__gradient__weight": 1.0,
    "regularizers__gradient__samples": 2,
    "objective__normalization": "none",
}


def test_smoothing_without_noise_changes_nothing():
    expected = run(objective__normalization="none")
    found = run(**SMOOTH, regularizers__gradient__std=0.0)
    np.testing.assert_allclose(found.images, expected.images, rtol=1e-5, atol=1e-5)
    noisy = run(**SMOOTH, regularizers__gradient__std=0.1)
    difference = np.abs(noisy.images - expected.images).max()
    assert difference > 0.01 * np.abs(expected.images).max()


def test_smoothing_averages_over_perturbed_images_in_range():
    images, seen = jnp.clip(IMAGES * 3 - 1, 0, 1), []

    def score(params, images, features):  # its gradient is the image itself
        seen.append(np.asarray(jax.lax.stop_gradient(images)))
        return jnp.sum(images**2, axis=(1, 2, 3)) / 2

    found = run(
        images,
        [Reward("brightness", {}, score, None)],
        **{
            **SMOOTH,
            "regularizers__gradient__samples": 3,
            "regularizers__gradient__weight": 0.25,
            "regularizers__gradient__std": 0.2,
        },
    )
    plain, *perturbed = seen
    assert len(perturbed) == 3
    np.testing.assert_array_equal(plain, images)
    expected = 0.7 * (0.75 * plain + 0.25 * np.mean(perturbed, axis=0))
    np.testing.assert_allclose(found.images, expected, rtol=1e-5, atol=1e-6)
    inside = np.abs(plain - 0.5) < 0.2
    noise = np.stack([x - plain for x in perturbed])[:, inside]
    np.testing.assert_allclose(noise.std(), 0.2, atol=0.04)  # somewhat clipped
    assert len(np.unique(noise)) > 0.9 * noise.size  # each its own draw
    assert all(x.min() >= 0 and x.max() <= 1 for x in perturbed)


# --- Options -------------------------------------------------------------------------------------


def toward(direction):
    """A reward whose gradient is this constant everywhere."""

    def score(params, images, features):
        return jnp.sum(images * direction[None], axis=(1, 2, 3))

    return score


FIRST = jnp.zeros((4, 5, 3)).at[0, 0, 0].set(2.0)
AGAINST = FIRST.at[0, 0, 0].set(-1.0).at[0, 0, 1].set(3.0)
PAIR = [
    Reward("brightness", {}, toward(FIRST), None),
    Reward("agreement", {}, toward(AGAINST), None),
]
PLAIN = {"objective__normalization": "none"}


def test_cosines_between_rewards():
    found = run(rewards=PAIR, **PLAIN)
    assert found.cosines.keys() == {"brightness~agreement"}
    np.testing.assert_allclose(
        found.cosines["brightness~agreement"], np.full(3, -1 / np.sqrt(10)), rtol=1e-5
    )


def test_projection_takes_out_what_works_against_another_reward():
    added = run(rewards=PAIR, **PLAIN).images[0, 0, 0]
    np.testing.assert_allclose(added, [0.7 * 2 - 1.3, 1.3 * 3, 0], rtol=1e-5)
    found = run(rewards=PAIR, objective__conflicts="project", **PLAIN).images[0, 0, 0]
    first, against = np.array([1.4, 0.0]), np.array([-1.3, 3.9])
    expected = (
        first
        - first @ against / (against @ against) * against
        + against
        - first @ against / (first @ first) * first
    )
    np.testing.assert_allclose(found[:2], expected, rtol=1e-5)
    agree = [PAIR[0], Reward("agreement", {}, toward(FIRST + 1), None)]
    np.testing.assert_allclose(
        run(rewards=agree, objective__conflicts="project", **PLAIN).images,
        run(rewards=agree, **PLAIN).images,
    )


def test_a_reward_above_its_cap_falls_silent_for_that_image():
    scores = run(rewards=PAIR[:1], **PLAIN).scores["brightness"]
    cap = float(jnp.sort(scores)[1])  # between the three images
    found = run(rewards=PAIR[:1], rewards__brightness__cap=cap, **PLAIN)
    silent = ~np.any(np.asarray(found.images), axis=(1, 2, 3))
    assert silent.tolist() == (np.asarray(scores) >= cap).tolist() and silent.sum() == 2
    np.testing.assert_array_equal(found.scores["brightness"], scores)


def test_sharpness_looks_from_down_the_slope():
    quadratic = Reward(
        "brightness",
        {},
        lambda params, images, features: jnp.sum(images**2, axis=(1, 2, 3)) / 2,
        None,
    )
    inside = 0.3 + 0.4 * IMAGES  # the gradient is the image itself
    found = run(inside, [quadratic], objective__sharpness=0.05, **PLAIN).images
    size = np.sqrt(np.mean(np.square(inside), axis=(1, 2, 3), keepdims=True))
    np.testing.assert_allclose(found, 0.7 * inside * (1 - 0.05 / size), rtol=1e-5)


def test_smoothing_is_kept_where_sharpness_looks():
    seen = []

    def score(params, images, features):  # its gradient is the image itself
        seen.append(np.asarray(jax.lax.stop_gradient(images)))
        return jnp.sum(images**2, axis=(1, 2, 3)) / 2

    found = run(
        0.3 + 0.4 * IMAGES,
        [Reward("brightness", {}, score, None)],
        **{
            **SMOOTH,
            "objective__sharpness": 0.05,
            "regularizers__gradient__samples": 2,
            "regularizers__gradient__weight": 0.25,
            "regularizers__gradient__std": 2e-4,  # much less than the way down
        },
    )
    plain, descended, *perturbed = seen
    assert len(perturbed) == 2
    down = np.sqrt(np.mean(np.square(descended - plain), axis=(1, 2, 3)))
    np.testing.assert_allclose(down, 0.05, rtol=1e-4)
    around = np.sqrt(np.mean(np.square(np.stack(perturbed) - descended), axis=(2, 3, 4)))
    assert np.all(around > 0) and np.all(around < 0.1 * down)
    expected = 0.7 * (0.75 * descended + 0.25 * np.mean(perturbed, axis=0))
    np.testing.assert_allclose(found.images, expected, rtol=1e-5, atol=1e-6)
