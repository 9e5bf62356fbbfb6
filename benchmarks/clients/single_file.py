"""Single-file checkpoints under the names of their first authors, from diffusers folders.

Clients read these: SD 1.5 as CompVis published it, SDXL as sgm, SD3 as mmdit. The names are written
down here once more, and not taken from r0_jax.export, so that no fault of an export repeats itself.
"""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from r0_jax.files import read_json
from r0_jax.weights import convert, tensor_file
from r0_jax.weights.tensor_file import Tensor, TensorFile

_NETWORK = "model.diffusion_model."
_STEMS = ("diffusion_pytorch_model", "model")
_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = (
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    ("group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])\.", r"\1."),
)
_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_MMDIT = (
    (r"transformer_blocks\.(\d+)\.", r"joint_blocks.\1."),
    (r"pos_embed\.", ""),
    (r"^proj\.", "x_embedder.proj."),
    (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"norm1\.linear", "x_block.adaLN_modulation.1"),
    (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
    (r"attn\.to_out\.0", "x_block.attn.proj"),
    (r"attn\.to_add_out", "context_block.attn.proj"),
    (r"ff\.net\.0\.proj", "x_block.mlp.fc1"),
    (r"ff\.net\.2", "x_block.mlp.fc2"),
    (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"),
    (r"ff_context\.net\.2", "context_block.mlp.fc2"),
)
_MMDIT_FUSED = {
    "x_block": ("to_q", "to_k", "to_v"),
    "context_block": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def write(folder: Path, target: Path) -> None:
    """Write the checkpoint of a pipeline's folder; that of SD3 has no text encoders."""
    kind = read_json(folder / "model_index.json")["_class_name"]
    found = [*_vae(folder / "vae")]
    if kind == "StableDiffusion3Pipeline":
        found += _mmdit(folder / "transformer")
    elif kind == "StableDiffusionXLPipeline":
        found += _unet(folder / "unet")
        found += _renamed(folder / "text_encoder", "conditioner.embedders.0.transformer.{}".format)
        found += _open_clip(folder / "text_encoder_2", "conditioner.embedders.1.model.")
    else:
        found += _unet(folder / "unet")
        found += _renamed(folder / "text_encoder", "cond_stage_model.transformer.{}".format)
    tensor_file.write(target, found)


def unet_name(module: str, layers: int, attentions: list[bool]) -> str:
    """Return the first authors' name of a UNet's module.

    Args:
      module: its name in diffusers.
      layers: resnets of a level of the encoder; the decoder has one more.
      attentions: whether a level of the decoder has attentions, in the order of its levels.
    """
    if module in _UNET:
        return _UNET[module]
    head, kind, number, rest = re.fullmatch(
        r"(.*_block(?:s\.\d+)?)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", module
    ).groups()
    number, rest = int(number), _RESNET.get(rest, rest) if kind == "resnets" else rest
    if head == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
    side, level = head.split("_blocks.")
    in_element = {"resnets": 0, "attentions": 1}.get(kind)
    if side == "down":
        first = 1 + (layers + 1) * int(level)
        if in_element is None:
            return f"input_blocks.{first + layers}.0.op"
        return f"input_blocks.{first + number}.{in_element}.{rest}"
    first = (layers + 1) * int(level)
    if in_element is None:  # it comes last in the level's last element
        return f"output_blocks.{first + layers}.{1 + attentions[int(level)]}.{rest}"
    return f"output_blocks.{first + number}.{in_element}.{rest}"


def _unet(folder: Path) -> Iterator[Tensor]:
    fields = read_json(folder / "config.json")
    attentions = ["CrossAttn" in kind for kind in fields["up_block_types"]]

    def rename(key: str) -> str:
        module, end = key.rsplit(".", 1)
        return f"{_NETWORK}{unet_name(module, fields['layers_per_block'], attentions)}.{end}"

    return _renamed(folder, rename)


def _vae(folder: Path) -> Iterator[Tensor]:
    last = len(read_json(folder / "config.json")["block_out_channels"]) - 1

    def rename(key: str) -> str:
        key = re.sub(
            r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)",
            lambda x: f"up.{last - int(x[1])}.{'block' if x[2] == 'resnets' else 'upsample'}",
            key,
        )
        for ours, theirs in _VAE:
            key = re.sub(ours, theirs, key)
        return f"first_stage_model.{key}"

    for tensor in _renamed(folder, rename):
        is_matrix = ".attn_1." in tensor.key and len(tensor.shape) == 2  # once a convolution
        yield tensor._replace(shape=(*tensor.shape, 1, 1)) if is_matrix else tensor


def _open_clip(folder: Path, prefix: str) -> Iterator[Tensor]:
    """Yield CLIP as open_clip has it: queries, keys and values in one."""
    stored = {tensor.key: tensor for tensor in _renamed(folder, str)}
    for key, tensor in stored.items():
        layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", key)
        if key == "text_projection.weight":
            yield Tensor(
                f"{prefix}text_projection",
                tensor.shape[::-1],
                tensor.dtype,
                functools.partial(_transposed, tensor),
            )
        elif layer is None:
            yield tensor._replace(key=prefix + _CLIP[key])
        elif layer[2] in _CLIP_LAYER:
            name = f"transformer.resblocks.{layer[1]}.{_CLIP_LAYER[layer[2]]}.{layer[3]}"
            yield tensor._replace(key=prefix + name)
        elif layer[2] == "self_attn.q_proj":
            parts = [stored[key.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            yield _joined(
                f"{prefix}transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}", parts
            )


def _mmdit(folder: Path) -> Iterator[Tensor]:
    stored = {tensor.key: tensor for tensor in _renamed(folder, str)}
    last = max(int(key.split(".")[1]) for key in stored if key.startswith("transformer_blocks."))
    for key, tensor in stored.items():
        if part := re.fullmatch(r"transformer_blocks\.(\d+)\.attn\.(\w+)\.(weight|bias)", key):
            for block, names in _MMDIT_FUSED.items():
                if part[2] == names[0]:
                    name = f"{_NETWORK}joint_blocks.{part[1]}.{block}.attn.qkv.{part[3]}"
                    yield _joined(name, [stored[key.replace(names[0], x)] for x in names])
            if part[2].removeprefix("add_").removeprefix("to_")[0] in "qkv":
                continue
        if "norm_out.linear" in key or f".{last}.norm1_context.linear" in key:
            tensor = tensor._replace(value=functools.partial(_swapped, tensor))
        for ours, theirs in _MMDIT:
            key = re.sub(ours, theirs, key)
        yield tensor._replace(key=_NETWORK + key)


def _renamed(folder: Path, rename: Callable[[str], str]) -> Iterator[Tensor]:
    """Yield the tensors of a network's folder under other names."""
    stem = next(stem for stem in _STEMS if any(folder.glob(f"{stem}*.safetensors")))
    for path in convert.find_files(folder, stem):
        file = TensorFile(path)
        for key, stored in file.tensors.items():
            value = functools.partial(file.read, key)
            yield Tensor(rename(key), stored.shape, file.dtype(key), value)


def _joined(key: str, parts: list[Tensor]) -> Tensor:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def value() -> np.ndarray:
        return np.concatenate([part.value() for part in parts])

    return Tensor(key, shape, parts[0].dtype, value)


def _transposed(tensor: Tensor) -> np.ndarray:
    return tensor.value().T


def _swapped(tensor: Tensor) -> np.ndarray:
    """Return scale and shift in the other order."""
    return np.concatenate(np.split(tensor.value(), 2)[::-1])
