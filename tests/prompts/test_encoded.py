"""Training from encoded prompts, without the text encoders that made them."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import forks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_world
import tensorflow_datasets as tfds
import tfds_prompts
from dry_runs import ROOT, cache, command, environment  # noqa: F401 (cache is a fixture)
from safetensors.numpy import load_file, save_file

from configs import sd3_r0, sd15_r0, sdxl_r0, z_image_r0
from r0_jax import config as base
from r0_jax import encode_prompts, prompts, rewards
from r0_jax.errors import InputError
from r0_jax.method.generator import Generator
from r0_jax.method.objective import Objective
from r0_jax.method.reward_step import Drawn
from r0_jax.parallel import sharding
from r0_jax.pipelines import families
from r0_jax.plan import weightless
from r0_jax.prompts import encoded, encoded_writer, shards
from r0_jax.prompts.files import read_prompts
from r0_jax.prompts.order import Draws
from r0_jax.stand_ins import miniature, miniature_reward, miniature_tokenizer
from r0_jax.weights import lazy

RECIPES = {
    "sd15": (sd15_r0, {}),
    "sdxl": (sdxl_r0, {}),
    "sd3": (sd3_r0, {}),
    "sd3 without T5": (sd3_r0, {"text_encoder_3": None, "tokenizer_3": None}),
    "z_image": (z_image_r0, {}),
}


def run(*calls):
    """(status, stdout, stderr) of one command after the other, each a module and flags."""
    calls = [(f"r0_jax.{module}", flags) for module, *flags in calls]
    return forks.run(calls, env=environment())


def ended_well(result):
    """What it said on standard output."""
    status, out, err = result
    assert status == 0, err
    return out


def one_line_error(result):
    status, _, err = result
    assert status == 2 and "Traceback" not in err, err
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def own_copy(name, folder):
    """The dry run of a recipe on a pipeline of its own, of which parts may be taken away."""
    recipe, changes = RECIPES[name]
    config = recipe.get_config("dryrun")
    miniature.write(folder / "pipeline", config.family, **changes)
    config.pretrained = str(folder / "pipeline")
    config.sampler.num_steps = config.objective.grad_steps = 1
    config.batch_size, config.eval.num_prompts = 8, 3
    return config


def take_text_away(folder):
    """Deletes text encoders and tokenizers."""
    gone = [path for path in folder.iterdir() if path.name.startswith(("text_", "tokenizer"))]
    for path in gone:
        shutil.rmtree(path)
    assert gone


# --- the same training ---------------------------------------------------------------------------


def first_loss(config, pipeline, batches):
    """Of the first batch, and its metrics; with parameters away from where training starts."""
    text = not config.data.encoded
    trained_on = [rewards.load(name, entry, text=text) for name, entry in config.rewards.items()]
    generator = Generator(
        config.lora.rank, config.lora.alpha, config.lora.targets, config.dtype, pipeline.fixed
    )
    objective = Objective(pipeline, generator, trained_on, config)
    part = pipeline.generator_part
    placed = lazy.place(pipeline.params)
    frozen = {
        **placed,
        "base": placed[part],
        "empty": pipeline.empty,
        "rewards": {reward.name: lazy.place(reward.params) for reward in trained_on},
    }
    params = generator.init(jax.random.key(0), placed[part], pipeline.networks[part].shapes)
    params = {name: value + 0.1 for name, value in params.items()}
    keys = step_world.sample_keys(config.batch_size)
    batch = {name: jnp.asarray(value) for name, value in next(batches).items()}
    loss = jax.jit(lambda *args: objective.loss(*args, Drawn(0), {}))
    return loss(params, frozen, batch, keys)


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_loss_is_that_of_text(tmp_path, name):
    config = own_copy(name, tmp_path)
    if name != "sd15":  # whose rewards are these too
        with config.unlocked():
            config.rewards = {"hps_v2_1": config.rewards.hps_v2_1}
    size = config.height, config.width
    pipeline = families.load(config.pretrained).sized(*size)
    found = [rewards.load(name, entry) for name, entry in config.rewards.items()]
    draws = Draws(config.batch_size, config.seed, range(1))
    source = prompts.of(config)
    source.prepare(tmp_path / "prompts", pipeline, found, [], draws, False)
    batches = source.batches(tmp_path / "prompts", pipeline, found, draws, [0], 1)
    expected, metrics = first_loss(config, pipeline, batches)
    assert metrics["norm/x0/guidance"] > 0  # which asks for the empty prompt

    # Of the others bfloat16 is a program more to compile.
    tolerances = {"float32": 1e-4} | ({"bfloat16": 0.05} if name == "sd15" else {})
    for dtype in tolerances:
        assert encode_prompts.encode(
            config, tmp_path / dtype, dtype=dtype, shard_prompts=3, batch_size=2
        )
    take_text_away(tmp_path / "pipeline")
    for dtype, tolerance in tolerances.items():
        config.data.encoded = str(tmp_path / dtype)
        source = prompts.of(config)
        source.check(config)
        bare = source.attach(families.load(config.pretrained, text=False)).sized(*size)
        assert not any(part.startswith("text") for part in bare.params)
        batches = source.batches(tmp_path, bare, found, draws, [0], 1)
        planned = weightless.load(config, sharding.make_mesh({}, jax.devices()[:1])).abstract[2]
        assert {name: (x.shape, x.dtype) for name, x in planned.items()} == {
            name: (x.shape, x.dtype) for name, x in next(batches).items()
        }
        batches = source.batches(tmp_path, bare, found, draws, [0], 1)
        loss, others = first_loss(config, bare, batches)
        assert loss == pytest.approx(float(expected), rel=tolerance)
        for metric, value in metrics.items():
            assert others[metric] == pytest.approx(float(value), rel=tolerance, abs=1e-3), metric


def test_prompts_of_different_lengths_take_the_room_of_their_own_tokens(tmp_path):
    lengths = np.array([3, 64, 9])
    columns = {
        "prompt": ["a", "b", "c"],
        "prompt_embeds": np.random.default_rng(0).standard_normal((3, 64, 1024)).astype(np.float32),
        "prompt_lengths": lengths,
    }
    encoded_writer.write(tmp_path / "encoded", columns, dtype="float32")
    opened = encoded.open_folder(tmp_path / "encoded")
    assert opened.schema["prompt_embeds"][0] == (64, 1024)
    found = opened.read("train", [0, 1, 2])
    assert found["prompt_lengths"].tolist() == [3, 64, 9]
    is_text = (np.arange(64) < lengths[:, None])[..., None]
    expected = np.where(is_text, columns["prompt_embeds"], 0)
    np.testing.assert_array_equal(found["prompt_embeds"], expected)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "encoded").glob("*array_record*"))
    assert on_disk < 0.6 * columns["prompt_embeds"].nbytes  # files fill up 64 kB
    for wrong in (0, 65):
        changed = columns | {"prompt_lengths": np.array([3, wrong, 9])}
        with pytest.raises(InputError, match="prompt_lengths should be from 1 to 64"):
            encoded_writer.write(tmp_path / "wrong", changed)
    (tmp_path / "encoded" / "metadata.json").unlink()
    with pytest.raises(InputError, match="prompt_embeds is not a Tensor of a fixed shape"):
        encoded.open_folder(tmp_path / "encoded")


def test_the_whole_job_runs_without_text_encoders(tmp_path):
    """Training, sample grid, the table with its guided base, resume, export."""
    config = own_copy("sdxl", tmp_path)
    (tmp_path / "two.txt").write_text("\n".join(miniature_tokenizer.PROMPTS[:2]), "utf-8")
    flags = [
        "--config=configs/sdxl_r0.py:dryrun",
        f"--config.pretrained={config.pretrained}",
        "--config.sampler.num_steps=2",
        "--config.optimizer.schedule=constant",  # or its steps could not be raised
    ]
    for section in ("rewards", "heldout_rewards"):
        for name, entry in config[section].items():
            shutil.copytree(entry.path, tmp_path / name)
            flags.append(f"--config.{section}.{name}.path={tmp_path / name}")
    encode = ("encode_prompts", *flags, f"--out={tmp_path / 'encoded'}")
    first, again, other = run(encode, encode, (*encode, "--dtype=float32"))
    assert "is complete" in ended_well(first)
    assert "is complete" in ended_well(again)
    assert 'was begun with other dtype: "bfloat16" there, "float32" here' in one_line_error(other)

    take_text_away(tmp_path / "pipeline")
    for name, entry in {**config.rewards, **config.heldout_rewards}.items():
        take_text_tower_away(tmp_path / name, rewards.load(name, entry).text_parts)
    workdir, from_encoded = f"--workdir={tmp_path / 'run'}", f"={tmp_path / 'encoded'}"
    train = ("main", *flags, f"--config.data.encoded{from_encoded}", workdir)
    train = (*train, "--config.eval.term_norms=False")
    sample = ("sample", workdir, f"--out={tmp_path / 'images'}")
    sample = (*sample, f"--prompts={tmp_path / 'two.txt'}")
    bare, *trained, unread, drawn, exported = run(
        ("main", *flags, f"--workdir={tmp_path / 'text'}"),
        (*train, "--config.steps=2", "--config.test.prompts="),
        train,
        sample,
        (*sample, f"--encoded{from_encoded}", "--guidance_scale=2"),
        ("export", workdir, "--format=peft", f"--out={tmp_path / 'lora'}"),
    )
    assert "is missing" in one_line_error(bare)
    for started in trained:
        ended_well(started)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "heldout/pickscore" in line] == [0, 2, 4]
    assert all(line["norm/x0/guidance"] > 0 for line in lines if "train/loss" in line)
    table = json.loads((tmp_path / "run" / "eval.json").read_text())["models"]
    assert table["base_3_guided"]["network_calls"]["value"] == 6
    said = one_line_error(unread)
    assert "is missing" in said and f"--encoded{from_encoded}" in said
    ended_well(drawn)
    assert len(list((tmp_path / "images").glob("0*.png"))) == 2
    ended_well(exported)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "text_encoder=None" in card  # they are not there


def take_text_tower_away(folder, parts):
    for pattern in ("vocab.*", "merges.txt", "tokenizer*"):
        for path in folder.glob(pattern):
            path.unlink()
    if not parts:  # it reads no text
        return
    [path] = folder.glob("*.safetensors")
    weights = load_file(path)
    kept = {key: value for key, value in weights.items() if key.split(".")[0] not in parts}
    assert len(kept) < len(weights)
    save_file(kept, path)


# --- kills, and several processes ----------------------------------------------------------------


def files(folder):
    """What a dataset is made of, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_and_shared_work_gives_the_same_bytes(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a red circle {i}" for i in range(400)) + "\n", "utf-8")
    flags = [
        "--config=configs/sd15_r0.py:dryrun",
        f"--config.data.prompts={prompts}",
        "--shard_prompts=4",
        "--batch_size=4",
    ]
    process = subprocess.Popen(
        command("encode_prompts", *flags, f"--out={tmp_path / 'killed'}"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "killed").glob("encoded_prompts-train*"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = list((tmp_path / "killed").glob("encoded_prompts-train*"))
    assert 3 <= len(before) < 100
    (tmp_path / "killed" / ".encoded_prompts-train.array_record-00099.tmp").write_bytes(b"half")
    with pytest.raises(InputError, match="is not finished: repeat the command"):
        encoded.open_folder(tmp_path / "killed")
    times = {path: path.stat().st_mtime_ns for path in before}
    shared = ("encode_prompts", *flags, f"--out={tmp_path / 'shared'}", "--processes=2")
    continued, undisturbed, first, second = run(
        ("encode_prompts", *flags, f"--out={tmp_path / 'killed'}"),
        ("encode_prompts", *flags, f"--out={tmp_path / 'whole'}"),
        (*shared, "--process=0"),
        (*shared, "--process=1"),
    )
    ended_well(continued)
    assert times == {path: path.stat().st_mtime_ns for path in before}  # and were not made again
    ended_well(undisturbed)
    assert "other processes are still encoding" in ended_well(first)
    assert "is complete" in ended_well(second)
    whole = files(tmp_path / "whole")
    assert len(whole) == 100 + 1 + 1 + 3  # training, evaluation, negative; and JSON
    assert files(tmp_path / "killed") == whole
    assert files(tmp_path / "shared") == whole
    found = encoded.open_folder(tmp_path / "whole")
    assert found.read("train", range(400))["prompt"].tolist() == read_prompts(prompts)


# --- embeddings of the user's own ----------------------------------------------------------------


def columns(count, seed=0, **changes):
    """Embeddings that SDXL's miniature takes, and features of its rewards."""
    rng = np.random.default_rng(seed)
    shapes = {
        "prompt_embeds": (7, 40),
        "pooled_prompt_embeds": (12,),
        "features/hps_v2_1": (8,),
        "features/clip_score": (8,),
        "features/pickscore": (8,),
        "features/heldout_clip": (8,),
    }
    found = {
        name: rng.standard_normal((count, *shape), np.float32) for name, shape in shapes.items()
    }
    found["features/image_reward"] = rng.integers(20, size=(count, 35), dtype=np.int32)
    found = {"prompt": [f"提示 {seed} {i}" for i in range(count)], **found, **changes}
    return {name: value for name, value in found.items() if value is not None}


def test_the_written_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, (name, count) in enumerate((("train", 8), ("evaluation", 4), ("negative", 1))):
        made = columns(count, seed)
        np.save(f"{name}.npy", made["prompt_embeds"].astype(np.float16))
        np.save(f"{name}_pooled.npy", made["pooled_prompt_embeds"])
        Path(f"{name}.txt").write_text("\n".join(made["prompt"]) + "\n", "utf-8")
    text = (ROOT / "docs" / "prompts.md").read_text("utf-8")
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert {line.split()[1] for line in example.splitlines() if "import" in line} == {
        "numpy",
        "r0_jax.prompts",
    }
    exec(compile(example, "example", "exec"), {})

    evaluation = tmp_path / "evaluation.txt"
    flags = [
        "--config=configs/sdxl_r0.py:dryrun",
        "--config.data.prompts=",
        f"--config.eval.prompts={evaluation}",
        "--config.test.prompts=",
        "--config.sampler.num_steps=1",
        "--config.objective.grad_steps=1",
        "--config.steps=1",
        "--config.eval.term_norms=False",
    ]
    mine, ready = tmp_path / "my_embeddings", tmp_path / "ready"
    train = ("main", *flags, f"--workdir={tmp_path / 'run'}")
    bare, added, trained = run(
        (*train, f"--config.data.encoded={mine}"),
        ("encode_prompts", *flags, f"--config.data.encoded={mine}", f"--out={ready}"),
        (*train, f"--config.data.encoded={ready}"),
    )
    assert "no features of the reward clip_score" in one_line_error(bare)
    ended_well(added)
    ended_well(trained)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    scores = [line["heldout/pickscore"] for line in lines if "heldout/pickscore" in line]
    assert len(scores) == 2 and np.isfinite(scores).all()

    found = encoded.open_folder(ready).read("evaluation", range(4))
    np.testing.assert_array_equal(
        found["prompt_embeds"], np.load("evaluation.npy").astype("bfloat16")
    )
    reward = rewards.load("clip_score", miniature_reward.kept_reward("clip_score", 0))
    np.testing.assert_allclose(
        found["features/clip_score"],
        reward.text_features(lazy.place(reward.params), found["prompt"].tolist()),
        atol=4e-3,
    )


def test_what_is_written_is_what_is_read(tmp_path):
    made = columns(5, ids=np.arange(10, dtype=np.int64).reshape(5, 2))
    encoded_writer.write(
        tmp_path / "e",
        made,
        negative=columns(1, prompt=None, ids=[[0, 0]]),
        dtype="float32",
        shard_prompts=2,
    )
    found = encoded.open_folder(tmp_path / "e")
    assert found.rows == {"train": 5, "negative": 1}
    read = found.read("train", range(5))
    assert read.keys() == made.keys() and read["ids"].dtype == np.int32
    for name, value in made.items():
        np.testing.assert_array_equal(read[name], value)


@pytest.mark.parametrize(
    "train_, negative, message",
    [
        (columns(3, prompt_embeds=None), None, "no column 'prompt_embeds'"),
        (columns(3, prompt_embeds=np.zeros((3, 7, 40), np.int32)), None, "holds int32"),
        (columns(3, prompt_embeds=np.zeros((2, 7, 40), np.float32)), None, "has shape [2, 7, 40]"),
        (columns(3, prompt=["a", "b", 3]), None, "should be texts"),
        (columns(3, pooled_prompt_embeds=np.full((3, 12), np.nan, np.float32)), None, "has NaN"),
        (columns(3) | {"a b": np.zeros((3, 2))}, None, "cannot be the name of a column"),
        (columns(0), None, "has no prompts"),
        (columns(3), columns(2), "expected [1]"),
        (columns(3), columns(1, pooled_prompt_embeds=None), "different columns"),
    ],
)
def test_columns_that_do_not_fit_are_errors(tmp_path, train_, negative, message):
    with pytest.raises(InputError, match=re.escape(message)):
        encoded_writer.write(tmp_path / "e", train_, negative=negative)
    assert not (tmp_path / "e" / "dataset_info.json").exists()


def test_other_embeddings_do_not_continue_what_is_there(tmp_path):
    for _ in range(2):
        encoded_writer.write(tmp_path / "e", columns(3))
    other = columns(3)
    other["prompt_embeds"] = other["prompt_embeds"] + 1
    with pytest.raises(InputError, match="was begun with other embeddings"):
        encoded_writer.write(tmp_path / "e", other)


# --- datasets that do not fit --------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A dry run's config on encoded prompts."""
    folder = tmp_path_factory.mktemp("sdxl")
    config = own_copy("sdxl", folder)
    encode_prompts.encode(config, folder / "encoded", shard_prompts=3)
    config.data.encoded = str(folder / "encoded")
    return config


def check(config):
    """What training looks at before it starts."""
    source = prompts.of(config)
    source.attach(families.load(config.pretrained, family=config.family, text=False))
    source.check(config)
    for name, entry in {**config.rewards, **config.heldout_rewards}.items():
        source.examples(rewards.load(name, entry, text=False), entry)


def test_a_dataset_that_fits_is_taken(sdxl):
    check(sdxl)


def test_prompts_are_found_by_their_text(sdxl):
    source = prompts.of(sdxl)
    pipeline = source.attach(families.load(sdxl.pretrained, family=sdxl.family, text=False))
    path = sdxl.eval.prompts
    found = source.evaluation(path, 2, pipeline, [])
    tokens = source.tokens(found.prompts[::-1], path, pipeline)
    assert tokens.keys() == found.tokens.keys()
    for name, values in found.tokens.items():
        np.testing.assert_array_equal(tokens[name], values[::-1])
    with pytest.raises(InputError, match=r"'unseen' of .* is not among the evaluation prompts"):
        source.tokens(["unseen"], path, pipeline)


def changed(config, **fields):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(fields)
    return config


def test_a_dataset_that_does_not_fit_is_an_error(sdxl, tmp_path):
    def fails(message, **fields):
        with pytest.raises(InputError, match=re.escape(message)) as error:
            check(changed(sdxl, **fields))
        assert "\n" not in str(error.value)

    own = tmp_path / "own"
    encoded_writer.write(own, columns(3))
    mine = {"data.encoded": str(own), "data.prompts": "", "eval.prompts": "", "test.prompts": ""}
    fails(
        "no split 'negative', the embedding of the empty prompt, which regularizers.guidance",
        **mine,
    )
    without = mine | {"regularizers.guidance.weight": 0.0}
    check(changed(sdxl, **without))
    looked_at = tmp_path / "looked_at.txt"
    looked_at.write_text("\n".join(columns(2, seed=1)["prompt"]), "utf-8")
    encoded_writer.write(tmp_path / "both", columns(3), columns(2, seed=1))
    without |= {"data.encoded": str(tmp_path / "both"), "test.prompts": str(looked_at)}
    fails("the base's guidance in test", **without)
    check(changed(sdxl, **without, **{"test.guidance_scale": 1.0}))
    fails("is not a folder", **{"data.encoded": str(tmp_path / "nowhere")})

    other = tmp_path / "other.txt"
    other.write_text("a green star\na prompt that nobody encoded\n", "utf-8")
    fails("the training prompts in", **{"data.prompts": str(other)})
    fails("'a prompt that nobody encoded' of", **{"eval.prompts": str(other)})
    fails("'a prompt that nobody encoded' of", **{"test.prompts": str(other)})
    clip = sdxl.rewards.clip_score.path
    fails("made by a reward with other weights", **{"heldout_rewards.pickscore.path": clip})
    entry = base.reward_entry("clip_score", path=clip)
    new, encoded = rewards.load("new", entry, text=False), prompts.of(sdxl)
    with pytest.raises(InputError, match=r"no features of the reward new.*clip_score"):
        encoded.examples(new, entry)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"prompt_embeds": np.zeros((3, 7, 41), np.float32)},
            "takes prompt_embeds of shape [any, 40]",
        ),
        ({"prompt_embeds": np.zeros((3, 40), np.float32)}, "there are [40] in it"),
        ({"pooled_prompt_embeds": None}, "there are none in it"),
        ({"features/clip_score": np.zeros((3, 9), np.float32)}, "has shape [9], but the reward"),
    ],
)
def test_shapes_that_the_network_does_not_take_are_errors(sdxl, tmp_path, changes, message):
    encoded_writer.write(
        tmp_path / "e",
        columns(3, **changes),
        negative=columns(
            1, **{name: value if value is None else value[:1] for name, value in changes.items()}
        ),
    )
    with pytest.raises(InputError, match=re.escape(message)):
        check(
            changed(
                sdxl,
                **{
                    "data.encoded": str(tmp_path / "e"),
                    "data.prompts": "",
                    "eval.prompts": "",
                    "test.prompts": "",
                },
            )
        )


