"""The demo's page: one prompt, drawn by all models side by side from the same noise."""

import html
import random
import threading
import typing
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from r0_jax.config import MOST_GUIDANCE
from r0_jax.config_check import MOST_STEPS
from r0_jax.demo.studio import Drawing, Studio
from r0_jax.errors import explain

_MOST_CHARACTERS = 1000  # of a prompt
_MOST_SEED = 2**32 - 1
_KEPT, _THUMBNAIL = 36, 384  # images in the gallery, and the pixels of their longer side
_GUIDANCE = 20.0  # where the sliders end
_WAITING = 20  # people in the queue; others are told to come back
# Small images fill their place too.
_CSS = """
footer {display: none !important}
.picture img {width: 100% !important; height: 100% !important; object-fit: contain}
"""


class Column(NamedTuple):
    """What the page has of one model, from top to bottom."""

    picture: gr.Image
    caption: gr.Markdown
    steps: gr.Slider
    guidance: gr.Slider


def build(studio: Studio, examples: Sequence[str]) -> gr.Blocks:
    """Return the page of a studio; `examples` are prompts to click on."""
    with gr.Blocks(title="r0_jax", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# r0_jax\nEach model draws the prompt from the same noise.")
        drawn = gr.State([])
        with gr.Row():
            prompt = gr.Textbox(
                examples[0] if examples else "",
                label="Prompt",
                lines=2,
                max_length=_MOST_CHARACTERS,
                scale=4,
                elem_id="prompt",
            )
            most = {"precision": 0, "minimum": 0, "maximum": _MOST_SEED}
            seed = gr.Number(0, label="Seed", scale=1, elem_id="seed", **most)
        with gr.Row():
            draw = gr.Button("Draw", variant="primary", elem_id="draw")
            again = gr.Button("Draw with another seed", elem_id="again")
        with gr.Row():
            columns = [_column(i, model) for i, model in enumerate(studio.models)]
        link = gr.HTML(elem_id="link")
        if examples:
            rows = [[text] for text in examples]
            gr.Examples(rows, [prompt], label="Examples", cache_examples=False)
        gallery = gr.Gallery(label="Drawn so far", columns=6, height="auto", fit_columns=False)

        settings = [slider for column in columns for slider in (column.steps, column.guidance)]

        def reseed() -> int:
            return random.randint(0, _MOST_SEED)

        def restore(request: gr.Request) -> list[Any]:
            if not request.query_params:
                return [gr.skip()] * (2 + len(settings))
            bounds = [(slider.minimum, slider.maximum) for slider in settings]
            usual = [prompt.value, seed.value, *(slider.value for slider in settings)]
            return restored(request.query_params, usual, bounds)

        paint = _painter(studio, columns, drawn, gallery, link)
        inputs = [prompt, seed, drawn, *settings]
        shown = [part for column in columns for part in (column.picture, column.caption)]
        outputs = [*shown, drawn, gallery, link]
        together: dict[str, Any] = {"concurrency_limit": 1, "show_progress": "minimal"}
        gr.on([draw.click, prompt.submit], paint, inputs, outputs, api_name="draw", **together)
        again.click(reseed, None, seed, api_name=False).then(
            paint, inputs, outputs, api_name=False, **together
        )
        page.load(restore, None, [prompt, seed, *settings], api_name=False)
    return page.queue(max_size=_WAITING)


def _column(number: int, model: Any) -> Column:
    """Add a model's column to the page."""
    most = max(_GUIDANCE, model.guidance_scale)
    with gr.Column(min_width=240):
        return Column(
            gr.Image(
                label=model.name,
                format="png",
                interactive=False,
                height=340,
                elem_classes="picture",
                buttons=["download", "fullscreen"],
                elem_id=f"image_{number}",
            ),
            gr.Markdown(elem_id=f"caption_{number}"),
            gr.Slider(1, MOST_STEPS, model.steps, step=1, label="Steps"),
            gr.Slider(1, most, model.guidance_scale, step=0.1, label="Guidance (1: none)"),
        )


def _painter(
    studio: Studio, columns: Sequence[Column], drawn: gr.State, gallery: gr.Gallery, link: gr.HTML
) -> Callable[..., Iterator[dict[Any, Any]]]:
    """Return what the buttons do: draw with one model after the other, and show each image."""
    lock = threading.Lock()  # both buttons may be pressed, by several people

    @typing.no_type_check  # its wrapper would hide from gradio that it is a generator
    def paint(prompt, seed, history, *values):
        text, seed = _checked(prompt, seed)
        for steps, guidance_scale in zip(values[::2], values[1::2], strict=True):
            _check_range("Steps", steps, 1, MOST_STEPS)
            _check_range("Guidance", guidance_scale, 1, MOST_GUIDANCE)
        yield {column.caption: "waiting" for column in columns}
        new = []
        for i, (model, column) in enumerate(zip(studio.models, columns, strict=True)):
            steps, guidance_scale = int(values[2 * i]), float(values[2 * i + 1])
            yield {column.caption: "drawing"}
            try:
                with lock:
                    found = studio.draw(i, text, seed, steps, guidance_scale)
            except Exception as error:
                _, said = explain(error)
                if said is None:
                    raise
                raise gr.Error(f"{model.name}: {said}") from None
            image = Image.fromarray((255 * found.image).round().astype("uint8"))
            how = f"{steps} steps, guidance {guidance_scale:g}, seed {seed}"
            small = image.copy()
            small.thumbnail((_THUMBNAIL, _THUMBNAIL))
            new.append((small, f"{model.name}, {how}: {text}"))
            yield {column.picture: image, column.caption: caption_of(found)}
        history = [*new, *history][:_KEPT]
        yield {drawn: history, gallery: history, link: link_of(text, seed, values)}

    return paint


def launch(page: gr.Blocks, host: str, port: int | None) -> str:
    """Serve a page in threads; return its address. Without a port it takes a free one.

    Raises OSError where the port is taken.
    """
    sans = ("system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif")
    theme = gr.themes.Default(font=sans, font_mono=("ui-monospace", "monospace"))
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css=_CSS,
        share=False,
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
        state_session_capacity=100,
        max_file_size="1mb",
        ssr_mode=False,
        mcp_server=False,
    )
    return address


