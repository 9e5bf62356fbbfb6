"""Both kinds of prompts answer the same questions."""

import inspect

import pytest

from r0_jax import config as base
from r0_jax import prompts
from r0_jax.errors import InputError
from r0_jax.prompts.encoded import EncodedPrompts
from r0_jax.prompts.source import PromptSource
from r0_jax.prompts.text import TextPrompts


@pytest.mark.parametrize("kind", [TextPrompts, EncodedPrompts])
def test_both_kinds_have_the_methods_of_the_protocol(kind):
    asked = dict(inspect.getmembers(PromptSource, inspect.isfunction))
    asked = {name: method for name, method in asked.items() if not name.startswith("_")}
    assert {"attach", "check", "columns", "prepare", "batches", "evaluation"} <= set(asked)
    for name, method in asked.items():
        found = inspect.signature(getattr(kind, name)).parameters
        expected = inspect.signature(method).parameters
        assert [*found] == [*expected], name


def test_data_encoded_chooses_the_kind(tmp_path):
    config = base.get_config()
    config.data.prompts = "prompts.txt"
    assert prompts.of(config) == TextPrompts("prompts.txt")
    config.data.encoded = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match="the encoded prompts, is not a folder"):
        prompts.of(config)
