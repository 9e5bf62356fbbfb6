"""Images on disk: of a folder's own scheduler, of a run, the same however they are batched."""

import json
import os
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from runs import check_refusals, commands, write_run

from r0_jax import sample
from r0_jax.diffusion import rollout
from r0_jax.errors import InputError
from r0_jax.evaluation import images
from r0_jax.evaluation.noise import draw_noise
from r0_jax.export import folder as export
from r0_jax.workdir.workdir import LocalWorkdir

# diffusers 0.42's Euler under numpy 2: np.array(torch tensor).
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers"
)
PROMPTS = ["a red circle", "a blue square above a green star", "红色的圆"]
LATENTS = np.random.default_rng(0).standard_normal((len(PROMPTS), 8, 8, 4), np.float32)
EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
DDIM = EULER | {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
DPM = EULER | {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    tiny.stable_diffusion(folder / "pndm")
    for name, scheduler in [("euler", EULER), ("ddim", DDIM), ("dpm", DPM)]:
        shutil.copytree(folder / "pndm", folder / name)
        path = folder / name / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(scheduler), encoding="utf-8")
        path = folder / name / "model_index.json"
        index = json.loads(path.read_text("utf-8"))
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        path.write_text(json.dumps(index), encoding="utf-8")
    write_run(folder / "run", folder / "pndm", 2, {10: 0.5})
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    np.save(folder / "latents.npy", LATENTS)
    return folder


def stock(folder, steps, prompts=PROMPTS, noise=LATENTS, guidance_scale=1.0, **parts):
    """What diffusers draws from the same noise."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(np.asarray(noise).transpose(0, 3, 1, 2).copy())
    return pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        latents=latents,
        output_type="np",
    ).images


def noise_of(seed, count):
    return draw_noise(jax.random.key(seed), jnp.arange(count), LATENTS.shape[1:])[0]


def difference(a, b):
    return np.abs(a - b).max()


@pytest.mark.parametrize(("name", "guidance_scale"), [("pndm", 4.0), ("euler", 1.0)])
def test_a_folder_is_sampled_by_its_own_scheduler(folder, name, guidance_scale):
    source = sample.from_pipeline(folder / name, 5)
    [drawn] = sample.draw(source, PROMPTS, latents=LATENTS, guidance_scale=guidance_scale)
    theirs = stock(folder / name, 5, guidance_scale=guidance_scale)
    assert drawn.std() > 0.1
    assert difference(drawn, theirs) < 2 / 255
    print(f"{name}: stock diffusers against ours {difference(drawn, theirs):.1e}")


def test_an_image_depends_on_seed_and_index_but_not_on_the_batch(folder):
    prompts = [PROMPTS[0]] * 5
    source = sample.from_pipeline(folder / "ddim", 2, eta=1.0)
    [drawn] = sample.draw(source, prompts, seed=7)
    batches = list(sample.draw(source, prompts, seed=7, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert difference(np.concatenate(batches), drawn) < 1e-4
    assert min(difference(drawn[i], drawn[0]) for i in range(1, 5)) > 0.05
    # eta draws more noise than the first: without it the images are others.
    assert difference(stock(folder / "ddim", 2, prompts, noise_of(7, 5)), drawn) > 0.02


def test_samples_of_a_prompt_keep_their_noise(folder):
    source = sample.from_pipeline(folder / "pndm", 1)
    asked = [(1, 0), (0, 1), (1, 2)]
    [drawn] = sample.draw(source, PROMPTS, samples=asked)
    [first] = sample.draw(source, PROMPTS)
    assert difference(drawn[0], first[1]) < 1e-5
    assert min(difference(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 0.05
    [given] = sample.draw(source, PROMPTS, samples=asked, latents=LATENTS[[1, 0, 2]])
    [theirs] = sample.draw(source, PROMPTS, latents=LATENTS)
    assert difference(given[:2], theirs[[1, 0]]) < 1e-5


def test_noise_is_one_draw_an_index():
    key = jax.random.key(3)
    noise, keys = draw_noise(key, jnp.arange(1000), (4, 4, 2))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert len(np.unique(noise)) > 31_900  # no two alike, but for the 23 bits of a draw
    some, some_keys = draw_noise(key, jnp.asarray([999, 5]), (4, 4, 2))
    np.testing.assert_array_equal(some, noise[jnp.asarray([999, 5])])
    assert (some_keys == keys[jnp.asarray([999, 5])]).all()
    other, _ = draw_noise(jax.random.key(4), jnp.arange(1000), (4, 4, 2))
    assert difference(other, noise) > 1
    # What steps draw is not the first noise again.
    fresh = rollout.normal(keys, 0, (4, 4, 2))
    assert abs(np.corrcoef(fresh.ravel(), noise.ravel())[0, 1]) < 0.03


def test_latents_that_do_not_fit(tmp_path):
    shape = (3, 8, 8, 4)
    good = LATENTS.astype(np.float64)
    cases = {
        "shape": (LATENTS[:2], r"has shape \[2, 8, 8, 4\]; expected .*\[3, 8, 8, 4\], \[N, h, w"),
        "torch": (LATENTS.transpose(0, 3, 1, 2), r"has shape \[3, 4, 8, 8\]"),
        "kind": (np.zeros(shape, np.int32), "holds int32, not floating-point"),
        "nan": (np.where(LATENTS > 2, np.nan, LATENTS), "holds NaN"),
        "huge": (good * 1e300, "holds NaN or infinite"),
        "pickle": (np.full(shape, {}), "not a whole .npy file of numbers"),
    }
    for name, (array, said) in cases.items():
        path = tmp_path / f"{name}.npy"
        np.save(path, array, allow_pickle=True)
        with pytest.raises(InputError, match=said):
            sample.read_latents(path, shape)
    np.savez(tmp_path / "several.npz", LATENTS)
    np.save(tmp_path / "good.npy", LATENTS)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-9])
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04 and no more")
    for name, said in [
        ("several.npz", "several arrays"),
        ("cut.npy", "not a whole"),
        ("empty.npy", "not a whole"),
        ("zip.npy", "not a whole"),
        ("none.npy", "no such file"),
    ]:
        with pytest.raises(InputError, match=said):
            sample.read_latents(tmp_path / name, shape)
    np.save(tmp_path / "good.npy", good)
    read = sample.read_latents(tmp_path / "good.npy", shape)
    assert read.dtype == np.float32 and np.array_equal(read, LATENTS)


# --- the command -------------------------------------------------------------------------


def test_the_command_draws_what_stock_diffusers_draws(folder, tmp_path):
    prompts = ["--prompts", folder / "prompts.txt"]
    [(status, out, err), (run_status, _, run_err)] = commands(
        "r0_jax.sample",
        [
            [
                "--pipeline",
                folder / "ddim",
                *prompts,
                "--out",
                tmp_path / "a",
                "--batch_size=2",
                "--num_inference_steps=3",
                "--latents",
                folder / "latents.npy",
            ],
            ["--workdir", folder / "run", *prompts, "--out", tmp_path / "b", "--seed=4294967295"],
        ],
    )
    assert (status, err, run_status, run_err) == (0, "", 0, "")
    assert out == f"3 images are in {tmp_path / 'a'}, and contact_sheet.png\n"
    export.export(LocalWorkdir(folder / "run"), tmp_path / "exported", "diffusers")
    for name, theirs in [
        ("a", stock(folder / "ddim", 3)),
        ("b", stock(tmp_path / "exported", 4, noise=noise_of(2**32 - 1, 3))),
    ]:
        assert [*map(json.loads, (tmp_path / name / "prompts.jsonl").read_text().splitlines())] == [
            {"id": f"{i:05d}", "prompt": prompt, "image_path": f"{i:05d}.png"}
            for i, prompt in enumerate(PROMPTS)
        ]
        files = [f"{i:05d}.png" for i in range(3)]
        assert {*files, "contact_sheet.png"} <= set(os.listdir(tmp_path / name))
        drawn = np.stack([images.load_png(tmp_path / name / file) for file in files])
        assert difference(drawn, theirs) < 2 / 255
    with Image.open(tmp_path / "a" / "00002.png") as image:
        assert image.text == {
            "prompt": PROMPTS[2],
            "index": "2",
            "seed": "0",
            "num_inference_steps": "3",
            "guidance_scale": "1.0",
            "eta": "0.0",
            "latents": "latents.npy",
        }


def test_processes_share_a_layout_and_a_killed_one_continues(folder, tmp_path):
    """The files are those of one process that draws all, byte for byte."""
    rows = [
        {"item": f"p{i}", "prompt": prompt, "category": "Text_Rendering"}
        for i, prompt in enumerate(PROMPTS)
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")

    def call(out, *flags):
        return [
            *("--pipeline", folder / "pndm", "--prompts", path, "--out", tmp_path / out),
            *("--layout=oneig", "--id_column=item", "--num_inference_steps=1", "--batch_size=6"),
            *flags,
        ]

    share = [call("b", f"--process={i}", "--processes=2") for i in range(2)]
    names = [f"images/text/pndm/p{i}.webp" for i in range(3)]
    results = commands("r0_jax.sample", [call("a"), share[0], share[1], share[0]])
    assert [(status, err) for status, _, err in results] == [(0, "")] * 4
    said = [out.replace(str(tmp_path), "") for _, out, _ in results]
    whole = "3 images are in /b, and contact_sheet.png\n"
    assert said[1:] == [
        "the share of process 0 is in /b; other processes are still drawing\n",
        whole,
        whole,
    ]
    for name in names:
        written = (tmp_path / "b" / name).read_bytes()
        assert written == (tmp_path / "a" / name).read_bytes()
        with Image.open(tmp_path / "b" / name) as image:
            assert image.size == (32, 32)
    # As after a kill before the end, with a file half written under a hidden name.
    (tmp_path / "b" / "prompts.jsonl").unlink()
    (tmp_path / "b" / "images/text/pndm/.p1.webp.00.tmp").write_bytes(b"half")
    again, other = commands("r0_jax.sample", [call("b"), call("b", "--seed=1")])
    assert again[0] == 0 and other[0] == 2 and "holds images already" in other[2]
    assert (tmp_path / "b" / "prompts.jsonl").is_file()
    assert sorted(os.listdir(tmp_path / "b/images/text/pndm")) == ["p0.webp", "p1.webp", "p2.webp"]


def test_a_sampler_that_is_not_here_is_replaced_and_told(folder, tmp_path):
    [(status, out, err)] = commands(
        "r0_jax.sample",
        [
            [
                "--pipeline",
                folder / "dpm",
                "--prompts",
                folder / "prompts.txt",
                "--out",
                tmp_path,
                "--num_inference_steps=3",
                "--latents",
                folder / "latents.npy",
            ]
        ],
    )
    assert status == 0 and out.startswith("3 images are in")
    assert (
        err.startswith(
            f"warning: images are drawn with DDIM, not with the folder's sampler: {folder / 'dpm'}"
        )
        and "scheduler 'DPMSolverMultistepScheduler'" in err
        and err.count("\n") == 1
    )
    ddim = diffusers.DDIMScheduler.from_pretrained(
        folder / "dpm" / "scheduler", timestep_spacing="trailing", clip_sample=False
    )
    theirs = stock(folder / "dpm", 3, scheduler=ddim)
    drawn = np.stack([images.load_png(tmp_path / f"{i:05d}.png") for i in range(3)])
    assert difference(drawn, theirs) < 2 / 255


def test_bad_input_is_one_line(folder, tmp_path):
    prompts = ["--prompts", folder / "prompts.txt"]
    to = ["--out", tmp_path / "out"]
    good = ["--pipeline", folder / "pndm", *prompts, *to]
    (tmp_path / "blank.txt").write_text("\n \n", encoding="utf-8")
    np.save(tmp_path / "two.npy", LATENTS[:2])
    (tmp_path / "used").mkdir()
    images.save_png(tmp_path / "used" / "00000.png", np.zeros((8, 8, 3)))
    check_refusals(
        "r0_jax.sample",
        [
            ([*prompts, *to], "give either --pipeline=DIR or --workdir=W"),
            ([*good, "--workdir", folder / "run"], "give either --pipeline=DIR or --workdir=W"),
            ([*good, "--step=10"], "--step and --pretrained go with --workdir"),
            (["--pipeline", folder / "pndm", *to], "missing --prompts"),
            ([*good, "--prompts", tmp_path / "none.txt"], "none.txt: no such file"),
            ([*good, "--prompts", tmp_path / "blank.txt"], "blank.txt has no prompts"),
            ([*good, "--out", tmp_path / "used"], r"holds images already \(00000.png\); "),
            (
                [*good, "--out", folder / "prompts.txt"],
                "prompts.txt is not a folder; choose another",
            ),
            ([*good, "--out", folder / "prompts.txt" / "x"], "prompts.txt is not a folder; choose"),
            ([*good, "--eta=2"], "--eta=2"),
            ([*good, "--language=zh"], "--language goes with --layout=unigenbench"),
            ([*good, "--process=1"], "--process and --processes go together"),
            ([*good, "--process=2", "--processes=2"], "--process=2 must be below --processes=2"),
            ([*good, "--layout=hpsv2"], "prompt 0 has no field style"),
            ([*good, "--layout=dpg", "--samples_per_prompt=3"], "makes no grid of 2 x 2: give 4"),
            ([*good, "--id_column=id"], "prompt 0: no id among the fields"),
            ([*good, "--guidance_scale=1e308"], r"--guidance_scale=1e308: .* \[0, 1000"),
            ([*good, "--num_inference_steps=0"], "--num_inference_steps=0"),
            ([*good, "--batch_size=0"], "--batch_size=0"),
            ([*good, "--seed=-1"], "--seed=-1"),
            ([*good, "--dtype=float16"], "--dtype=float16"),
            ([*good, "--pipeline", tmp_path], "model_index.json is missing"),
            ([*good, "--num_inference_steps=2000"], "more than the 1000 timesteps"),
            ([*good, "--eta=0.5"], "needs a DDIMScheduler"),
            (["--workdir", folder / "run", *prompts, *to, "--eta=0.5"], "must be 0 or 1 with"),
            ([*good, "--latents", tmp_path / "two.npy"], r"expected .* of shape \[3, 8, 8, 4\]"),
            (["--workdir", folder / "run", *prompts, *to, "--step=7"], "no checkpoint of step 7"),
            (["--workdir", tmp_path / "used", *prompts, *to], "has no config.json"),
        ],
    )
    assert not (tmp_path / "out").exists()