def test_another_family_or_encoder_is_named(sdxl, tmp_path):
    source = prompts.of(sdxl)
    sd15 = families.load(miniature.kept("StableDiffusionPipeline") / "pipeline", text=False)
    with pytest.raises(InputError, match=r"takes prompt_embeds of shape \[any, 16\]"):
        source.attach(sd15)
    config = own_copy("sd15", tmp_path)
    encode_prompts.encode(config, tmp_path / "encoded")
    taiyi = families.load(miniature.kept("Taiyi") / "pipeline", text=False)
    with pytest.raises(InputError, match="the text_encoder is CLIPTextModel there and BertModel"):
        encoded.open_folder(tmp_path / "encoded").attach(taiyi)


def damage(folder, how):
    shard = folder / "encoded_prompts-train.array_record-00001-of-00003"
    if how == "shard gone":
        shard.unlink()
    elif how == "shard cut":
        shard.write_bytes(shard.read_bytes()[:-20000])
    elif how == "shard empty":
        shard.write_bytes(b"")
    elif how in ("features.json", "dataset_info.json", "metadata.json"):
        (folder / how).write_text('{"broken')
    elif how == "metadata of another shape":
        (folder / "metadata.json").write_text('{"pipeline": 3, "rewards": [], "prompts": null}')
    elif how == "no info":
        (folder / "dataset_info.json").unlink()


