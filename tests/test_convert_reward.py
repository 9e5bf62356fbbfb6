"""Published files, in miniature, through the converter and into a reward."""

import gzip
import json
import pathlib
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import torch_twins
from reward_configs import CN_CLIP, IMAGE_REWARD, OPEN_CLIP
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch_preprocess import in_torch, noise
from transformers import BertTokenizer
from vocabularies import MERGES, WORDS

from r0_jax import convert_reward, rewards
from r0_jax.errors import InputError
from r0_jax.rewards import prompt_text
from r0_jax.rewards.reward import Reward
from r0_jax.weights import lazy

DATA = pathlib.Path(__file__).parent / "data"
PROMPTS = ["a red square", "一个红色的方块 &amp; more", ""]


TEXT_CFG = OPEN_CLIP["text_cfg"] | {"vocab_size": 512 + len(MERGES) + 2, "context_length": 16}
CLIP_FIELDS = OPEN_CLIP | {"text_cfg": TEXT_CFG}
CHINESE_FIELDS = CN_CLIP | {"vocab_size": len(WORDS)}
IMAGE_REWARD_FIELDS = {
    **IMAGE_REWARD,
    "text_config": IMAGE_REWARD["text_config"] | {"vocab_size": len(WORDS) + 2},
}


def unit(features):
    return features / features.norm(dim=-1, keepdim=True)


def pixels(images, policy, corner="floor"):
    return in_torch(images, policy, corner).permute(0, 3, 1, 2)


def expect(reward: Reward, images: np.ndarray, in_torch_) -> None:
    """Scores within 1e-4 of torch's, gradients within 1e-3 of their largest element."""
    scores, gradient = reward.value_and_grad(images, PROMPTS[: len(images)])
    leaf = torch.tensor(images, requires_grad=True)
    expected = in_torch_(leaf)
    expected.sum().backward()
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected.detach(), rtol=1e-4, atol=1e-4)
    size = float(leaf.grad.abs().max())
    assert size > 1e-5
    np.testing.assert_allclose(gradient, leaf.grad, atol=1e-3 * size)
    np.testing.assert_allclose(reward(images, PROMPTS[: len(images)]), scores, rtol=1e-5, atol=1e-6)


def expect_without_text(kind: str, folder: pathlib.Path, reward: Reward) -> None:
    """The same scores from features alone, where text tower and tokenizer are gone."""
    features = jnp.asarray(reward.text_features(reward.params, PROMPTS[:2]))
    images, fingerprint = jnp.asarray(noise(23, 40)), reward.fingerprint()
    expected = jax.jit(reward.score)(lazy.place(reward.params), images, features)
    for path in [*folder.glob("vocab.*"), *folder.glob("merges.txt"), *folder.glob("tokenizer*")]:
        path.unlink()
    [weights] = folder.glob("*.safetensors")
    save_arrays(
        {
            key: value
            for key, value in load_file(weights).items()
            if key.split(".")[0] not in reward.text_parts
        },
        weights,
    )
    alone = rewards.load(kind, folder, text=False)
    assert (alone.fingerprint(), alone.width) == (fingerprint, features.shape[1])
    assert alone.params.keys() == {
        k for k in reward.params if k.split(".")[0] not in reward.text_parts
    }
    found = jax.jit(alone.score)(lazy.place(alone.params), images, features)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(InputError, match="was loaded without its text tower"):
        alone(images, PROMPTS[:2])


def test_hps_is_the_cosine_of_the_padded_image(tmp_path, bpe):
    module = tiny.randomize(torch_twins.OpenCLIP(CLIP_FIELDS), seed=0)
    torch.save({"epoch": 3, "state_dict": module.state_dict()}, tmp_path / "HPS.pt")
    convert_reward.convert_reward(
        "hps_v2_1", tmp_path / "HPS.pt", tmp_path / "out", bpe, CLIP_FIELDS
    )
    reward = rewards.load("hps_v2_1", tmp_path / "out")
    ids = prompt_text.open_clip(tmp_path / "out", 16, 521)(PROMPTS[:2]).ids
    expect(
        reward,
        noise(23, 40),
        lambda x: (
            unit(module.image_features(pixels(x, "pad")))
            * unit(module.text_features(torch.tensor(ids)))
        ).sum(-1),
    )
    # As a CLIP score it would be padded too: the folder says so.
    clip = rewards.load("clip_score", tmp_path / "out")
    np.testing.assert_array_equal(
        clip(noise(23, 40), PROMPTS[:2]), reward(noise(23, 40), PROMPTS[:2])
    )
    expect_without_text("hps_v2_1", tmp_path / "out", reward)


