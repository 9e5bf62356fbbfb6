"""One line for the user, safe to show on a terminal."""

import pytest

from r0_jax import cli, errors
from r0_jax.errors import InputError


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\x9b31m\x7f\x00", r"a\x9b31m\x7f\x00"),
        ("a\u202eb\ud800", r"a\u202eb\ud800"),
        ("a\r\nb\u2028c", "a b c"),
        ("红色 的\u3000圆 é…", "红色 的\u3000圆 é…"),
    ],
)
def test_control_characters_are_escaped(text, shown, capsys):
    assert errors.explain(InputError(text)) == (errors.USER_ERROR, shown)
    cli._show_warning(text)
    assert capsys.readouterr().err == f"warning: {shown}\n"


def test_long_names_and_lines_are_cut_in_their_middle():
    _, line = errors.explain(InputError(f"start {'x' * 100_000} end"))
    assert len(line) < 1100 and line.startswith("start xx") and line.endswith("x end")
    _, line = errors.explain(InputError("start " + "xy " * 100_000 + "end"))
    assert len(line) < 4100 and line.startswith("start xy") and line.endswith("xy end")
    path = "/".join(["folder"] * 100)
    assert errors.explain(InputError(path)) == (errors.USER_ERROR, path)
