"""HPSv3: Qwen2-VL reads the image, a rubric and the prompt, and an MLP gives the score."""

from pathlib import Path

from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from r0_jax import remote
from r0_jax.files import naming, read_json
from r0_jax.models.qwen2_vl import HPSv3, Qwen2VLConfig
from r0_jax.rewards.around_image import AroundImage, check_type, load_qwen2_vl, make_reward
from r0_jax.rewards.preprocess import Preprocess
from r0_jax.rewards.reward import Reward
from r0_jax.weights import convert
from r0_jax.weights.network import Network, Params, stored_in

SPECIAL = ("<|Reward|>",)  # the score is read from its state; nothing that follows changes it
_TEMPLATE = read_json(Path(__file__).parent / "templates" / "hps_v3.json")
TEXTS = (str(_TEMPLATE["before"]), str(_TEMPLATE["after"]))  # around the image


def load(name: str, entry: ConfigDict, dtype: str, text: bool) -> Reward:
    """Load HPSv3 from a converted folder; scores are about 5 to 11 for today's models.

    The features of a prompt are the token ids of the rubric with the prompt in it, int32. The
    tokenizer is read without `text` too: it says what stands before the image.
    """
    del text
    folder = remote.local(entry.path)
    with naming(folder):
        with naming(folder / "config.json"):
            config = Qwen2VLConfig.from_json(check_type(folder, "hps_v3"))
        files = convert.find_files(folder, "model")
        network = Network.abstract(lambda rngs: HPSv3(config, rngs=rngs), stored_in(files))
    params = convert.open_params(files, network, "float32")
    params = {
        k: v if k.startswith("rm_head.") else v.astype(convert.DTYPES[dtype])
        for k, v in params.items()
    }
    around = tokens(folder, config.vocab_size, entry.tokens)
    prepare = Preprocess(entry.size, "area", resize=entry.resize)

    def score(
        params: Params, images: Float[Array, "b h w 3"], features: Int[Array, "b t"]
    ) -> Float[Array, " b"]:
        return network(params, prepare(images).astype(dtype), around.before, features)

    grid = entry.size // config.vision_config.patch_size
    return make_reward(name, params, score, around, grid)


def tokens(folder: Path, words: int, most: int) -> AroundImage:
    """Return the rubric around an image, for prompts of at most `most` tokens."""
    tokenizer = load_qwen2_vl(folder, words, SPECIAL)
    before, after = TEXTS
    return AroundImage(tokenizer, before, [after], most)
