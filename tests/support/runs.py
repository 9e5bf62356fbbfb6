"""Workdirs of runs that nobody trained, and stock libraries that have nothing to say."""

import contextlib
import json
import logging
import re
from pathlib import Path

import diffusers
import forks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import yaml

from r0_jax import config, sample
from r0_jax.method import train_state
from r0_jax.method.generator import Generator
from r0_jax.pipelines import families
from r0_jax.workdir.checkpoint_manager import Checkpoints
from r0_jax.workdir.workdir import LocalWorkdir

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle", "a blue square above a green star", "红色的圆"]
LATENTS = np.random.default_rng(0).standard_normal((len(PROMPTS), 8, 8, 4), np.float32)
# Linears and convolutions, 1 x 1 and 3 x 3.
TARGETS = r".*\.(to_q|to_v|to_out\.0|proj_in|conv1)|time_embedding\.linear_1"
RANK, ALPHA = 3, 6.0
CLOSE = 2 / 255


def write_run(workdir, pretrained, rank, scores, targets=TARGETS, size=0):
    """A workdir with checkpoints {step: held-out score}, each with other random parameters.

    `size` is that of its images, where the pretrained does not say it.
    """
    fields = {
        "pretrained": str(pretrained),
        "data": {"prompts": "prompts.txt", "encoded": ""},
        "dtype": "float32",
        "attention": "xla",
        "height": size,
        "width": size,
        "steps": 100,
        "batch_size": 8,
        "device_batch": 0,
        "draw_batch": 0,
        "seed": 3,
        "lora": {"rank": rank, "alpha": ALPHA, "targets": targets},
        "sampler": {"num_steps": 4, "eta": 0.0, "random_eta": True, "guidance_scale": 1.0},
        "objective": {"method": "r0plus"},
        "rewards": {"hps": {"weight": 1.0}, "clip": {"weight": 0.5}},
        "heldout_rewards": {"pickscore": {"weight": 1.0}},
        "test": config.get_config().test.to_dict(),
        "regularizers": {"weight": {"weight": 0.01}, "output": {"weight": 0.0}},
    }
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    pipeline = families.load(pretrained)
    part = pipeline.generator_part
    base, shapes = pipeline.params[part], pipeline.networks[part].shapes
    generator = Generator(rank, ALPHA, targets, fixed=pipeline.fixed)
    start = jax.eval_shape(lambda base: generator.init(jax.random.key(0), base, shapes), base)
    with Checkpoints(LocalWorkdir(workdir)) as checkpoints:
        for step, score in scores.items():
            random = np.random.default_rng(step)
            params, ema_params = (
                {
                    name: jnp.asarray(
                        base.get(name, 0) + 0.2 * random.standard_normal(x.shape), x.dtype
                    )
                    for name, x in start.items()
                }
                for _ in range(2)
            )
            state = train_state.init(params, optax.sgd(0.0))
            state = state._replace(step=jnp.int32(step), ema_params=ema_params)
            checkpoints.save(state)
            if score is not None:
                checkpoints.add_metrics(step, {"heldout/pickscore": score}, score)


@contextlib.contextmanager
def silent():
    """Fails if diffusers, transformers or PEFT log a warning, or anything warns in Python."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
    said = [record.getMessage() for record in records]
    # diffusers says this of every LoRA without a text encoder's part, whatever the file holds.
    expected = (
        "No LoRA keys associated to ",
        # Of Taiyi's BERT, in the pipeline that its authors chose for it.
        "Expected types for text_encoder: ",
    )
    assert [x for x in said if not x.startswith(expected)] == []


def images_of(pipeline, steps=4, noise=LATENTS, guidance_scale=1, **size):
    """Stock diffusers' images from the noise; a guidance of 1 is none."""
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    is_z_image = isinstance(pipeline, diffusers.ZImagePipeline)
    if is_z_image:  # it draws 1024 px unless told
        scale = pipeline.vae_scale_factor
        size = {"height": scale * noise.shape[1], "width": scale * noise.shape[2]} | size
    return pipeline(
        list(PROMPTS),  # which Z-Image's overwrites
        num_inference_steps=steps,
        guidance_scale=guidance_scale - 1 if is_z_image else guidance_scale,
        latents=latents,
        output_type="np",
        **size,
    ).images


def ours(source, noise=LATENTS):
    drawn = sample.draw(source, PROMPTS, latents=noise, guidance_scale=source.guidance_scale)
    return np.concatenate(list(drawn))


def difference(a, b):
    return np.abs(a - b).max()


def card(folder):
    """The front matter, the snippet and the rest."""
    _, front, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    return yaml.safe_load(front), snippet, text


def commands(module, calls):
    """[(exit status, stdout, stderr)] of one command with each of several lists of arguments."""
    return forks.run([(module, arguments) for arguments in calls])


def check_refusals(module, cases):
    """Each is one line on stderr that says what the case says, and status 2."""
    for (arguments, said), (status, out, err) in zip(
        cases, commands(module, [arguments for arguments, _ in cases]), strict=True
    ):
        assert (status, out) == (2, ""), (arguments, err)
        assert re.fullmatch(f"error: .*{said}.*\n", err), (arguments, err)
