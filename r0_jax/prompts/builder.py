"""The tfds builder of a run's prepared prompts; tfds takes seconds to import: import this late."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import tensorflow_datasets as tfds
from numpy.typing import NDArray

from r0_jax.files import Json
from r0_jax.prompts.dataset import NAME, SPLIT, digest


class PromptsBuilder(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]  # tfds does not declare it
):
    """Write one split of examples, given as columns."""

    name = NAME
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # without it tfds imports a package that it does not declare

    def __init__(self, examples: Mapping[str, NDArray | list[str]], **kwargs: str | Path) -> None:
        self._examples = examples
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, tfds.features.FeatureConnector] = {}
        for name, values in self._examples.items():
            if isinstance(values, list):
                features[name] = tfds.features.Text()
            else:
                # Bytes are six times faster to write than lists of numbers. They are exact for
                # every dtype, also bfloat16 and scalars.
                features[name] = tfds.features.Tensor(
                    shape=values.shape[1:], dtype=values.dtype, encoding="bytes"
                )
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(
                distinct_prompts=len(set(self._examples["prompt"])),
                digest=digest(self._examples["prompt"]),
            ),
            disable_shuffling=True,  # grain shuffles on reading
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[int, Json]]]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Json]]:
        for i, row in enumerate(zip(*self._examples.values(), strict=True)):
            yield i, dict(zip(self._examples, row, strict=True))
