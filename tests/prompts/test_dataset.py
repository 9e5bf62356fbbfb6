"""Prompts: every format and every mistake, and batches that depend only on (seed, step)."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tensorflow_datasets as tfds
from pyarrow import parquet

from r0_jax.errors import InputError
from r0_jax.prompts import dataset, files

PROMPTS = ["a red circle", "红色的圆在蓝色方块的左边。", "a red circle", "naïve – “quoted” 🎈"]
EXAMPLES = 23  # prime: no batch size below divides it


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A prepared dataset with every kind of column the trainer stores."""
    folder = tmp_path_factory.mktemp("data") / "prompts"
    dataset.prepare(columns(), folder)
    return folder


def columns() -> dict[str, np.ndarray | list[str]]:
    rng = np.random.default_rng(0)
    return {
        "prompt": [f"提示 {i % 20}" for i in range(EXAMPLES)],
        "input_ids": np.arange(EXAMPLES * 77, dtype=np.int32).reshape(EXAMPLES, 77),
        "clip": rng.normal(size=(EXAMPLES, 8)).astype(np.float32),
        "embeds": rng.normal(size=(EXAMPLES, 3, 4)).astype("bfloat16"),
        "index": np.arange(EXAMPLES, dtype=np.int32),
    }


def take(folder: Path, count: int, **kwargs) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(dataset.load(folder, **kwargs), count))


def indices(folder: Path, count: int, **kwargs) -> np.ndarray:
    return np.concatenate([batch["index"] for batch in take(folder, count, **kwargs)])


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


# --- reading prompts ---------------------------------------------------------------------


def test_txt(tmp_path):
    content = "\ufeff" + "\r\n".join([PROMPTS[0], "", "  ", *PROMPTS[1:], ""])
    assert files.read_prompts(write(tmp_path / "p.txt", content)) == PROMPTS


def test_txt_splits_at_line_ends_only(tmp_path):
    content = "one\u2028line\rtwo\n"
    assert files.read_prompts(write(tmp_path / "p.txt", content)) == ["one\u2028line", "two"]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_jsonl(tmp_path, bom):
    records = [PROMPTS[0], {"prompt": PROMPTS[1]}, {"caption": PROMPTS[2]}, {"text": PROMPTS[3]}]
    records.append({"text": "no", "caption": "no", "prompt": "yes", "id": 3})
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    assert files.read_prompts(write(tmp_path / "p.jsonl", bom + lines)) == [*PROMPTS, "yes"]


def test_json(tmp_path):
    items = [PROMPTS[0], {"caption": PROMPTS[1]}, *PROMPTS[2:]]
    assert files.read_prompts(write(tmp_path / "p.json", json.dumps(items))) == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("p.txt", "one\ntwo\n \nthree\n", "line 3"),
        ("p.txt", "\none\n", "line 1"),
        ("p.jsonl", '"one"\n\n"three"\n', "line 2"),
        ("p.json", '["one", "two", "", "four"]', "item 3"),
    ],
)
def test_a_blank_prompt_would_shift_numbered_ones(tmp_path, name, content, where):
    path = write(tmp_path / name, content)
    assert "" not in files.read_prompts(path)
    with pytest.raises(InputError, match=rf"{name}, {where} is blank, so which images belong to"):
        files.read_prompts(path, numbered=True)


def test_blank_prompts_at_the_end_shift_nothing(tmp_path):
    for name, content in [
        ("p.txt", "one\ntwo\n\n \n"),
        ("p.jsonl", '"one"\n"two"\n\n'),
        ("p.json", '["one", "two", ""]'),
    ]:
        assert files.read_prompts(write(tmp_path / name, content), numbered=True) == ["one", "two"]


@pytest.mark.parametrize("name", ["prompt", "caption", "text"])
def test_parquet(tmp_path, name):
    table = pyarrow.table({"id": range(5), name: [*PROMPTS, None]})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert files.read_prompts(tmp_path / "p.parquet") == PROMPTS


def test_prepared_folder_is_a_tfds_folder(tmp_path):
    dataset.prepare({"prompt": PROMPTS, "x": np.zeros((4, 2))}, tmp_path / "prompts")
    assert files.read_prompts(tmp_path / "prompts") == PROMPTS


