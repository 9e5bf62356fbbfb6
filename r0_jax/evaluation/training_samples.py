"""Shows on a run's page what its evaluations drew: strips of a prompt over training, and grids."""

import html
import re
from pathlib import Path

from r0_jax.errors import InputError
from r0_jax.evaluation import html_page, images
from r0_jax.files import check_regular, loads

COLUMNS = 4  # of a grid
PROMPTS = "eval_prompts.json"
_GRIDS_SHOWN = 6
_STRIPS, _STRIP = 4, 8  # prompts, and images of each


def write(folder: Path, shown: object) -> str:
    """Return a part of a page about a workdir's grids; it says what is missing.

    `shown` is the config's eval.grid: how many images a grid has, if there are as many prompts.
    """
    found = {
        path: re.fullmatch(r"step_(\d+)", path.stem)
        for path in (folder / "samples").glob("step_*.png")
    }
    steps = {int(match[1]): path for path, match in found.items() if match}
    if not steps:
        return html_page.missing("samples/step_*.png", "the evaluations during training")
    chosen = _spread(sorted(steps), _GRIDS_SHOWN)
    figures = "".join(
        f"<figure><figcaption>step {step}</figcaption>{html_page.image(steps[step], 640)}</figure>"
        for step in chosen
    )
    return f"""<p class="soft">The same prompts and noise every time.</p>
{_strips(folder, shown, {step: steps[step] for step in _spread(sorted(steps), _STRIP)})}
<p class="soft">{len(chosen)} of {len(steps)} grids.</p><div class="grids">{figures}</div>"""


def _spread(steps: list[int], count: int) -> list[int]:
    """Return `count` steps or fewer, from the first to the last."""
    last, count = len(steps) - 1, min(len(steps), count)
    return sorted({steps[round(i * last / max(count - 1, 1))] for i in range(count)})


def _strips(folder: Path, shown: object, grids: dict[int, Path]) -> str:
    """Return the images of the first prompts, step by step; "" where a file cannot be read."""
    try:
        check_regular(folder / PROMPTS)
        prompts = loads((folder / PROMPTS).read_bytes())
        sheets = {step: images.load_pixels(path) for step, path in grids.items()}
    except (OSError, ValueError, InputError):
        return ""  # the grids below say which
    if not (isinstance(prompts, list) and isinstance(shown, int)):
        return ""
    count, strips = min(len(prompts), shown), ""
    for index, prompt in enumerate(prompts[: min(count, _STRIPS)]):
        cells = "".join(
            f"<div>{html_page.picture(images.tile(sheet, index, count, COLUMNS), 256, 'image')}"
            f"<small>{step}</small></div>"
            for step, sheet in sheets.items()
        )
        caption = f"<figcaption>{html.escape(str(prompt))}</figcaption>"
        strips += f'<figure>{caption}<div class="row">{cells}</div></figure>'
    return f'<div class="strips">{strips}</div>'
