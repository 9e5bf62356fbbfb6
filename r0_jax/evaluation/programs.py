"""The programs that evaluations in training run on the devices.

`Validation` runs them. `plan` compiles the same ones from shapes, to see whether they fit.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from r0_jax.diffusion import grid
from r0_jax.evaluation import hacking
from r0_jax.evaluation.batches import batch_size
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.method.generator import Generator
from r0_jax.models import repeat
from r0_jax.models.linear import Adapted
from r0_jax.parallel import sharding
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.prompts.source import Columns
from r0_jax.rewards.reward import FEATURES, Reward
from r0_jax.weights.network import Shapes


class Stage(NamedTuple):
    """One jitted program, and what lies on the devices while it runs.

    Attributes:
      name: for people, such as "drawing".
      run: the program.
      arguments: shapes of what it takes; those that lie on the devices have a sharding.
      held: {kind: shapes} of what lies there, whether the program takes it or not. What is also an
        argument is the same object.
    """

    name: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    held: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """The programs of one config; each is compiled when it is first called.

    Attributes:
      rewards: those that are trained on, and those that are held out.
      frozen: what is not trained, on the devices; for `stages` shapes with sharding will do.
      count: of prompts.
    """

    config: ConfigDict
    pipeline: Pipeline
    generator: Generator
    rewards: Sequence[Reward]
    frozen: dict[str, Any]
    mesh: Mesh
    count: int

    @functools.cached_property
    def batch(self) -> int:
        """How many images are drawn and scored at once, over all devices."""
        return batch_size(self.config, self.count, self.mesh)

    @functools.cached_property
    def grids(self) -> tuple[int, ...]:
        """Patches a side of the rewards' towers, for the signs of hacking."""
        return tuple(sorted({reward.grid for reward in self.rewards if reward.grid}))

    @functools.cached_property
    def sampler(self) -> ImageSampler:
        """Draws in the few steps that are trained."""
        return few_step_sampler(self.config, self.pipeline, self.mesh)

    @functools.cached_property
    def look(self):
        """(None, images, None) -> what the signs of hacking need to know of each image."""
        return sharding.spread(lambda _, images, __: hacking.look(images, self.grids), self.mesh)

    @functools.cached_property
    def scores(self) -> dict[str, Callable[..., jax.Array]]:
        """{reward: (params, images, features) -> scores}."""
        return scorers(self.rewards, self.mesh)

    def where(self, heldout: Reward) -> dict[str, NamedSharding]:
        """Return where a held-out reward lies while it scores: as those that are trained on do."""
        params = heldout.scoring_params
        shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in params.items()}
        return sharding.param_sharding(shapes, self.mesh, self.config.sharding)

    def parts(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Return what the sampler takes, with these weights of the generator."""
        return {**self.frozen, self.pipeline.generator_part: weights}

    def stages(self, trained: Shapes, columns: Columns) -> Iterator[Stage]:
        """Yield each program with the shapes of what it takes, and what it finds.

        Args:
          trained: shapes of the trained parameters, with sharding.
          columns: of a batch of prompts with the features of all rewards.
        """
        weights, base = self._weights(trained), self.frozen["base"]
        own = {
            name: (leaf.a, leaf.b) if isinstance(leaf, Adapted) else leaf
            for name, leaf in weights.items()
            if leaf is not base[name]
        }
        held = {"generator": own}
        yield drawing(
            "drawing", self.sampler, self.pipeline, self.parts(weights), columns, self.batch, held
        )
        images = images_of(self.pipeline, self.batch)
        yield Stage("signs of hacking", self.look, (None, images, None), held)
        for reward in self.rewards:
            params = self.frozen["rewards"].get(reward.name)
            own = {}
            if params is None:
                params = sharding.with_sharding(reward.scoring_params, self.where(reward))
                own = {f"held-out {reward.name}": params}
            features = features_of(reward, columns, self.batch)
            yield Stage(
                f"reward {reward.name}",
                self.scores[reward.name],
                (params, images, features),
                held | own,
            )

    def _weights(self, trained: Shapes) -> dict[str, Any]:
        """Return the shapes of `generator.weights`, which lie as what they are made of."""
        base = self.frozen["base"]
        found = jax.eval_shape(self.generator.weights, trained, base)

        def lying(name: str, leaf: Any) -> Any:
            module = name.removesuffix(".kernel")
            if isinstance(leaf, Adapted):
                a, b = (trained[f"{module}.lora_{factor}.kernel"].sharding for factor in "AB")
                return Adapted(base[name], _struct(leaf.a, a), _struct(leaf.b, b))
            return _struct(leaf, trained[name].sharding) if name in trained else base[name]

        return {name: lying(name, leaf) for name, leaf in found.items()}


def _struct(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def few_step_sampler(config: ConfigDict, pipeline: Pipeline, mesh: Mesh) -> ImageSampler:
    """Return what draws in the steps that a config trains."""
    sampler, blocks = config.sampler, repeat.of_config(config, mesh)
    steps = grid.grid(pipeline.scheduler_config, sampler.num_steps, sampler.eta)
    return ImageSampler(pipeline, steps, sampler.guidance_scale, mesh, blocks)


def scorers(rewards: Sequence[Reward], mesh: Mesh) -> dict[str, Callable[..., jax.Array]]:
    """Return {reward: jitted (params, images, features) -> scores}, over the devices of a mesh."""
    return {reward.name: sharding.spread(reward.score, mesh) for reward in rewards}


def drawing(
    name: str,
    sampler: ImageSampler,
    pipeline: Pipeline,
    parts: dict[str, Any],
    columns: Columns,
    size: int,
    held: Mapping[str, Any],
) -> Stage:
    """Return the stage in which a sampler draws `size` images with `parts` of a pipeline."""
    tokens = {
        column: jax.ShapeDtypeStruct((size, *shape), dtype)
        for column, (shape, dtype) in columns.items()
        if not column.startswith(FEATURES)
    }
    noise = jax.ShapeDtypeStruct((size, *pipeline.latent_shape), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
    return Stage(name, sampler.run, (parts, tokens, noise, keys), held)


def images_of(pipeline: Pipeline, size: int) -> jax.ShapeDtypeStruct:
    """Return the shape of `size` images."""
    return jax.ShapeDtypeStruct((size, *pipeline.image_shape), jnp.float32)


def features_of(reward: Reward, columns: Columns, size: int) -> jax.ShapeDtypeStruct | None:
    """Return the shape of a reward's features of `size` prompts; None if it reads none."""
    if reward.column not in columns:
        return None
    shape, dtype = columns[reward.column]
    return jax.ShapeDtypeStruct((size, *shape), dtype)


def placed(params: Any, where: NamedSharding, dtype: Any = None) -> Any:
    """Return the shapes of what `lazy.place(params, where, dtype)` puts on the devices."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=where), params
    )
