"""Checkpoint files: exact both ways, and each broken one refused by a line that says why."""

import contextlib
import errno
import json
import pathlib
import pickle
import shutil
from collections.abc import Iterator

import diffusers
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
import transformers
from published import config_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from r0_jax.errors import InputError
from r0_jax.files import read_json
from r0_jax.models.clip import CLIPConfig, CLIPModel
from r0_jax.pipelines.folder import NETWORKS
from r0_jax.weights import convert
from r0_jax.weights.network import Network

DATA = pathlib.Path(__file__).parents[1] / "data"


def network_of(folder) -> Network:
    """The network that a folder's config.json describes."""
    fields = read_json(folder / "config.json")
    if fields.get("model_type") == "clip":
        config = CLIPConfig.from_json(fields)
        return Network.abstract(lambda rngs: CLIPModel(config, rngs=rngs))
    build, _ = NETWORKS[fields.get("_class_name") or fields["architectures"][0]]
    return Network.abstract(lambda rngs: build(fields, rngs))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    return tiny.clip(tiny.stable_diffusion(root, seed=0) / "clip", seed=1).parent


@pytest.fixture
def folder(originals, tmp_path):
    """A VAE's folder, to be tampered with."""
    return pathlib.Path(shutil.copytree(originals / "vae", tmp_path / "vae"))


@pytest.fixture(scope="module")
def vae(originals):
    return network_of(originals / "vae")


STEM = "diffusion_pytorch_model"
FILE = f"{STEM}.safetensors"


@contextlib.contextmanager
def refused(*said: str) -> Iterator[None]:
    with pytest.raises(InputError) as error:
        yield
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for part in said:
        assert part in message


def load(folder, network, dtype="float32"):
    return convert.load(convert.find_files(folder, STEM), network, dtype)


# --- the rule --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, key, shape, file_shape",
    [
        ("conv_in.kernel", "conv_in.weight", (3, 5, 4, 8), (8, 4, 3, 5)),
        ("ff.net.0.proj.kernel", "ff.net.0.proj.weight", (4, 8), (8, 4)),
        ("norm1.scale", "norm1.weight", (4,), (4,)),
        ("norm1.bias", "norm1.bias", (4,), (4,)),
        ("token_embedding.embedding", "token_embedding.weight", (5, 3), (5, 3)),
        ("embeddings.class_embedding", "embeddings.class_embedding", (3,), (3,)),
        ("logit_scale", "logit_scale", (), ()),
    ],
)
def test_the_rule(name, key, shape, file_shape):
    value = np.random.default_rng(0).standard_normal(shape)
    assert convert.to_key(name) == key
    stored = convert.to_checkpoint(name, value)
    assert stored.shape == file_shape
    np.testing.assert_array_equal(convert.from_checkpoint(name, stored), value)


MANIFESTS = {  # of the published files -> the config published with them
    "sd15_unet": ("stable_diffusion/unet", NETWORKS["UNet2DConditionModel"][0]),
    "sd15_vae_fp32_oldnames": ("stable_diffusion/vae", NETWORKS["AutoencoderKL"][0]),
    "clip_l_text_hub": ("stable_diffusion/text_encoder", NETWORKS["CLIPTextModel"][0]),
    "clip_l_hf": (
        "clip_score",
        lambda fields, rngs: CLIPModel(CLIPConfig.from_json(fields), rngs=rngs),
    ),
    "sdxl_unet": ("stable_diffusion_xl/unet", NETWORKS["UNet2DConditionModel"][0]),
    "sdxl_vae": ("stable_diffusion_xl/vae", NETWORKS["AutoencoderKL"][0]),
    "sdxl_text_encoder_2": (
        "stable_diffusion_xl/text_encoder_2",
        NETWORKS["CLIPTextModelWithProjection"][0],
    ),
    "sd3_vae": ("stable_diffusion_3/vae", NETWORKS["AutoencoderKL"][0]),
    "sd3_text_encoder": (
        "stable_diffusion_3/text_encoder",
        NETWORKS["CLIPTextModelWithProjection"][0],
    ),
    "t5xxl_encoder": ("stable_diffusion_3/text_encoder_3", NETWORKS["T5EncoderModel"][0]),
    "taiyi_bert_text_encoder": ("taiyi/text_encoder", NETWORKS["BertModel"][0]),
    "z_image_transformer": ("z_image/transformer", NETWORKS["ZImageTransformer2DModel"][0]),
    "qwen3_4b_text_encoder": ("z_image/text_encoder", NETWORKS["Qwen3Model"][0]),
    "flux1_vae_16ch": ("z_image/vae", NETWORKS["AutoencoderKL"][0]),
}
OLD_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_names_and_shapes_are_those_of_the_published_file(manifest):
    config, build = MANIFESTS[manifest]
    fields = config_of(config)
    network = Network.abstract(lambda rngs: build(fields, rngs))
    published = read_json(DATA / "keys" / f"{manifest}.json")
    expected = {}
    for key, shape in published["keys"].items():
        for old, new in OLD_NAMES.items():
            key = key.replace(old, new) if "attentions" in key else key  # BERT's own stay
        expected[key] = tuple(shape)
    ours = {}
    for name, struct in network.shapes.items():
        zeros = np.broadcast_to(np.float32(0), struct.shape)  # one number, whatever the shape
        ours[convert.to_key(name)] = convert.to_checkpoint(name, zeros).shape
    assert ours == expected
    assert sum(struct.size for struct in network.shapes.values()) == published["_num_elements"]


