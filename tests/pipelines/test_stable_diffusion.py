"""A whole folder against stock diffusers, from tokens to images; and folders that are not whole."""

import contextlib
import dataclasses
import json
import shutil
import warnings

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
import torch

from r0_jax.diffusion import grid, schedulers
from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.errors import InputError
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.models.unet_2d_condition import UNet2DConditionConfig
from r0_jax.pipelines import stable_diffusion, tokenizers
from r0_jax.weights import lazy

# diffusers 0.42's Euler under numpy 2: np.array(torch tensor).
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers"
)

PROMPTS = tiny.PROMPTS
LATENTS = parity.normal(0, len(PROMPTS), 8, 8, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    unet = {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }  # one level: quick to compile
    return tiny.stable_diffusion(tmp_path_factory.mktemp("stable_diffusion"), seed=0, unet=unet)


@pytest.fixture(scope="module")
def pipeline(folder):
    return stable_diffusion.load(folder)


@pytest.fixture(scope="module")
def stock(folder):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def copy(folder, tmp_path):
    """The folder, to be tampered with."""
    return shutil.copytree(folder, tmp_path / "copy")


@contextlib.contextmanager
def refused(*said):
    with pytest.raises(InputError) as error:
        yield
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for part in said:
        assert str(part) in message


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


# --- part by part ----------------------------------------------------------------------------


def test_tokenize(pipeline, stock, copy):
    expected = stock.tokenizer(
        PROMPTS, padding="max_length", max_length=tiny.TOKENS, truncation=True, return_tensors="np"
    ).input_ids
    ids = pipeline.tokenize(PROMPTS)["input_ids"]
    assert ids.dtype == np.int32 and ids.shape == (len(PROMPTS), tiny.TOKENS)
    np.testing.assert_array_equal(ids, expected)
    assert len(set(map(tuple, ids))) == len(PROMPTS)
    # As folders on the hub hold it: vocabulary and merges, and no tokenizer.json.
    (copy / "tokenizer" / "tokenizer.json").unlink()
    tokenizer = tokenizers.load_tokenizer(copy / "tokenizer")
    np.testing.assert_array_equal(tokenizers.tokenize(tokenizer, PROMPTS, tiny.TOKENS), expected)


def test_a_textual_inversion_of_several_vectors_is_all_of_them(stock, copy):
    theirs = type(stock.tokenizer).from_pretrained(copy / "tokenizer")
    theirs.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
    theirs.save_pretrained(copy / "tokenizer")
    prompts = ["a <cat> on a <dog>", "<dog>", "a red square"]
    expected = theirs(
        [stock._maybe_convert_prompt(prompt, theirs) for prompt in prompts],
        padding="max_length", max_length=tiny.TOKENS,
    ).input_ids  # fmt: skip
    ours = tokenizers.load_tokenizer(copy / "tokenizer")
    np.testing.assert_array_equal(tokenizers.tokenize(ours, prompts, tiny.TOKENS), expected)
    assert len({"<cat>", "<cat>_1", "<cat>_2"} & set(ours.convert_ids_to_tokens(expected[0]))) == 3


def test_prompts_that_are_cut_off_are_counted(pipeline):
    long = "a red square " * 10
    with pytest.warns(UserWarning, match=r"2 of 5 prompts \(40%\) are longer than 24 tokens"):
        ids = pipeline.tokenize(["a", long, "b", long, ""])["input_ids"]
    assert ids[1, -1] == ids[0, -1] == pipeline.tokenizers["tokenizer"].eos_token_id
    fits = "a " * (tiny.TOKENS - 2)  # and the two ends
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = pipeline.tokenize([fits])["input_ids"]
    assert ids[0, -2] != pipeline.tokenizers["tokenizer"].eos_token_id


@pytest.mark.parametrize("length, expected", [(9, 9), (100, tiny.TOKENS)])
def test_tokens_are_padded_to_the_length_of_the_tokenizer(pipeline, copy, length, expected):
    edit(copy / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    tokenizer = tokenizers.load_tokenizer(copy / "tokenizer")
    other = dataclasses.replace(pipeline, tokenizers={"tokenizer": tokenizer})
    assert other.tokenize(["a red square"])["input_ids"].shape == (1, expected)


def test_encode_prompt(pipeline, stock):
    expected = stock.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    params = lazy.place(pipeline.params)
    conditioning = jax.jit(pipeline.encode_prompt)(params, pipeline.tokenize(PROMPTS))
    assert list(conditioning) == ["prompt_embeds"]
    parity.assert_close(conditioning["prompt_embeds"], parity.to_jax(expected), parity.OUTPUT)


def test_denoise_and_features(pipeline, stock):
    prompt_embeds = parity.normal(1, len(PROMPTS), 5, 16)
    timesteps = np.array([0, 1, 500.5, 999], np.float32)
    features = []
    hook = stock.unet.mid_block.register_forward_hook(lambda *args: features.append(args[-1]))
    expected = stock.unet(*map(parity.to_torch, (LATENTS, timesteps, prompt_embeds))).sample
    hook.remove()

    def run(unet, latents):
        args = unet, latents, jnp.asarray(timesteps), {"prompt_embeds": jnp.asarray(prompt_embeds)}
        return pipeline.denoise(*args), pipeline.features(*args)

    run = jax.jit(run)
    for dtype, tolerance in ((jnp.float32, parity.OUTPUT), (jnp.bfloat16, 1e-1)):
        unet = lazy.place(pipeline.params["unet"], dtype=dtype)
        output, mid = run(unet, LATENTS)
        assert output.dtype == mid.dtype == jnp.float32
        parity.assert_close(output, parity.to_jax(expected), tolerance)
        parity.assert_close(mid, parity.to_jax(features[0]), tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, parity.OUTPUT), (jnp.bfloat16, 1e-1)])
