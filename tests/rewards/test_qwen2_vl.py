"""HPSv3 and questions to a Qwen2-VL, in miniature, against transformers: files to scores."""

import hashlib
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwen2_vl as twin
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch_preprocess import noise
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as processing

from r0_jax import convert_reward, rewards
from r0_jax.config import reward_entry
from r0_jax.errors import InputError
from r0_jax.rewards import hps_v3, vlm_yes_no
from r0_jax.rewards.around_image import AroundImage, load_qwen2_vl
from r0_jax.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, smart_resize
from r0_jax.stand_ins import miniature_tokenizer
from r0_jax.weights import lazy

PROMPTS = ["a red circle.", '红色的圆 on {} "x"?']
SIZE = 84
SHAPES = [(512, 512), (768, 768), (1536, 1536), (1024, 768), (448, 448), (300, 1200), (64, 48)]


def write_tokenizer(folder, texts):
    miniature_tokenizer.write_tokenizer(
        folder, "Qwen2Tokenizer", "<|endoftext|>", 32768, texts=texts
    )
    return transformers.Qwen2Tokenizer.from_pretrained(folder)


def in_torch(images, height, width):
    """Images [B, h, w, 3] resized and normalized, as [B, 3, h, w]."""
    x = torch.as_tensor(images).permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(x, (height, width), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


def expect(reward, images, theirs, prompts=PROMPTS):
    """Scores within 1e-4 of transformers', image gradients within 1e-3 of their largest."""
    scores, gradient = reward.value_and_grad(images, prompts)
    leaf = torch.tensor(images, requires_grad=True)
    expected = theirs(leaf)
    expected.sum().backward()
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected.detach(), rtol=1e-4, atol=1e-4)
    size = float(leaf.grad.abs().max())
    assert size > 1e-5
    np.testing.assert_allclose(gradient, leaf.grad, atol=1e-3 * size)
    return scores


# --- the image ------------------------------------------------------------------------------------


def test_sizes_are_the_published_ones():
    found = {shape: smart_resize(*shape, 448**2) for shape in SHAPES}
    # The published code rounds 15.999999999999998 down: an image of 768 px is seen at 420 px.
    assert found[512, 512] == (448, 448)
    assert found[768, 768] == found[1536, 1536] == (420, 420)
    assert found[1024, 768] == (504, 364)
    for h, w in [*SHAPES, *itertools.product(range(30, 2000, 333), repeat=2)]:
        assert smart_resize(h, w, 448**2) == processing.smart_resize(h, w, 28, 448**2, 448**2)
    with pytest.raises(InputError, match=r"an image of 10 x 2001 pixels .* cannot be scored"):
        smart_resize(10, 2001, 448**2)


@pytest.mark.parametrize("shape", [(100, 100), (61, 180), (180, 61)], ids="{0[0]}x{0[1]}".format)
def test_preprocessing_and_its_gradient(shape):
    prepare, images = Preprocess(SIZE, "area"), noise(*shape)
    found, pull_back = jax.vjp(prepare, jnp.asarray(images))
    leaf = torch.tensor(images, requires_grad=True)
    expected = in_torch(leaf, *smart_resize(*shape, SIZE**2))
    assert found.shape[1] % 28 == found.shape[2] % 28 == 0
    weights = np.random.default_rng(0).standard_normal(found.shape, np.float32)
    (expected.permute(0, 2, 3, 1) * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).detach(), atol=1e-5)
    np.testing.assert_allclose(pull_back(jnp.asarray(weights))[0], leaf.grad, atol=1e-4)
    # PIL rounds to bytes twice, and clips, of which there is nothing here.
    files = (255 * (0.3 + 0.4 * images)).astype(np.uint8)
    height, width = smart_resize(*shape, SIZE**2)
    in_pil = np.asarray(Image.fromarray(files[0]).resize((width, height), Image.Resampling.BICUBIC))
    ours = np.asarray(prepare(jnp.asarray(files / np.float32(255))))[0] * CLIP_STD + CLIP_MEAN
    assert np.abs(np.clip(ours, 0, 1) - in_pil / 255).max() < 0.012


def test_patches_are_those_of_the_processor_of_transformers():
    files = (noise(56, 84) * 255).astype(np.uint8)
    found = processing.Qwen2VLImageProcessorPil()(
        [Image.fromarray(file) for file in files], return_tensors="pt"
    )
    pixels, grid = twin.patches(in_torch(files / np.float32(255), 56, 84))
    np.testing.assert_allclose(found["pixel_values"], pixels, atol=1e-5)
    np.testing.assert_array_equal(found["image_grid_thw"], grid)


