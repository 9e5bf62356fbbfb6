"""The parts of the work that are no command of r0_jax: each runs in a process of its own.

    python -m benchmarks.fullsize.tasks --task=make --folder=runs/fullsize/sd15

prints one JSON object on its last line.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks.fullsize import folders, setting
from benchmarks.fullsize.setting import FAMILIES, HELDOUT, REWARDS, Places, Setting
from r0_jax import cli
from r0_jax.files import read_json
from r0_jax.stand_ins import blank
from r0_jax.stand_ins.miniature_tokenizer import PROMPTS
from r0_jax.weights.tensor_file import TensorFile

DRAWN = 2  # prompts
STEPS = 4


def make(asked: Setting, at: Places) -> dict[str, Any]:
    """Write models, prompts and noise; return how many parameters there are of each."""
    from r0_jax.pipelines import families

    shutil.rmtree(at.models, ignore_errors=True)
    at.models.mkdir(parents=True)
    kind, judges = FAMILIES[asked.family].kind, dict.fromkeys(HELDOUT.values())
    if asked.miniature:
        folders.write_miniature(at.pipeline, kind)
    else:
        folders.write_pipeline(at.pipeline, kind)
    counts = {path.name: _parameters(path) for path in sorted(at.pipeline.iterdir())}
    for seed, name in enumerate((*REWARDS, *judges)):
        path = at.models / name
        if asked.miniature:
            folders.write_miniature_reward(path, name, seed)
        elif name in (*asked.rewards, *judges):
            folders.write_reward(path, name, seed)
        else:  # only to count
            blank.write_reward(path, name)
        counts[name] = _parameters(path)
    if asked.decoder:
        folders.write_decoder(at.models / "decoder", kind)
    at.prompts.write_text("\n".join(PROMPTS) + "\n", "utf-8")
    at.drawn_prompts.write_text("\n".join(PROMPTS[:DRAWN]) + "\n", "utf-8")
    pipeline = families.load(at.pipeline, text=False, images=False).sized(asked.size, asked.size)
    noise = np.random.default_rng(0).standard_normal((DRAWN, *pipeline.latent_shape), np.float32)
    np.save(at.noise, noise)
    return {
        "parameters": {name: count for name, count in counts.items() if count},
        "disk_bytes": sum(x.stat().st_blocks * 512 for x in at.models.rglob("*") if x.is_file()),
        "pixels": list(pipeline.image_shape[:2]),
    }


def _parameters(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    files = [TensorFile(path) for path in folder.glob("*.safetensors")]
    return sum(int(np.prod(x.shape)) for file in files for x in file.tensors.values())


def forward(asked: Setting, at: Places) -> dict[str, Any]:
    """Call the generator once in both dtypes; return seconds and the bytes that it needs."""
    import jax
    import jax.numpy as jnp

    from r0_jax.pipelines import families
    from r0_jax.weights import lazy

    found = {}
    for dtype in ("bfloat16", "float32"):
        pipeline = families.load(at.pipeline, dtype).sized(asked.size, asked.size)
        tokens = pipeline.tokenize(PROMPTS[:1])
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pipeline.params)
        told = jax.eval_shape(pipeline.encode_prompt, shapes, tokens)
        told = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), told)
        generator = lazy.place(pipeline.params[pipeline.generator_part])
        inputs = (jnp.ones((1, *pipeline.latent_shape)), jnp.full(1, 500.0), told)
        compiled = jax.jit(pipeline.denoise).lower(generator, *inputs).compile()
        times = []
        for _ in range(2):  # the first one also fills caches
            begin = time.perf_counter()
            jax.block_until_ready(compiled(generator, *inputs))
            times.append(time.perf_counter() - begin)
        memory = compiled.memory_analysis()
        found[dtype] = {
            "seconds": times[-1],
            "weight_bytes": sum(x.nbytes for x in generator.values()),
            "temporary_bytes": memory.temp_size_in_bytes,
        }
    return {"forward": found, "backend": jax.default_backend()}


def stock(asked: Setting, at: Places) -> dict[str, Any]:
    """Draw every export with stock diffusers in float32; return how far its images are from ours.

    A difference is the largest of a color, of 255. That of "untrained" is what training changed.
    """
    import diffusers
    import torch
    from PIL import Image

    family = FAMILIES[asked.family]
    absent = {"text_encoder_3": None, "tokenizer_3": None} if asked.family == "sd3" else {}
    optional = ("safety_checker", "feature_extractor") if asked.family == "sd15" else ()
    published = absent | dict.fromkeys(optional)
    variant = {} if asked.miniature or asked.family == "sd3" else {"variant": "fp16"}
    noise = torch.from_numpy(np.load(at.noise).transpose(0, 3, 1, 2).copy())
    ours = np.stack(
        [np.asarray(Image.open(at.images / f"{i:05d}.png"), np.float32) for i in range(DRAWN)]
    )

    def difference(pipeline: Any) -> float:
        pipeline.set_progress_bar_config(disable=True)
        theirs = [
            pipeline(
                prompt,
                num_inference_steps=STEPS,
                guidance_scale=1,
                latents=noise[i : i + 1],
                height=ours.shape[1],
                width=ours.shape[2],
                output_type="np",
            ).images[0]
            for i, prompt in enumerate(PROMPTS[:DRAWN])
        ]
        return float(np.abs(np.round(255 * np.stack(theirs)) - ours).max())

    def load(folder: Path, **options: Any) -> Any:
        return diffusers.DiffusionPipeline.from_pretrained(
            folder, torch_dtype=torch.float32, **options
        )

    found = {"diffusers": difference(load(at.exported / "diffusers", **absent))}
    pipeline = load(at.pipeline, **published, **variant)
    scheduler = at.exported / "peft"
    kind = getattr(diffusers, read_json(scheduler / "scheduler_config.json")["_class_name"])
    pipeline.scheduler = kind.from_pretrained(scheduler)
    found["untrained"] = difference(pipeline)
    for form in family.formats[1:]:
        (adapters,) = (at.exported / form).glob("*.safetensors")
        pipeline.load_lora_weights(adapters.parent, weight_name=adapters.name)
        found[form] = difference(pipeline)
        pipeline.unload_lora_weights()
    return {"differences": found, "standard_deviation": float(ours.std())}


TASKS: dict[str, Callable[[Setting, Places], dict[str, Any]]] = {
    "make": make,
    "forward": forward,
    "stock": stock,
}


def define_flags() -> None:
    flags.DEFINE_enum("task", None, list(TASKS), "what to do", required=True)
    cli.define_path("folder", None, "of the family", required=True)


def main(argv: list[str]) -> None:
    del argv
    folder = Path(flags.FLAGS.folder)
    print(json.dumps(TASKS[flags.FLAGS.task](setting.read(folder), Places(folder))))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
