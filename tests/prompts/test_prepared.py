"""Prompts of a run: only what it draws is encoded, once, and a kill costs little."""

import dataclasses
import shutil
import warnings
from collections import Counter

import grain
import numpy as np
import pytest
import tfds_prompts

from r0_jax.errors import InputError
from r0_jax.parallel import heartbeat
from r0_jax.pipelines import families
from r0_jax.prompts import catalog, prepared, table
from r0_jax.prompts.order import Draws
from r0_jax.rewards.reward import Reward
from r0_jax.stand_ins import miniature


class Killed(BaseException):
    """Ends a start, as SIGKILL would."""


class Tower:
    """A reward's text tower, which notes what it encodes and may be killed."""

    def __init__(self):
        self.encoded, self.calls_left, self.shift, self.weights = Counter(), 10**9, 0.0, 1.0

    def text_features(self, params, prompts):
        self.calls_left -= 1
        if self.calls_left < 0:
            raise Killed
        self.encoded.update(prompts)
        numbers = [[hash(prompt) % 1000 / 7 + self.shift, len(prompt)] for prompt in prompts]
        return np.asarray(numbers, np.float32)

    @property
    def reward(self) -> Reward:
        return Reward(
            "tower",
            {"kernel": np.full((2, 2), self.weights, np.float32)},
            score=lambda params, images, features: images[:, 0, 0, 0],
            text_features=self.text_features,
        )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    miniature.write(folder, "StableDiffusionPipeline")
    return families.load(folder)


@pytest.fixture
def run(tmp_path, pipeline, monkeypatch):
    monkeypatch.setattr(prepared, "SHARD", 8)
    monkeypatch.setattr(prepared, "PART", 3)
    return Run(tmp_path, pipeline)


class Run:
    """Starts of one run of 4 prompts a step."""

    def __init__(self, folder, pipeline):
        self.file, self.folder = folder / "prompts.txt", folder / "run" / "prompts"
        self.pipeline, self.tower = pipeline, Tower()

    def write(self, prompts):
        self.file.write_text("\n".join(prompts) + "\n", "utf-8")

    def start(self, steps, begun=False, since=0, heldout=()):
        """Prepare; return the numbers of prompts and all that was encoded in this start."""
        self.tower.encoded.clear()
        summary = prepared.prepare(
            str(self.file),
            self.folder,
            self.pipeline,
            [self.tower.reward],
            heldout,
            Draws(4, 7, range(since, steps)),
            begun,
        )
        return summary, self.tower.encoded.copy()

    def batches(self, steps, since=0, **part):
        return list(prepared.batches(self.folder, Draws(4, 7, range(since, steps)), **part))


def many(count):
    return [f"a red circle {i}" for i in range(count)]


def drawn(rows, steps):
    """The rows of the first batches of 4, as runs have drawn them from the beginning."""
    order = grain.MapDataset.range(rows).seed(7).shuffle().repeat(2**31).batch(4)
    return [order[step] for step in range(steps)]


@pytest.mark.parametrize("prompts", [many(50), many(7), [*many(5), *many(9)], ["only"]])
def test_batches_are_those_of_all_prompts_encoded_at_once(run, prompts):
    run.write(prompts)
    steps = 9
    summary, _ = run.start(steps)
    rows = drawn(len(prompts), steps)
    texts = {prompts[row] for row in np.concatenate(rows)}
    assert summary == (len(prompts), len(set(prompts)), len(texts))
    whole = run.pipeline.tokenize(prompts) | prepared.features(
        {"prompt": prompts}, [run.tower.reward]
    )
    assert whole.keys() == {"input_ids", "features/tower"}
    for batch, expected in zip(run.batches(steps), rows, strict=True):
        for name, values in whole.items():
            assert batch[name].dtype == values.dtype and batch[name].flags.c_contiguous
            np.testing.assert_array_equal(batch[name], values[expected])
    later = run.batches(steps, since=5, parts=[1], of=2)
    for batch, expected in zip(later, rows[5:], strict=True):
        np.testing.assert_array_equal(batch["input_ids"], whole["input_ids"][expected[2:]])


def test_only_what_the_run_draws_is_encoded_and_once(run):
    prompts = [f"{text} again" for text in many(200)] * 2
    run.write(prompts)
    _, encoded = run.start(6)
    assert encoded == Counter({prompts[row] for row in np.concatenate(drawn(400, 6))})
    assert run.start(6, begun=True)[1] == {}  # nothing when it resumes
    _, more = run.start(10, begun=True)
    expected = {prompts[row] for row in np.concatenate(drawn(400, 10))} - encoded.keys()
    # The row that tells whether the tower is the same is encoded a second time.
    assert more.keys() - encoded.keys() == expected and more.total() == len(expected) + 1 > 1
    run.batches(10)
    # What was before the oldest checkpoint is not needed again.
    shutil.rmtree(run.folder)
    _, rest = run.start(10, since=6)
    assert rest == Counter({prompts[row] for row in np.concatenate(drawn(400, 10)[6:])})


