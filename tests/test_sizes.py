"""Files that ask for more than they hold, before anything is allocated or built."""

import gzip
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from r0_jax import convert_reward, sample
from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.errors import InputError
from r0_jax.evaluation import images
from r0_jax.models.autoencoder_kl import AutoencoderKLConfig
from r0_jax.models.clip import CLIPTextConfig
from r0_jax.models.unet_2d_condition import UNet2DConditionConfig
from r0_jax.pipelines import families, tokenizers
from r0_jax.stand_ins import miniature
from r0_jax.weights.tensor_file import TensorFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes") / "p"
    miniature.write(folder, "StableDiffusionPipeline")
    return folder


@pytest.mark.parametrize(
    ("config", "field", "value", "said"),
    [
        (CLIPTextConfig, "num_hidden_layers", 10**6, "num_hidden_layers = 1e+06"),
        (AutoencoderKLConfig, "layers_per_block", 10**9, "layers_per_block = 1e+09"),
        (UNet2DConditionConfig, "sample_size", 10**9, "sample_size = 1e+09"),
        (UNet2DConditionConfig, "sample_size", [64, 10**400], "sample_size = too large"),
        (UNet2DConditionConfig, "norm_eps", float("nan"), "norm_eps = NaN"),
        (UNet2DConditionConfig, "norm_eps", -1, "norm_eps = -1"),
        (CLIPTextConfig, "layer_norm_eps", 1e308, "layer_norm_eps"),
        (AutoencoderKLConfig, "scaling_factor", float("inf"), "scaling_factor"),
    ],
)
def test_a_number_that_no_network_has_is_named(config, field, value, said):
    with pytest.raises(InputError, match=re.escape(f"{config.__name__}: {said}")):
        config.from_json({field: value})


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_train_timesteps", 10**9, "num_train_timesteps=1000000000"),
        ("beta_end", float("nan"), "beta_end=nan"),
        ("beta_start", 10**400, "too large"),
        ("steps_offset", 10**12, "steps_offset"),
    ],
)
def test_a_number_that_no_schedule_has_is_named_with_its_file(field, value, said):
    fields = {"_class_name": "DDIMScheduler", field: value}
    config = SchedulerConfig.from_json(fields, "/p/scheduler_config.json: ")
    with pytest.raises(InputError, match=f"^/p/scheduler_config.json: .*{said}"):
        _ = config.sampling


@pytest.mark.parametrize(
    ("part", "field"),
    [("text_encoder", "num_hidden_layers"), ("unet", "layers_per_block")],
)
def test_more_layers_than_the_weights_have_are_not_built(folder, tmp_path, part, field):
    copy = shutil.copytree(folder, tmp_path / "p")
    path = copy / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {field: 9000}), "utf-8")
    with pytest.raises(InputError, match=rf"^{path}: the config asks for more than \d+ tensors"):
        families.load(copy)


def test_added_tokens_with_ids_beyond_any_vocabulary(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "p")
    path = copy / "tokenizer" / "tokenizer_config.json"
    added = {"999999999": {"content": "x"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}))
    with pytest.raises(InputError, match="the id '999999999', which no vocabulary has"):
        tokenizers.load_tokenizer(copy / "tokenizer")


def test_a_tokenizer_that_pads_with_nothing(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "p")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = copy / "tokenizer" / name
        if path.is_file():
            path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))
    with pytest.raises(InputError, match=r"tokenizer_config\.json names no pad_token"):
        tokenizers.load_tokenizer(copy / "tokenizer")


def test_a_pipe_among_the_files_of_a_tokenizer_or_of_weights(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "p")
    os.mkfifo(copy / "tokenizer" / "added_tokens.json")  # which transformers would open
    with pytest.raises(InputError, match=r"added_tokens\.json is a pipe"):
        tokenizers.load_tokenizer(copy / "tokenizer")
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors is a pipe"):
        TensorFile(tmp_path / "x.safetensors")


def test_more_than_eight_thousand_pixels_a_side_of_latents(folder):
    with pytest.raises(InputError, match="height=80000000 must be at most 65536"):
        families.load(folder).sized(80_000_000, 0)


def test_a_header_of_an_array_is_read_before_its_memory_is_taken(tmp_path):
    shape = (2, 8, 8, 4)
    np.save(tmp_path / "x.npy", np.zeros(shape, np.float32))
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(data.replace(b"(2, 8, 8, 4)", b"(9999999999,)"[:12]))
    with pytest.raises(InputError, match=r"x\.npy"):
        sample.read_latents(tmp_path / "x.npy", shape)
    huge = data.replace(b"(2, 8, 8, 4), }  ", b"(2, 8, 8, 4000000000000), }"[:17])
    (tmp_path / "x.npy").write_bytes(huge)
    with pytest.raises(InputError, match=r"x\.npy"):
        sample.read_latents(tmp_path / "x.npy", shape)


def test_a_compressed_file_that_unpacks_to_a_disk_full(tmp_path):
    with gzip.open(tmp_path / "bpe.txt.gz", "wb") as file:
        for _ in range(40):
            file.write(bytes(2**20))
    with pytest.raises(InputError, match="not a gzipped list of merges, or not a whole one"):
        convert_reward.write_tokenizer(tmp_path / "bpe.txt.gz", tmp_path / "out")


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (lambda: torch.zeros(2, dtype=torch.float8_e4m3fn), "of torch.float8_e4m3fn"),
        (lambda: torch.zeros(2).to_sparse(), "sparse"),
        (lambda: torch.empty(2, device="meta"), "a meta tensor without values"),
        (lambda: torch.zeros(1).expand(10**12), "of which the file holds fewer"),
        (lambda: torch.zeros(2, dtype=torch.complex64), "of torch.complex64"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2)], layout=torch.strided), "nested"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch: its nested and sparse tensors are prototypes
def test_tensors_that_are_no_plain_numbers_are_named(tmp_path, tensor, said):
    torch.save({"layers.0.weight": tensor()}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=f"layers.0.weight is .*{said}|not a complete file"):
        convert_reward.read_checkpoint(tmp_path / "x.pt")


def test_scores_of_a_trainer_beside_the_weights_are_read_past(tmp_path):
    state = {"state_dict": {"a": torch.ones(2)}, "epoch": 3, "best": np.float64(0.5)}
    torch.save(state, tmp_path / "x.pt")
    np.testing.assert_array_equal(convert_reward.read_checkpoint(tmp_path / "x.pt")["a"], [1, 1])


def test_an_image_of_floats_and_one_of_too_many_pixels(tmp_path, monkeypatch):
    Image.fromarray(np.full((4, 4), 7.5, np.float32)).save(tmp_path / "0.png", "TIFF")
    with pytest.raises(InputError, match=r"0\.png holds floating-point pixels"):
        images.load_png(tmp_path / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    Image.new("L", (8, 8)).save(tmp_path / "1.png")
    with pytest.raises(InputError, match=r"1\.png has too many pixels"):
        images.load_png(tmp_path / "1.png")