# --- there and back --------------------------------------------------------------------------

TORCH = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "clip": transformers.CLIPModel,
}


@pytest.mark.parametrize("part", TORCH)
def test_round_trip_is_exact(part, originals, tmp_path):
    files = convert.find_files(originals / part, "model" if part == "clip" else STEM)
    params = convert.load(files, network_of(originals / part))
    assert all(isinstance(value, np.ndarray) for value in params.values())
    path = tmp_path / "new" / "saved.safetensors"
    convert.save(params, path, metadata={"made_by": "a test"})

    ours, theirs = load_file(path), load_file(files[0])
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and ours[key].shape == value.shape, key
        assert ours[key].numpy().tobytes() == value.numpy().tobytes(), key
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt", "made_by": "a test"}

    # And the library takes it for its own: every key, every shape.
    module = TORCH[part].from_pretrained(originals / part)
    for value in module.parameters():
        torch.nn.init.zeros_(value)
    module.load_state_dict(ours, strict=True)
    for key, value in module.state_dict().items():
        assert torch.equal(value, theirs[key]), key


def test_a_text_encoder_is_read_without_and_written_with_the_prefix_of_the_hub(originals, tmp_path):
    """transformers 5 writes a CLIPTextModel without `text_model.`, and reads both."""
    folder = shutil.copytree(originals / "text_encoder", tmp_path / "text_encoder")
    path = folder / "model.safetensors"
    theirs = load_file(path)
    network = network_of(folder)
    params = convert.load(convert.find_files(folder, "model"), network)
    convert.save(params, path)
    assert load_file(path).keys() == {
        f"text_model.{key.removeprefix('text_model.')}" for key in theirs
    }
    again = convert.load([path], network)
    assert all(np.array_equal(again[name], params[name]) for name in params)
    module, info = transformers.CLIPTextModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for key, value in module.state_dict().items():
        assert torch.equal(value, theirs[key]), key


def test_shards(folder, vae):
    expected = load(folder, vae)
    module = diffusers.AutoencoderKL.from_pretrained(folder)
    (folder / FILE).unlink()
    module.save_pretrained(folder, max_shard_size="20KB")
    files = convert.find_files(folder, STEM)
    assert len(files) > 2
    params = load(folder, vae)
    assert params.keys() == expected.keys()
    assert all(np.array_equal(params[name], expected[name]) for name in params)

    missing = files[1]
    missing.unlink()
    with refused(f"{STEM}.safetensors.index.json", missing.name, "incomplete"):
        load(folder, vae)