def test_open_clip_as_a_clip_score_crops(tmp_path, bpe):
    module = tiny.randomize(torch_twins.OpenCLIP(CLIP_FIELDS), seed=1)
    save_file(
        {k: v.contiguous() for k, v in module.state_dict().items()}, tmp_path / "x.safetensors"
    )
    convert_reward.convert_reward(
        "clip_score", tmp_path / "x.safetensors", tmp_path / "out", bpe, CLIP_FIELDS
    )
    reward = rewards.load("clip_score", tmp_path / "out")
    ids = prompt_text.open_clip(tmp_path / "out", 16, 521)(PROMPTS[:2]).ids
    expect(
        reward,
        noise(23, 40),
        lambda x: (
            unit(module.image_features(pixels(x, "crop", "round")))
            * unit(module.text_features(torch.tensor(ids)))
        ).sum(-1),
    )


def test_pickscore_is_scaled_and_crops(tmp_path):
    folder = tiny.clip(tmp_path / "clip", seed=3)
    module = tiny.CLIPModel.from_pretrained(folder).eval()
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    state = {k: v for k, v in torch.load(_as_bin(folder, tmp_path)).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(24)[None]  # as old files have
    torch.save(state, tmp_path / "pytorch_model.bin")
    convert_reward.convert_reward(
        "pickscore", tmp_path / "pytorch_model.bin", tmp_path / "out", folder, fields
    )
    reward = rewards.load("pickscore", tmp_path / "out")
    ids = tiny.CLIPTokenizer.from_pretrained(folder)(
        PROMPTS[:2], padding="max_length", max_length=24, truncation=True, return_tensors="pt"
    ).input_ids

    def in_torch_(x):
        image = module.get_image_features(pixels(x, "crop")).pooler_output
        text = module.get_text_features(ids).pooler_output
        return module.logit_scale.exp() * (unit(image) * unit(text)).sum(-1)

    expect(reward, noise(23, 40), in_torch_)
    expect_without_text("pickscore", tmp_path / "out", reward)


def _as_bin(folder, tmp_path):
    torch.save(
        {k: torch.tensor(v) for k, v in load_file(folder / "model.safetensors").items()},
        tmp_path / "model.bin",
    )
    return tmp_path / "model.bin"


def test_chinese_clip_of_its_authors_squashes(tmp_path, vocab):
    module = tiny.randomize(torch_twins.CNCLIP(CHINESE_FIELDS), seed=0)
    state = {f"module.{k}": v for k, v in module.state_dict().items()}
    state["module.bert.pooler.dense.weight"] = torch.zeros(16, 16)
    torch.save({"state_dict": state}, tmp_path / "clip_cn.pt")
    convert_reward.convert_reward(
        "chinese_clip", tmp_path / "clip_cn.pt", tmp_path / "out", vocab, CHINESE_FIELDS
    )
    reward = rewards.load("chinese_clip", tmp_path / "out")
    ids = BertTokenizer.from_pretrained(vocab.parent)(
        PROMPTS[:2], padding="max_length", max_length=52, truncation=True, return_tensors="pt"
    ).input_ids
    assert (ids[1] > 4).sum() > 5  # Chinese is not all unknown
    expect(
        reward,
        noise(23, 40),
        lambda x: (
            unit(module.image_features(pixels(x, "squash"))) * unit(module.text_features(ids))
        ).sum(-1),
    )
    expect_without_text("chinese_clip", tmp_path / "out", reward)


def test_image_reward(tmp_path, vocab):
    module = tiny.randomize(torch_twins.ImageReward(*IMAGE_REWARD_FIELDS.values()), seed=0)
    state = module.state_dict() | {
        "blip.text_encoder.embeddings.position_ids": torch.arange(60)[None]
    }
    torch.save(state, tmp_path / "ImageReward.pt")
    convert_reward.convert_reward(
        "image_reward", tmp_path / "ImageReward.pt", tmp_path / "out", vocab, IMAGE_REWARD_FIELDS
    )
    reward = rewards.load("image_reward", tmp_path / "out")
    features = reward.text_features(reward.params, PROMPTS)
    assert features.dtype == np.int32 and features.shape == (3, 35)
    ids = BertTokenizer.from_pretrained(vocab.parent)(
        PROMPTS, padding="max_length", max_length=35, truncation=True, return_tensors="pt"
    ).input_ids
    np.testing.assert_array_equal(features, ids)
    expect(reward, noise(40, 23), lambda x: module(ids[:2], pixels(x, "crop", "round")))
    assert reward.truncated(["red " * 33, "red " * 34]).tolist() == [False, True]
    half = rewards.load("image_reward", tmp_path / "out", "bfloat16")
    assert {str(v.dtype) for k, v in half.params.items() if k.startswith("mlp")} == {"float32"}
    assert {str(v.dtype) for k, v in half.params.items() if k.startswith("blip")} == {"bfloat16"}
    np.testing.assert_allclose(
        half(noise(40, 23), PROMPTS[:2]), reward(noise(40, 23), PROMPTS[:2]), atol=1e-2
    )
    expect_without_text("image_reward", tmp_path / "out", reward)


def test_cycle_reward(tmp_path, vocab):
    text = IMAGE_REWARD_FIELDS["text_config"] | {"max_position_embeddings": 128}
    fields = IMAGE_REWARD_FIELDS | {"text_config": text}
    module = tiny.randomize(torch_twins.CycleReward(*fields.values()), seed=0)
    torch.save(module.state_dict(), tmp_path / "CycleReward-T2I.pth")
    convert_reward.convert_reward(
        "cycle_reward", tmp_path / "CycleReward-T2I.pth", tmp_path / "out", vocab, fields
    )
    reward = rewards.load("cycle_reward", tmp_path / "out")
    ids = BertTokenizer.from_pretrained(vocab.parent)(
        PROMPTS, padding="max_length", max_length=128, truncation=True, return_tensors="pt"
    ).input_ids
    np.testing.assert_array_equal(reward.text_features(reward.params, PROMPTS), ids)
    expect(reward, noise(40, 23), lambda x: module(ids[:2], pixels(x, "crop", "round")))
    with pytest.raises(InputError, match="model_type = 'cycle_reward' is not image_reward"):
        rewards.load("image_reward", tmp_path / "out")


def test_aesthetic_head_in_the_folder_of_its_clip(tmp_path):
    folder = tiny.clip(tmp_path / "clip", seed=1)
    mlp = tiny.randomize(torch_twins.score_mlp(12), seed=4)
    torch.save(mlp.state_dict(), tmp_path / "linearMSE.pth")
    convert_reward.convert_reward(
        "aesthetic", tmp_path / "linearMSE.pth", folder, fields={"inputs": 12}
    )
    module = tiny.CLIPModel.from_pretrained(folder).eval()
    expect(
        rewards.load("aesthetic", folder),
        noise(24, 30),
        lambda x: mlp["layers"](unit(module.get_image_features(pixels(x, "crop")).pooler_output))[
            :, 0
        ],
    )


# --- tokenizers -----------------------------------------------------------------------------------


def test_tokens_are_those_of_open_clip(tmp_path):
    """Written down from open_clip's own tokenizer, on merges for the words of `tiny`."""
    published = json.loads((DATA / "open_clip_tokens.json").read_text("utf-8"))
    merges = [" ".join(pair) for pair in _merges()]
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress("\n".join(["#v", *merges]).encode()))
    convert_reward.write_tokenizer(tmp_path / "bpe.txt.gz", tmp_path)
    tokenize = prompt_text.open_clip(tmp_path, 24, published["vocab_size"])
    found = tokenize([row["prompt"] for row in published["rows"]])
    for row, ids in zip(published["rows"], found.ids.tolist(), strict=True):
        assert ids == row["ids"], row["prompt"]
    assert sum(found.truncated) >= 2 and not found.truncated[0]


