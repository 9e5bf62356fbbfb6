import dataclasses
import functools
import itertools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from reward_configs import OPEN_CLIP
from safetensors.torch import save_file
from torch_preprocess import in_torch, noise
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from r0_jax import rewards
from r0_jax.config import reward_entry
from r0_jax.errors import InputError
from r0_jax.rewards import plugin, tower
from r0_jax.rewards import reward as reward_module
from r0_jax.rewards.reward import Reward, value_and_gradient
from r0_jax.weights import lazy

PROMPTS = ["a red square", "a blue circle above a green star"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.clip(tmp_path_factory.mktemp("clip"), seed=1)


@functools.cache
def torch_clip(folder):
    return CLIPModel.from_pretrained(folder).eval()


def torch_text(folder, prompts):
    ids = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", truncation=True, max_length=tiny.TOKENS, return_tensors="pt"
    )
    with torch.no_grad():
        features = torch_clip(folder).get_text_features(**ids).pooler_output
    return features / features.norm(dim=-1, keepdim=True)


def torch_image(folder, pixel_values):
    features = torch_clip(folder).get_image_features(pixel_values).pooler_output
    return features / features.norm(dim=-1, keepdim=True)


@pytest.fixture(scope="module")
def reward(folder):
    return rewards.load("clip", reward_entry("clip_score", path=str(folder)))


def score(reward, images, features):
    params = lazy.place(reward.params)
    return jax.jit(reward.score)(params, jnp.asarray(images), features)


def scores_and_gradient(reward, images, features):
    features = features if features is None else jnp.asarray(features)
    compiled = jax.jit(
        lambda params, images: value_and_gradient(
            lambda x: reward.score(params, x, features), images
        )
    )
    return compiled(lazy.place(reward.params), jnp.asarray(images))


@pytest.mark.parametrize("shape", [(40, 40), (23, 40), (11, 9)], ids="{0[0]}x{0[1]}".format)
def test_clip_score_equals_transformers(folder, reward, shape):
    features = reward.text_features(reward.params, PROMPTS)
    scores, gradient = scores_and_gradient(reward, noise(*shape), features)

    images = torch.tensor(noise(*shape), requires_grad=True)
    pixel_values = in_torch(images, "crop").permute(0, 3, 1, 2)
    expected = (torch_image(folder, pixel_values) * torch_text(folder, PROMPTS)).sum(-1)
    expected.sum().backward()
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected.detach(), atol=2e-6)
    size = images.grad.abs().max()
    assert size > 1e-4
    np.testing.assert_allclose(gradient, images.grad, atol=1e-4 * float(size))


def test_clip_score_of_a_folder_that_squashes(tmp_path):
    squash = {"do_center_crop": False, "size": {"height": 16, "width": 16}}
    folder = tiny.clip(tmp_path, seed=2, preprocessor=squash)
    reward = rewards.load("clip", reward_entry("clip_score", path=str(folder)))
    scores = score(reward, noise(12, 30), reward.text_features(reward.params, PROMPTS))
    with torch.no_grad():
        pixel_values = in_torch(noise(12, 30), "squash").permute(0, 3, 1, 2)
        expected = (torch_image(folder, pixel_values) * torch_text(folder, PROMPTS)).sum(-1)
    np.testing.assert_allclose(scores, expected, atol=2e-6)


def test_clip_score_of_image_files_equals_the_processor_of_transformers(folder, reward):
    """Its uint8 rounding and clipping is all that differs."""
    files = (noise(40, 61) * 255).astype(np.uint8)
    scores = score(reward, files / np.float32(255), reward.text_features(reward.params, PROMPTS))
    with torch.no_grad():
        pixel_values = CLIPImageProcessor.from_pretrained(folder)(
            [Image.fromarray(file) for file in files], return_tensors="pt"
        ).pixel_values
        expected = (torch_image(folder, pixel_values) * torch_text(folder, PROMPTS)).sum(-1)
    np.testing.assert_allclose(scores, expected, atol=5e-3)