def write_tfds(folder: Path, features: dict, rows: list[dict], split: str) -> Path:
    class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "foreign"
        VERSION = tfds.core.Version("2.0.0")
        url_infos = None  # nothing is downloaded

        def _info(self):
            columns = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=columns)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(rows)

    builder = Foreign(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def test_foreign_tfds_folder_without_decoding_its_images(tmp_path):
    png = write(tmp_path / "broken.png", b"\x89PNG\r\n\x1a\n")
    features = {"image": tfds.features.Image(), "caption": tfds.features.Text(), "text": np.int64}
    rows = [{"image": str(png), "caption": prompt, "text": 1} for prompt in PROMPTS]
    version = write_tfds(tmp_path, features, rows, split="validation")
    assert sorted(files.read_prompts(version)) == sorted(PROMPTS)  # tfds shuffles on writing
    with pytest.raises(InputError, match=r"no dataset_info\.json; give the folder of one version"):
        files.read_prompts(version.parent)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", None, "p.txt: no such file or directory"),
        ("p.txt", "", "p.txt has no prompts"),
        ("p.txt", "\ufeff\n \n", "p.txt has no prompts"),
        ("p.jsonl", "\n", "p.jsonl has no prompts"),
        ("p.json", "[]", "p.json has no prompts"),
        ("p.txt", b"a\nb\n\xff\xfe\n", "p.txt, line 3: not UTF-8; save the file as UTF-8"),
        ("p.txt", "a red".encode("utf-16-le"), "p.txt: not UTF-8; save the file as UTF-8"),
        ("p.jsonl", b'"a"\n"\xe9"\n', "p.jsonl, line 2: not UTF-8"),
        ("p.jsonl", '"a"\n\n{"prompt": "b"\n', "p.jsonl, line 3: broken JSON: Expecting ','"),
        ("p.jsonl", '{"prompts": "b"}', "p.jsonl, line 1: no prompt or caption or text among"),
        ("p.jsonl", '"a"\n{"prompt": ["b"]}', "p.jsonl, line 2: expected a prompt as text, found"),
        ("p.jsonl", '"a"\n3', "p.jsonl, line 2: expected a prompt as text, found int"),
        ("p.jsonl", '"\\ud83d"', "p.jsonl, line 1: the prompt holds half of a surrogate pair"),
        ("p.json", '["a",\n"b"\n"c"]', "p.json, line 3: broken JSON: Expecting ','"),
        ("p.json", '{"prompt": "a"}', "p.json: expected a list, found dict"),
        ("p.json", '["a", {"id": 1}]', "p.json, item 2: no prompt or caption or text among"),
        ("p.parquet", b"not parquet at all", "p.parquet: not a parquet file: "),
        ("p.csv", "prompt\na\n", "p.csv: cannot read prompts from .csv; give .txt, .jsonl, .json"),
        ("p", "a\n", "p: cannot read prompts from a file without suffix; give .txt"),
    ],
)
def test_bad_prompt_file(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(InputError) as error:
        files.read_prompts(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(error.value)


def test_bad_parquet_columns(tmp_path):
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"id": [1], "url": ["x"]}), path)
    with pytest.raises(InputError, match=r"no prompt or caption or text among the columns \(id, u"):
        files.read_prompts(path)
    parquet.write_table(pyarrow.table({"prompt": [1, 2]}), path)
    with pytest.raises(InputError, match=r"row 1: expected a prompt as text, found int"):
        files.read_prompts(path)


def test_a_parquet_file_with_two_columns_of_one_name(tmp_path):
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.table(columns, names=["prompt"] * 2), tmp_path / "p.parquet")
    assert files.read_prompts(tmp_path / "p.parquet") == ["a"]


def test_prompts_that_are_not_utf8(tmp_path):
    latin = "café".encode("latin-1")
    text = pyarrow.array([b"a", latin]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": text}), tmp_path / "p.parquet")
    rows = [{"text": b"a"}, {"text": latin}]
    version = write_tfds(tmp_path, {"text": tfds.features.Text()}, rows, split="train")
    for path in (tmp_path / "p.parquet", version):
        with pytest.raises(InputError, match=rf"^{path}: a prompt is not UTF-8: b'caf.xe9'"):
            files.read_prompts(path)


def test_tfds_folder_without_text(tmp_path):
    version = write_tfds(tmp_path, {"label": np.int64}, [{"label": 1}], split="train")
    with pytest.raises(InputError, match=r"no prompt or caption or text among the text feat.*none"):
        files.read_prompts(version)


def test_tfds_folder_of_another_file_format(tmp_path):
    dataset.prepare({"prompt": PROMPTS}, tmp_path / "prompts")
    info = tmp_path / "prompts" / "dataset_info.json"
    text = info.read_text(encoding="utf-8")
    info.write_text(text.replace("array_record", "tfrecord"), encoding="utf-8")
    with pytest.raises(InputError, match="prepare it with file_format='array_record'"):
        files.read_prompts(tmp_path / "prompts")


# --- preparing ---------------------------------------------------------------------------


def test_prepare_keeps_every_value_and_dtype(folder):
    written = columns()
    [batch] = take(folder, 1, batch_size=EXAMPLES, seed=0)
    order = batch["index"]
    assert set(batch) == set(written)
    assert batch["prompt"].tolist() == [written["prompt"][i] for i in order]
    for name in ("input_ids", "clip", "embeds", "index"):
        assert batch[name].dtype == written[name].dtype, name
        np.testing.assert_array_equal(batch[name], written[name][order])


def test_describe_counts_duplicates_once(folder):
    digest = dataset.digest(columns()["prompt"])
    assert dataset.describe(folder) == dataset.Summary(23, 20, digest)
    assert digest != dataset.digest(columns()["prompt"][::-1])


def test_prepare_prints_nothing(tmp_path, capfd):
    dataset.prepare({"prompt": PROMPTS}, tmp_path / "prompts")
    assert capfd.readouterr() == ("", "")


def test_prepare_leaves_only_the_finished_folder(tmp_path):
    dataset.prepare({"prompt": PROMPTS}, tmp_path / "prompts")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]
    with pytest.raises(InputError, match="exists already; delete it"):
        dataset.prepare({"prompt": ["other"]}, tmp_path / "prompts")
    assert files.read_prompts(tmp_path / "prompts") == PROMPTS