def _merges():
    for word in tiny._WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(symbols)):
            yield "".join(symbols[:i]), symbols[i]


def test_a_vocabulary_larger_than_the_table_is_refused(tmp_path, vocab, bpe):
    with pytest.raises(InputError, match="the vocabulary goes up to id"):
        prompt_text.wordpiece(vocab.parent, 35, len(WORDS) - 1)
    convert_reward.write_tokenizer(bpe, tmp_path)
    with pytest.raises(InputError, match="the vocabulary goes up to id 520"):
        prompt_text.open_clip(tmp_path, 77, 520)


@pytest.mark.parametrize("words", [WORDS[:-1], WORDS[:-3], [*WORDS, "[DEC]"], [*WORDS, "more"]])
def test_image_reward_takes_no_vocabulary_but_its_own(tmp_path, vocab, words):
    """Its two special tokens would fall onto embeddings of words, or onto none."""
    module = torch_twins.ImageReward(*IMAGE_REWARD_FIELDS.values())
    torch.save(module.state_dict(), tmp_path / "x.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")

    def convert(path):
        convert_reward.convert_reward(
            "image_reward", tmp_path / "x.pt", tmp_path / "out", path, IMAGE_REWARD_FIELDS
        )

    if "[DEC]" in words:  # as BLIP's own tokenizer is saved
        return convert(tmp_path / "vocab.txt")
    with pytest.raises(InputError, match=r"the vocabulary (has|goes up to id) .* embeddings"):
        convert(tmp_path / "vocab.txt")
    assert not (tmp_path / "out").exists()
    convert(vocab)
    (tmp_path / "out" / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    with pytest.raises(InputError, match=r"the vocabulary (has|goes up to id) .* embeddings"):
        rewards.load("image_reward", tmp_path / "out")


def test_merges_that_are_broken(tmp_path, bpe):
    whole = bpe.read_bytes()
    middle = len(whole) // 2
    for broken in (whole[:middle], b"x" + whole, whole[:12] + b"\xff" * 8 + whole[20:]):
        (tmp_path / "bpe.txt.gz").write_bytes(broken)
        with pytest.raises(InputError, match=r"bpe\.txt\.gz is not a gzipped list of merges"):
            convert_reward.write_tokenizer(tmp_path / "bpe.txt.gz", tmp_path)


def test_what_is_no_vocabulary_of_bert(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[CLS]", "[PAD]", "[UNK]", "[SEP]"]), "utf-8")
    with pytest.raises(InputError, match=r"PAD. is not its first token"):
        prompt_text.wordpiece(tmp_path, 35, 100)


# --- what goes wrong ------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def _save(kind, path):
    state = torch_twins.OpenCLIP(CLIP_FIELDS).state_dict()
    for value in state.values():
        value.fill_(0.5)
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Evil()}))
        return
    if kind == "evil":
        torch.save({"state_dict": state, "args": Evil()}, path)
        return
    if kind == "short":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5000])
        return
    if kind == "nothing":
        torch.save([1, 2], path)
        return
    if kind == "missing":
        del state["visual.proj"]
    if kind == "unexpected":
        state["visual.head.weight"] = torch.zeros(3, 2)
    if kind == "shape":
        state["ln_final.weight"] = torch.zeros(17)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("pickle", "not a complete file of plain tensors .*: download it again"),
        ("evil", "not a complete file of plain tensors .*: download it again"),
        ("short", "not a complete file of plain tensors"),
        ("nothing", "does not hold named tensors"),
        ("missing", r"the key visual.proj is missing; expected shape \(24, 12\)"),
        ("unexpected", r"1 unexpected key.* visual.head.weight of shape \(3, 2\)"),
        ("shape", r"ln_final.weight has shape \(17,\), but the config asks for \(16,\)"),
    ],
)
def test_broken_checkpoints_write_nothing(tmp_path, bpe, capfd, kind, said):
    _save(kind, tmp_path / "x.pt")
    with pytest.raises(InputError, match=said) as error:
        convert_reward.convert_reward(
            "hps_v2", tmp_path / "x.pt", tmp_path / "out", bpe, CLIP_FIELDS
        )
    assert len(str(error.value).splitlines()) == 1
    assert "executed" not in capfd.readouterr().out and not (tmp_path / "out").exists()