def test_a_folder_that_the_processor_of_transformers_5_wrote(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    own = CLIPImageProcessor.from_pretrained(folder, image_mean=[0.5, 0.4, 0.3])
    CLIPProcessor(own, CLIPTokenizer.from_pretrained(folder)).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    found = tower.load(tmp_path)
    assert found.prepare == dataclasses.replace(tower.load(folder).prepare, mean=(0.5, 0.4, 0.3))
    assert (found.tokenize(PROMPTS).ids == tower.load(folder).tokenize(PROMPTS).ids).all()
    # The file of an older processor beside it is not what transformers goes by.
    (tmp_path / "preprocessor_config.json").write_text('{"resample": 2}')
    assert tower.load(tmp_path).prepare == found.prepare
    path = tmp_path / "processor_config.json"
    fields = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({"image_processor": fields["image_processor"] | {"size": 8}}))
    with pytest.raises(InputError, match=r" processor_config\.json: image_processor: size = 8"):
        tower.load(tmp_path)
    path.write_text("{}")  # nothing of images in it, as versions before 5 have it
    with pytest.raises(InputError, match=r" preprocessor_config\.json: resample = 2 is not"):
        tower.load(tmp_path)


def test_an_invalid_config_is_told_with_its_file(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"projection_dim": "16"}))
    with pytest.raises(InputError) as error:
        tower.load(tmp_path)
    assert str(error.value) == (
        f'{tmp_path / "config.json"}: CLIPConfig: projection_dim = "16" is not supported: '
        "a whole number is expected"
    )


def test_an_open_clip_folder_whose_preprocessing_is_no_object(tmp_path):
    fields = {"model_cfg": OPEN_CLIP, "preprocess_cfg": "x"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"open_clip_config\.json: preprocess_cfg = 'x' is not an"):
        tower.load(tmp_path, text=False)


def test_logit_scale_multiplies_the_cosine(folder, reward):
    features = reward.text_features(reward.params, PROMPTS)
    other = rewards.load("b", reward_entry("clip_score", path=str(folder), logit_scale=True))
    cosine, scaled = (score(x, noise(16, 16), features) for x in (reward, other))
    scale = torch_clip(folder).logit_scale.exp().item()
    assert scale > 5
    np.testing.assert_allclose(scaled, scale * cosine, rtol=1e-5)


def test_text_features_of_many_prompts(folder, reward):
    prompts = [f"{i} red {'squares' * (i % 3)}" for i in range(259)]  # not a multiple of a batch
    assert len(prompts) % tower._TEXT_BATCH == 3
    found = reward.text_features(reward.params, prompts)
    assert found.dtype == np.float32 and isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, torch_text(folder, prompts), atol=2e-6)
    np.testing.assert_allclose(
        reward.text_features(reward.params, prompts[-2:]), found[-2:], atol=1e-6
    )


def test_text_tower_is_compiled_for_few_sizes(reward):
    few = reward.text_features(reward.params, PROMPTS[:1] * 5)
    reward.text_features(reward.params, ["a star"] * 256)
    with jax.no_tracing():
        np.testing.assert_array_equal(reward.text_features(reward.params, PROMPTS[:1] * 8)[:5], few)
        assert len(reward.text_features(reward.params, ["a star"] * 600)) == 600


def test_towers_compute_in_their_dtype_and_score_in_float32(folder):
    reward = rewards.load("clip", reward_entry("clip_score", path=str(folder)), "bfloat16")
    dtypes = {name: str(x.dtype) for name, x in reward.params.items()}
    assert dtypes.pop("logit_scale") == "float32" and set(dtypes.values()) == {"bfloat16"}
    features = jax.ShapeDtypeStruct((2, 12), jnp.float32)
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    params = lazy.place(reward.params)
    assert jax.eval_shape(reward.score, params, images, features).dtype == jnp.float32
    program = str(jax.make_jaxpr(reward.score)(params, images, features))
    products = [line for line in program.splitlines() if "dot_general" in line and ":f32" in line]
    assert not [line for line in products if "16]" in line.split("=")[0]], products


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    widths = (12, 1024, 128, 64, 16, 1)
    linears = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    dropout = torch.nn.Dropout(0.2)
    mlp = torch.nn.Module()  # as improved-aesthetic-predictor's simple_inference.py has it
    mlp.layers = torch.nn.Sequential(
        linears[0],
        dropout,
        linears[1],
        dropout,
        linears[2],
        torch.nn.Dropout(0.1),
        linears[3],
        linears[4],
    )
    tiny.randomize(mlp, seed=4)
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file(mlp.state_dict(), path)
    return mlp, path


