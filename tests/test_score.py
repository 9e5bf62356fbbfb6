import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tiny
from PIL import Image
from torch_preprocess import noise

from r0_jax import rewards, score
from r0_jax.errors import InputError
from r0_jax.evaluation import images, pairing, statistics, unfinished
from r0_jax.rewards import plugin
from r0_jax.rewards.preprocess import Preprocess
from r0_jax.rewards.reward import Reward
from r0_jax.stand_ins import miniature_reward

ROOT = pathlib.Path(__file__).parent.parent
MODULE = """
def redness(images, features):
    return images[..., 0].mean(axis=(1, 2))

def batch_mean(images, features):
    return images.mean(axis=(1, 2, 3)) - images.mean()

def scalar(images, features):
    return images.mean()

def failing(images, features):
    raise RuntimeError("boom")
"""
PROMPTS = ["a red square", "a blue circle", "a star", "red " * 40, "a green star"]


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "r0_jax.score", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A CLIP, a user's module, prompts, and images of which number 1 is missing and 2 broken."""
    root = tmp_path_factory.mktemp("world")
    tiny.clip(root / "clip", seed=1)
    (root / "mine.py").write_text(MODULE, "utf-8")
    (root / "prompts.txt").write_text("\n".join(PROMPTS), "utf-8")
    drawn = noise(24, 24)
    for number, image in [(0, drawn[0]), (3, drawn[1]), (4, noise(24, 30)[0])]:
        images.save_png(root / "drawn" / f"{number:05d}.png", image)
    (root / "drawn" / "00002.png").write_bytes(b"\x89PNG broken")
    (root / "drawn" / "contact_sheet.png").write_bytes(b"")
    (root / "drawn" / "notes.txt").write_text("not an image", "utf-8")
    return root