def test_the_dtype_of_the_file_is_kept(tmp_path, bpe):
    module = tiny.randomize(torch_twins.OpenCLIP(CLIP_FIELDS), seed=0)
    for dtype in (torch.float16, torch.bfloat16):
        torch.save(module.to(dtype).state_dict(), tmp_path / "x.pt")
        out = tmp_path / str(dtype)
        convert_reward.convert_reward("hps_v2", tmp_path / "x.pt", out, bpe, CLIP_FIELDS)
        stored = load_file(out / "open_clip_model.safetensors")
        assert {str(x.dtype) for x in stored.values()} == {str(dtype).removeprefix("torch.")}
        np.testing.assert_array_equal(
            stored["visual.proj"].astype(np.float32), module.visual.proj.detach().float()
        )


def test_the_command(tmp_path, bpe):
    module = tiny.randomize(torch_twins.OpenCLIP(CLIP_FIELDS), seed=0)
    torch.save(module.state_dict(), tmp_path / "x.pt")
    (tmp_path / "cfg.json").write_text(json.dumps(CLIP_FIELDS), "utf-8")

    def run(*arguments):
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "r0_jax.convert_reward",
                *arguments,
                f"--checkpoint={tmp_path / 'x.pt'}",
                f"--out={tmp_path / 'out'}",
            ],
            capture_output=True,
            text=True,
        )

    done = run(
        "--reward=hps_v2_1", f"--tokenizer={bpe}", f"--architecture_config={tmp_path / 'cfg.json'}"
    )
    assert done.returncode == 0, done.stderr
    assert rewards.load("hps_v2_1", tmp_path / "out").params["logit_scale"].dtype == np.float32
    for arguments, said in [
        (("--reward=hps_v2_1",), "give its tokenizer with --tokenizer=PATH"),
        (("--reward=clip_score", "--architecture=B"), "published as ViT-L-14, ViT-H-14"),
    ]:
        done = run(*arguments)
        assert done.returncode == 2 and re.search(said, done.stderr), done.stderr
        assert done.stderr.count("\n") == 1