def test_aesthetic_equals_torch(folder, head):
    mlp, path = head
    reward = rewards.load("beauty", reward_entry("aesthetic", path=str(folder), head=str(path)))
    assert reward.text_features is None
    scores, gradient = scores_and_gradient(reward, noise(24, 24), None)

    images = torch.tensor(noise(24, 24), requires_grad=True)
    features = torch_image(folder, in_torch(images, "crop").permute(0, 3, 1, 2))
    expected = mlp.layers(features)[:, 0]
    expected.sum().backward()
    np.testing.assert_allclose(scores, expected.detach(), rtol=1e-4, atol=1e-5)
    size = float(images.grad.abs().max())
    np.testing.assert_allclose(gradient, images.grad, atol=1e-4 * size)


def test_truncation_and_the_grid_of_patches(folder, reward, head):
    assert reward.truncated_share(["red", "red " * 40, "a star", ""]) == 0.25
    assert reward.grid == 4
    beauty = rewards.load("beauty", reward_entry("aesthetic", path=str(folder), head=str(head[1])))
    assert beauty.truncated_share(["red " * 40]) is None and beauty.grid == 4


def test_the_same_weights_under_another_name(folder, reward, tmp_path):
    again = rewards.load("other", reward_entry("clip_score", path=str(folder)))
    assert reward.same_weights(again)
    other = rewards.load("clip_score", tiny.clip(tmp_path, seed=5))
    assert not reward.same_weights(other)
    without = Reward("x", {}, lambda params, images, features: mean(images), None)
    assert not without.same_weights(without.renamed("y"))


def test_five_lines_of_python(folder):
    clip = rewards.load("clip_score", folder)
    scores, gradient = clip.value_and_grad(noise(20, 20), PROMPTS)
    assert clip.name == "clip_score" and gradient.shape == (2, 20, 20, 3)
    np.testing.assert_allclose(clip(noise(20, 20), PROMPTS), scores, rtol=1e-5)


def test_unknown_type():
    with pytest.raises(InputError, match=r"rewards.x.type = 'clip' is unknown; known: clip_score"):
        rewards.load("x", reward_entry("clip"))


def test_a_resize_of_the_entry(folder, reward):
    reduced = rewards.load("clip", reward_entry("clip_score", path=str(folder), resize="reduce"))
    features, images = reward.text_features(reward.params, PROMPTS), noise(64, 64)
    blocks = images.reshape(2, 32, 2, 32, 2, 3).mean((2, 4))
    np.testing.assert_allclose(
        score(reduced, images, features), score(reward, blocks, features), atol=1e-6
    )
    with pytest.raises(InputError, match=r"rewards.x.resize = 'area' is unknown; known: bicubic"):
        rewards.load("x", reward_entry("clip_score", path=str(folder), resize="area"))


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"type": "clip_score"}, "path"),
        ({"type": "aesthetic", "head": "head.safetensors"}, "path"),
        ({"type": "hps_v2_1"}, "path"),
    ],
)
def test_an_entry_without_its_files(fields, missing):
    with pytest.raises(InputError, match=rf"rewards.x.{missing} is not set: a reward of type"):
        rewards.load("x", reward_entry(**fields))


COMMAND = "convert the published file first, with python -m r0_jax.convert_reward"