@pytest.mark.parametrize("variant, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_variants(folder, vae, variant, dtype, shard):
    whole = load(folder, vae)
    module = diffusers.AutoencoderKL.from_pretrained(folder).to(dtype)
    module.save_pretrained(folder, variant=variant, max_shard_size=shard)
    # The full-precision file, while it is there.
    assert convert.find_files(folder, STEM) == [folder / FILE]
    (folder / FILE).unlink()
    assert all(variant in file.name for file in convert.find_files(folder, STEM))
    params = load(folder, vae)
    for name, value in params.items():
        assert value.dtype == np.float32
        rounded = torch.tensor(whole[name]).to(dtype).float().numpy()
        np.testing.assert_array_equal(value, rounded)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_may_have_any_name(folder, variant):
    """Nothing but the index says what they are."""
    tensors = list(load_file(folder / FILE).items())
    (folder / FILE).unlink()
    names = [f"{STEM}{variant}.a.safetensors", "part_b.safetensors"]
    for name, half in zip(names, (tensors[::2], tensors[1::2]), strict=True):
        save_file(dict(half), folder / name)
    index = folder / f"{FILE}.index{variant}.json"
    index.write_text(
        json.dumps({"weight_map": {key: names[i % 2] for i, (key, _) in enumerate(tensors)}}),
        "utf-8",
    )
    assert convert.find_weights(folder, STEM) == index
    assert convert.find_files(folder, STEM) == [folder / name for name in names]


def test_full_precision_shards_are_preferred_to_a_variant_in_one_file(folder):
    module = diffusers.AutoencoderKL.from_pretrained(folder)
    (folder / FILE).unlink()
    module.save_pretrained(folder, max_shard_size="20KB")
    module.half().save_pretrained(folder, variant="fp16")
    assert all("fp16" not in file.name for file in convert.find_files(folder, STEM))


def test_of_a_single_file_and_shards_each_library_has_its_own_choice(folder):
    module = diffusers.AutoencoderKL.from_pretrained(folder)
    module.save_pretrained(folder, max_shard_size="20KB")
    shutil.copy(next(folder.glob("*-of-*")), folder / FILE)  # of another revision
    assert len(convert.find_files(folder, STEM)) > 2
    theirs = diffusers.AutoencoderKL.from_pretrained(folder)
    assert theirs.state_dict().keys() == module.state_dict().keys()
    for path in list(folder.glob(f"{STEM}*")):
        path.rename(folder / path.name.replace(STEM, "model"))
    assert convert.find_files(folder, "model") == [folder / "model.safetensors"]


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_variant_that_is_whole_is_preferred_to_shards_that_are_not_there(folder, shard):
    """A snapshot of every *.json and of the variant's weights alone."""
    module = diffusers.AutoencoderKL.from_pretrained(folder)
    (folder / FILE).unlink()
    module.save_pretrained(folder, max_shard_size="20KB")
    full = convert.find_files(folder, STEM)
    full[1].unlink()
    module.half().save_pretrained(folder, variant="fp16", max_shard_size=shard)
    assert (folder / f"{FILE}.index.json").exists()
    files = convert.find_files(folder, STEM)
    assert all("fp16" in file.name for file in files) and len(files) == len(set(files))
    assert (len(files) > 2) == (shard == "20KB")
    files[-1].unlink()
    if shard == "20KB":  # nor is this one whole: of the first is told
        assert convert.find_weights(folder, STEM) == folder / f"{FILE}.index.json"
    with refused(f"{FILE}.index.json names 1 file(s)", full[1].name, "incomplete"):
        convert.find_files(folder, STEM)


@pytest.mark.parametrize(
    "name, dtype",
    [("float32", np.float32), ("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)],
)
def test_dtypes(folder, vae, name, dtype):
    params = load(folder, vae, name)
    assert {value.dtype for value in params.values()} == {np.dtype(dtype)}
    convert.save(load(folder, vae), folder / "half.safetensors", name)
    expected = getattr(torch, name)
    source = load_file(folder / FILE)
    for key, value in load_file(folder / "half.safetensors").items():
        assert value.dtype == expected
        assert torch.equal(value, source[key].to(expected)), key


def test_position_ids_are_ignored(originals, tmp_path):
    folder = shutil.copytree(originals / "clip", tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    for tower in ("text_model", "vision_model"):
        tensors[f"{tower}.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(tensors, folder / "model.safetensors")
    network = network_of(folder)
    params = convert.load(convert.find_files(folder, "model"), network)
    assert params.keys() == network.shapes.keys()


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_names_of_a_vae(folder, vae, as_convolution):
    expected = load(folder, vae)
    tensors = {}
    for key, value in load_file(folder / FILE).items():
        for old, new in OLD_NAMES.items():
            if new in key:
                key = key.replace(new, old)
                if as_convolution and key.endswith("weight"):
                    value = value[:, :, None, None]
        tensors[key] = value
    assert sum(".query." in key for key in tensors) == 4
    save_file(tensors, folder / FILE)
    params = load(folder, vae)
    assert all(np.array_equal(params[name], expected[name]) for name in expected)


# --- files that do not fit -------------------------------------------------------------------

KEY = "decoder.conv_in.weight"


def change(folder, edit):
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE)


def test_a_missing_key_is_named_with_the_shape_it_should_have(folder, vae):
    change(folder, lambda tensors: tensors.pop(KEY))
    with refused(FILE, KEY, "missing", "(16, 4, 3, 3)"):
        load(folder, vae)


def test_an_unexpected_key_is_named_with_its_shape(folder, vae):
    change(folder, lambda tensors: tensors.update({"ema.decay": torch.zeros(2, 5)}))
    with refused(FILE, "unexpected", "ema.decay", "(2, 5)"):
        load(folder, vae)


def test_keys_of_the_rest_of_a_model_are_skipped(originals, tmp_path):
    folder = pathlib.Path(shutil.copytree(originals / "text_encoder", tmp_path / "text_encoder"))
    (file,) = convert.find_files(folder, "model")
    network, whole = network_of(folder), convert.load([file], network_of(folder))
    rest = {"logit_scale": torch.zeros(()), "vision_model.x.weight": torch.zeros(2, 2)}
    save_file(load_file(file) | rest | {"global_step": torch.zeros(1)}, file)
    params = convert.load([file], network)
    assert params.keys() == whole.keys()
    assert all(np.array_equal(params[name], whole[name]) for name in params)


def test_what_is_not_finite_is_not_written(tmp_path):
    path = tmp_path / "x.safetensors"
    for dtype, value in (("float32", np.nan), ("float16", 7e4), ("bfloat16", np.inf)):
        params = {"a.kernel": np.full((2, 2), value, np.float32)}
        with pytest.raises(InputError, match=rf"a\.weight holds NaN or infinities in {dtype}"):
            convert.save(params, path, dtype)
    with pytest.raises(InputError, match="a holds NaN or infinities in float32"):
        convert.save_tensors({"a": np.asarray([np.inf], np.float32)}, path)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_too_large_for_the_dtype_are_not_called_nan(folder, vae):
    change(folder, lambda tensors: tensors.update({KEY: tensors[KEY].double() + 1e300}))
    with refused(KEY, "numbers of float64 that are too large for float32"):
        load(folder, vae)


@pytest.mark.parametrize(
    "key, shape, expected",
    [
        (KEY, (16, 4, 5, 5), "(16, 4, 3, 3)"),
        (KEY, (16, 4), "(16, 4, 3, 3)"),
        ("encoder.mid_block.attentions.0.to_q.weight", (16, 16, 3, 3), "(16, 16)"),
        ("encoder.conv_in.bias", (8, 1, 1), "(8,)"),
    ],
)
def test_a_mis_shaped_key_is_named_with_both_shapes(folder, vae, key, shape, expected):
    change(folder, lambda tensors: tensors.update({key: torch.zeros(shape)}))
    with refused(FILE, key, str(shape), expected):
        load(folder, vae)


def test_a_number_format_numpy_lacks_is_named(folder, vae):
    change(folder, lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.float8_e4m3fn)}))
    with refused(FILE, KEY, "float8"):
        load(folder, vae)


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool", "complex64"])
def test_numbers_that_are_no_weights_are_refused(folder, vae, dtype):
    change(folder, lambda tensors: tensors.update({KEY: tensors[KEY].to(getattr(torch, dtype))}))
    with refused(FILE, KEY, dtype):
        load(folder, vae)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_truncated_file(folder, vae, size):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:size])
    with refused(FILE, "not a complete safetensors file", "download it again"):
        load(folder, vae)


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html>Sign in</html>",
        pickle.dumps({"a": 1}),
    ],
    ids=["html", "pickle"],
)
def test_a_foreign_file(folder, vae, content):
    (folder / FILE).write_bytes(content)
    with refused(FILE, "not a complete safetensors file"):
        load(folder, vae)