def test_a_folder_is_scored_and_what_cannot_be_is_named(world):
    done = run(
        world,
        "--images=drawn",
        "--prompts=prompts.txt",
        "--out=scores.jsonl",
        "--batch_size=2",
        "--rewards=clip_score=clip,again:clip_score=clip,red:function=mine:redness",
    )
    assert done.returncode == 0, done.stderr
    assert "image 00001 is missing" in done.stderr and "00002.png is not an image" in done.stderr
    assert "3 images scored, 2 skipped" in done.stdout

    lines = (world / "scores.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["file"] for row in rows] == ["00000.png", "00003.png", "00004.png"]
    reward = rewards.load("clip_score", world / "clip")
    for row, number in zip(rows, (0, 3, 4), strict=True):
        image = images.load_png(world / "drawn" / row["file"])
        assert row["prompt"] == PROMPTS[number].strip()
        np.testing.assert_allclose(
            row["clip_score"], reward(image[None], [row["prompt"]])[0], atol=1e-5
        )
        assert row["again"] == row["clip_score"]
        np.testing.assert_allclose(row["red"], image[..., 0].mean(), atol=1e-6)

    table = next(line for line in done.stdout.splitlines() if " clip_score " in line)
    entry = statistics.mean_ci(np.asarray([row["clip_score"] for row in rows]))
    assert f"{entry['value']:.4f}" in table and f"{entry['ci95'][0]:.4f}" in table
    assert "33%" in table  # one prompt of three is too long


def test_a_list_of_images_brings_its_prompts(world, tmp_path):
    images.save_png(tmp_path / "a" / "0000.png", noise(24, 24)[0])
    images.save_png(tmp_path / "b" / "0000.png", noise(24, 24)[1])
    rows = [
        {"id": name, "prompt": f"a {name}", "image_path": f"{name}/0000.png"} for name in ("a", "b")
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    flags = [f"--images={path}", "--rewards=function=mine:redness", f"--out={tmp_path / 's.jsonl'}"]
    done = run(world, *flags)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text("utf-8").splitlines()]
    assert [(row["file"], row["prompt"]) for row in found] == [
        ("a/0000.png", "a a"),
        ("b/0000.png", "a b"),
    ]
    np.testing.assert_allclose(found[1]["function"], noise(24, 24)[1][..., 0].mean(), atol=3e-3)
    path.write_text('{"prompt": "x"}', "utf-8")
    with pytest.raises(InputError, match="the record of 'x' has no image_path"):
        pairing.read_listing(path)


def test_files_as_users_have_them(tmp_path):
    drawn = (255 * noise(24, 30)).astype(np.uint8)
    grey = np.linspace(0, 65535, 24 * 30).reshape(24, 30).astype(np.uint16)
    rgba = np.concatenate([drawn[0], drawn[1][..., :1]], axis=-1)
    for name, image in [
        ("0.jpg", Image.fromarray(drawn[0]).convert("CMYK")),
        ("1.png", Image.fromarray(grey)),
        ("2.webp", Image.fromarray(drawn[1])),
        ("3.png", Image.fromarray(rgba)),
        ("4.bmp", Image.fromarray(drawn[0]).convert("P")),
        ("5.PNG", Image.fromarray(drawn[0]).convert("L")),
        ("6.png", Image.fromarray(drawn[0])),
    ]:
        image.save(tmp_path / name)
    (tmp_path / "._0.png").write_bytes(b"of the Finder")
    (tmp_path / "7.png").write_bytes(b"")
    (tmp_path / "8.png").write_bytes((tmp_path / "6.png").read_bytes()[:200])
    (tmp_path / "9.png").mkdir()
    prompts = ["a red square", "a star"] * 5
    items, missing = score.pair(tmp_path, prompts)
    assert len(items) == 10 and not missing

    asked = []

    def text_features(params, prompts):
        asked.append(list(prompts))
        return np.asarray([[len(prompt)] for prompt in prompts], np.float32)

    brightness = Reward(
        "brightness",
        {},
        lambda params, images, features: features[:, 0] + images.mean((1, 2, 3)),
        text_features,
    )
    problems = []
    rows = score.score([brightness], items, 4, problems.append)
    assert asked == [["a red square", "a star"]]  # each once
    assert sorted(rows) == [0, 1, 2, 3, 4, 5, 6]
    assert [
        name in problem for name, problem in zip(("7.png", "8.png", "9.png"), problems, strict=True)
    ] == [True] * 3
    found = [rows[i]["brightness"] - len(prompts[i]) for i in range(7)]
    np.testing.assert_allclose(found[1], 0.5, atol=1e-3)  # 16 bits
    np.testing.assert_allclose(found[3], drawn[0].mean() / 255, atol=1e-3)  # under transparency
    np.testing.assert_allclose(found[6], drawn[0].mean() / 255, atol=1e-3)


def test_one_batch_is_held_whatever_shapes_images_have(tmp_path, monkeypatch):
    shapes = [(4, 5 + i % 3) for i in range(12)] + [(6 + i, 4) for i in range(9)]
    for i, shape in enumerate(shapes):
        images.save_png(tmp_path / f"{i:02d}.png", noise(*shape)[0])
    (tmp_path / "21.png").write_bytes((tmp_path / "09.png").read_bytes()[:60])  # with its header
    items, _ = score.pair(tmp_path, [f"prompt {i}" for i in range(22)])
    read, most, found, bad = [], 0, {}, []
    load_png = images.load_png
    monkeypatch.setattr(images, "load_png", lambda path: read.append(path) or load_png(path))
    for indices, drawn in score.batches(items, 3, lambda i, message: bad.append(i)):
        most, read[:] = max(most, len(read)), []
        # One program a shape: four images 4 px high take two batches of three.
        assert len(drawn) == (3 if len(drawn[0]) == 4 else 1)
        found |= dict(zip(indices, drawn, strict=False))
    assert most == 3 and bad == [21] and sorted(found) == list(range(21))
    for i, image in found.items():
        np.testing.assert_array_equal(image, load_png(items[i].path))


def test_an_orientation_that_the_header_does_not_tell(tmp_path, monkeypatch):
    for i in range(3):
        images.save_png(tmp_path / f"{i}.png", noise(4, 5 - i % 2)[0])
    monkeypatch.setattr(images, "read_shape", lambda path: (4, 5, 3))
    items, _ = score.pair(tmp_path, ["x", "y", "z"])
    assert [(indices, drawn.shape) for indices, drawn in score.batches(items, 3, print)] == [
        ([0, 2], (3, 4, 5, 3)),
        ([1], (3, 4, 4, 3)),
    ]


def test_check_of_a_users_reward(world):
    done = run(world, "--check=mine:redness")
    assert done.returncode == 0 and "mine:redness can be trained on" in done.stdout, done.stderr
    done = run(world, "--check=mine:batch_mean")
    assert done.returncode == 2 and "score depends on another image" in done.stderr


def test_an_out_that_cannot_be_written_shows_before_the_work(world):
    done = run(
        world,
        "--images=nowhere",
        "--prompts=prompts.txt",
        "--out=drawn",
        "--rewards=clip_score=clip",
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: --out=drawn is a folder: give a file, such as drawn/scores.jsonl\n"
    )


def test_a_blank_line_among_the_prompts_is_told_by_its_number(world, tmp_path):
    (tmp_path / "prompts.txt").write_text("a star\n\na circle\n")
    done = run(
        world,
        "--images=drawn",
        f"--prompts={tmp_path / 'prompts.txt'}",
        "--out=x.jsonl",
        "--rewards=clip_score=clip",
    )
    assert done.returncode == 2 and "prompts.txt, line 2 is blank" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("names", "count", "said"),
    [
        ([], 1, "holds no images"),
        (["a.png"], 2, "holds 1 images, but there are 2 prompts"),
        (
            ["0.png", "1.png", "grid.png"],
            2,
            r"3 images, but there are 2 prompts: .* from 0 \(grid.png is not\)$",
        ),
        (["5.png"], 5, "5.png has no prompt: there are 5, counted from 0"),
        (["1.png", "01.jpg"], 5, "01.jpg and 1.png have the same number"),
    ],
)
def test_images_that_do_not_say_what_they_show(tmp_path, names, count, said):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=said):
        score.pair(tmp_path, ["x"] * count)


