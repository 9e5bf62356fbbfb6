"""Configs whose weights are not there, and their programs."""

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from r0_jax import prompts, remote, rewards
from r0_jax.config import guided_parts, trained_rewards
from r0_jax.console import console
from r0_jax.pipelines import families
from r0_jax.pipelines.folder import read_index
from r0_jax.prompts.source import PromptSource
from r0_jax.rewards.reward import Reward
from r0_jax.stand_ins import blank
from r0_jax.training import program
from r0_jax.training.program import Program


@contextlib.contextmanager
def filled(config: ConfigDict) -> Iterator[ConfigDict]:
    """Yield the config with weights of zeros in place of those that are not set or not there.

    They have the published sizes and lie in a temporary folder that takes no room. A line on
    standard error names them.
    """
    families.check_family(config.family)
    config, missing = copy.deepcopy(config), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if config.family and not _is_there(config.pretrained):
            # A reward that reads Chinese goes with a pipeline that reads it too.
            computed = trained_rewards(config).values()
            chinese = any(entry.type == "chinese_clip" for entry in computed)
            missing.append(blank.write_pipeline(root / "pipeline", config.family, chinese))
            config.pretrained = str(root / "pipeline")
        families.check_there(config.pretrained, config.family)
        if config.objective.decoder and not _is_there(config.objective.decoder):
            family = read_index(remote.local(config.pretrained))["_class_name"]
            missing.append(blank.write_decoder(root / "decoder", family))
            config.objective.decoder = str(root / "decoder")
        for section, entries in (
            ("rewards", trained_rewards(config)),
            ("heldout_rewards", config.heldout_rewards),
        ):
            for reward, entry in entries.items():
                if entry.type != "function" and not _is_there(entry.path):
                    (root / section).mkdir(exist_ok=True)
                    missing.append(blank.write_reward(root / section / reward, entry.type))
                    entry.path, entry.head = str(root / section / reward), ""
        if missing:
            console.print(
                f"not there, planned with the published sizes: {', '.join(missing)}",
                highlight=False,
                soft_wrap=True,
            )
        if not (config.data.prompts or config.data.encoded):
            (root / "prompts.txt").write_text("a prompt\n", encoding="utf-8")
            config.data.prompts = str(root / "prompts.txt")
        yield config


def _is_there(path: str) -> bool:
    return bool(path) and (remote.url_of(path) is not None or Path(path).exists())


def load(config: ConfigDict, mesh: Mesh) -> Program:
    """Return the config's program; only the training checks that its rewards are sound."""
    source = prompts.of(config)
    pipeline = families.load(config.pretrained, config.dtype, config.family, text=source.text)
    trained_on = _load_rewards(trained_rewards(config), config, source)
    pipeline = source.attach(pipeline).sized(config.height, config.width)
    for name in guided_parts(config):
        source.check_guidance(name)
    return program.build(config, mesh, pipeline, trained_on, source)


def load_heldout(built: Program) -> list[Reward]:
    """Return the rewards with which a program's run is only measured."""
    return _load_rewards(built.config.heldout_rewards, built.config, built.source)


def _load_rewards(
    entries: Mapping[str, ConfigDict] | ConfigDict, config: ConfigDict, source: PromptSource
) -> list[Reward]:
    return [rewards.load(name, entry, config.dtype, source.text) for name, entry in entries.items()]
