"""Published sizes without weights: read as any folder is, with the published number of weights."""

import numpy as np
import pytest

from r0_jax import rewards
from r0_jax.errors import InputError
from r0_jax.pipelines import families, tiny_decoder
from r0_jax.stand_ins import blank

# Millions of parameters of the part that is trained.
SIZES = {
    "StableDiffusionPipeline": 859.5,
    "StableDiffusionXLPipeline": 2567.5,
    "StableDiffusion3Pipeline": 2084.95,
    "ZImagePipeline": 6154.91,
}


@pytest.mark.parametrize("family", SIZES)
def test_pipelines(tmp_path, family):
    blank.write_pipeline(tmp_path / "pipeline", family)
    pipeline = families.load(tmp_path / "pipeline", "bfloat16")
    params = pipeline.params[pipeline.generator_part]
    assert sum(np.prod(x.shape) for x in params.values()) / 1e6 == pytest.approx(
        SIZES[family], rel=1e-4
    )
    blank.write_decoder(tmp_path / "decoder", family)
    assert tiny_decoder.load(tmp_path / "decoder", pipeline, "bfloat16").params
    assert not np.asarray(min(params.values(), key=lambda x: np.prod(x.shape))).any()
    assert {ids.shape[1] for ids in pipeline.tokenize(["a prompt"]).values()} <= {77, 256, 512}
    on_disk = sum(512 * path.stat().st_blocks for path in tmp_path.rglob("*"))
    assert on_disk < 5e6  # of gigabytes


def test_taiyi(tmp_path):
    assert blank.write_pipeline(tmp_path / "pipeline", "StableDiffusionPipeline", True) == "taiyi"
    pipeline = families.load(tmp_path / "pipeline", "bfloat16")
    assert pipeline.tokenize(["一个红色的圆"])["input_ids"].shape == (1, 512)
    words = pipeline.params["text_encoder"]["embeddings.word_embeddings.embedding"]
    assert words.shape == (21128, 768)


@pytest.mark.parametrize(
    "kind",
    [
        "hps_v2_1",
        "image_reward",
        "cycle_reward",
        "clip_score",
        "aesthetic",
        "pickscore",
        "chinese_clip",
    ],
)
def test_rewards(tmp_path, kind):
    blank.write_reward(tmp_path / kind, kind)
    reward = rewards.load(kind, str(tmp_path / kind), "bfloat16")
    assert sum(np.prod(x.shape) for x in reward.params.values()) > 3e8


@pytest.mark.parametrize("kind", ["hps_v3", "vlm_yes_no"])
def test_rewards_that_are_language_models(tmp_path, kind):
    blank.write_reward(tmp_path / kind, kind)
    reward = rewards.load(kind, str(tmp_path / kind), "bfloat16", text=False)
    # 8.29 billion numbers in the published HPSv3, less lm_head.
    assert sum(np.prod(x.shape) for x in reward.params.values()) == pytest.approx(7.75e9, rel=1e-3)
    assert sum(512 * path.stat().st_blocks for path in tmp_path.rglob("*")) < 2e7
    # As many tokens as the published tokenizer makes of the rubric, within a third.
    assert kind == "vlm_yes_no" or reward.width - 128 == pytest.approx(507, rel=1 / 3)


def test_a_reward_of_no_published_size(tmp_path):
    with pytest.raises(InputError, match="give it a path"):
        blank.write_reward(tmp_path / "x", "function")
