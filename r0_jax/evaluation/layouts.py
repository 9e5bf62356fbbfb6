"""Where the images of a benchmark's prompts lie, under the names that its public scorer reads.

Scorers list their folder, and some fail at a file that is no image. So images lie in folders of
their own below --out, and `prompts.jsonl` and the contact sheet lie above them.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from r0_jax.errors import InputError
from r0_jax.files import is_plain_name
from r0_jax.prompts.records import FILE, Prompt

STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPSv2's benchmark
# Categories in OneIG-Bench's prompt files -> the classes that its scorer has folders for.
CLASSES = {
    "anime_stylization": "anime",
    "portrait": "human",
    "general_object": "object",
    "text_rendering": "text",
    "knowledge_reasoning": "reasoning",
    "multilingualism": "multilingualism",
}
_MOST_NAME = 255  # bytes of a file's name, on most file systems


class Naming(NamedTuple):
    """What paths say besides the prompt.

    Attributes:
      samples: images of each prompt.
      model: the name of what drew them.
      language: of the prompts, as UniGenBench names it: en, zh, en_long or zh_long.
    """

    samples: int
    model: str = "model"
    language: str = "en"

    @property
    def folder(self) -> str:
        """The folder of this model's images below --out."""
        return f"images/{self.model}"


class Target(NamedTuple):
    """A file to write.

    Attributes:
      path: below --out.
      id: of its line in prompts.jsonl; no other line has it.
      prompt: its number.
      samples: of the prompt that it shows; several are a grid, row by row.
    """

    path: str
    id: str
    prompt: int
    samples: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The files of one benchmark.

    Attributes:
      path: (number in its group, prompt, sample, naming) -> a file below --out. A grid is named by
        its first sample.
      samples: of a prompt, as the benchmark asks for.
      most: samples of a prompt that its scorer reads; None for any number.
      grid: whether the samples of a prompt are one file; then there are 1, or 4 in two rows.
      square: whether the scorer cuts a grid into squares.
      ids: fields that name a prompt, the first that is there.
      needs_id: whether the scorer looks prompts up by id.
      group: (number, prompt) -> the group in which the scorer counts prompts; by default all are
        one.
      note: (number, prompt, naming) -> a further file that the scorer reads: path and text.
    """

    path: Callable[[int, Prompt, int, Naming], str]
    samples: int = 1
    most: int | None = None
    grid: bool = False
    square: bool = False
    ids: tuple[str, ...] = ("id",)
    needs_id: bool = False
    group: Callable[[int, Prompt], str] = lambda number, prompt: ""
    note: Callable[[int, Prompt, Naming], tuple[str, str]] | None = None

    def targets(self, prompts: Sequence[Prompt], naming: Naming) -> list[Target]:
        """Return all files, in the order of the prompts and their samples.

        Raises InputError where prompts lack a field, or where two files would have one name.
        """
        self._check(prompts, naming)
        each = (
            [tuple(range(naming.samples))] if self.grid else [(i,) for i in range(naming.samples)]
        )
        ids = _distinct([prompt.id or f"{i:05d}" for i, prompt in enumerate(prompts)])
        found: dict[str, Target] = {}
        counts: Counter[str] = Counter()
        for number, prompt in enumerate(prompts):
            group = self.group(number, prompt)
            for samples in each:
                path = self.path(counts[group], prompt, samples[0], naming)
                if (other := found.get(path)) is not None:
                    raise InputError(
                        f"prompts {other.prompt} and {number} would both be {path}: give each an "
                        "id of its own"
                    )
                if len(path.rsplit("/", 1)[-1].encode()) > _MOST_NAME:
                    raise InputError(f"prompt {number} is too long for a file's name: {path[:80]}…")
                name = ids[number] if len(each) == 1 else f"{ids[number]}_{samples[0]}"
                found[path] = Target(path, name, number, samples)
            counts[group] += 1
        return list(found.values())

    def notes(self, prompts: Sequence[Prompt], naming: Naming) -> Mapping[str, str]:
        """Return the texts of further files that the scorer reads, by their paths below --out."""
        if self.note is None:
            return {}
        return dict(self.note(number, prompt, naming) for number, prompt in enumerate(prompts))

    def check_shape(self, shape: tuple[int, ...], samples: int) -> None:
        """Raise InputError where the scorer cannot cut images [h, w, 3] out of their grid."""
        if self.square and samples > 1 and shape[0] != shape[1]:
            raise InputError(
                "the scorer of this layout cuts grids into squares, but images have "
                f"{shape[1]} x {shape[0]} pixels: give one size as --height and --width"
            )

    def _check(self, prompts: Sequence[Prompt], naming: Naming) -> None:
        given = f"--samples_per_prompt={naming.samples}"
        if self.grid and naming.samples not in (1, 4):
            raise InputError(f"{given} makes no grid of 2 x 2: give 4, or 1 for no grid")
        if self.most is not None and naming.samples > self.most:
            raise InputError(f"{given}: the scorer of this layout reads {self.most} of a prompt")
        if not is_plain_name(naming.model):
            raise InputError(f"--model_name={naming.model} cannot be the name of a folder")
        unnamed = next((i for i, prompt in enumerate(prompts) if prompt.id is None), None)
        if self.needs_id and unnamed is not None:
            raise _missing(unnamed, prompts[unnamed], " or ".join(self.ids))


def style_of(prompt: Prompt) -> object:
    """Return the style of a prompt of HPSv2's benchmark: a field, or its file; None without."""
    return prompt.fields.get("style", prompt.fields.get(FILE))