def test_other_names_are_paired_in_order(tmp_path):
    for name in ("b.png", "a.JPG"):
        (tmp_path / name).write_bytes(b"")
    items, missing = score.pair(tmp_path, ["first", "second"])
    assert [(item.path.name, item.prompt) for item in items] == [
        ("a.JPG", "first"),
        ("b.png", "second"),
    ]
    assert missing == []


def test_names_are_ordered_as_people_count(tmp_path):
    for name in (
        "img_10.png",
        "img_9.jpg",
        "img_1.png",
        "img_01.png",
        "img.png",
        "x1y20.png",
        "x1y3.png",
        "img_9b.png",
    ):
        (tmp_path / name).write_bytes(b"")
    items, _ = score.pair(tmp_path, ["x"] * 8)
    assert [item.path.name for item in items] == [
        "img.png",
        "img_01.png",
        "img_1.png",
        "img_9.jpg",
        "img_9b.png",
        "img_10.png",
        "x1y3.png",
        "x1y20.png",
    ]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["img_0", "img_1", "img_3", "img_4"], "img_3.png with 'p2', img_4.png with 'p3'"),
        (
            ["0", "1", "3", "4", "5", "grid"],
            "3.png with 'p2', 4.png with 'p3', 5.png with 'p4', ... (see --out)",
        ),
        (["0", "1", "grid"], "grid.png with 'p2'"),
        (["a_grid", "img_0", "img_1"], "img_0.png with 'p1', img_1.png with 'p2'"),
        (["img_01", "img_1"], "img_1.png with 'p1'"),
        (["img_7", "img_8", "img_9", "img_10"], None),
        (["a_1", "a_2", "b_1", "b_2"], None),
        (["cat_9", "dog_3", "star"], None),
        (["0", "2"], None),  # by number
    ],
)
def test_names_that_leave_a_doubt(names, said):
    items = [score.Item(pathlib.Path(f"{name}.png"), f"p{i}") for i, name in enumerate(names)]
    start = "names are not numbered one by one, so images are paired in order: "
    assert score.doubt(items) == (said and start + said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("clip_score", "should read type=folder"),
        ("prompt:clip_score=clip", "'prompt' is another field in --out: give another name"),
        ("file:clip_score=clip", "'file' is another field in --out"),
        ("hps=/x", "'hps' is unknown; known: clip_score, hps_v2"),
        (
            "pickscore=/nowhere",
            "rewards.pickscore.path = '/nowhere' does not exist: give the folder",
        ),
        ("image_reward=clip", "model_type = 'clip' is not image_reward: make the folder with"),
        ("x:function=mine:scalar", "reward x returns .* for 2 images"),
        ("x:function=mine:failing", "reward x fails on images .*: RuntimeError: boom$"),
    ],
)
def test_rewards_that_cannot_be_loaded(given, said, world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(world)
    with pytest.raises(InputError, match=said):
        score.load_rewards([given], "float32")
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("kind", ["hps_v3", "vlm_yes_no", "cycle_reward"])
def test_rewards_that_read_image_and_prompt_together(kind, world, tmp_path):
    miniature_reward.write_reward(tmp_path, kind)
    [reward] = score.load_rewards([f"{kind}={tmp_path}"], "float32")
    plugin.check(reward, (32, 48, 3), trained=False)
    drawn = [world / "drawn" / "00000.png", world / "drawn" / "00004.png"]  # of two shapes
    items = [score.Item(path, prompt) for path in drawn for prompt in PROMPTS[:2]]
    rows = score.score([reward], items, 2, print)
    assert len({row[kind] for row in rows.values()}) == 4


def test_a_reward_named_twice(world):
    given = [f"clip_score={world / 'clip'}"] * 2
    with pytest.raises(InputError, match="names clip_score twice"):
        score.load_rewards(given, "float32")


def test_neither_torch_nor_tensorflow_is_imported():
    code = (
        "import sys; import r0_jax.score, r0_jax.convert_reward; "
        "print([m for m in ('torch', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_what_is_killed_leaves_the_old_scores_alone(world, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, jax, signal\n\n"
        # In the background of a shell it is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n\n"
        "def reward(images, features):\n"
        "    if images.shape[0] != 2:  # not while it is tried\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n    return images.mean(axis=(1, 2, 3))\n"
    )
    (tmp_path / "scores.jsonl").write_text("old\n")
    done = run(
        tmp_path,
        f"--images={world / 'drawn'}",
        f"--prompts={world / 'prompts.txt'}",
        "--out=scores.jsonl",
        "--rewards=function=slow:reward",
    )
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "scores.jsonl").read_text() == "old\n"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "scores.jsonl",
        "slow.py",
    ]