def caption_of(found: Drawing) -> str:
    """Return what stands under an image, as Markdown."""
    calls = "1 network call" if found.network_calls == 1 else f"{found.network_calls} network calls"
    cost = f"{calls}, {found.seconds:.2f} s"
    if found.compiled:
        cost += " (compiled just now)"
    scores = "".join(f"\n| {_cell(name)} | {x:.4g} |" for name, x in found.scores.items())
    return f"{cost}\n\n| reward | score |\n|---|---:|{scores}" if scores else cost


def link_of(prompt: str, seed: int, values: Sequence[float | int]) -> str:
    """Return HTML with a link that restores a setting."""
    query = {"prompt": prompt, "seed": seed, "set": ",".join(f"{value:g}" for value in values)}
    address = html.escape("?" + urllib.parse.urlencode(query), quote=True)
    return f'<a href="{address}" target="_blank">Link to this setting</a>'


def restored(
    query: Mapping[str, str],
    usual: Sequence[Any],
    bounds: Sequence[tuple[float | int, float | int]],
) -> list[Any]:
    """Return prompt, seed and the models' steps and guidance that a link asks for.

    What it does not say, or says wrongly, stays as `usual`. `bounds` are of steps and guidance.
    """
    prompt, seed, *settings = usual
    prompt = str(query.get("prompt", prompt))[:_MOST_CHARACTERS]
    seed = _number(query.get("seed", ""), 0, _MOST_SEED, seed)
    asked = query.get("set", "").split(",")
    if len(asked) != len(settings):
        return [prompt, int(seed), *settings]
    settings = [
        _number(text, least, most, value)
        for text, (least, most), value in zip(asked, bounds, settings, strict=True)
    ]
    return [prompt, int(seed), *settings]


def _number(text: str, least: float | int, most: float | int, usual: float | int) -> float | int:
    try:
        value = float(text)
    except ValueError:
        return usual
    return value if least <= value <= most else usual  # NaN is neither


def _checked(prompt: str, seed: float | int | None) -> tuple[str, int]:
    text = " ".join(str(prompt).split())
    if not text:
        raise gr.Error("Write a prompt first.")
    if len(text) > _MOST_CHARACTERS:
        raise gr.Error(f"The prompt is longer than {_MOST_CHARACTERS} characters: shorten it.")
    if seed is None or not (0 <= seed <= _MOST_SEED) or seed != int(seed):
        raise gr.Error(f"The seed must be a whole number from 0 to {_MOST_SEED}.")
    return text, int(seed)


def _check_range(name: str, value: float | int, least: float | int, most: float | int) -> None:
    if not least <= value <= most:
        raise gr.Error(f"{name} must be from {least} to {most:g}.")


def _cell(text: str) -> str:
    return html.escape(text).replace("|", "\\|")
