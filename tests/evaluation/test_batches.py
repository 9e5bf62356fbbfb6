import numpy as np
import pytest

from r0_jax.evaluation import batches


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
