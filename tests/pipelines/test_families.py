"""Every family against its stock pipeline: prompts, guidance, images; and folders mixed up."""

import functools
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch

from r0_jax import sample
from r0_jax.diffusion import grid, schedulers
from r0_jax.errors import InputError
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.method.generator import Generator
from r0_jax.models.attention_backend import Backend
from r0_jax.pipelines import families, stable_diffusion_xl
from r0_jax.stand_ins import miniature, miniature_tokenizer
from r0_jax.weights import lazy

# diffusers 0.42's Euler under numpy 2: np.array(torch tensor).
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers"
    )
]

PROMPTS = ["a red circle", "a blue square above a green star", "红色的圆"]
XL, SD3, Z = "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "ZImagePipeline"
FOLDERS = {  # name -> (miniature, changes)
    "sd": ("StableDiffusionPipeline", {}),
    "taiyi": ("Taiyi", {}),
    "sdxl": (XL, {}),
    "sd3": (SD3, {}),
    "sd3_without_t5": (SD3, {"text_encoder_3": None, "tokenizer_3": None}),
    "z_image": (Z, {"scheduler": {"shift": 6.0}}),
    "z_image_turbo": (Z, {}),
}
diffusers.logging.set_verbosity_error()
diffusers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    for name, (family, changes) in FOLDERS.items():
        miniature.write(root / name, family, **changes)
    return root


@pytest.fixture(scope="module")
def loaded(folders):
    def load(name):
        pipeline = families.load(folders / name)
        return pipeline.sized(16, 16) if is_z_image(name) else pipeline

    return functools.cache(load)


@pytest.fixture(scope="module")
def stock(folders):
    @functools.cache
    def load(name):
        kind = getattr(
            diffusers,
            json.loads((folders / name / "model_index.json").read_text("utf-8"))["_class_name"],
        )
        # Stock diffusers asks for parts that the index says are not there.
        absent = {part: None for part, changes in FOLDERS[name][1].items() if changes is None}
        pipe = kind.from_pretrained(folders / name, **absent)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def is_z_image(name):
    return name.startswith("z_image")


def noise_of(pipeline):
    return parity.normal(0, len(PROMPTS), *pipeline.latent_shape)


def theirs(pipe, latents, steps, guidance_scale, **kwargs):
    if isinstance(pipe, diffusers.ZImagePipeline):
        guidance_scale -= 1  # its convention
        kwargs = {"height": 16, "width": 16} | kwargs
    with torch.no_grad():
        return pipe(
            list(PROMPTS),  # which Z-Image's overwrites
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            latents=parity.to_torch(latents),
            output_type="np",
            **kwargs,
        ).images


def ours(pipeline, scheduler, guidance_scale):
    sampler = ImageSampler(pipeline, scheduler, guidance_scale)
    noise = noise_of(pipeline)
    return np.asarray(
        sampler(
            lazy.place(pipeline.params),
            pipeline.tokenize(PROMPTS),
            jnp.asarray(noise),
            jax.random.split(jax.random.key(0), len(noise)),
        )
    )


def assert_same_images(found, expected):
    assert np.mean((expected > 0.01) & (expected < 0.99)) > 0.2, "saturated: tests little"
    difference = np.abs(found - expected)
    assert difference.max() < 2 / 255
    assert difference.mean() < 1e-4  # rounding; a wrong step could hide under the line above


