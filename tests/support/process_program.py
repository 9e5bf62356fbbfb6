"""What one of many processes does in tests: small steps together, and one that goes wrong.

python launch/local.py --processes=2 -- tests/support/process_program.py TROUBLE FOLDER
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import grain  # noqa: F401 (slow to import, and nothing is done meanwhile)
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tfds_prompts

from r0_jax import config as base
from r0_jax.errors import InputError
from r0_jax.method import train_state
from r0_jax.parallel import distributed, heartbeat, replicas, sharding
from r0_jax.parallel.stop_signal import Stopped, StopSignal
from r0_jax.prompts import dataset
from r0_jax.prompts.order import Draws
from r0_jax.workdir import checkpoint, checkpoint_manager
from r0_jax.workdir.workdir import LocalWorkdir

STEPS, TROUBLED = 6, 3


def main(trouble: str, folder: Path) -> None:
    config = base.get_config()
    with config.unlocked():
        config.processes.lost_timeout = 8
        config.processes.hang_timeout = 6 if trouble in ("hangs", "stuck") else 60
        config.processes.start_timeout = 5 if trouble == "absent" else 60
    if trouble == "absent" and os.environ["JAX_PROCESS_ID"] == "1":
        raise SystemExit(0)
    with StopSignal() as stop, distributed.joined(config), stop.deferred():
        if trouble in ("full", "unread"):
            save_and_restore(trouble, folder)
        else:
            steps(trouble, folder, stop)


def steps(trouble: str, folder: Path, stop: StopSignal) -> None:
    mesh, me = sharding.global_mesh(), jax.process_index()
    if trouble == "stuck" and me == 1:
        time.sleep(1000)
    prompts = folder / "prompts"
    size = distributed.of_first(lambda: prepare(prompts))
    split = sharding.batch_sharding(mesh)
    parts, count = sharding.local_parts(split)
    batches = dataset.load(prompts, Draws(size, 0), parts, count)
    add = jax.jit(lambda total, x: total + jnp.sum(x), out_shardings=sharding.replicated(mesh))
    total = jax.device_put(np.float32(0), sharding.replicated(mesh))
    for step in range(1, STEPS + 1 if trouble != "endless" else 10**6):
        rows = {"number": next(batches)["number"]}
        print(f"step {step} rows {' '.join(map(str, rows['number']))}", flush=True)
        if step == TROUBLED and me == 1:
            make(trouble)
        heartbeat.beat(f"the batch of step {step}")
        total = add(total, sharding.put_batch(rows, split)["number"])
        if trouble == "differ" and step == TROUBLED and me == 1:
            total = corrupted(total)
        replicas.check({"sum": total}, step)
        print(f"sum {float(np.asarray(total)):g}", flush=True)
        if stop.requested():
            print(f"stopped at step {step}", flush=True)
            return
        if trouble == "endless":
            time.sleep(0.05)


def save_and_restore(trouble: str, folder: Path) -> None:
    """Two checkpoints, and one that the disk refuses to process 0, or process 1 cannot read."""
    where = sharding.replicated(sharding.global_mesh())
    params = {"a.kernel": jnp.arange(4096.0)}
    start = jax.jit(
        lambda step: train_state.init(params, optax.sgd(1.0))._replace(step=step),
        out_shardings=where,
    )
    with checkpoint_manager.Checkpoints(LocalWorkdir(folder)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(start(jnp.int32(step)))
        checkpoints.wait()
        if trouble == "full":
            if jax.process_index() == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            checkpoints.save(start(jnp.int32(3)))
            checkpoints.wait()
        read = checkpoint.read_arrays
        failures = iter([trouble == "unread" and jax.process_index() == 1])

        def once(folder: Path, wanted: dict) -> dict:
            if all(x.sharding for x in wanted.values()) and next(failures, False):
                raise checkpoint._unreadable(folder, ValueError("[os_error_code='5']"))
            return read(folder, wanted)

        checkpoint.read_arrays = once
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            jax.eval_shape(start, jnp.int32(0)),
        )
        print(f"restored {int(checkpoints.restore(target)[0].step)}", flush=True)


def prepare(prompts: Path) -> int:
    size = 8 * jax.process_count()
    numbers = np.arange(3 * size, dtype=np.int32)
    tfds_prompts.write({"prompt": [f"prompt {i}" for i in numbers], "number": numbers}, prompts)
    return size


def make(trouble: str) -> None:
    if trouble == "input":
        raise InputError("bad weights on this host")
    if trouble == "bug":
        raise RuntimeError("a bug")
    if trouble == "asked":
        raise Stopped
    if trouble == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    if trouble == "hangs":
        time.sleep(1000)


def corrupted(array: jax.Array) -> jax.Array:
    """The same array to JAX, with one bit flipped in this process's copy."""
    [shard] = [np.array(shard.data) for shard in array.addressable_shards]
    flipped = (shard.view(np.uint32) ^ np.uint32(1)).view(np.float32)
    here = jax.device_put(flipped.reshape(array.shape), jax.local_devices()[0])
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, [here])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
