"""Text of a folder or a run stays text in the model card."""

import ast
import json

import pytest
import yaml

from r0_jax.export import model_card

TEXTS = [
    'a"b',
    "a`b",
    "``",
    "a\n---\nb: c",
    "<script>",
    "a|b",
    "![x](http://x)",
    "a\x1b[2J",
    "a\x7f\x85\u2028b",
    "红色",
    "\\",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_never_leaves_its_place(text):
    string = model_card._string(text)
    assert ast.literal_eval(string) == json.loads(string) == yaml.safe_load(string) == text
    code, plain = model_card._code(text), model_card._escape(text)
    assert all(len(x.splitlines()) == 1 and x.isprintable() for x in (string, code, plain))
    fence = code[: len(code) - len(code.lstrip("`"))]
    assert code.endswith(fence) and fence not in code.strip("`")
    for special in "`<>|[]*":
        assert plain.count(special) == plain.count(f"\\{special}")


def test_plain_names_are_written_as_they_are():
    text = "stable-diffusion_v1.5 x 0.5, heldout/pickscore"
    assert model_card._escape(text) == text
    assert model_card._code(text) == f"`{text}`"