@pytest.mark.parametrize("name", [name for name in FOLDERS if not is_z_image(name)])
def test_prompts_are_encoded_as_the_stock_pipeline_does(loaded, stock, name):
    pipeline, pipe = loaded(name), stock(name)

    @jax.jit
    def encode(params, tokens, empty):
        positive = pipeline.encode_prompt(params, tokens)
        return positive, pipeline.encode_negative(params, empty, positive)

    positive, negative = encode(
        lazy.place(pipeline.params), pipeline.tokenize(PROMPTS), pipeline.tokenize([""])
    )
    with torch.no_grad():
        if name in ("sd", "taiyi"):
            expected = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
        elif name == "sdxl":
            expected = pipe.encode_prompt(PROMPTS)
        else:
            expected = pipe.encode_prompt(PROMPTS, None, None)
    keys = ["prompt_embeds", "pooled_prompt_embeds"][: len(expected) // 2]
    for (key, which), value in zip(
        [(k, w) for k in keys for w in (positive, negative)], expected, strict=True
    ):
        assert which[key].shape == tuple(value.shape)
        if name == "sdxl" and which is negative:
            assert not which[key].any() and not value.any()
        else:
            parity.assert_close(which[key], value.numpy(), parity.OUTPUT)
    if name.startswith("sd3"):
        assert positive["prompt_embeds"].shape[1] == miniature_tokenizer.TOKENS + 256


@pytest.mark.parametrize(
    "name, steps, guidance_scale",
    [
        ("sdxl", 5, 5.0),
        ("sdxl", 4, 1.0),
        ("sd3", 5, 7.0),
        ("sd3", 4, 1.0),
        ("sd3_without_t5", 4, 3.0),
        ("taiyi", 4, 5.0),
        ("z_image", 5, 5.0),
        ("z_image_turbo", 8, 1.0),
    ],
)
def test_images_are_those_of_the_stock_pipeline(loaded, stock, name, steps, guidance_scale):
    pipeline = loaded(name)
    expected = theirs(stock(name), noise_of(pipeline), steps, guidance_scale)
    scheduler = schedulers.from_config(pipeline.scheduler_config, steps)
    assert_same_images(ours(pipeline, scheduler, guidance_scale), expected)


def test_the_prompt_of_z_image_is_a_chat_whose_pads_are_left_out(loaded, stock):
    pipeline, pipe = loaded("z_image_turbo"), stock("z_image_turbo")
    tokens = pipeline.tokenize(PROMPTS)
    chats = [
        pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in PROMPTS
    ]
    assert chats[0] == "<|im_start|>user\na red circle<|im_end|>\n<|im_start|>assistant\n"
    expected = pipe.tokenizer(chats, padding="max_length", max_length=512, truncation=True)
    np.testing.assert_array_equal(tokens["input_ids"], expected.input_ids)
    with torch.no_grad():
        rows = pipe.encode_prompt([*PROMPTS, ""], "cpu", do_classifier_free_guidance=False)[0]

    @jax.jit
    def encode(params, tokens, empty):
        positive = pipeline.encode_prompt(params, tokens)
        return positive, pipeline.encode_negative(params, empty, positive)

    splits = {"prompts": tokens, "empty": pipeline.empty}
    short = pipeline.shorten(splits)
    assert [ids["input_ids"].shape for ids in short.values()] == [(3, 32), (1, 32)]
    params = lazy.place(pipeline.params)
    for told in (splits, short):
        positive, negative = encode(params, told["prompts"], told["empty"])
        negative = {name: value[:1] for name, value in negative.items()}
        found = {k: np.concatenate([v, negative[k]]) for k, v in positive.items()}
        assert found["prompt_lengths"].tolist() == [len(row) for row in rows]
        for embeds, row in zip(found["prompt_embeds"], rows, strict=True):
            parity.assert_close(embeds[: len(row)], row.numpy(), parity.OUTPUT)
            assert not embeds[len(row) :].any()


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "z_image"])
def test_images_of_another_size_are_those_of_the_stock_pipeline(loaded, stock, name):
    pipeline = loaded(name).sized(24, 16)
    assert pipeline.image_shape == (24, 16, 3)
    assert loaded(name).sized(0, 24).image_shape == (16, 24, 3)  # 0 keeps its own
    assert loaded(name).sized(0, 0) is loaded(name)
    expected = theirs(stock(name), noise_of(pipeline), 2, 3.0, height=24, width=16)
    scheduler = schedulers.from_config(pipeline.scheduler_config, 2)
    assert_same_images(ours(pipeline, scheduler, 3.0), expected)


@pytest.mark.parametrize(
    "name, size, said",
    [
        ("sd", (15, 16), "height=15 must be a multiple of 2"),
        ("sd", (16, 1), "width=1 must be a multiple of 2"),
        ("sd3", (18, 16), "height=18 must be a multiple of 4"),
        ("sd3", (16, 28), "width=28 must be at most 24"),
        ("z_image", (18, 16), "height=18 must be a multiple of 4"),
    ],
)
def test_sizes_that_a_pipeline_has_not(loaded, name, size, said):
    with pytest.raises(InputError, match=said):
        loaded(name).sized(*size)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "z_image"])
