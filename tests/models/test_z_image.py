"""Every layer of Z-Image's transformer and the whole of it against diffusers, both ways."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
import torch
from diffusers import ZImageTransformer2DModel as TorchZImage
from diffusers.models.transformers import transformer_z_image as theirs_z_image
from parity import normal

from r0_jax.errors import InputError
from r0_jax.files import read_json
from r0_jax.models import repeat, transformer_z_image
from r0_jax.models.transformer_z_image import ZImageTransformer2DConfig, ZImageTransformer2DModel
from r0_jax.weights import convert
from r0_jax.weights.network import Network

STEM = "diffusion_pytorch_model"
SMALL = 1e-3  # inputs of parts with a norm: at this scale a wrong epsilon shows
FIELDS = {
    "in_channels": 4,
    "dim": 24,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "norm_eps": 1e-4,
    "cap_feat_dim": 10,
    "axes_dims": [4, 2, 6],
    "axes_lens": [100, 20, 30],
}
CONFIG = ZImageTransformer2DConfig.from_json(FIELDS)
SHORT, LONG = 7, 45  # tokens of the captions: filled up to 32 and 64
LENGTHS = np.array([SHORT, LONG], np.int32)
TIMES = np.array([0.0, 0.61], np.float32)


def check(torch_module, constructor, *inputs, theirs=None, ours=None, quiet=()):
    tiny.randomize(torch_module, seed=0)
    parity.quieten(torch_module, *quiet)
    network = parity.part(constructor)
    parity.compare(
        network if ours is None else lambda *args: ours(network, *args),
        parity.params_of(torch_module, network.shapes),
        torch_module if theirs is None else lambda *args: theirs(torch_module, *args),
        *inputs,
    )


def abstract(fields) -> Network:
    config = ZImageTransformer2DConfig.from_json(fields)
    return Network.abstract(lambda rngs: ZImageTransformer2DModel(config, rngs=rngs))


def twins(folder, **fields):
    """A torch transformer and ours, with the same weights, by way of diffusers' folder."""
    module = tiny.randomize(TorchZImage(**FIELDS | fields), seed=0)
    module.save_pretrained(folder)
    network = abstract(read_json(folder / "config.json"))
    return module, network, convert.load(convert.find_files(folder, STEM), network)


def inputs(config, height, width):
    return (
        normal(0, 2, height, width, config.in_channels),
        normal(1, 2, LONG, config.cap_feat_dim),
    )


def ours(network, method="__call__", lengths=LENGTHS):
    return lambda params, latents, embeds: network.apply(
        params, method, latents, jnp.asarray(TIMES), embeds, jnp.asarray(lengths)
    )


def theirs(module, lengths=LENGTHS):
    def run(latents, embeds):
        captions = [row[:length] for row, length in zip(embeds, lengths, strict=True)]
        images = list(latents.unsqueeze(2))
        patch = module.config.all_patch_size[0]
        found = module(images, torch.tensor(TIMES), captions, patch_size=patch)
        return torch.stack(found.sample).squeeze(2)

    return run


# --- parts -------------------------------------------------------------------------------


def test_time_runs_from_noise_to_data():
    module = tiny.randomize(theirs_z_image.TimestepEmbedder(24, mid_size=1024), seed=0)
    network = parity.part(lambda rngs: transformer_z_image.TimestepEmbedder(CONFIG, rngs=rngs))
    times = np.array([0.0, 390.25, 1000.0], np.float32)
    parity.compare(network, parity.params_of(module, network.shapes), module, times)


def places(module, size, filled):
    """What diffusers turns the tokens of an image and a caption by, and our angles."""
    ids = [
        torch.cartesian_prod(torch.tensor([filled + 1]), *map(torch.arange, size)),
        torch.stack([torch.arange(1, filled + 1)] + [torch.zeros(filled, dtype=int)] * 2, 1),
    ]
    return [module.rope_embedder(x.int()) for x in ids]


def test_positions_depend_on_the_length_of_the_caption():
    module = TorchZImage(**FIELDS)
    model = Network.abstract(lambda rngs: ZImageTransformer2DModel(CONFIG, rngs=rngs))
    zeros = {name: jnp.zeros(x.shape) for name, x in model.shapes.items()}
    image, caption = model.apply(zeros, "_angles", jnp.asarray([32, 64]), (3, 5), 64)
    for row, filled in zip(image, (32, 64), strict=True):
        expected_image, expected_caption = places(module, (3, 5), filled)
        for found, expected in ((row, expected_image), (caption[0, :filled], expected_caption)):
            np.testing.assert_allclose(np.cos(found), expected.real, atol=1e-6)
            np.testing.assert_allclose(np.sin(found), expected.imag, atol=1e-6)


@pytest.mark.parametrize("modulation", [False, True])
def test_block(modulation):
    """Of captions of two lengths: the rest is not attended to."""
    mask = torch.arange(9)[None] < torch.tensor([[9], [4]])
    angles = normal(3, 2, 9, 6)
    turns = torch.polar(torch.ones(2, 9, 6), torch.tensor(angles))

    def theirs(module, x, *conditioning):
        return module(x, mask, turns, *conditioning)

    def ours(network, params, x, *conditioning):
        return network(params, x, jnp.asarray(angles), jnp.asarray([9, 4]), *conditioning)

    check(
        theirs_z_image.ZImageTransformerBlock(0, 24, 2, 2, 1e-4, True, modulation=modulation),
        lambda rngs: transformer_z_image.ZImageTransformerBlock(
            CONFIG, modulation=modulation, rngs=rngs
        ),
        SMALL * normal(0, 2, 9, 24),
        *[normal(1, 2, 24)] * modulation,
        theirs=theirs,
        ours=ours,
        quiet=["attention.to_q", "attention.to_k", "attention.to_out", "feed_forward.w2"],
    )


