"""From a prompt file, or a dataset of encoded prompts, to a batch of the step."""

from ml_collections import ConfigDict

from r0_jax.prompts import encoded
from r0_jax.prompts.source import PromptSource
from r0_jax.prompts.text import TextPrompts


def of(config: ConfigDict) -> PromptSource:
    """Return the prompts of a config: those encoded in data.encoded, else the text in data.prompts.

    Raises InputError for a data.encoded that is incomplete, damaged or something else.
    """
    if config.data.encoded:
        return encoded.open_folder(config.data.encoded)
    return TextPrompts(config.data.prompts)