# --- the text -------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_loses_its_end(tmp_path):
    write_tokenizer(tmp_path, ["describe this: now"])
    tokenizer = load_qwen2_vl(tmp_path, 10_000)
    around = AroundImage(tokenizer, "<|vision_start|>", ["describe this: {} now"], most=4)

    def row(text):
        ids = tokenizer(f"describe this: {text} now").input_ids
        return ids + [-1] * (around.width - len(ids))

    found = around(["a red", "a red circle a blue star", "霜霜霜"])
    assert found.truncated.tolist() == [False, True, True]
    assert found.ids[2].tolist() == row("霜")  # three bytes; half a character is none
    assert found.ids[0].tolist() == row("a red")
    assert found.ids[1].tolist() == row("a red circle a blue")  # " a" is one token
    assert -1 not in found.ids[1]
    assert around.before.tolist() == [tokenizer.get_vocab()["<|vision_start|>"]]


def test_hps_v3_reads_its_rubric_up_to_the_special_token(tmp_path):
    tokenizer = write_tokenizer(tmp_path, hps_v3.TEXTS)
    words = len(tokenizer) + 1
    around = hps_v3.tokens(tmp_path, words, 16)
    [row] = around(["a red circle"]).ids.tolist()
    row = row[: row.index(-1)]
    text = tokenizer.decode(row[:-1])
    assert row[-1] == words - 1
    assert text.startswith("<|vision_end|>\nYou are tasked with evaluating a generated image")
    assert "\nTextual prompt - a red circle\n\n\n\nPlease provide the overall" in text
    assert tokenizer.decode(around.before).endswith("<|im_start|>user\n<|vision_start|>")
    # A blank that an editor removes at the end of a line would change every score.
    digest = hashlib.sha256("".join(hps_v3.TEXTS).encode()).hexdigest()
    assert digest.startswith("6a7f7e3a2071bc99")
    # 15 and 507 of the published tokenizer; words that it splits are single here, and others not.
    assert len(around.before) < 40 and 400 < len(row) < 900


# --- HPSv3 ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """A converted folder, and what transformers says of prepared images under PROMPTS."""
    folder = tmp_path_factory.mktemp("hps_v3")
    tokenizer = write_tokenizer(folder / "tokenizer", hps_v3.TEXTS)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    fields = twin.FIELDS | {"vocab_size": len(tokenizer)}
    module = twin.hps_v3(**fields)
    state = module.state_dict() | {"lm_head.weight": torch.zeros(len(tokenizer), 32)}
    save_file(state, folder / "HPSv3.safetensors")
    convert_reward.convert_reward(
        "hps_v3", folder / "HPSv3.safetensors", folder / "out", folder / "tokenizer", fields
    )
    before, after = (
        [tokenizer(text.replace("{}", prompt)).input_ids for prompt in PROMPTS]
        for text in hps_v3.TEXTS
    )

    return folder, lambda images: module(images, before[0], after)


def test_hps_v3_equals_transformers(hps):
    folder, theirs = hps
    assert "lm_head.weight" not in load_file(folder / "out" / "model.safetensors")
    entry = reward_entry("hps_v3", path=str(folder / "out"), size=SIZE, tokens=24)
    reward = rewards.load("hps", entry)
    images = noise(100, 180)
    scores = expect(reward, images, lambda x: theirs(in_torch(x, 56, 112)))
    assert reward.truncated(PROMPTS).tolist() == [False, False] and reward.grid == 6
    features = reward.text_features(reward.params, PROMPTS)
    assert features.dtype == np.int32 and features.shape == (2, reward.width)
    # The same without the tokenizer's work, and with prompts filled up further.
    again = rewards.load("hps", reward_entry("hps_v3", path=entry.path, size=SIZE, tokens=40))
    more = again.text_features(again.params, PROMPTS)
    assert more.shape[1] == features.shape[1] + 16
    alone = rewards.load("hps", entry, text=False)
    found = jax.jit(alone.score)(lazy.place(alone.params), jnp.asarray(images), more)
    np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-5)
    half = rewards.load("hps", entry, "bfloat16")
    dtypes = {k: str(v.dtype) for k, v in half.params.items()}
    assert {v for k, v in dtypes.items() if k.startswith("rm_head")} == {"float32"}
    assert {v for k, v in dtypes.items() if not k.startswith("rm_head")} == {"bfloat16"}
    assert half(images, PROMPTS).dtype == jnp.float32


# --- questions ------------------------------------------------------------------------------------

QUESTIONS = ("图中是否写着“{}”？请回答是或否。", "图里有“{}”吗？")