def test_failed_prepare_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        dataset.prepare({"prompt": ["one", "two"], "x": np.zeros(1)}, tmp_path / "prompts")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["rows", "rename"])
def test_killed_prepare_is_not_taken_for_a_finished_one(tmp_path, moment):
    folder = tmp_path / "prompts"
    script = f"""
import os
import numpy as np
from r0_jax import data
class Killing(np.ndarray):
    def __iter__(self):
        yield self[0]
        os._exit(9)
column = np.zeros(2)
if {moment!r} == "rows":
    column = column.view(Killing)
else:
    os.replace = lambda *names: os._exit(9)
data.prepare({{"prompt": ["first", "second"], "column": column}}, {str(folder)!r})
"""
    assert run_python(script).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.tmp"]
    left = (tmp_path / "prompts.tmp").rglob("dataset_info.json")
    assert len(list(left)) == (1 if moment == "rename" else 0)
    assert not dataset.is_prepared(folder)
    with pytest.raises(InputError, match="is not a prepared dataset"):
        dataset.load(folder, batch_size=2, seed=0)
    dataset.prepare({"prompt": PROMPTS}, folder)
    assert files.read_prompts(folder) == PROMPTS
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]


@pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 1000)])
def test_damaged_folder(folder, tmp_path, damage):
    shutil.copytree(folder, tmp_path / "copy")
    [records] = (tmp_path / "copy").glob("*array_record*")
    damage(records)
    with pytest.raises(InputError, match=r"copy cannot be read: "):
        dataset.load(tmp_path / "copy", batch_size=2, seed=0)
    with pytest.raises(InputError, match=r"copy cannot be read: "):
        files.read_prompts(tmp_path / "copy")


# --- loading -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_epoch_has_every_example_once(folder, batch_size):
    found = indices(folder, 3 * EXAMPLES, batch_size=batch_size, seed=1)
    epochs = found[: 3 * EXAMPLES].reshape(3, EXAMPLES)
    assert [sorted(epoch) for epoch in epochs.tolist()] == 3 * [list(range(EXAMPLES))]
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3  # each in another order
    assert tuple(epochs[0]) != tuple(range(EXAMPLES))


def test_order_depends_on_the_seed_alone(folder):
    first, again = (indices(folder, 5, batch_size=6, seed=3) for _ in range(2))
    other = indices(folder, 5, batch_size=6, seed=4)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("step", [0, 1, 5, 100])
def test_starting_at_a_step_equals_skipping_to_it(folder, step):
    skipped = indices(folder, step + 3, batch_size=6, seed=3)[step * 6 :]
    np.testing.assert_array_equal(indices(folder, 3, batch_size=6, seed=3, step=step), skipped)


@pytest.mark.parametrize("process_count", [2, 3, 4])
def test_processes_hold_consecutive_parts_of_the_global_batch(folder, process_count):
    whole = take(folder, 6, batch_size=12, seed=3, step=2)
    parts = [
        take(folder, 6, batch_size=12, seed=3, step=2, parts=[i], of=process_count)
        for i in range(process_count)
    ]
    for step, batch in enumerate(whole):
        for name in batch:
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])


def test_a_process_may_hold_parts_that_are_not_neighbours(folder):
    whole = take(folder, 3, batch_size=12, seed=3, step=2)
    mine = take(folder, 3, batch_size=12, seed=3, step=2, parts=[0, 2], of=4)
    for step, batch in enumerate(mine):
        rows = [0, 1, 2, 6, 7, 8]
        assert all((batch[name] == whole[step][name][rows]).all() for name in batch)


def test_uneven_split_among_processes_is_refused(folder):
    with pytest.raises(InputError, match="batch_size 12 does not divide evenly into 5 parts"):
        dataset.load(folder, batch_size=12, seed=0, of=5)


def test_batch_larger_than_the_dataset_repeats_it(folder):
    batch = indices(folder, 1, batch_size=3 * EXAMPLES + 2, seed=0)
    counts = np.bincount(batch, minlength=EXAMPLES)
    assert counts.sum() == 3 * EXAMPLES + 2 and counts.min() == 3 and counts.max() == 4


def test_one_prompt_is_enough(tmp_path):
    dataset.prepare({"prompt": ["only"]}, tmp_path / "prompts")
    for batch in take(tmp_path / "prompts", 2, batch_size=3, seed=0):
        assert batch["prompt"].tolist() == ["only"] * 3


def run_python(script: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_no_tensorflow_and_no_wait_at_exit(folder):
    script = f"""
import sys, time
from r0_jax import data
batches = data.load({str(folder)!r}, batch_size=64, seed=0)
next(batches)
print([name for name in ("tensorflow", "torch") if name in sys.modules])
"""
    result = run_python(script)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")
