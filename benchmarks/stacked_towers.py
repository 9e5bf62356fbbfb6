"""Compares ways to run three vision towers of one architecture (HPS v2.1, PickScore, CLIP-H).

They run one after another, or as one tower with stacked weights:

    python -m benchmarks.stacked_towers --dtype=bfloat16 --batch_sizes=1,8,32    # an accelerator
    python -m benchmarks.stacked_towers --layers=2 --batch_sizes=1,4             # two CPU cores

Each way computes the features of every tower, and their gradients with respect to the same images,
as a training step needs. "vmap" runs all towers at once. "map" loops over the stacked weights, and
compiles one tower instead of three. The weights are random.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags  # not r0_jax.cli: its config files need more packages

from benchmarks import measure
from r0_jax.models import open_clip
from r0_jax.models.open_clip import OpenCLIPConfig, VisionTransformer
from r0_jax.weights.network import Network, Params


def define_flags() -> None:
    flags.DEFINE_enum("tower", "ViT-H-14", list(open_clip.ARCHITECTURES), "architecture")
    flags.DEFINE_integer("towers", 3, "number of towers", lower_bound=2)
    flags.DEFINE_integer("layers", 0, "number of layers to keep; 0: all", lower_bound=0)
    flags.DEFINE_list("batch_sizes", ["8"], "images at once; each size gets its own rows")
    flags.DEFINE_integer("repeats", 9, "timed calls after one warm-up call", lower_bound=1)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "dtype of weights and activations"
    )
    flags.DEFINE_string("out", None, "document for the section; printed by default")


def build(tower: str, layers: int) -> Network:
    """Return the vision tower, cut to `layers` layers if that is not 0."""
    fields = open_clip.ARCHITECTURES[tower]
    config = OpenCLIPConfig.from_json(
        fields | {"vision_cfg": fields["vision_cfg"] | ({"layers": layers} if layers else {})}
    )

    def construct(rngs):
        module = VisionTransformer(
            config.vision_cfg, config.embed_dim, config.activation, rngs=rngs
        )
        module.config = config
        return module

    return Network.abstract(construct)


def random_params(network: Network, seed: int, dtype: str) -> Params:
    """Draw weights of the scale of trained ones, so that numbers stay finite at any depth."""
    keys = jax.random.split(jax.random.key(seed), len(network.shapes))

    def draw(name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        noise = 0.02 * jax.random.normal(key, shape, jnp.float32)
        return (noise + name.endswith("scale")).astype(dtype)

    return {
        name: draw(name, struct.shape, key)
        for (name, struct), key in zip(network.shapes.items(), keys, strict=True)
    }


def ways(network: Network) -> dict:
    """Return {name: function}; (params, images) -> (features, gradients).

    The params are a list for "one after another", else stacked.
    """

    def one(params, images):
        def feature(x):
            return network(params, x).astype(jnp.float32).mean(axis=-1)

        values, pullback = jax.vjp(feature, images)
        return values, pullback(jnp.ones_like(values))[0]

    return {
        "one after another": lambda params, images: jax.tree.map(
            lambda *x: jnp.stack(x), *[one(p, images) for p in params]
        ),
        "vmap": lambda params, images: jax.vmap(one, (0, None))(params, images),
        "map": lambda params, images: jax.lax.map(functools.partial(one, images=images), params),
    }


def rows(network: Network, batch_size: int) -> list[list[str]]:
    """Return one row per way: time, compile time, memory, and difference from the first way."""
    given = flags.FLAGS
    towers = [random_params(network, seed, given.dtype) for seed in range(given.towers)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *towers)
    size = network.config.vision_cfg.image_size
    images = jax.random.normal(jax.random.key(99), (batch_size, size, size, 3)).astype(given.dtype)
    found, first, plain = [], None, None
    for name, function in ways(network).items():
        params = towers if name == "one after another" else stacked
        begin = time.perf_counter()
        compiled = jax.jit(function).lower(params, images).compile()
        compile_time = time.perf_counter() - begin
        gradients = np.asarray(compiled(params, images)[1], np.float32)
        first = gradients if first is None else first
        took = measure.milliseconds(lambda c=compiled, p=params: c(p, images), given.repeats)
        plain = plain or took
        found.append(
            [
                f"{batch_size}, {name}",
                f"{took:.1f}",
                f"{plain / took:.2f}",
                f"{compile_time:.1f}",
                f"{compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f}",
                f"{np.abs(gradients - first).max() / np.abs(first).max():.0e}",
            ]
        )
    return found


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    network = build(given.tower, given.layers)
    found = [row for size in given.batch_sizes for row in rows(network, int(size))]
    header = [
        "images, towers",
        "ms",
        "times as fast",
        "s to compile",
        "temporary MiB",
        "gradients apart",
    ]
    text = f"""    python -m benchmarks.stacked_towers {measure.given_flags()}

{given.towers} towers {given.tower}, {given.layers or "all"} layers, {given.dtype}: features and
image gradients of all.

{measure.table(header, found)}

{measure.machine("jax")} Seed 0, median of {given.repeats} calls."""
    measure.publish(given.out, f"## Several towers at once: {jax.devices()[0].device_kind}", text)


if __name__ == "__main__":
    define_flags()
    app.run(main)