@pytest.mark.parametrize(
    "how",
    [
        "shard gone",
        "shard cut",
        "shard empty",
        "features.json",
        "dataset_info.json",
        "metadata.json",
        "no info",
        "metadata of another shape",
    ],
)
def test_a_damaged_dataset_is_one_line(sdxl, tmp_path, how):
    folder = tmp_path / "encoded"
    shutil.copytree(sdxl.data.encoded, folder)
    damage(folder, how)
    with pytest.raises(InputError) as error:
        check(changed(sdxl, **{"data.encoded": str(folder)}))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_foreign_datasets_are_errors_and_their_folders_stay(sdxl, tmp_path):
    tfds_prompts.write(
        {"prompt": ["a", "b"], "input_ids": np.zeros((2, 3), np.int32)}, tmp_path / "p"
    )
    with pytest.raises(InputError, match=r"there are none in it"):
        check(changed(sdxl, **{"data.encoded": str(tmp_path / "p")}))
    tfds_prompts.write(
        {"prompt": ["a"], "prompt_embeds": np.zeros((1, 7, 40), np.int32)}, tmp_path / "q"
    )
    with pytest.raises(InputError, match="holds int32"):
        check(changed(sdxl, **{"data.encoded": str(tmp_path / "q")}))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    config = own_copy("sdxl", tmp_path / "own")
    for folder in (tmp_path / "notes", tmp_path / "p"):
        before = sorted(folder.iterdir())
        with pytest.raises(InputError, match="is in the way"):
            encode_prompts.encode(config, folder)
        assert sorted(folder.iterdir()) == before