@pytest.mark.parametrize("tied", [True, False])
def test_yes_no_equals_transformers(tmp_path, tied):
    language, questions = ("chinese", QUESTIONS) if tied else ("english", ())
    tokenizer = write_tokenizer(tmp_path, vlm_yes_no.TEXTS)
    vocabulary = tokenizer.get_vocab()
    fields = {
        "vocab_size": len(tokenizer) + 3,  # published tables are larger than their vocabularies
        "tie_word_embeddings": tied,
        "image_token_id": vocabulary["<|image_pad|>"],
        "video_token_id": vocabulary["<|video_pad|>"],
        "vision_start_token_id": vocabulary["<|vision_start|>"],
        "vision_end_token_id": vocabulary["<|vision_end|>"],
    }
    module = twin.model(seed=2, **fields)
    module.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"resample": 3, "min_pixels": 3136}')
    entry = reward_entry(
        "vlm_yes_no",
        path=str(tmp_path),
        size=SIZE,
        tokens=24,
        language=language,
        questions=questions,
    )
    reward = rewards.load("yes", entry)
    answers = [tokenizer(word).input_ids[0] for word in vlm_yes_no.ANSWERS[language]]
    asked = [
        text.replace("{}", prompt)
        for prompt in PROMPTS
        for text in questions or vlm_yes_no.QUESTIONS[language]
    ]
    before = tokenizer(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>"
    ).input_ids
    after = tokenizer(
        [f"<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n" for text in asked]
    ).input_ids
    each = len(after) // len(PROMPTS)

    def theirs(images):
        images, scores = in_torch(images, 56, 112), []
        for i in range(len(PROMPTS)):
            found = [
                twin.next_word(module, images[i : i + 1], before, text)[0].log_softmax(-1)
                for text in after[i * each : (i + 1) * each]
            ]
            scores.append(torch.stack([x[answers[0]] - x[answers[1]] for x in found]).mean())
        return torch.stack(scores)

    expect(reward, noise(100, 180), theirs)
    assert reward.params["lm_head.kernel"].shape == (32, 2)
    half = rewards.load("yes", entry, "bfloat16")
    assert half.params["lm_head.kernel"].dtype == np.float32


# --- what goes wrong ------------------------------------------------------------------------------


def refused(said, load):
    with pytest.raises(InputError, match=said) as error:
        load()
    assert len(str(error.value).splitlines()) == 1


def test_bad_folders_and_entries_in_one_line_each(tmp_path, hps):
    folder, _ = hps
    hps_folder, out = folder / "out", tmp_path / "vlm"
    refused(
        "model_type = 'hps_v3' is not qwen2_vl: its reward has type hps_v3",
        lambda: rewards.load("vlm_yes_no", hps_folder),
    )
    refused("model_type = 'hps_v3' is not a CLIP", lambda: rewards.load("clip_score", hps_folder))
    refused("'hps_v3' is not image_reward", lambda: rewards.load("image_reward", hps_folder))
    refused(
        "is a file: give the transformers folder of a Qwen2-VL",
        lambda: rewards.load("vlm_yes_no", folder / "HPSv3.safetensors"),
    )
    refused(
        "--reward=hps_v3 --checkpoint=.*HPSv3.safetensors --tokenizer=PATH --out=FOLDER",
        lambda: rewards.load("hps_v3", folder / "HPSv3.safetensors"),
    )
    refused(
        "does not exist: give the folder of its vlm_yes_no model$",
        lambda: rewards.load("vlm_yes_no", tmp_path / "none"),
    )
    for fields, said in (
        ({"size": 450}, "size = 450 is not a multiple of 28"),
        ({"tokens": 0}, "tokens = 0 must be at least 1"),
        (
            {"type": "vlm_yes_no", "language": "french"},
            "language = 'french' is unknown; known: eng",
        ),
        (
            {"type": "vlm_yes_no", "questions": ("Is it?",)},
            "'Is it\\?' has no {}, where the prompt",
        ),
    ):
        entry = reward_entry(**{"type": "hps_v3", "path": str(hps_folder)} | fields)
        refused(f"rewards.x.*{said}", lambda entry=entry: rewards.load("x", entry))

    # A folder of transformers, then parts of it missing or of another size.
    tokenizer = write_tokenizer(out, vlm_yes_no.TEXTS)
    config = twin.FIELDS | {"vocab_size": len(tokenizer)}
    (out / "preprocessor_config.json").write_text("{}")
    (out / "config.json").write_text(json.dumps(config))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(r"names 1 file\(s\) that are not there", lambda: rewards.load("vlm_yes_no", out))
    (out / "model.safetensors.index.json").unlink()
    state = twin.state_of(twin.model(vocab_size=len(tokenizer)))
    save_file({k: v.contiguous() for k, v in state.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    refused(
        r"has shape \(32, 48\), but the config asks for \(32, 40\)",
        lambda: rewards.load("vlm_yes_no", out),
    )
    refused(
        "model_type = 'qwen2_vl' is not hps_v3: its reward has type vlm_yes_no",
        lambda: rewards.load("hps_v3", out),
    )
    refused("the vocabulary goes up to id", lambda: load_qwen2_vl(out, 100))
    refused(
        "is token .* but the network's embeddings end at",
        lambda: hps_v3.tokens(out, len(tokenizer) + 9, 1),
    )
    tiny.tokenizer(tmp_path / "clip")
    refused("the tokenizer has no <.im_start", lambda: load_qwen2_vl(tmp_path / "clip", 10_000))