@pytest.mark.parametrize("name", [FILE, f"{FILE}.index.json", "config.json"])
def test_a_git_lfs_pointer(folder, vae, name):
    if name != "config.json":
        (folder / FILE).unlink()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 334643276\n"
    (folder / name).write_bytes(pointer)
    with refused(str(folder / name), "Git LFS pointer", "run `git lfs pull`"):
        load(folder, network_of(folder))


def test_layers_beyond_those_of_the_config_are_skipped(originals, tmp_path):
    """Clip skip as users of transformers write it: the config has one layer less than the file."""
    folder = pathlib.Path(shutil.copytree(originals / "text_encoder", tmp_path / "text_encoder"))
    whole = convert.load(convert.find_files(folder, "model"), network_of(folder))
    fields = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 1}))
    shorter, files = network_of(folder), convert.find_files(folder, "model")
    with pytest.warns(UserWarning, match=r"has 1 layers: those beyond it .* skipped \(clip skip\)"):
        params = convert.load(files, shorter)
    assert params.keys() == {name for name in whole if ".layers.1." not in name}
    assert all(np.array_equal(params[name], whole[name]) for name in params)
    tensors = load_file(files[0])
    first = next(key for key in tensors if ".layers.0." in key)
    save_file(tensors | {first.replace("layers.0.", "layers.0.own."): torch.zeros(3)}, files[0])
    with refused("1 unexpected key"):
        convert.load(files, shorter)


