"""The frame of the HTML pages: one file that needs no other, light and dark, wide and narrow."""

import base64
import html
import io
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from r0_jax.errors import InputError
from r0_jax.evaluation.images import load_png, to_uint8


def write(title: str, sections: Mapping[str, str]) -> bytes:
    """Return a page of sections, {heading: HTML}; the title is plain text."""
    title = html.escape(title)
    body = "".join(
        f"<section><h2>{html.escape(heading)}</h2>{content}</section>"
        for heading, content in sections.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_CSS}</style></head>
<body><main><h1>{title}</h1><p class="soft">Written {datetime.now():%Y-%m-%d %H:%M}</p>
{body}</main></body></html>
""".encode()


def image(path: Path, side: int) -> str:
    """Return an <img> of a file that carries its data, with at most `side` pixels a side."""
    try:
        return picture(to_uint8(load_png(path)), side, path.name)
    except InputError:
        return note(f"{path.name} is missing or unreadable")


def picture(pixels: UInt8[np.ndarray, "h w 3"], side: int, name: str) -> str:
    """Return an <img> that carries its data, with at most `side` pixels a side."""
    shown, buffer = Image.fromarray(pixels), io.BytesIO()
    if max(shown.size) <= 128:
        shown.save(buffer, "PNG", optimize=True)
    else:  # as PNG, photographs and grids would take tens of megabytes
        shown.thumbnail((side, side))
        shown.save(buffer, "JPEG", quality=85)
    kind = "png" if buffer.getvalue().startswith(b"\x89PNG") else "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(name)}" src="data:image/{kind};base64,{data}">'


def facts(named: Mapping[str, object]) -> str:
    """Return a list of names and values; "" for none."""
    pairs = "".join(
        f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(brief(value))}</dd>"
        for name, value in named.items()
    )
    return f"<dl>{pairs}</dl>" if named else ""


def brief(value: object) -> str:
    """Return a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def missing(file: str, writer: str) -> str:
    """Return a note on a file that a run has not written yet."""
    return note(f"There is no {file} in this folder; it is written by {writer}.")


def note(text: str) -> str:
    """Return a paragraph that stands out; the text is plain."""
    return f'<p class="note">{html.escape(text)}</p>'


_CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #59636e; --rule: #d8dee4;
  --tint: #eef5fb; --c1: #0072b2; --c2: #c45500; --c3: #9a3f78; --c4: #007a5a; --c5: #59636e;
  --c6: #8a6d00; --c7: #5b4bb5; --c8: #111; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e6e9ec; --soft: #9aa4ae;
  --rule: #333a41; --tint: #1b2733; --c1: #56b4e9; --c2: #f0a030; --c3: #d98fbd; --c4: #3ecfa0;
  --c5: #9aa4ae; --c6: #d9bd4a; --c7: #a99cf0; --c8: #fff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.45;
  font-family: system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 1rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p { margin: .25rem 0 .75rem; max-width: 42rem; }
.soft, small { color: var(--soft); }
small { font-size: .8rem; }
.note { color: var(--soft); font-size: .85rem; border-left: 3px solid var(--c2);
  padding-left: .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; }
tbody th { text-align: left; font-weight: 400; min-width: 9rem; }
td { white-space: nowrap; }
.ours { background: var(--tint); font-weight: 600; }
.ours small { font-weight: 400; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.panels figcaption { font-weight: 600; }
.c1 { --line: var(--c1); } .c2 { --line: var(--c2); } .c3 { --line: var(--c3); }
.c4 { --line: var(--c4); } .c5 { --line: var(--c5); }
.key span { white-space: nowrap; margin-right: 1rem; font-weight: 600; }
svg { display: block; width: 100%; height: auto; font-family: inherit; overflow: visible; }
td svg { width: 120px; margin-left: auto; stroke: var(--soft); fill: var(--soft); }
td svg.sure { stroke: var(--c1); fill: var(--c1); }
td svg .zero { stroke: var(--soft); stroke-dasharray: 2 2; }
td svg .interval { stroke-width: 2; }
img { display: block; width: 100%; height: auto; border-radius: 3px; }
.pairs { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); }
.pairs figure { display: flex; flex-direction: column; justify-content: space-between; gap: .3rem; }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: .4rem; }
.row img { image-rendering: pixelated; }
.strips { display: grid; gap: 1rem; margin-bottom: 1.5rem; }
.strips .row { grid-auto-columns: minmax(0, 9rem); }
.grids { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: .8rem; }
@media (max-width: 40rem) { th, td { padding: .35rem .4rem; font-size: .85rem; }
  td small { display: block; } }
"""