def test_a_killed_call_continues_where_it_was(tmp_path, monkeypatch):
    prompts = [f"prompt {i}" for i in range(5)]
    for i in range(5):
        images.save_png(tmp_path / f"{i}.png", noise(8, 8 + i)[0])
    items, _ = score.pair(tmp_path, prompts)
    prepare = Preprocess(8)
    seen, load_pixels = [], images.load_pixels

    def judge(params, prepared, features):
        return prepared.mean((1, 2, 3))

    reward = Reward("r", {}, judge, None, prepare=prepare, judge=judge)

    def load(path):
        seen.append(path.name)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return load_pixels(path)

    monkeypatch.setattr(images, "load_pixels", load)
    out = tmp_path / "scores.jsonl"
    job = unfinished.job_of([reward], ["clip=x"], "float32")
    first = unfinished.Unfinished(out, items, job)
    with pytest.raises(KeyboardInterrupt):
        score.score([reward], items, 2, print, first.keep)
    first._file.write(b'["half a li')  # as a kill may leave it
    first._file.close()

    again = unfinished.Unfinished(out, items, job)
    known = again.read()
    assert sorted(known) == [0, 1]
    seen[:] = ["", "", "", ""]
    rows = score.score([reward], items, 2, print, again.keep, known)
    assert sorted(rows) == [0, 1, 2, 3, 4] and seen[4:] == ["2.png", "3.png", "4.png"]
    for i, row in rows.items():
        expected = prepare.on_host(load_pixels(items[i].path)).mean()
        np.testing.assert_allclose(row["r"], expected, atol=1e-5)
    # Another job, and an image that changed, are not continued.
    assert unfinished.Unfinished(out, items, "other").read() == {}
    images.save_png(items[0].path, noise(9, 9)[0])
    assert sorted(again.read()) == [1, 2, 3, 4]
    with pytest.raises(InputError, match="another process is scoring"):
        unfinished.Unfinished(out, items, job).keep({0: {"r": 1.0}})
    again.remove()
    assert not list(tmp_path.glob(".scores*"))


def test_images_of_many_sizes_take_one_program_and_the_memory_of_one(tmp_path):
    for i in range(6):
        images.save_png(tmp_path / f"{i}.png", noise(8 + i, 20 - i)[0])
    items, _ = score.pair(tmp_path, ["x"] * 6)
    shapes = []

    def judge(params, prepared, features):
        shapes.append(prepared.shape)  # once a trace
        return prepared.mean((1, 2, 3))

    reward = Reward("r", {}, judge, None, prepare=Preprocess(8), judge=judge)
    assert len(score.score([reward], items, 4, print)) == 6
    assert shapes == [(4, 8, 8, 3)]


def test_a_name_that_is_not_utf8_and_files_that_are_no_images(world, tmp_path):
    (tmp_path / "i").mkdir()
    images.save_png(tmp_path / "x.png", noise(8, 8)[0])
    os.rename(tmp_path / "x.png", os.fsencode(tmp_path / "i") + b"/a\xff.png")
    os.mkfifo(tmp_path / "i" / "b.png")
    (tmp_path / "p.txt").write_text("a star\na square\n")
    done = run(
        world,
        f"--images={tmp_path / 'i'}",
        f"--prompts={tmp_path / 'p.txt'}",
        f"--out={tmp_path / 's.jsonl'}",
        "--rewards=clip_score=clip",
    )
    assert done.returncode == 0 and "b.png is a pipe or a device" in done.stderr, done.stderr
    (row,) = map(json.loads, (tmp_path / "s.jsonl").read_text("utf-8").splitlines())
    assert os.fsencode(row["file"]) == b"a\xff.png" and row["clip_score"] is not None