def test_a_tfds_dataset_of_the_documented_schema_will_do(sdxl, tmp_path):
    """Written without this project's writer, and without metadata."""

    class Mine(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "mine"
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None  # nothing is downloaded

        def _info(self):
            tensor = tfds.features.Tensor
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "prompt": tfds.features.Text(),
                        "prompt_embeds": tensor(shape=(7, 40), dtype=np.float16, encoding="bytes"),
                        "pooled_prompt_embeds": tensor(shape=(12,), dtype=np.float32),
                        "features__image_reward": tensor(shape=(35,), dtype=np.int32),
                        **{
                            f"features__{name}": tensor(shape=(8,), dtype=np.float32)
                            for name in ("hps_v2_1", "clip_score", "pickscore", "heldout_clip")
                        },
                    }
                ),
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(5, 0),
                "negative": self._generate_examples(1, 1),
            }

        def _generate_examples(self, count, seed):
            made = columns(count, seed)
            made["prompt_embeds"] = made["prompt_embeds"].astype(np.float16)
            for i in range(count):
                yield i, {name.replace("/", "__"): value[i] for name, value in made.items()}

    builder = Mine(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    config = changed(
        sdxl,
        **{
            "data.encoded": str(builder.data_dir),
            "data.prompts": "",
            "eval.prompts": "",
            "test.prompts": "",
        },
    )
    check(config)
    source = prompts.of(config)
    pipeline = source.attach(families.load(config.pretrained, text=False))
    count = config.eval.num_prompts
    found = source.evaluation(config.eval.prompts, count, pipeline, [])
    assert len(found.prompts) == count == len(found.tokens["prompt_embeds"])
    assert not found.features


# --- pieces --------------------------------------------------------------------------------------


def test_shards_cover_all_rows_once():
    planned = shards.plan({"train": 10, "evaluation": 3, "none": 0}, 4)
    assert [(s.split, s.start, s.stop, s.count) for s in planned] == [
        ("train", 0, 4, 3),
        ("train", 4, 8, 3),
        ("train", 8, 10, 3),
        ("evaluation", 0, 3, 1),
    ]


def test_flags_that_do_not_fit_are_one_line(tmp_path):
    encode = ("encode_prompts", "--config=configs/sd15_r0.py:dryrun", f"--out={tmp_path / 'e'}")
    beyond, alone = run((*encode, "--process=2", "--processes=2"), (*encode, "--process=1"))
    assert "--process=2 must be below --processes=2" in one_line_error(beyond)
    assert "--process and --processes go together" in one_line_error(alone)
    assert not (tmp_path / "e").exists()


def test_a_shard_that_another_process_finished_meanwhile_is_taken(tmp_path):
    """Two processes that were given the same share by mistake."""
    schema = {"prompt": None}
    (shard,) = shards.plan({"train": 2}, 4)

    def parts(other):
        yield {"prompt": ["a", "b"]}
        if other:
            shards.write(tmp_path, shard, schema, parts(False))
            shards.finish(tmp_path, [shard], schema)  # which removes unfinished files

    shards.write(tmp_path, shard, schema, parts(True))
    assert shards.missing(tmp_path, [shard]) == [] and len(read_prompts(tmp_path)) == 2