def test_the_grid_of_training_is_found_by_a_stock_sampler(loaded, stock, name):
    pipeline, pipe = loaded(name), stock(name)
    config = grid.exported(pipeline.scheduler_config, 4)
    scheduler = getattr(diffusers, config.class_name).from_config(config.fields)
    pipe = type(pipe)(**pipe.components | {"scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    found = ours(pipeline, grid.grid(pipeline.scheduler_config, 4), 1.0)
    assert_same_images(found, theirs(pipe, noise_of(pipeline), 4, 1.0))
    if name == "z_image":  # whose pipeline hands the grid to the folder's own scheduler
        assert config.fields["shift"] == 6 and "shift_terminal" not in config.fields
    if name != "sdxl":  # the same grid, as the card spells it
        spelled = theirs(stock(name), noise_of(pipeline), 4, 1.0, sigmas=[1, 0.75, 0.5, 0.25])
        assert_same_images(found, spelled)
        trained = grid.grid(pipeline.scheduler_config, 4)
        stretched = grid.of_folder(config, 4)
        for levels in (None, [1, 0.75, 0.5, 0.25]):
            drawn = sample.from_pipeline(pipeline.folder, 4, levels).scheduler
            np.testing.assert_array_equal(drawn.sigmas, trained.sigmas)
        np.testing.assert_allclose(stretched.sigmas, trained.sigmas, atol=1e-6)


def test_an_empty_prompt_may_be_encoded_instead_of_zeros(folders, tmp_path):
    folder = shutil.copytree(folders / "sdxl", tmp_path / "sdxl")
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    pipeline = stable_diffusion_xl.load(folder)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    scheduler = schedulers.from_config(pipeline.scheduler_config, 2)
    assert_same_images(ours(pipeline, scheduler, 5.0), theirs(pipe, noise_of(pipeline), 2, 5.0))


def test_bfloat16_keeps_the_sizes_whole(loaded):
    """1336 is no bfloat16: told as one, it would be 1336 no more."""
    pipeline = loaded("sdxl")
    params = lazy.place(pipeline.params, dtype=jnp.bfloat16)
    told = jax.eval_shape(pipeline.encode_prompt, params, pipeline.tokenize(PROMPTS))
    assert told["add_time_ids"].dtype == jnp.int32
    assert told["prompt_embeds"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_full_fine_tuning_trains_all_but_a_table_of_sines(loaded, name):
    pipeline = loaded(name)
    part = pipeline.generator_part
    base, shapes = pipeline.params[part], pipeline.networks[part].shapes
    generator = Generator(0, 1.0, "", fixed=pipeline.fixed)
    params = generator.init(jax.random.key(0), base, shapes)
    assert shapes.keys() - params.keys() == ({"pos_embed.pos_embed"} if name == "sd3" else set())
    moved = generator.weights({name: value + 1 for name, value in params.items()}, base)
    assert moved.keys() == shapes.keys()
    assert all(np.array_equal(moved[name], base[name]) == (name not in params) for name in moved)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "z_image"])
def test_attention_of_every_part_is_computed_by_the_chosen_backend(loaded, name):
    pipeline = loaded(name)
    splash = pipeline.attending(Backend("splash", interpret=True))
    tokens = {k: jnp.asarray(v) for k, v in pipeline.tokenize(PROMPTS[:2]).items()}
    noise = jnp.asarray(noise_of(pipeline)[:2])

    def predict(pipeline):
        def run(params):
            told = pipeline.encode_prompt(params, tokens)
            return pipeline.denoise(
                params[pipeline.generator_part], noise, jnp.asarray([999.0, 10.0]), told
            )

        return run

    def by_splash(function, params):
        return "pallas_call" in str(jax.make_jaxpr(function)(params))

    assert by_splash(lambda p: splash.encode_prompt(p, tokens), pipeline.params)
    assert by_splash(lambda p: splash.decode(p, noise), pipeline.params["vae"])
    assert not by_splash(predict(pipeline), pipeline.params)
    params = lazy.place(pipeline.params)
    found, expected = (jax.jit(predict(p))(params) for p in (splash, pipeline))
    parity.assert_close(found, expected, 1e-5)


# --- folders that are not it ------------------------------------------------------------------


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def test_another_family_is_named(folders):
    with pytest.raises(InputError) as error:
        families.load(folders / "sdxl", family="StableDiffusionPipeline")
    assert str(error.value).startswith(
        "this folder is SDXL (StableDiffusionXLPipeline), the config is for Stable Diffusion 1.x"
    )
    with pytest.raises(InputError, match=r"sd3 is Stable Diffusion 3 .*, not SDXL"):
        stable_diffusion_xl.load(folders / "sd3")
    assert families.load(folders / "taiyi", family="StableDiffusionPipeline")


@pytest.mark.parametrize(
    "family, said",
    [
        (SD3, "gated: log in there and accept its licence"),
        (XL, "stable-diffusion-xl-base-1.0"),
        (Z, "Tongyi-MAI/Z-Image-Turbo"),
        ("", "a supported family"),
    ],
)
def test_without_weights_it_says_which_to_put_where(tmp_path, family, said):
    for folder in ("", str(tmp_path)):
        with pytest.raises(InputError, match=said) as error:
            families.check_there(folder, family)
        assert len(str(error.value).splitlines()) == 1
        assert "--config.pretrained=" in str(error.value)
    with pytest.raises(InputError, match="family='SDXL' is unknown"):
        families.check_there("", "SDXL")


@pytest.mark.parametrize(
    "name, part, changes, said",
    [
        ("sdxl", "unet", {"addition_embed_type": None}, "addition_embed_type"),
        (
            "sdxl",
            "unet",
            {"addition_time_embed_dim": 4},
            "projection_class_embeddings_input_dim is 60",
        ),
        (
            "sdxl",
            "unet",
            {"cross_attention_dim": 16},
            "sum of both text encoders' hidden_size is 40",
        ),
        ("sdxl", "unet", {"time_cond_proj_dim": 8}, "time_cond_proj_dim = 8"),
        ("sdxl", "text_encoder_2", {"vocab_size": 9}, "the tokenizer_2 has ids up to"),
        ("sd3", "transformer", {"qk_norm": "layer_norm"}, "qk_norm"),
        ("sd3", "transformer", {"pooled_projection_dim": 7}, "pooled_projection_dim is 7"),
        ("sd3", "transformer", {"in_channels": 4}, "in_channels is 4"),
        ("sd3", "transformer", {"joint_attention_dim": 48}, "text_encoder_3's d_model is 40"),
        ("sd3_without_t5", "transformer", {"joint_attention_dim": 32}, "add up to 40"),
        ("sd3", "transformer", {"sample_size": 14}, "sample_size = 14"),
        ("z_image", "transformer", {"cap_feat_dim": 24}, "text_encoder's hidden_size is 20"),
        ("z_image", "transformer", {"in_channels": 4}, "in_channels is 4"),
        ("z_image", "transformer", {"qk_norm": False}, "qk_norm"),
        ("z_image", "text_encoder", {"vocab_size": 9}, "the tokenizer has ids up to"),
        ("sd3", "text_encoder_2", {"max_position_embeddings": 8}, "text_encoder_2 has 8 positions"),
        (
            "taiyi",
            "text_encoder",
            {"position_embedding_type": "relative"},
            "position_embedding_type",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named_before_weights_are_read(
    folders, tmp_path, name, part, changes, said
):
    folder = shutil.copytree(folders / name, tmp_path / name)
    edit(folder / part / "config.json", **changes)
    for path in folder.glob("*/*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        families.load(folder)


def test_t5_that_was_not_downloaded(folders, tmp_path, loaded):
    """9.5 GB that one may do without, but not half of it."""
    folder = shutil.copytree(folders / "sd3", tmp_path / "sd3")
    shutil.move(folder / "text_encoder_3", tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="text_encoder_3 is missing: loading without it"):
        pipeline = families.load(folder)
    without = loaded("sd3_without_t5")
    assert pipeline.networks.keys() == without.networks.keys()
    assert pipeline.tokenizers.keys() == without.tokenizers.keys() == {"tokenizer", "tokenizer_2"}
    (folder / "text_encoder_3").mkdir()
    with pytest.raises(InputError, match=r"text_encoder_3.*config\.json is missing"):
        families.load(folder)
    (folder / "text_encoder_3").rmdir()
    shutil.move(tmp_path / "elsewhere", folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    with pytest.raises(InputError, match=r"tokenizer_3/tokenizer\.json is missing"):
        families.load(folder)


@pytest.mark.parametrize(
    "name, file",
    [
        ("sd3", "tokenizer_3/tokenizer.json"),
        ("taiyi", "tokenizer/vocab.txt"),
        ("sdxl", "tokenizer_2/merges.txt"),
        ("z_image", "tokenizer/merges.txt"),
    ],
)
def test_a_missing_tokenizer_file_is_named(folders, tmp_path, name, file):
    folder = shutil.copytree(folders / name, tmp_path / name)
    (folder / file).unlink()
    with pytest.raises(InputError, match=f"{file} is missing"):
        families.load(folder)
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=f"{file} is a Git LFS pointer"):
        families.load(folder)
