"""Text of a folder or a run stays text in the model card."""

import ast
import json

import pytest
import yaml

from r0_jax.export import licence, model_card

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


@pytest.mark.parametrize(
    "card, fields",
    [
        ("---\nlicense: apache-2.0\n---\n# M\n", {"license": "apache-2.0"}),
        (
            "\ufeff---\nlicense: other\nlicense_name: my-licence\nlicense_link: LICENSE.md\n---\n",
            {"license": "other", "license_name": "my-licence", "license_link": "LICENSE.md"},
        ),
        ("---\nlicense: [a, b]\nlicense_name: 3\n---\n", {}),
        ("# no metadata\n---\nlicense: mit\n---\n", {}),
        ("", {}),
    ],
)
def test_the_licence_is_that_of_the_pretrained_card(tmp_path, card, fields):
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert licence.of_folder(tmp_path) == fields


@pytest.mark.parametrize(
    "card", [b"---\nlicense: [\n---\n", b"---\n\xff\n---\n", b"---\nlicense: mit"]
)
def test_a_broken_pretrained_card_warns(tmp_path, card):
    (tmp_path / "README.md").write_bytes(card)
    with pytest.warns(UserWarning, match="names no licence"):
        assert licence.of_folder(tmp_path) == {}


def test_without_a_pretrained_card_there_is_no_licence(tmp_path):
    assert licence.of_folder(tmp_path) == {}