def test_a_file_that_is_not_there(tmp_path, vae):
    with refused(str(tmp_path / FILE), "missing"):
        convert.find_files(tmp_path, STEM)
    with refused(str(tmp_path / "nowhere" / FILE), "missing"):
        convert.find_files(tmp_path / "nowhere", STEM)
    with refused(str(tmp_path / "head.safetensors"), "missing"):
        convert.load([tmp_path / "head.safetensors"], vae)


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", [f"{STEM}.bin", "model.ckpt", "model.pt"])
def test_pickles_are_refused_and_never_run(folder, vae, tmp_path, name):
    (folder / FILE).unlink()
    (folder / name).write_bytes(pickle.dumps(_Bomb(tmp_path / "ran")))
    with refused(str(folder), "only pickled weights", FILE):
        load(folder, vae)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {KEY: "../outside.safetensors"}},
        {"weight_map": {KEY: "/etc/passwd"}},
        {"weight_map": {KEY: "folder/inside.safetensors"}},
        {"weight_map": {KEY: 3}},
        {"weight_map": {KEY: "a" * 5000}},
        {"weight_map": {KEY: "色" * 200}},  # 600 bytes
        {"weight_map": {KEY: "\ud800"}},
        {"weight_map": {}},
        {"weight_map": [FILE]},
        {"metadata": {}},
        [],
    ],
)
def test_an_index_of_other_places_or_of_nothing(folder, vae, index):
    shutil.copy(folder / FILE, folder.parent / "outside.safetensors")
    (folder / FILE).unlink()
    (folder / f"{FILE}.index.json").write_text(json.dumps(index), "utf-8")
    with refused(f"{FILE}.index.json", "not a safetensors index"):
        load(folder, vae)


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"[" * 100_000])
def test_an_index_that_is_not_json(folder, vae, content):
    (folder / FILE).unlink()
    (folder / f"{FILE}.index.json").write_bytes(content)
    with refused(f"{FILE}.index.json", "not a safetensors index"):
        load(folder, vae)


# --- writing ---------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(folder, vae, monkeypatch):
    params, before = load(folder, vae), (folder / FILE).read_bytes()
    files = sorted(folder.iterdir())

    def fail(error):
        def read(name, value):
            if name == list(params)[-1]:  # the others are written
                raise error
            return value

        return read

    monkeypatch.setattr(convert, "to_checkpoint", fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert.save(params, folder / FILE)
    monkeypatch.setattr(convert, "to_checkpoint", fail(OSError(errno.ENOSPC, "No space left")))
    with refused(str(folder / FILE), "No space left"):
        convert.save(params, folder / FILE)
    assert (folder / FILE).read_bytes() == before
    assert sorted(folder.iterdir()) == files


def test_a_saved_file_can_be_read_by_everyone(folder, vae):
    convert.save(load(folder, vae), folder / FILE)
    assert (folder / FILE).stat().st_mode & 0o777 == 0o644