def test_final_layer():
    check(
        theirs_z_image.FinalLayer(24, 16),
        lambda rngs: transformer_z_image.FinalLayer(CONFIG, rngs=rngs),
        SMALL * normal(0, 2, 5, 24),
        normal(1, 2, 24),
    )


# --- the whole ---------------------------------------------------------------------------

CONFIGS = {  # changes, size of the latents
    "pads": ({"n_layers": 2}, (6, 10)),  # 15 tokens
    "no-pads": ({"n_layers": 1, "n_refiner_layers": 2}, (8, 16)),  # 32 tokens
    "one": ({"n_layers": 1, "all_patch_size": [1]}, (5, 9)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_transformer(name, tmp_path):
    fields, size = CONFIGS[name]
    module, network, params = twins(tmp_path, **fields)
    parity.compare(ours(network), params, theirs(module), *inputs(network.config, *size))


def test_captions_may_be_filled_up_further(tmp_path):
    """Rows after a caption's end are not read, however many and whatever is in them."""
    module, network, params = twins(tmp_path, n_layers=1)
    latents, embeds = inputs(network.config, 6, 10)
    lengths = np.array([32, 3], np.int32)  # one fills 32 exactly
    expected = theirs(module, lengths)(*map(parity.to_torch, (latents, embeds)))
    wider = np.concatenate([embeds, 100 * normal(2, 2, 20, 10)], axis=1)
    found = jax.jit(ours(network, lengths=lengths))(params, latents, wider)
    parity.assert_close(found, parity.to_jax(expected), parity.OUTPUT)


def test_mid_features_and_scanned_blocks(tmp_path):
    module, network, params = twins(tmp_path)
    features = []
    module.layers[1].register_forward_hook(lambda *args: features.append(args[-1]))
    latents, embeds = inputs(network.config, 6, 10)
    expected = theirs(module)(*map(parity.to_torch, (latents, embeds)))

    @jax.jit
    def both(*args):
        with repeat.use(repeat.Repeat(scan=True, remat=True)):
            return ours(network)(*args), ours(network, "mid_features")(*args)

    output, middle = both(params, latents, embeds)
    parity.assert_close(output, parity.to_jax(expected), parity.OUTPUT)
    expected = features[0][:, :15].unflatten(1, (3, 5)).detach().numpy()
    parity.assert_close(middle, expected, parity.OUTPUT)


def test_too_many_tokens_are_refused():
    network = abstract(FIELDS)
    for size, captions in (((42, 4), 45), ((4, 62), 45), ((4, 4), 97)):
        args = normal(0, 2, *size, 4), normal(1, 2, captions, 10)
        with pytest.raises(InputError, match="too many tokens for the transformer"):
            jax.eval_shape(ours(network), network.shapes, *args)


def test_bfloat16(tmp_path):
    module, network, params = twins(tmp_path, n_layers=1)
    params = {name: jnp.asarray(value, jnp.bfloat16) for name, value in params.items()}
    latents, embeds = inputs(network.config, 6, 10)
    expected = theirs(module)(*map(parity.to_torch, (latents, embeds)))
    args = (params, *(jnp.asarray(x, jnp.bfloat16) for x in (latents, embeds)))
    output = jax.jit(ours(network))(*args)
    assert output.dtype == jnp.bfloat16
    parity.assert_close(output.astype(jnp.float32), parity.to_jax(expected), 1e-1, "output")
    # Norms, softmax, sinusoids and turns are float32, the bulk of the work is not.
    expected = {
        "rsqrt": {"float32"},
        "exp": {"float32"},
        "cos": {"float32"},
        "dot_general": {"bfloat16"},
    }
    assert parity.input_dtypes(ours(network), *args, primitives=list(expected)) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"all_patch_size": [2, 4]},
        {"all_patch_size": [0]},
        {"all_f_patch_size": [2]},
        {"qk_norm": False},
        {"siglip_feat_dim": 1152},
        {"n_kv_heads": 1},
        {"n_heads": 5},
        {"axes_dims": [4, 4, 6]},
        {"axes_dims": [3, 3, 6]},
        {"axes_dims": [4, 8]},
        {"axes_lens": [100, 20]},
        {"n_layers": 0},
        {"cap_feat_dim": "10"},
        {"a_field_of_tomorrow": 1},
    ],
)
def test_what_is_not_supported_is_refused_by_name(change):
    with pytest.raises(InputError, match=next(iter(change))) as error:
        ZImageTransformer2DConfig.from_json(FIELDS | change)
    assert len(str(error.value).splitlines()) == 1


def test_defaults_are_those_of_diffusers():
    parameters = inspect.signature(TorchZImage.__init__).parameters
    for name, value in dataclasses.asdict(ZImageTransformer2DConfig()).items():
        default = parameters[name].default
        assert value == (tuple(default) if isinstance(default, list) else default), name
