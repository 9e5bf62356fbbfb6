"""Opens a page on which a prompt is drawn by several models, side by side from the same noise.

    python -m r0_jax.demo                                  the embedded world's base and newest run
    python -m r0_jax.demo --pipelines=base=DIR,r0=WORKDIR --rewards=hps_v2_1=models/hps_v2_1

A model is a diffusers folder or the workdir of a run, which may still be training. The page is for
this machine alone, unless `--host=0.0.0.0` opens it to others. It needs `pip install
'r0_jax[demo]'`.
"""

from r0_jax import signals

if __name__ == "__main__":
    signals.end_at_once()  # until cli.run: the imports below take seconds

import os
import time
from importlib import metadata
from pathlib import Path

from absl import flags

from r0_jax import cli, compilation_cache, rewards
from r0_jax.demo import models
from r0_jax.demo.studio import Studio
from r0_jax.errors import InputError
from r0_jax.evaluation import scoring
from r0_jax.prompts.files import PROMPT
from r0_jax.shapes import PROMPTS

_EXAMPLES = [
    "A red fox in the snow at dawn, photograph",
    "an old lighthouse on a cliff, oil painting",
    "a cup of coffee beside an open book, soft light",
    "一只橘猫坐在窗边看雨",
    "水墨画：云雾中的群山和一条小船",
]


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_named_paths("pipelines", "name=folder, ...: diffusers folders or workdirs of runs")
    cli.define_named_paths(
        "rewards",
        "type=folder, ..., or name:type=folder; default: those of the first run",
    )
    cli.define_path("runs", "runs", "without --pipelines: where the newest run is looked for")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of all networks")
    flags.DEFINE_string("host", "127.0.0.1", "address to serve on; 0.0.0.0 is open to others")
    flags.DEFINE_integer("port", 7860, "port to serve on", lower_bound=1, upper_bound=65535)


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    try:
        metadata.version("gradio")  # a folder of this name here would be imported in its place
    except metadata.PackageNotFoundError:
        raise InputError("the demo needs gradio: python -m pip install 'r0_jax[demo]'") from None
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before its import; it would call home
    for name in ("NO_PROXY", "no_proxy"):  # it looks at its own page, which no proxy reaches
        own = [os.environ.get(name, ""), "localhost", "127.0.0.1", given.host]
        os.environ[name] = ",".join(filter(None, own))
    from r0_jax.demo import page

    compilation_cache.keep()
    if given.pipelines:
        found, examples = models.load(given.pipelines), _EXAMPLES
    else:
        found = models.of_world(Path(given.runs))
        examples = (PROMPTS / "test.txt").read_text("utf-8").splitlines()[:6]
    if given.rewards:
        judges = scoring.load_rewards(given.rewards, given.dtype)
    else:
        entries = next((model.rewards for model in found if model.rewards), {})
        judges = [
            rewards.load(name, entry, given.dtype)
            for name, entry in entries.items()
            if entry.reads == PROMPT  # a page has no other text
        ]
    studio = Studio(found, judges, given.dtype)
    try:
        address = page.launch(page.build(studio, examples), given.host, given.port)
    except (OSError, ValueError):  # gradio's ValueError: it does not reach its own page
        raise InputError(
            f"cannot serve on {given.host}, port {given.port}: it is in use or not of this "
            "machine; give another --port or --host"
        ) from None
    print(f"models: {', '.join(model.name for model in found)}")
    print(f"open {address} in a browser; Ctrl-C ends the demo", flush=True)
    while True:
        time.sleep(0.5)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
