"""What `tests/support/faults.py` runs in processes of their own, besides the main job itself.

python -m fault_programs restore --config=... --workdir=W    digests of what a mesh restores
python -m fault_programs damage W COUNT SEED                 a line of JSON a damaged checkpoint
"""

import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def redness(images, features):
    """The reward of the campaign: it compiles at once."""
    del features
    return jnp.mean(images[..., 0] - images[..., 1], axis=(1, 2))


def blueness(images, features):
    del features
    return jnp.mean(images[..., 2] - images[..., 1], axis=(1, 2))


def digest(array: Any) -> str:
    value = np.ascontiguousarray(array)
    return f"{value.dtype}{list(value.shape)} {hashlib.sha256(value.tobytes()).hexdigest()}"


def split_small_arrays() -> None:
    """Shards what is far below the 4 MB from which it pays, so that a small world is sharded."""
    from r0_jax.parallel import sharding

    sharding._MIN_BYTES = 2**6


def train() -> None:
    """The main job, its arrays sharded however small they are."""
    from r0_jax import cli, main

    split_small_arrays()
    main.define_flags()
    cli.run(main.main)


def restore() -> None:
    """The main job up to its first step: prints what it was about to train on instead."""
    from r0_jax.training import loop
    from r0_jax.workdir import checkpoint_manager

    def run(self):
        arrays = checkpoint_manager._flatten(self.state)
        split = [name for name, x in arrays.items() if x.addressable_shards[0].data.size < x.size]
        print(
            json.dumps(
                {
                    "devices": len(jax.devices()),
                    "split": len(split),
                    "digests": {name: digest(x) for name, x in arrays.items()},
                }
            )
        )
        return False

    loop.Loop.run = run
    train()


def damage(workdir: str, count: str, seed: str) -> None:
    """Damages the newest of two checkpoints in `count` ways, each on a fresh copy of the run."""
    from ml_collections import ConfigDict

    from r0_jax.errors import InputError
    from r0_jax.method import optim, train_state
    from r0_jax.parallel import sharding
    from r0_jax.workdir import checkpoint, checkpoint_manager
    from r0_jax.workdir.workdir import LocalWorkdir

    workdir = Path(workdir)
    older, newest = checkpoint.steps(LocalWorkdir(workdir))[-2:]
    whole = {}
    for step in (older, newest):
        folder = workdir / "checkpoints" / str(step)
        shapes = checkpoint.stored_shapes(folder)
        whole[step] = (
            {name: digest(x) for name, x in checkpoint.read_arrays(folder, shapes).items()},
            checkpoint.read_metadata(LocalWorkdir(workdir), step),
        )
    config = ConfigDict(json.loads((workdir / "config.json").read_text("utf-8")))
    params = {
        name.removeprefix("params."): shape
        for name, shape in shapes.items()
        if name.startswith("params.")
    }
    moments = [name.split(".")[1] for name in shapes if name.startswith("moments.")]
    state = jax.eval_shape(
        lambda: train_state.init(
            {name: jnp.zeros(x.shape, x.dtype) for name, x in params.items()},
            optim.make_optimizer(config, 0.0),
            sorted(set(moments)),
        )
    )
    where = jax.tree.map(lambda _: sharding.replicated(sharding.local_mesh()), state)
    target = sharding.with_sharding(state, where)

    def outcome(copy: Path) -> str:
        try:  # as a reader of the run, who must not change it
            read, _ = checkpoint.load_params(LocalWorkdir(copy), step=newest)
            reader = (
                "read"
                if all(
                    digest(x) == whole[newest][0][f"ema_params.{name}"] for name, x in read.items()
                )
                and read
                else "WRONG NUMBERS READ"
            )
        except InputError:
            reader = "refused"
        with checkpoint_manager.Checkpoints(LocalWorkdir(copy)) as checkpoints:
            restored, metadata = checkpoints.restore(target)
        step = metadata["step"]
        found = {name: digest(x) for name, x in checkpoint_manager._flatten(restored).items()}
        aside = [path.name for path in (copy / "checkpoints").iterdir() if "damaged" in path.name]
        if (found, metadata) != whole.get(step) or "WRONG" in reader:
            return f"WRONG NUMBERS, at step {step}; the reader: {reader}"
        if step == newest:
            return "harmless" if not aside and reader == "read" else f"{aside}, reader: {reader}"
        return "set aside" if aside == [f"{newest}.damaged"] else f"not set aside: {aside}"

    rng = random.Random(int(seed))
    for number in range(int(count)):
        with tempfile.TemporaryDirectory(dir=workdir.parent) as folder:
            copy = Path(folder) / "run"
            shutil.copytree(workdir, copy)
            how = harm(copy / "checkpoints" / str(newest), rng, number)
            try:
                came_of_it = outcome(copy)
            except Exception as error:  # told with the rest
                came_of_it = f"{type(error).__name__}: {error}"
            print(json.dumps({"how": how[0], "file": how[1], "outcome": came_of_it}), flush=True)


HARMS = ("truncated", "a bit flipped", "deleted", "emptied", "overwritten with zeros")


def harm(checkpoint: Path, rng: random.Random, number: int) -> tuple[str, str]:
    """Does one of `HARMS` to a random file of a checkpoint; says which, and which file.

    Mostly it is one that is read: a process leaves many others, from before they were merged.
    """
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    read = [path for path in found if "ocdbt.process_0" not in path.parts]
    path = rng.choice(read if rng.random() < 0.8 else found)
    how, size = HARMS[number % len(HARMS)], path.stat().st_size
    if how == "deleted":
        path.unlink()
    elif how == "a bit flipped":
        with path.open("r+b") as file:
            file.seek(place := rng.randrange(size))
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    elif how == "overwritten with zeros":
        path.write_bytes(bytes(size))
    else:
        os.truncate(path, 0 if how == "emptied" else rng.randrange(size))
    return how, str(path.relative_to(checkpoint))


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    if name == "damage":
        damage(*arguments)
    else:
        sys.argv = sys.argv[:1] + arguments
        {"train": train, "restore": restore}[name]()
