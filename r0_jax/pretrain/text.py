"""Stage `text_encoder`: trains the text encoder on captions of both languages.

Stable Diffusion freezes CLIP's text encoder. This encoder learns to name the objects of a scene,
and is frozen too.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from transformers import CLIPTokenizer

from r0_jax.models.clip import CLIPTextConfig, CLIPTextModel
from r0_jax.pipelines.tokenizers import load_tokenizer, tokenize
from r0_jax.pretrain.fit import console, fit
from r0_jax.pretrain.folders import write_json
from r0_jax.shapes.captions import captions_for
from r0_jax.shapes.scene import COLOURS, RELATIONS, SHAPES, SIZES, Scene, sample_scenes
from r0_jax.weights import convert
from r0_jax.weights.network import Network, init

# Number of classes of each field of a scene, in the order of `answers`.
QUESTIONS = (len(SHAPES),) * 2 + (len(COLOURS),) * 2 + (len(SIZES),) * 2 + (2, len(RELATIONS))
CAPTION_LENGTH = 17  # tokens of the longest caption; the tokens after its end play no part


def train(config: ConfigDict, out: Path) -> None:
    """Train the text encoder; write `out/pipeline/text_encoder`."""
    tokenizer = load_tokenizer(out / "pipeline" / "tokenizer")
    fields = {**config.network.to_dict(), **special_tokens(tokenizer)}
    parsed = CLIPTextConfig.from_json(fields)

    def constructor(rngs):
        return CLIPTextModel(parsed, rngs=rngs)

    network = Network.abstract(constructor)

    def loss(params, batch, key):
        """Return the cross-entropy of all answers of a linear head on the end-of-text token."""
        del key
        params = dict(params)
        head = params.pop("head")
        logits = network(params, batch["input_ids"]).pooled @ head
        losses, right = [], True
        for i, part in enumerate(jnp.split(logits, np.cumsum(QUESTIONS)[:-1], axis=-1)):
            answer = batch["answers"][:, i]
            losses.append(optax.softmax_cross_entropy_with_integer_labels(part, answer).mean())
            right &= jnp.argmax(part, axis=-1) == answer
        return sum(losses), {"all_right": jnp.mean(right)}

    encoder_key, head_key = jax.random.split(jax.random.key(config.seed))
    start = init(constructor, encoder_key)
    start["head"] = 0.02 * jax.random.normal(head_key, (parsed.hidden_size, sum(QUESTIONS)))
    params = fit(loss, start, batches(config, tokenizer), config)
    del params["head"]
    folder = out / "pipeline" / "text_encoder"
    convert.save(params, folder / "model.safetensors", config.store_dtype)
    write_json(folder / "config.json", fields)
    console.print(f"written to {folder}")


def special_tokens(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """Return the fields of a text config that describe its tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def answers(scenes: Scene) -> np.ndarray:
    """Return the correct answers for scenes: int32 [N, len(QUESTIONS)]."""
    fields = [
        scenes.shape,
        scenes.colour,
        scenes.size,
        scenes.count[:, None] - 1,
        scenes.relation[:, None],
    ]
    return np.concatenate(fields, axis=1).astype(np.int32)


def batches(config: ConfigDict, tokenizer: CLIPTokenizer) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of captions of training scenes, with their answers."""
    rng = np.random.default_rng(config.seed)
    while True:
        scenes = sample_scenes(rng, config.batch_size, "train")
        yield {
            "input_ids": tokenize(tokenizer, captions_for(scenes, rng), CAPTION_LENGTH),
            "answers": answers(scenes),
        }
