"""Write docs/api/rewards.md from the docstrings of r0_jax.rewards: `make docs`.

    python docs/make_api.py            # writes the page
    python docs/make_api.py --check    # exit status 1 if the page is not up to date

The source is parsed, not imported, so the page does not depend on installed packages.
"""

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api" / "rewards.md"
FIRST = ("__init__", "reward", "plugin", "tower", "preprocess")  # the others follow by name
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises):$")
_ENTRY = re.compile(r"(\w+): (.*)")

Definition = ast.FunctionDef | ast.ClassDef


def page() -> str:
    """Return the whole page as Markdown."""
    folder = ROOT / "r0_jax" / "rewards"
    stems = sorted(path.stem for path in folder.glob("*.py"))
    ordered = [*FIRST, *(stem for stem in stems if stem not in FIRST)]
    source = (ROOT / "r0_jax" / "config.py").read_text("utf-8")
    entry = next(node for node in public(ast.parse(source).body) if node.name == "reward_entry")
    parts = [
        "# API of `r0_jax.rewards`",
        "Generated from the docstrings by `make docs`. [rewards.md](../rewards.md) is the guide.",
        *(part for stem in ordered for part in module(folder / f"{stem}.py")),
        "## `r0_jax.config`",
        *function(entry, source, "### "),
    ]
    return "\n\n".join(parts) + "\n"


def module(path: Path) -> Iterator[str]:
    """Yield the parts of a module: its docstring, public functions, classes and their methods."""
    source = path.read_text("utf-8")
    tree = ast.parse(source)
    name = "r0_jax.rewards" + ("" if path.stem == "__init__" else f".{path.stem}")
    yield f"## `{name}`"
    yield text(ast.get_docstring(tree))
    for node in public(tree.body):
        if isinstance(node, ast.FunctionDef):
            yield from function(node, source, "### ")
        else:
            yield f"### class `{node.name}`"
            yield text(ast.get_docstring(node))
            for method in public(node.body):
                yield from function(method, source, "#### ", f"{node.name}.")


def public(body: list[ast.stmt]) -> Iterator[Definition]:
    """Yield the functions and classes that have a docstring and no leading underscore."""
    for node in body:
        named = isinstance(node, Definition) and (
            not node.name.startswith("_") or node.name == "__call__"
        )
        if named and ast.get_docstring(node):
            yield node


def function(node: ast.FunctionDef, source: str, level: str, owner: str = "") -> Iterator[str]:
    """Yield heading, signature and docstring; `level` is the heading's mark."""
    yield f"{level}`{owner}{node.name}`"
    if not any(ast.unparse(x).endswith("property") for x in node.decorator_list):
        yield f"```python\n{signature(node, source)}\n```"
    yield text(ast.get_docstring(node))


def signature(node: ast.FunctionDef, source: str) -> str:
    """Return the source from the name of a function to the colon before its body."""
    lines = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    return textwrap.dedent("\n".join(lines)).removeprefix("def ").removesuffix(":")


def text(docstring: str | None) -> str:
    """Return a docstring as Markdown: sections such as "Args:" become lists."""
    lines, section = [], False
    for line in inspect.cleandoc(docstring or "").splitlines():
        if found := _SECTION.fullmatch(line):
            lines += ["", f"**{found[1]}**", ""]
            section = True
        elif section and line.startswith("  ") and not line.startswith("   "):
            entry = _ENTRY.fullmatch(line.strip())
            lines.append(f"- `{entry[1]}`: {entry[2]}" if entry else f"- {line.strip()}")
        elif section and line.startswith("   "):
            lines.append(f"  {line.strip()}")
        else:
            section = section and not line
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    if parser.parse_args().check:
        return int(not PAGE.exists() or PAGE.read_text("utf-8") != page())
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
