"""SIGTERM while a run is being evaluated."""

import os
import signal
import time

import pytest
from fault_world import measured
from ml_collections import ConfigDict

from r0_jax import config as base
from r0_jax.evaluation import validation
from r0_jax.parallel.stop_signal import Stopped, StopSignal
from r0_jax.stand_ins import miniature, miniature_tokenizer
from r0_jax.training import train
from r0_jax.workdir import checkpoint
from r0_jax.workdir.workdir import LocalWorkdir


def config_in(folder) -> ConfigDict:
    miniature.write(
        folder / "pipeline",
        "StableDiffusionPipeline",
        text_encoder={"num_hidden_layers": 1},
        unet={"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
        vae={
            "block_out_channels": [8],
            "sample_size": 8,
            "down_block_types": ["DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D"],
        },
    )
    (folder / "prompts.txt").write_text("\n".join(miniature_tokenizer.PROMPTS), encoding="utf-8")
    config = base.get_config()
    config.pretrained, config.data.prompts = str(folder / "pipeline"), str(folder / "prompts.txt")
    with config.unlocked():
        for section, name in ((config.rewards, "redness"), (config.heldout_rewards, "blueness")):
            section[name] = base.reward_entry("function", function=f"fault_programs:{name}")
    config.objective.method = "r0plus"
    config.regularizers.weight.weight = 1e-3
    config.sampler.num_steps, config.lora.rank, config.batch_size = 1, 4, 8
    config.steps, config.eval_every, config.eval.num_prompts, config.eval.grid = 4, 2, 4, 4
    config.best_metric, config.early_stop, config.tensorboard = "heldout/blueness", 9, False
    config.eval.term_norms = False  # a program more to trace
    return config


def test_sigterm_in_a_callback_comes_again(capfd):
    """What is raised in one is swallowed."""

    class Dropped:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped), StopSignal():
        dropped = Dropped()
        del dropped
        time.sleep(10)
    assert "Stopped" not in capfd.readouterr().err


def test_sigterm_in_an_evaluation_saves_and_the_next_start_evaluates(tmp_path, monkeypatch):
    config, workdir = config_in(tmp_path), LocalWorkdir(tmp_path / "run")
    drawn, draw = [], validation.draw

    def draw_and_stop(*args):
        drawn.append(args)
        if len(drawn) == 3:  # the base's images, those of step 0, those of step 2
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args)

    monkeypatch.setattr(validation, "draw", draw_and_stop)
    with StopSignal() as stop:
        assert not train.train_and_evaluate(config, workdir, stop)
    assert len(drawn) == 3 and checkpoint.steps(workdir) == [0, 2]
    assert checkpoint.read_metadata(workdir, 2)["metrics"] == {}
    evaluated = [line["step"] for line in measured(workdir.path) if "heldout/blueness" in line]
    assert evaluated == [0] and measured(workdir.path)[-1].keys() >= {"train/loss"}

    assert train.train_and_evaluate(config, workdir, StopSignal())
    lines = measured(workdir.path)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "heldout/blueness" in line] == [0, 2, 4]
    for line in lines[2], lines[4]:
        metrics = checkpoint.read_metadata(workdir, line["step"])["metrics"]
        assert metrics.items() <= line.items() and "heldout/blueness" in metrics