def columns_of(samples: int) -> int:
    """Return how many samples of a grid lie side by side."""
    return math.isqrt(samples)


def _flat(number: int, prompt: Prompt, sample: int, naming: Naming) -> str:
    return f"{number:05d}.png" if naming.samples == 1 else f"{number:05d}_{sample}.png"


def _hpsv2(number: int, prompt: Prompt, sample: int, naming: Naming) -> str:
    return f"{naming.folder}/{_style(number, prompt)}/{number:05d}.jpg"


def _style(number: int, prompt: Prompt) -> str:
    style = style_of(prompt)
    if style is None:
        raise _missing(number, prompt, "style")
    if style not in STYLES:
        raise InputError(f"prompt {number} is of the style {style!r}, not of {', '.join(STYLES)}")
    return str(style)


def _geneval(number: int, prompt: Prompt, sample: int, naming: Naming) -> str:
    return f"{naming.folder}/{number:05d}/samples/{sample:04d}.png"


def _geneval_note(number: int, prompt: Prompt, naming: Naming) -> tuple[str, str]:
    """Return the record itself, which says what the images should show."""
    for field in ("tag", "include"):
        if field not in prompt.fields:
            raise _missing(number, prompt, field)
    record = {**prompt.fields, "prompt": prompt.text}
    return f"{naming.folder}/{number:05d}/metadata.jsonl", json.dumps(record) + "\n"


def _dpg(number: int, prompt: Prompt, sample: int, naming: Naming) -> str:
    name = _plain(number, prompt.id or "")
    if "." in name:
        raise InputError(f"prompt {number}: DPG-Bench's scorer reads no id with a dot ({name})")
    return f"{naming.folder}/{name}.png"


def _t2i_compbench(number: int, prompt: Prompt, sample: int, naming: Naming) -> str:
    """Name an image by its prompt, up to the first "_", and by its own number after the last."""
    text = _plain(number, prompt.text)
    if "_" in text:
        raise InputError(f"prompt {number}: T2I-CompBench's scorer would cut it at the '_': {text}")
    return f"{naming.folder}/samples/{text}_{number * naming.samples + sample:06d}.png"


def _unigenbench(number: int, prompt: Prompt, sample: int, naming: Naming) -> str:
    name = _plain(number, prompt.id or "")
    return f"eval_data/{naming.language}/{naming.model}/{name}_{sample}.png"


def _oneig(number: int, prompt: Prompt, sample: int, naming: Naming) -> str:
    if "category" not in prompt.fields:
        raise _missing(number, prompt, "category")
    category = prompt.fields["category"]
    kind = CLASSES.get(str(category).strip().lower().replace(" ", "_"))
    if kind is None:
        known = ", ".join(CLASSES)
        raise InputError(f"prompt {number} is of the category {category!r}, not of {known}")
    return f"images/{kind}/{naming.model}/{_plain(number, prompt.id or '')}.webp"


def _longtext(number: int, prompt: Prompt, sample: int, naming: Naming) -> str:
    try:
        number = number if prompt.id is None else int(prompt.id)
    except ValueError:
        raise InputError(
            f"prompt {number}: LongText-Bench numbers its prompts, but the id is {prompt.id!r}"
        ) from None
    return f"{naming.folder}/{number:04d}_{sample + 1}.png"


def _plain(number: int, name: str) -> str:
    """Return what becomes a file's name; raise InputError where it cannot."""
    if not is_plain_name(name):
        raise InputError(f"prompt {number}: {name!r} cannot be the name of a file")
    return name


def _missing(number: int, prompt: Prompt, field: str) -> InputError:
    has = ", ".join(map(str, prompt.fields)) or "none"
    return InputError(
        f"prompt {number} has no field {field} ({has}), which this layout needs: give the "
        "benchmark's own prompt file, or name its column by --id_column if it is an id"
    )


def _distinct(ids: Sequence[str]) -> list[str]:
    """Return ids, with the number of the prompt behind those that are there twice."""
    counts = Counter(ids)
    return [name if counts[name] == 1 else f"{name}#{i}" for i, name in enumerate(ids)]


LAYOUTS = {
    "flat": Layout(_flat),
    "hpsv2": Layout(_hpsv2, most=1, group=_style),
    "geneval": Layout(_geneval, samples=4, note=_geneval_note),
    "dpg": Layout(_dpg, 4, grid=True, square=True, ids=("id", "item_id"), needs_id=True),
    "t2i_compbench": Layout(_t2i_compbench),
    "unigenbench": Layout(_unigenbench, samples=4, ids=("index", "id"), needs_id=True),
    "oneig": Layout(_oneig, samples=4, grid=True, needs_id=True),
    "longtext": Layout(_longtext, samples=4, ids=("prompt_id", "id")),
}
