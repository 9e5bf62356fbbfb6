"""The programs that the result table runs on the devices.

`Testbed` runs them when the training holds nothing there any more. `plan` compiles them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from r0_jax.diffusion import schedulers
from r0_jax.evaluation.batches import batch_size
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.evaluation.programs import (
    Stage,
    drawing,
    features_of,
    few_step_sampler,
    images_of,
    placed,
    scorers,
)
from r0_jax.models import attention_backend, repeat
from r0_jax.parallel import sharding
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.prompts.source import Columns
from r0_jax.rewards import tower
from r0_jax.rewards.reward import Reward
from r0_jax.rewards.tower import Tower, normalize


class Samplers(NamedTuple):
    """Draw the columns of a run's table: the guided base, and both models in few steps."""

    guided: ImageSampler
    few: ImageSampler


def samplers(config: ConfigDict, pipeline: Pipeline, mesh: Mesh) -> Samplers:
    """Return the samplers of a run's table; InputError for too many steps of the base."""
    pipeline = pipeline.attending(attention_backend.of_config(config, mesh))
    test = config.test
    steps = schedulers.from_folder(pipeline.scheduler_config, test.base_steps)
    blocks = repeat.of_config(config, mesh)
    guided = ImageSampler(pipeline, steps, test.guidance_scale, mesh, blocks)
    return Samplers(guided, few_step_sampler(config, pipeline, mesh))


def feature_tower(config: ConfigDict) -> Tower | None:
    """Load the tower of the held-out reward `test.features`; None where that is ""."""
    if not config.test.features:
        return None
    entry = config.heldout_rewards[config.test.features]
    return tower.load(entry.path, config.dtype, text=False)


def image_features(found: Tower, dtype: str, mesh: Mesh) -> Callable[..., jax.Array]:
    """Return (params, images, None) -> unit-length features of a tower, jitted."""
    return sharding.spread(
        lambda params, images, _: normalize(
            found.sight.apply(params, "image_features", found.prepare(images).astype(dtype))
        ),
        mesh,
    )


def stages(
    config: ConfigDict,
    pipeline: Pipeline,
    rewards: Sequence[Reward],
    columns: Columns,
    mesh: Mesh,
) -> Iterator[Stage]:
    """Yield the programs of a run's table with the shapes of what they take; see `Programs.stages`.

    Of the samplers only the guided one, which works on twice the images: the other needs less.
    """
    size, everywhere = batch_size(config, config.test.num_prompts, mesh), sharding.replicated(mesh)
    parts = placed(pipeline.params, everywhere, config.dtype)
    held: dict[str, Any] = {f"model {name}": params for name, params in parts.items()}
    found = feature_tower(config)
    if found is not None:
        held["image features"] = placed(found.params, everywhere)
    guided = samplers(config, pipeline, mesh).guided
    yield drawing("table: drawing", guided, pipeline, parts, columns, size, held)
    images = images_of(pipeline, size)
    for reward in rewards:
        params = placed(reward.scoring_params, everywhere)
        yield Stage(
            f"table: reward {reward.name}",
            scorers([reward], mesh)[reward.name],
            (params, images, features_of(reward, columns, size)),
            held | {f"reward {reward.name}": params},
        )
    if found is not None:
        encode = image_features(found, config.dtype, mesh)
        yield Stage("table: image features", encode, (held["image features"], images, None), held)
