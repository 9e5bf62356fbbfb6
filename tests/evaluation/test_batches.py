import jax
import numpy as np
import pytest

from r0_jax import config as base
from r0_jax.evaluation import batches
from r0_jax.evaluation.noise import fixed_noise
from r0_jax.parallel import sharding


@pytest.mark.parametrize(
    ("draw_batch", "device_batch", "count", "size"),
    [
        (0, 0, 100, 32),  # what the step holds: its whole batch
        (0, 1, 100, 4),  # one image a device, as the step computes
        (0, 99, 100, 32),  # more than a device's share of the batch is never held
        (3, 1, 100, 12),
        (3, 1, 5, 8),  # no more than what was asked for, up to what four devices split
        (50, 0, 1, 4),
    ],
)
def test_as_many_images_are_drawn_at_once_as_the_step_holds(draw_batch, device_batch, count, size):
    config = base.get_config()
    config.batch_size, config.device_batch, config.draw_batch = 32, device_batch, draw_batch
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert batches.batch_size(config, count, mesh) == size


@pytest.mark.parametrize("count, size", [(7, 3), (6, 3), (2, 5), (1, 1)])
def test_batches_of_one_size_hold_every_row_once(count, size):
    found = list(batches.batches(count, size))
    assert all(rows.shape == (size,) for rows, _ in found)
    assert np.concatenate([rows[:real] for rows, real in found]).tolist() == list(range(count))
    last, real = found[-1]
    assert (last[real:] == count - 1).all()


def test_scores_are_those_of_the_images_without_what_fills_up():
    images = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1) * np.ones((1, 2, 2, 3), np.float32)
    features, shapes, checked = np.arange(5)[:, None] * 10, [], []

    def scorer(params, drawn, texts):
        shapes.append(drawn.shape)
        return params * drawn[:, 0, 0, 0] + texts[:, 0]

    found = batches.score(scorer, 2, images, features, 2, lambda: checked.append(1))
    np.testing.assert_array_equal(found, np.arange(5) * 12)
    assert shapes == [(2, 2, 2, 3)] * 3 and len(checked) == 3


def test_chunks_are_whole_batches_within_the_memory():
    image = (16, 16, 3)
    found = list(batches.chunks(20, 4, image, most_bytes=10 * 4 * 16 * 16 * 3))
    assert found == [range(0, 8), range(8, 16), range(16, 20)]
    # One batch at least, however large its images.
    assert list(batches.chunks(5, 2, image, most_bytes=1)) == [range(2), range(2, 4), range(4, 5)]
    assert list(batches.chunks(3, 8, image)) == [range(3)]


def test_noise_belongs_to_the_image_not_to_the_chunk():
    whole, keys = fixed_noise(3, 6, (2, 2, 1))
    part, some = fixed_noise(3, range(2, 5), (2, 2, 1))
    np.testing.assert_array_equal(part, whole[2:5])
    np.testing.assert_array_equal(jax.random.key_data(some), jax.random.key_data(keys[2:5]))
