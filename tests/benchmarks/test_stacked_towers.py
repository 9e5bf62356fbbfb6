import jax
import numpy as np
from reward_configs import OPEN_CLIP

from benchmarks import stacked_towers
from r0_jax.models import open_clip


def test_all_ways_compute_the_same(monkeypatch):
    monkeypatch.setitem(open_clip.ARCHITECTURES, "tiny", OPEN_CLIP)
    network = stacked_towers.build("tiny", layers=1)
    assert network.config.vision_cfg.layers == 1
    towers = [stacked_towers.random_params(network, seed, "float32") for seed in range(3)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *towers)
    images = jax.random.normal(jax.random.key(9), (2, 16, 16, 3))
    found = {
        name: function(towers if name == "one after another" else stacked, images)
        for name, function in stacked_towers.ways(network).items()
    }
    features, gradients = found.pop("one after another")
    assert features.shape == (3, 2) and gradients.shape == (3, *images.shape)
    assert not np.allclose(gradients[0], gradients[1], rtol=0.1)
    for others in found.values():
        np.testing.assert_allclose(others[0], features, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(others[1], gradients, rtol=1e-3, atol=1e-8)