def test_a_killed_start_continues(run):
    run.write(many(300))
    _, encoded = run.start(20)
    expected, whole = run.batches(20), encoded
    shutil.rmtree(run.folder)
    run.tower.calls_left = 8  # in the fourth shard
    with pytest.raises(Killed):
        run.start(20)
    kept = set(table.rows_in(run.folder).tolist())
    assert 16 <= len(kept) < len(whole)
    (run.folder / ".columns-0000000123.npy.0123.tmp").write_bytes(b"half")
    run.tower.calls_left = 10**9
    _, rest = run.start(20)
    # Again one row tells whether the tower is the same.
    assert len(rest) == len(whole) - len(kept) + 1 and rest.total() == len(rest)
    for batch, one in zip(run.batches(20), expected, strict=True):
        assert all((batch[name] == one[name]).all() for name in one)
    assert not any(path.name.startswith(".") for path in run.folder.iterdir())


@pytest.mark.parametrize("moment", ["catalog.json", "first.npy"])
def test_a_start_killed_at_its_begin_is_begun_anew(run, moment):
    run.write(many(9))
    run.start(1)
    for path in run.folder.glob("*.npy"):
        path.unlink()
    if moment == "catalog.json":
        (run.folder / "catalog.json").rename(run.folder / ".catalog.json.0123.tmp")
    assert run.start(2)[0].rows == 9
    run.batches(2)


def test_a_changed_file_is_noticed(run):
    run.write(many(100))
    run.start(5)
    before = run.batches(5)
    run.write(many(101))
    with pytest.warns(UserWarning, match="has changed since this run began"):
        summary, encoded = run.start(5, begun=True)
    assert summary.rows == 100 and not encoded
    np.testing.assert_array_equal(run.batches(5)[4]["input_ids"], before[4]["input_ids"])
    for change in (lambda: None, run.file.unlink):
        change()
        with (
            pytest.warns(UserWarning, match="has changed since this run began"),
            pytest.raises(InputError, match=r"needs \d+ more prompts, but .* have changed since"),
        ):
            run.start(9, begun=True)
    # Before the first checkpoint nothing depends on the old prompts.
    run.write(many(101))
    assert run.start(5)[0].rows == 101


@pytest.mark.parametrize("changed", [{"shift": 9.0}, {"weights": 2.0}])
def test_features_of_another_tower_are_noticed(run, changed):
    run.write(many(100))
    run.start(5)
    for name, value in changed.items():
        setattr(run.tower, name, value)
    with pytest.raises(InputError, match="or the rewards have changed since it began"):
        run.start(9, begun=True)
    _, encoded = run.start(5)
    assert len(encoded) > 10  # all of them
    whole = prepared.features({"prompt": many(100)}, [run.tower.reward])["features/tower"]
    np.testing.assert_array_equal(run.batches(5)[0]["features/tower"], whole[drawn(100, 5)[0]])


def test_prompts_that_an_older_version_kept_are_made_anew(run):
    run.write(many(30))
    run.folder.parent.mkdir()
    tfds_prompts.write({"prompt": many(30)}, run.folder)
    assert run.start(5, begun=True)[0].rows == 30
    assert not (run.folder / "dataset_info.json").exists()
    shutil.rmtree(run.folder)
    tfds_prompts.write({"prompt": many(31)}, run.folder)
    with pytest.raises(InputError, match="has changed since this run began"):
        run.start(5, begun=True)


@pytest.mark.parametrize("name", ["columns", "rows"])
def test_a_damaged_shard_is_one_line_and_can_be_made_again(run, name):
    run.write(many(100))
    run.start(5)
    expected = run.batches(5)
    path = min(run.folder.glob(f"{name}-*"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=f"{path} is damaged or not complete: delete"):
        run.batches(5)
    for part in run.folder.glob(f"*-{path.stem.split('-')[1]}.npy"):
        part.unlink()
    run.start(5, begun=True)
    for batch, one in zip(run.batches(5), expected, strict=True):
        np.testing.assert_array_equal(batch["input_ids"], one["input_ids"])


def test_every_part_is_a_sign_of_life(run):
    run.write(many(100))
    said = []
    with heartbeat.heard_by(said.append):
        _, encoded = run.start(10)
    parts = sum(line.endswith("prompts encoded") for line in said)
    assert parts >= len(encoded) / 5  # 3 prompts each, 5 at the end of a shard


def test_prompts_that_are_too_long_are_counted_over_all_parts(run):
    run.write([*many(20), *(f"{text} {'red ' * 90}" for text in many(20))])
    short = dataclasses.replace(
        run.tower.reward,
        name="short",
        truncated=lambda prompts: np.asarray([len(prompt) > 99 for prompt in prompts]),
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.start(10, heldout=[short])
    said = [str(warning.message) for warning in said]
    assert len(said) == 2
    assert any("20 of 40 prompts (50%) are longer than" in line for line in said)
    assert any("20 of 40 prompts (50%) are too long for the reward short" in line for line in said)


def test_a_file_that_changes_while_it_is_read_is_noticed(run):
    run.write(many(100))
    found = catalog.scan(run.file)
    run.write(many(50))
    with pytest.raises(InputError, match="has changed while it was read: start again"):
        list(found.texts(np.arange(100)))


def test_prompts_whose_removal_was_killed_are_removed_by_the_next_start(run, monkeypatch):
    run.write(["a", "b"])
    run.start(1)
    left = run.folder.with_name("prompts.removed")
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        prepared.remove(run.folder)
    assert not run.folder.exists() and left.exists()  # not half a folder that nobody knows
    prepared.remove(run.folder)
    assert not left.exists()


def test_what_is_not_ours_stays(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "thesis.txt").write_text("mine", "utf-8")
    with pytest.raises(InputError, match="does not hold a run's prompts"):
        prepared.remove(tmp_path / "prompts")
    assert (tmp_path / "prompts" / "thesis.txt").exists()