@pytest.mark.parametrize(
    ("kind", "files", "path", "said"),
    [
        (
            "hps_v2_1",
            ["HPS.pt"],
            "HPS.pt",
            "= '{0}/HPS.pt' is a file: give a transformers "
            f"or open_clip folder, or {COMMAND} --reward=hps_v2_1 "
            "--checkpoint={0}/HPS.pt --tokenizer=PATH "
            "--out=FOLDER",
        ),
        (
            "pickscore",
            ["model.safetensors"],
            "model.safetensors",
            "is a file: give a transformers or",
        ),
        (
            "image_reward",
            ["ImageReward.pt", "med_config.json"],
            "",
            "= '{0}' holds ImageReward.pt, "
            f"which is never read: {COMMAND} --reward=image_reward "
            "--checkpoint={0}/ImageReward.pt",
        ),
        (
            "clip_score",
            ["open_clip_config.json", "open_clip_pytorch_model.bin"],
            "",
            "--reward=clip_score --checkpoint={0}/open_clip_pytorch_model.bin --tokenizer=PATH",
        ),
        (
            "aesthetic",
            ["linearMSE.pth"],
            "linearMSE.pth",
            "--reward=aesthetic --checkpoint={0}/linearMSE.pth --out=FOLDER (see",
        ),
    ],
)
def test_published_checkpoints_are_led_to_the_converter(tmp_path, kind, files, path, said):
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(InputError, match=re.escape(said.format(tmp_path))) as error:
        rewards.load(kind, tmp_path / path)
    assert "\n" not in str(error.value)


def test_a_published_head_is_led_to_the_converter(folder):
    entry = reward_entry("aesthetic", path=str(folder), head="/x/linearMSE.pth")
    with pytest.raises(
        InputError,
        match=r"rewards.x.head = '/x/linearMSE.pth' is a pickle.* "
        rf"--checkpoint=/x/linearMSE.pth --out={folder} \(see",
    ):
        rewards.load("x", entry)


def test_a_folder_of_transformers_with_pickles_is_led_to_save_pretrained(folder, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    said = r"pickled weights, .* transformers' from_.* save_pretrained, which writes model\.saf"
    with pytest.raises(InputError, match=said):
        rewards.load("x", reward_entry("clip_score", path=str(tmp_path)), text=False)


# --- A user's own function ------------------------------------------------------------------------

SHAPE = (4, 6, 3)
MODULE = """
import jax.numpy as jnp

def redness(images, features):
    return images[..., 0].mean(axis=(1, 2))

def agreement(images, features):
    return images.mean(axis=(1, 2, 3)) * features[:, 1]

def agreement_text_features(prompts):
    return [[0.0, float(len(prompt)), 1.0] for prompt in prompts]

def one_argument(images):
    return images.mean(axis=(1, 2, 3))

a_number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module and makes it importable, for this test only."""

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text, "utf-8")

    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_users_function(module):
    module("mine", MODULE)
    reward = rewards.load("red", reward_entry("function", function="mine:redness"))
    plugin.check(reward, SHAPE)
    images = jnp.asarray(noise(4, 6))
    assert reward.text_features is None and reward.params == {}
    np.testing.assert_allclose(reward.score({}, images, None), images[..., 0].mean((1, 2)))

    reward = rewards.load("agree", reward_entry("function", function="mine:agreement"))
    plugin.check(reward, SHAPE)
    features = reward.text_features({}, ["abc", "abcde"])
    assert features.dtype == np.float32 and features.tolist() == [[0, 3, 1], [0, 5, 1]]
    np.testing.assert_allclose(
        reward.score({}, images, features), images.mean((1, 2, 3)) * np.asarray([3, 5]), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("mine", "'mine' should read module:function"),
        (":redness", "should read module:function"),
        ("mine:", "should read module:function"),
        ("no_such_module:f", "cannot be imported .*no_such_module.*PYTHONPATH"),
        ("mine:no_such_function", "cannot be imported .*no_such_function"),
        ("broken:f", "broken:f cannot be imported .SyntaxError"),
        ("failing:f", "failing:f cannot be imported .ZeroDivisionError: division by zero"),
        ("mine:one_argument", "mine:one_argument must take .images, features"),
        ("mine:a_number", "mine:a_number must take .images, features"),
    ],
)
def test_functions_that_cannot_be_loaded(module, function, said):
    module("mine", MODULE)
    module("broken", "def f(:\n")
    module("failing", "1 / 0\n")
    with pytest.raises(InputError, match=said) as e:
        rewards.load("x", reward_entry("function", function=function))
    assert "\n" not in str(e.value) and "rewards.x" in str(e.value)