def test_decode(pipeline, stock, dtype, tolerance):
    latents = stock.vae.config.scaling_factor * parity.to_torch(LATENTS)
    decoded = stock.vae.decode(latents / stock.vae.config.scaling_factor).sample
    expected = stock.image_processor.postprocess(decoded.detach(), output_type="np")
    vae = lazy.place(pipeline.params["vae"], dtype=dtype)
    decode = jax.jit(
        lambda vae, latents: (
            pipeline.decode(vae, latents),
            pipeline.decode_unclipped(vae, latents),
        )
    )
    images, unclipped = decode(vae, parity.to_jax(latents))
    assert images.dtype == unclipped.dtype == jnp.float32 and images.shape == (4, 16, 16, 3)
    parity.assert_close(images, expected, tolerance)
    parity.assert_close(unclipped, parity.to_jax(decoded) / 2 + 0.5, tolerance)
    assert unclipped.min() < 0 and unclipped.max() > 1  # or clipping would not be tested


def with_config(pipeline, part, **fields):
    """The pipeline with other fields in the config of a part."""
    network = pipeline.networks[part]
    network = dataclasses.replace(network, config=dataclasses.replace(network.config, **fields))
    return dataclasses.replace(pipeline, networks=pipeline.networks | {part: network})


def test_decode_scales_and_does_not_shift(pipeline, stock):
    """Of the two fields of a VAE's config the stock pipeline of this family reads one."""
    other = with_config(pipeline, "vae", scaling_factor=2.0, shift_factor=0.5)
    vae = diffusers.AutoencoderKL.from_config(
        stock.vae.config, scaling_factor=2.0, shift_factor=0.5
    )
    vae.load_state_dict(stock.vae.state_dict())
    pipe = diffusers.StableDiffusionPipeline(
        **stock.components | {"vae": vae}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    final = {}

    def keep(pipe, i, t, tensors):
        return final.update(tensors) or {}

    expected = pipe(
        PROMPTS,
        num_inference_steps=1,
        guidance_scale=1,
        output_type="np",
        latents=parity.to_torch(LATENTS),
        callback_on_step_end=keep,
    ).images
    vae = lazy.place(pipeline.params["vae"])
    images = jax.jit(other.decode)(vae, parity.to_jax(final["latents"]))
    assert images.std() > 0.05
    parity.assert_close(images, expected, parity.OUTPUT)


def test_shapes(pipeline):
    assert pipeline.latent_shape == (8, 8, 4) and pipeline.image_shape == (16, 16, 3)
    unet = UNet2DConditionConfig.from_json(tiny.UNET | {"sample_size": [6, 10], "in_channels": 5})
    wide = with_config(pipeline, "unet", sample_size=unet.sample_size, in_channels=5)
    assert wide.latent_shape == (6, 10, 5) and wide.image_shape == (12, 20, 3)
    with refused("sample_size", pipeline.folder):
        with_config(pipeline, "unet", sample_size=None).latent_shape  # noqa: B018


# --- whole trajectories ----------------------------------------------------------------------

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = SD | {"_class_name": "DDIMScheduler"}
EULER = SD | {"_class_name": "EulerDiscreteScheduler"}
SCHEDULERS = {
    "sd15": tiny.PNDM,
    # What stock pipelines overrule: steps_offset 0, and the default of clip_sample.
    "ddim_leading": DDIM
    | {"timestep_spacing": "leading", "set_alpha_to_one": False, "steps_offset": 0},
    "ddim_trailing_v": DDIM
    | {
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "clip_sample": False,
    },
    "euler": EULER,
    "euler_leading_v": EULER | {"timestep_spacing": "leading", "prediction_type": "v_prediction"},
}


@pytest.mark.parametrize(
    "name, steps, guidance_scale",
    [
        ("sd15", 4, 5.0),
        ("ddim_leading", 4, 1.0),
        ("ddim_trailing_v", 3, 5.0),
        ("euler", 4, 1.0),
        ("euler_leading_v", 3, 3.0),
    ],
)
def test_images_are_those_of_the_stock_pipeline(pipeline, stock, name, steps, guidance_scale):
    config = SCHEDULERS[name]
    kind = getattr(diffusers, config["_class_name"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that it overrules fields
        pipe = diffusers.StableDiffusionPipeline(
            **stock.components | {"scheduler": kind.from_config(config)},
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        expected = pipe(
            PROMPTS,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            latents=parity.to_torch(LATENTS),
            output_type="np",
        ).images

    config = SchedulerConfig.from_json(config | stable_diffusion.OVERRULED)
    sampler = ImageSampler(pipeline, schedulers.from_config(config, steps), guidance_scale)
    images = sampler(
        lazy.place(pipeline.params),
        pipeline.tokenize(PROMPTS),
        jnp.asarray(LATENTS),
        jax.random.split(jax.random.key(0), len(PROMPTS)),
    )
    assert np.mean((expected > 0.01) & (expected < 0.99)) > 0.2, "saturated: tests little"
    difference = np.abs(np.asarray(images) - expected)
    assert difference.max() < 2 / 255
    assert difference.mean() < 1e-4  # rounding; a wrong step could hide under the line above


def test_few_step_scheduler(pipeline, stock):
    config = grid.exported(pipeline.scheduler_config, 4)
    scheduler = diffusers.DDIMScheduler.from_config(config.fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a stock pipeline has nothing to overrule
        diffusers.StableDiffusionPipeline(
            **stock.components | {"scheduler": scheduler}, requires_safety_checker=False
        )
    scheduler.set_timesteps(4)
    ours = schedulers.from_config(config, 4)
    assert list(scheduler.timesteps) == list(ours.timesteps) == [999, 749, 499, 249]
    assert ours.next_sigmas[-1] == 0 and ours.next_alphas[-1] == 1
    np.testing.assert_allclose(
        config.noise.alphas_cumprod, SchedulerConfig.from_json(tiny.PNDM).noise.alphas_cumprod
    )
    v = grid.exported(SchedulerConfig.from_json(SCHEDULERS["ddim_trailing_v"]), 4)
    assert v.fields["prediction_type"] == "v_prediction" and v.fields["rescale_betas_zero_snr"]


# --- folders that are not it ------------------------------------------------------------------


def test_half_precision_and_old_layouts_load(folder, copy, pipeline):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    for part in ("unet", "vae", "text_encoder"):
        shutil.rmtree(copy / part)
    pipe.save_pretrained(copy, variant="fp16", max_shard_size="40KB")
    assert not list(copy.glob("*/*model.safetensors"))
    loaded = stable_diffusion.load(copy, "bfloat16")
    for part, params in loaded.params.items():
        for name, value in params.items():
            assert value.dtype == jnp.bfloat16
            expected = np.asarray(pipeline.params[part][name], np.float32)
            np.testing.assert_allclose(value.astype(np.float32), expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    "path",
    [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_file_is_named(copy, path):
    (copy / path).unlink()
    with refused(copy / path, "missing"):
        stable_diffusion.load(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(copy / part)
    with refused(copy / part, "missing"):
        stable_diffusion.load(copy)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_half_downloaded_tokenizer(copy, name):
    (copy / "tokenizer" / "tokenizer.json").unlink()
    (copy / "tokenizer" / name).unlink()
    with refused(copy / "tokenizer" / name, "missing"):
        stable_diffusion.load(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer(copy, name):
    (copy / "tokenizer" / name).write_text("{", "utf-8")
    with pytest.raises(InputError, match=r"readable CLIP tokenizer|is not valid JSON"):
        stable_diffusion.load(copy)


def test_a_tokenizer_without_a_vocabulary(copy):
    path = copy / "tokenizer" / "tokenizer.json"
    fields = json.loads(path.read_text("utf-8"))
    fields["model"] |= {"vocab": {}, "merges": []}
    path.write_text(json.dumps(fields | {"added_tokens": []}), "utf-8")
    with refused(copy / "tokenizer", "readable CLIP tokenizer"):
        tokenizers.load_tokenizer(copy / "tokenizer")


@pytest.mark.parametrize("length", [0, 1, 77.5, "77"])
def test_a_tokenizer_of_no_length(copy, length):
    edit(copy / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    with refused(copy / "tokenizer"):
        stable_diffusion.load(copy)


@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_merges_that_were_cut_at_the_end_of_a_line(copy, share):
    (copy / "tokenizer" / "tokenizer.json").unlink()
    path = copy / "tokenizer" / "merges.txt"
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join(lines[: 1 + int(share * len(lines))]) + "\n", "utf-8")
    with refused(path, "incomplete", "download it again"):
        stable_diffusion.load(copy)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    tokenizers.load_tokenizer(copy / "tokenizer")


def test_half_downloaded_weights(copy):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with refused(path, "not a complete safetensors file"):
        stable_diffusion.load(copy)


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize(
    "content, said", [("{", "not valid JSON"), ("[]", "JSON object"), ("\udcff", "not valid JSON")]
)
def test_broken_json_is_named(copy, name, content, said):
    (copy / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with refused(copy / name, said):
        stable_diffusion.load(copy)


def test_a_path_that_is_no_folder(tmp_path):
    for path in (tmp_path / "nothing", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with refused(path, "not a folder"):
            stable_diffusion.load(path)
    with refused(tmp_path / "model_index.json", "missing"):
        stable_diffusion.load(tmp_path)


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"_class_name": "StableDiffusionXLPipeline"},
            "is SDXL (StableDiffusionXLPipeline), not Stable Diffusion 1.x",
        ),
        ({"_class_name": None}, "supported: StableDiffusionPipeline"),
        (
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            "says T5EncoderModel of text_encoder",
        ),
        ({"unet": ["diffusers", "UNet2DModel"]}, "says UNet2DModel of unet"),
        ({"vae": [None, None]}, "vae"),
        ({"vae": []}, "vae"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "says AutoencoderTiny of vae"),
    ],
)
def test_another_family_is_named(copy, changes, said):
    edit(copy / "model_index.json", **changes)
    with refused(copy, said):
        stable_diffusion.load(copy)


@pytest.mark.parametrize(
    "part, changes, said",
    [
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        (
            "unet",
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 60,
            },
            "addition_embed_type",
        ),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet", {"num_class_embeds": 4}, "num_class_embeds"),
        ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
        ("unet", {"encoder_hid_dim": 256}, "encoder_hid_dim"),
        ("vae", {"latents_mean": [0.0]}, "latents_mean"),
        ("text_encoder", {"hidden_act": "mish"}, "hidden_act"),
        # Supported, but not what the file holds.
        ("unet", {"layers_per_block": 2}, "attentions.1."),
        ("text_encoder", {"num_hidden_layers": 3}, "layers.2."),
    ],
)
def test_a_config_that_is_not_supported_or_does_not_fit(copy, part, changes, said):
    edit(copy / part / "config.json", **changes)
    with refused(said):
        stable_diffusion.load(copy)


@pytest.mark.parametrize(
    "part, changes, said",
    [
        (
            "unet",
            {"cross_attention_dim": 20},
            "cross_attention_dim is 20, but the text_encoder's hidden_size is 16",
        ),
        ("unet", {"in_channels": 9}, "in_channels is 9, but the vae's latent_channels is 4"),
        ("unet", {"out_channels": 8}, "out_channels is 8, but the vae's latent_channels is 4"),
        (
            "vae",
            {"out_channels": 4},
            "out_channels is 4, but the number of an image's channels is 3",
        ),
        ("text_encoder", {"vocab_size": 500}, "the text_encoder knows 500 tokens"),
    ],
)
def test_parts_of_different_models(copy, part, changes, said):
    edit(copy / part / "config.json", **changes)
    for path in copy.glob("*/*.safetensors"):  # said before gigabytes are read
        path.write_bytes(b"")
    with refused(copy, said, "belong to different models"):
        stable_diffusion.load(copy)


@pytest.mark.parametrize("nested", [False, True])
def test_masked_padding_is_refused(copy, nested):
    path = copy / "text_encoder" / "config.json"
    edit(path, use_attention_mask=True)
    if nested:
        path.write_text(
            json.dumps({"model_type": "clip", "text_config": json.loads(path.read_text("utf-8"))}),
            "utf-8",
        )
    with refused(path, "use_attention_mask"):
        stable_diffusion.load(copy)


def test_a_text_encoder_with_the_config_of_a_whole_clip(copy, pipeline):
    path = copy / "text_encoder" / "config.json"
    fields = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({"model_type": "clip", "text_config": fields}), "utf-8")
    loaded = stable_diffusion.load(copy)
    assert loaded.networks["text_encoder"].config == pipeline.networks["text_encoder"].config


@pytest.mark.parametrize(
    "version, size, expected",
    [
        ("0.6.0", 8, (64, 64)),
        ("0.8.1", 32, (64, 64)),
        ("0.8.1", [8, 8], (8, 8)),
        ("0.8.1", 96, (96, 96)),
        ("0.9.0.dev0", 8, (8, 8)),
        ("0.42.0", 8, (8, 8)),
        (None, 8, (8, 8)),
    ],
)
def test_the_sample_size_of_old_folders(copy, version, size, expected):
    """As the stock pipeline reads it."""
    path = copy / "unet" / "config.json"
    edit(path, _diffusers_version=version, sample_size=size)
    if version is None:
        fields = json.loads(path.read_text("utf-8"))
        del fields["_diffusers_version"]
        path.write_text(json.dumps(fields), "utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(copy).unet.config.sample_size
    assert expected == (tuple(theirs) if isinstance(theirs, list | tuple) else (theirs, theirs))
    mended = expected[0] != size and not isinstance(size, list)
    with (
        pytest.warns(UserWarning, match=f"sample_size {size}: 64")
        if mended
        else (contextlib.nullcontext())
    ):
        loaded = stable_diffusion.load(copy)
    assert loaded.latent_shape == (*expected, 4)


def test_the_scheduler_is_of_the_class_in_the_index(copy):
    """As in stock pipelines: the name in the scheduler's own file plays no part."""
    edit(copy / "scheduler" / "scheduler_config.json", _class_name=["PNDMScheduler"])
    edit(copy / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(copy)
    loaded = stable_diffusion.load(copy)
    assert loaded.scheduler_config.class_name == type(pipe.scheduler).__name__
    ours = schedulers.from_config(loaded.scheduler_config, 4)
    pipe.scheduler.set_timesteps(4)
    np.testing.assert_allclose(ours.timesteps, pipe.scheduler.timesteps)
    edit(copy / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    loaded = stable_diffusion.load(copy)
    with refused("DPMSolverMultistepScheduler", "DDIMScheduler"):
        schedulers.from_config(loaded.scheduler_config, 4)
    assert grid.grid(loaded.scheduler_config, 4).timesteps.tolist() == [999, 749, 499, 249]
    edit(copy / "model_index.json", scheduler=["diffusers", "CogVideoXDDIMScheduler"])
    loaded = stable_diffusion.load(copy)  # prompts can be encoded with it
    with refused("CogVideoXDDIMScheduler"):
        grid.grid(loaded.scheduler_config, 4)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [None, None],
        [],
        3,
        ["diffusers", ["DDIMScheduler"]],
        ["DDIMScheduler"],
        ["diffusers", "DDIMScheduler", "x"],
    ],
)
def test_an_index_without_a_scheduler(copy, entry):
    edit(copy / "model_index.json", scheduler=entry)
    with refused(copy / "model_index.json", f"scheduler is {json.dumps(entry)}"):
        stable_diffusion.load(copy)


@pytest.mark.parametrize(
    "part, entry",
    [
        ("safety_checker", []),
        ("text_encoder", ["transformers"]),
        ("unet", "UNet2DConditionModel"),
        ("vae", ["diffusers", "AutoencoderKL", None]),
        ("tokenizer", ["transformers", 3]),
    ],
)
def test_an_index_whose_parts_are_no_pairs(copy, part, entry):
    edit(copy / "model_index.json", **{part: entry})
    with refused(copy / "model_index.json", f"{part} is {json.dumps(entry)}: its library and"):
        stable_diffusion.load(copy)


def test_a_part_without_a_library_is_none(copy):
    """As diffusers reads it."""
    edit(copy / "model_index.json", text_encoder=[None, "CLIPTextModel"])
    with refused("model_index.json lacks text_encoder: CLIPTextModel"):
        stable_diffusion.load(copy)


@pytest.mark.parametrize("part", ["unet", "scheduler", "tokenizer"])
def test_a_part_that_is_a_file(copy, part):
    shutil.rmtree(copy / part)
    (copy / part).write_text("")
    with refused(copy / part, "missing"):
        stable_diffusion.load(copy)


@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json"])
def test_a_json_file_that_is_a_folder_or_bottomless(copy, name):
    (copy / name).write_text("[" * 100_000)
    with refused(copy / name, "not valid JSON"):
        stable_diffusion.load(copy)
    (copy / name).unlink()
    (copy / name).mkdir()
    with refused(copy / name, "is a folder"):
        stable_diffusion.load(copy)
