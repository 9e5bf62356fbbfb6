"""Writes prompts and other columns as a tfds dataset with random access."""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds


class Prompts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One split of examples, given as columns."""

    name = "prompts"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(self, columns: Mapping[str, np.ndarray | list[str]], **kwargs):
        self._columns = columns
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            name: tfds.features.Text()
            if isinstance(values, list)
            else tfds.features.Tensor(shape=values.shape[1:], dtype=values.dtype, encoding="bytes")
            for name, values in self._columns.items()
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        for i, row in enumerate(zip(*self._columns.values(), strict=True)):
            yield i, dict(zip(self._columns, row, strict=True))


def write(columns: Mapping[str, np.ndarray | list[str]], folder: Path) -> None:
    """Write columns; record i is row i. A list becomes Text, an array [N, ...] Tensor."""
    building = folder.with_name(folder.name + ".tmp")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # tfds prints that it is "downloading"
        builder = Prompts(columns, data_dir=building, file_format="array_record")
        builder.download_and_prepare()
    os.replace(builder.data_dir, folder)
    shutil.rmtree(building)