def mean(images):
    return images.mean(axis=(1, 2, 3))


def failing(images, features):
    raise AssertionError


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x, f: mean(x)[:, None], r"returns .*\(2, 1\).*expected float32 of shape \(2,\)"),
        (lambda x, f: x.mean(), r"returns .*expected float32 of shape \(2,\)"),
        (lambda x, f: 1.0, r"returns .*expected float32 of shape \(2,\)"),
        (lambda x, f: (mean(x), mean(x)), r"returns .*expected float32 of shape \(2,\)"),
        (lambda x, f: mean(x).astype(jnp.bfloat16), "returns .*bfloat16.*expected float32"),
        (lambda x, f: jnp.round(mean(x)).astype(jnp.int32), "returns .*int32.*expected float32"),
        (lambda x, f: mean(x) / 0.0, "is not finite on random images"),
        (lambda x, f: jnp.sqrt(0.0 * mean(x)), "has a gradient that is not finite"),
        (lambda x, f: jax.lax.stop_gradient(mean(x)), "has a gradient of zero"),
        (lambda x, f: jnp.round(mean(x)), "has a gradient of zero"),
        (lambda x, f: mean(x) - mean(x).mean(), "one image's score depends on another image"),
        (lambda x, f: jnp.cumsum(mean(x)), "one image's score depends on another image"),
        (lambda x, f: jnp.broadcast_to(mean(x)[0], len(x)), "depends on another image"),
        (lambda x, f: mean(x) - jax.lax.stop_gradient(mean(x).max()), "depends on another image"),
        (lambda x, f: mean(x) * (x.std((1, 2, 3)) > 0.9 * x.std((1, 2, 3)).max()), "depends on an"),
        (lambda x, f: mean(x) + jnp.zeros(2), r"fails on images of shape \(3, 4, 6, 3\)"),
        (lambda x, f: jnp.asarray(np.asarray(x).mean((1, 2, 3))), "fails on .*TracerArrayConv"),
        (lambda x, f: mean(x) * f[:, 0], r"fails on images of shape \(2, 4, 6, 3\): TypeError"),
        (
            lambda x, f: jax.pure_callback(
                lambda x: np.mean(x, (1, 2, 3)), jax.ShapeDtypeStruct(x.shape[:1], jnp.float32), x
            ),
            "fails on the gradient at images .*ValueError: Pure callbacks do not support JVP",
        ),
        (failing, "fails on images .*: AssertionError$"),
    ],
)
def test_functions_that_cannot_be_trained_on(function, said):
    reward = Reward("x", {}, lambda params, images, features: function(images, features), None)
    with pytest.raises(InputError, match=said) as e:
        plugin.check(reward, SHAPE)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("encode", "said"),
    [
        ("    return [1.0, 2.0]", r"have shape \(2,\); expected \(2, D\)"),
        ("    return [[1.0]] * 3", r"have shape \(3, 1\); expected \(2, D\)"),
        ("    return [[1.0], [1.0, 2.0]]", "reward x fails on 2 prompts: ValueError"),
        ("    return {}['a']", "reward x fails on 2 prompts: KeyError: 'a'"),
    ],
)
def test_text_features_that_do_not_fit(module, encode, said):
    module(
        "mine",
        "def f(images, features):\n    return features[:, 0]\n"
        f"def f_text_features(prompts):\n{encode}\n",
    )
    reward = rewards.load("x", reward_entry("function", function="mine:f"))
    with pytest.raises(InputError, match=said) as e:
        plugin.check(reward, SHAPE)
    assert "\n" not in str(e.value)


def test_a_function_that_is_only_measured_needs_no_gradient():
    def score(params, images, features):
        return jax.pure_callback(
            lambda x: np.mean(x, (1, 2, 3)),
            jax.ShapeDtypeStruct(images.shape[:1], jnp.float32),
            images,
        )

    plugin.check(Reward("x", {}, score, None), SHAPE, trained=False)
    with pytest.raises(InputError, match="depends on another image"):
        plugin.check(
            Reward("x", {}, lambda p, x, f: jnp.cumsum(score(p, x, f)), None), SHAPE, trained=False
        )


