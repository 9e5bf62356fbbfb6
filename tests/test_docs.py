"""The documents: links, commands and paths that they name, figures that they copy."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from r0_jax import config as base
from r0_jax import config_check, rewards
from r0_jax.rewards import plugin
from r0_jax.rewards.around_image import PROMPT

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
OTHER_CONFIGS = ("docs/world.md", "docs/reports/", "docs/api/")  # some name fields of other configs
EXAMPLES = ("NAME",)  # stand for the reader's own


def read(page: Path) -> str:
    return page.read_text("utf-8")


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_resolve(name):
    page = ROOT / name
    # The text of a link may be code, so only its target is looked for.
    targets = re.findall(r"\]\(([^)\s]+)\)", read(page))
    for target in targets:
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(read(linked)), target


def test_a_broken_anchor_is_found():
    assert "what-the-compilers-effort-changes" in anchors("## What the compiler's effort changes")
    assert "other" not in anchors("# One\n\n```\n# other\n```\n")


@pytest.mark.parametrize("name", NAMES)
def test_modules_recipes_and_files_exist(name):
    text = read(ROOT / name)
    for module in set(re.findall(r"\bpython -m ([\w.]+)|-- -m ([\w.]+)", text)):
        assert importlib.util.find_spec(module[0] or module[1]) is not None, module
    paths = re.findall(
        r"(?<![\w./-])(?:r0_jax|configs|docs|tests|launch|benchmarks)/[\w./*-]*\w", text
    )
    for path in set(paths):
        if not any(example in path for example in EXAMPLES):
            assert list(ROOT.glob(path)), path


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name):
    text = read(ROOT / name)
    named = set(re.findall(r"(?:`|^    |&& )make ([a-z-]+)", text, re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(OTHER_CONFIGS)])
def test_config_fields_exist(name):
    config = base.get_config()
    with config.unlocked():
        config.rewards.any = config.heldout_rewards.any = base.reward_entry("clip_score")
    sections = "|".join(key for key, value in config.items() if hasattr(value, "keys"))
    text = read(ROOT / name)
    fields = re.findall(r"--config\.([a-z][\w.]*\w)", text)
    fields += re.findall(rf"`((?:{sections})\.[\w.]*\w)", text)
    for field in set(fields) - {"eval.json"}:  # a file
        named = re.sub(r"^((?:heldout_)?rewards)\.\w+", r"\1.any", field)
        part = config
        for key in named.split("."):
            assert key in part, field
            part = part[key]


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "index.md"
    linked = {
        (index.parent / target.partition("#")[0]).resolve()
        for target in re.findall(r"\]\(([^)\s]+)\)", read(index))
    }
    assert {page for page in PAGES if page != index} <= linked


def test_every_room_is_in_the_tree():
    tree = read(ROOT / "README.md").partition("## The tree")[2].partition("## ")[0]
    listed = set(re.findall(r"^ +(\w+)/ ", tree, re.MULTILINE))
    rooms = {path.parent.name for path in (ROOT / "r0_jax").glob("*/__init__.py")}
    assert rooms <= listed


def test_the_readme_copies_its_results():
    rows = re.findall(r"^\| (?:judge|held|Frechet|div|network).*$", read(ROOT / "README.md"), re.M)
    report = read(ROOT / "docs" / "reports" / "results.md").splitlines()
    assert len(rows) == 5 and all(row in report for row in rows)


def test_the_readme_copies_its_plans():
    plans = read(ROOT / "docs" / "reports" / "scale.md")
    memory = re.findall(r"\| LoRA R0\+ \| v5e-16 \| ([\d.]+) of", plans)
    families = read(ROOT / "README.md").partition("## Model families")[2]
    assert re.findall(r"\| ([\d.]+) GiB \|", families) == memory


def test_the_api_page_is_up_to_date():
    checked = subprocess.run([sys.executable, ROOT / "docs" / "make_api.py", "--check"])
    assert checked.returncode == 0, "run `make docs`"


def examples_of_rewards() -> list[str]:
    return re.findall(r"```python\n(.*?)```", read(ROOT / "docs" / "rewards.md"), re.DOTALL)


def test_the_example_of_an_entry_is_one():
    entry, _ = examples_of_rewards()
    config = base.get_config()
    with config.unlocked():
        exec(entry, {"config": config, "reward_entry": base.reward_entry})
    config_check.check_reward("rewards.words", config.rewards.words)
    assert config.rewards.words.type in rewards.TYPES
    assert all(PROMPT in question for question in config.rewards.words.questions)


def test_the_example_of_a_reward_is_one(tmp_path, monkeypatch):
    _, example = examples_of_rewards()
    (tmp_path / "my_module.py").write_text(example, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    plugin.check(rewards.load("function", "my_module:brightness"), (8, 8, 3))


def messages() -> str:
    """Return the texts of the package, whatever is formatted into them cut out."""
    found = []
    for path in (ROOT / "r0_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.JoinedStr):
                parts = (x.value if isinstance(x, ast.Constant) else "…" for x in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_that_are_explained_exist():
    text = read(ROOT / "docs" / "troubleshooting.md")
    quoted = [
        message
        for row in re.findall(r"^\| (.*?) \| ", text, re.MULTILINE)
        for message in re.findall(r"`([^`]+)`", row)
    ]
    known, found = messages(), 0
    for message in quoted:
        for part in re.split(r"\.\.\.|…|\b[A-Z]\b|[\"=]", message):
            if len(words := part.strip(" ,;:").split()) > 1:
                assert " ".join(words) in known, message
                found += 1
    assert found > 20