def test_a_function_with_weights_of_its_own(module):
    module(
        "mine",
        "import numpy as np\n"
        "def f(params, images, features):\n"
        "    assert not isinstance(params['a'], np.ndarray)\n"
        "    return images.mean((1, 2, 3)) * params['a'] + params['b'].sum()\n"
        "def f_params():\n"
        "    return {'a': np.float32(3), 'b': np.ones((2, 2), np.float32)}\n"
        "g, g_params, h, h_params = f, lambda: [1], f, lambda: {'a': None}\n"
        "def k(images, features): pass\n"
        "k_params = f_params\n",
    )
    reward = rewards.load("x", reward_entry("function", function="mine:f"))
    plugin.check(reward, SHAPE)
    images = noise(4, 6)
    np.testing.assert_allclose(reward(images, ["", ""]), 3 * images.mean((1, 2, 3)) + 4, rtol=1e-5)
    for name, said in (
        ("g", "must return .name: array., not list"),
        ("h", "must return"),
        ("k", "mine:k must take .params, images, features."),
    ):
        with pytest.raises(InputError, match=said):
            rewards.load("x", reward_entry("function", function=f"mine:{name}"))


def test_features_of_a_prompt_are_computed_once(monkeypatch):
    asked = []

    def encode(params, prompts):
        asked.append(list(prompts))
        return np.asarray([[len(prompt)] for prompt in prompts], np.float32)

    reward = Reward("x", {}, lambda params, images, features: features[:, 0], encode)
    images = np.zeros((3, 2, 2, 3), np.float32)
    assert reward(images, ["a", "bb", "a"]).tolist() == [1, 2, 1]
    assert reward(images, ["bb", "ccc", "a"]).tolist() == [2, 3, 1]
    assert asked == [["a", "bb"], ["ccc"]]
    monkeypatch.setattr(reward_module, "_MOST_KNOWN", 1)
    assert reward(images, ["bb", "ccc", "dddd"]).tolist() == [2, 3, 4]
    assert reward(images, ["a"] * 3).tolist() == [1, 1, 1]
    assert asked[2:] == [["dddd"], ["a"]]


@pytest.mark.parametrize(
    "images, prompts, said",
    [
        (np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"], "dtype uint8 cannot be scored"),
        (np.zeros((4, 4, 3), np.float32), ["a"], r"shape \(4, 4, 3\) .* numbers \[B, h, w, 3\]"),
        (np.zeros((2, 3, 4, 4), np.float32), ["a", "b"], r"shape \(2, 3, 4, 4\)"),
        (np.zeros((2, 4, 4, 3), np.float32), ["a"], "2 images and 1 prompts"),
        (np.zeros((1, 4, 4, 3), np.float32), "a", "1 images and one text: give a list"),
        ([[0.5]], ["a"], "dtype object cannot be scored"),
    ],
)
def test_a_call_that_would_be_misunderstood(images, prompts, said):
    # By itself: in tests the annotations of the calls would be checked first.
    with pytest.raises(InputError, match=said):
        reward_module._check_call(images, prompts)


def test_a_call_has_one_prompt_an_image():
    reward = Reward("x", {}, lambda params, images, features: mean(images), None)
    for call in (reward.__call__, reward.value_and_grad):
        with pytest.raises(InputError, match="2 images and 3 prompts"):
            call(np.zeros((2, 4, 4, 3), np.float32), ["a", "b", "c"])


def test_the_check_passes_weights_as_arguments():
    """A tower's weights as constants of the program would take minutes to compile."""
    seen = []

    def score(params, images, features):
        seen.append(params["scale"])
        return params["scale"] * mean(images)

    plugin.check(Reward("x", {"scale": np.asarray(2.0, np.float32)}, score, None), SHAPE)
    assert seen and all(isinstance(x, jax.core.Tracer) for x in seen)
