"""Writes and reads images: PNGs with text chunks, grids, and labelled contact sheets."""

import contextlib
import html
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped, UInt8
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from r0_jax.errors import InputError
from r0_jax.files import check_not_pointer, check_regular, write_bytes

# Formats that PIL decodes by itself: for PostScript it would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_LABEL_LINES = 3
_MIN_CELL = 128  # pixels; smaller images are enlarged so that a prompt fits under them
# EXIF's orientation -> what undoes it; then the turns that exchange height and width.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = tuple(_TURNS[orientation] for orientation in (5, 6, 7, 8))


def to_uint8(images: Shaped[ArrayLike, "*b h w c"]) -> UInt8[np.ndarray, "*b h w c"]:
    """Return the images in 0..255, rounded to nearest; values outside [0, 1] are clipped.

    NaN becomes black, so that people can still look at the samples of a diverged run. uint8 images
    are returned as they are.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    images = np.nan_to_num(images.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0)
    return np.rint(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)


def save_png(
    path: str | os.PathLike,
    image: Shaped[ArrayLike, "h w c"],
    text: Mapping[str, object] | None = None,
) -> None:
    """Write a float [0, 1] or uint8 image, with `text` (prompt, seed, ...) in its text chunks.

    Viewers that show PNG text show them, in any script; PIL reads `Image.open(path).text`.
    """
    info = PngInfo()
    for name, value in (text or {}).items():
        info.add_itxt(name, str(value))
    buffer = io.BytesIO()
    image = to_uint8(image)
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
        buffer, "PNG", pnginfo=info, optimize=True
    )
    write_bytes(path, buffer.getvalue())


def save_image(
    path: str | os.PathLike,
    image: Shaped[ArrayLike, "h w c"],
    text: Mapping[str, object] | None = None,
) -> None:
    """Write an image in the format of its suffix: .png as `save_png` does, .jpg or .webp.

    JPEG has quality 95 and its colours at full resolution; WebP is lossless. Both drop `text`.
    """
    suffix = Path(path).suffix
    if suffix == ".png":
        return save_png(path, image, text)
    buffer, drawn = io.BytesIO(), Image.fromarray(to_uint8(image))
    if suffix == ".jpg":
        drawn.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        drawn.save(buffer, "WEBP", lossless=True)
    write_bytes(path, buffer.getvalue())


def load_png(path: str | os.PathLike) -> Float[np.ndarray, "h w 3"]:
    """Read an image as RGB in [0, 1], upright; save_png's images come back to within 1 / 255.

    Transparent pixels show their colour, as in the rewards' own code. Raises InputError for a file
    that is not a whole image.
    """
    pixels = load_pixels(path)
    return pixels.astype(np.float32) / np.float32(255) if pixels.dtype == np.uint8 else pixels


def load_pixels(
    path: str | os.PathLike,
) -> UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w 3"]:
    """Read what `load_png` reads, in a quarter of the memory: uint8, where the file has 8 bits."""
    with _opened(path) as image:
        image.load()  # a PNG may store its orientation after its pixels
        upright = image.transpose(turn) if (turn := _turn(image)) is not None else image
        if upright.mode == "F":  # of any range: what is white is not said
            raise InputError(f"{path} holds floating-point pixels: save it with 8 bits a channel.")
        if upright.mode.startswith("I"):  # 16-bit grey: PIL would cut it off at 255
            grey = np.asarray(upright, np.float32) / np.float32(65535)
            return np.repeat(grey[..., None], 3, axis=-1)
        return np.asarray(upright.convert("RGB"))


def read_shape(path: str | os.PathLike) -> tuple[int, int, int]:
    """Read the shape of `load_png`'s image from the header alone; InputError where it has none.

    It exchanges height and width where a PNG stores its orientation after its pixels.
    """
    with _opened(path) as image:
        width, height = image.size
        return (width, height, 3) if _turn(image) in _ON_ITS_SIDE else (height, width, 3)


def grid(
    images: Shaped[ArrayLike, "b h w c"], columns: int, pad: int = 2
) -> UInt8[np.ndarray, "height width c"]:
    """Return one uint8 image of all, row after row, with `pad` white pixels around each."""
    images = to_uint8(images)
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    shape = (rows * (height + pad) + pad, columns * (width + pad) + pad, channels)
    sheet = np.full(shape, 255, np.uint8)
    for index, image in enumerate(images):
        top = pad + index // columns * (height + pad)
        left = pad + index % columns * (width + pad)
        sheet[top : top + height, left : left + width] = image
    return sheet


def tile(
    sheet: UInt8[np.ndarray, "height width c"], index: int, count: int, columns: int, pad: int = 2
) -> UInt8[np.ndarray, "h w c"]:
    """Return image `index` of the `count` that `grid` has put together."""
    rows = math.ceil(count / columns)
    height, width = ((sheet.shape[0] - pad) // rows, (sheet.shape[1] - pad) // columns)
    top, left = pad + index // columns * height, pad + index % columns * width
    return sheet[top : top + height - pad, left : left + width - pad]


def contact_sheet(
    images: Shaped[ArrayLike, "b h w c"], prompts: Sequence[str], path: str | os.PathLike
) -> Path | None:
    """Write a PNG with every image over its prompt, wrapped and cut to a few lines.

    No installed font may be able to draw every prompt, such as Chinese on a bare machine. Then the
    sheet numbers the images and shows only the prompts that it can draw. An HTML file of the same
    name lists all prompts by number. Returns the path of that file, else None.
    """
    path = Path(path)
    images = to_uint8(images)
    prompts = [" ".join(prompt.split()) for prompt in prompts]
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    columns = min(len(images), max(1, math.ceil(math.sqrt(len(images) * 1.5))))
    scale = max(1, math.ceil(_MIN_CELL / images.shape[2]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    size = max(12, images.shape[2] // 24)
    font_path, labels = font_for("".join(prompts) + "…"), prompts
    if font_path is None:
        font_path = _bundled_font()
        drawable = [_covers(font_path, _codepoints(prompt)) for prompt in prompts]
        labels = [
            f"{index}. {prompt}" if known else f"{index}."
            for index, (prompt, known) in enumerate(zip(prompts, drawable, strict=True))
        ]
    font = ImageFont.truetype(font_path, size)
    save_png(path, _draw_sheet(images, labels, font, columns))
    if labels is prompts:
        return None
    listing = path.with_suffix(".html")
    write_bytes(listing, _listing(path.name, prompts).encode("utf-8"))
    return listing


def font_for(text: str) -> str | None:
    """Return the path of a font with a glyph for every character of `text`; None without one.

    It tries matplotlib's own DejaVu Sans, then installed fonts, those for Chinese first.
    """
    codepoints = _codepoints(text)
    if _covers(_bundled_font(), codepoints):
        return _bundled_font()
    from matplotlib import font_manager

    installed = sorted(font_manager.findSystemFonts(), key=_font_preference)
    return next((path for path in installed if _covers(path, codepoints)), None)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Return at most `lines` lines of at most `width` pixels; the last ends in … if text was cut.

    Breaks lines at spaces and between ideographs; inside a word only if it is wider than a line.
    """
    # A run of Latin letters stays together; closing punctuation stays with its ideograph.
    pieces = re.findall(r"[⺀-鿿豈-﫿][，。、；：！？）」]*|[^\s⺀-鿿豈-﫿]+|\s+", text)
    result, line = [], ""
    while pieces and len(result) <= lines:
        piece = pieces.pop(0)
        if font.getlength((line + piece).rstrip()) <= width:
            line += piece
        elif line.strip():
            result.append(line.strip())
            line, pieces = "", [piece.lstrip(), *pieces]
        else:  # one piece wider than a line
            n = 1
            while font.getlength(piece[: n + 1]) <= width:
                n += 1
            result.append(piece[:n])
            pieces = [piece[n:], *pieces]
    result.append(line.strip())
    result = [line for line in result if line]
    if len(result) <= lines:
        return result
    last = result[lines - 1]
    while last and font.getlength(last.rstrip() + "…") > width:
        last = last[:-1]
    return [*result[: lines - 1], last.rstrip() + "…"]


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """Open an image file; turn what PIL raises while it is open into an InputError."""
    check_regular(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        check_not_pointer(path)
        raise InputError(f"{path} is not an image, or cut short; make it again.") from error
    except InputError:
        raise
    except (MemoryError, Image.DecompressionBombError):
        raise InputError(f"the image {path} has too many pixels: make it smaller.") from None
    except Exception as error:  # of a broken file PIL raises any kind: SyntaxError, struct.error
        reason = (getattr(error, "strerror", None) or "it is damaged").lower()
        raise InputError(f"cannot read the image {path}: {reason}; make it again.") from None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the turn that puts a camera's image upright, by its EXIF; None if it is upright."""
    try:
        # PNG's own getexif decodes the image. ImageOps.exif_transpose also rewrites the EXIF, and
        # fails at what some cameras write there.
        return _TURNS.get(Image.Image.getexif(image).get(ExifTags.Base.Orientation))
    except SyntaxError:  # no EXIF at all: viewers show the image as it lies
        return None


def _draw_sheet(
    images: UInt8[np.ndarray, "b h w c"],
    labels: list[str],
    font: ImageFont.FreeTypeFont,
    columns: int,
) -> UInt8[np.ndarray, "height width 3"]:
    count, height, width, channels = images.shape
    pad = max(4, width // 24)
    line_height = math.ceil(sum(font.getmetrics()) * 1.1)
    wrapped = [wrap(label, font, width, _LABEL_LINES) for label in labels]
    label_height = max(len(lines) for lines in wrapped) * line_height + pad // 2
    cells = np.full((count, height + label_height, width, channels), 255, np.uint8)
    cells[:, :height] = images
    sheet = Image.fromarray(grid(cells, columns, pad).repeat(3 // channels, axis=-1))
    draw = ImageDraw.Draw(sheet)
    for index, lines in enumerate(wrapped):
        left = pad + index % columns * (width + pad)
        top = pad + index // columns * (height + label_height + pad) + height + pad // 2
        for number, line in enumerate(lines):
            draw.text((left, top + number * line_height), line, fill=(20, 20, 20), font=font)
    return np.asarray(sheet)


def _listing(sheet: str, prompts: list[str]) -> str:
    rows = "\n".join(f"<li>{html.escape(prompt)}</li>" for prompt in prompts)
    return f"""<!doctype html>
<html><head><meta charset="utf-8"><title>{html.escape(sheet)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"></head>
<body><p>No installed font can draw all of these prompts, so the sheet numbers them.</p>
<img src="{html.escape(sheet)}" alt="contact sheet" style="max-width:100%">
<ol start="0">
{rows}
</ol></body></html>
"""


def _bundled_font() -> str:
    import matplotlib

    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def _font_preference(path: str) -> tuple[bool, bool, str]:
    """Return a sort key: sans fonts for Chinese first, so that few files are opened."""
    name = Path(path).name.lower()
    sans = re.search(r"sans.?(cjk|sc|gb)|wqy|msyh|simhei|pingfang|heiti|droidsansfallback", name)
    return not sans, "regular" not in name, name


def _codepoints(text: str) -> set[int]:
    return {ord(character) for character in text if not character.isspace()}


def _covers(path: str, codepoints: set[int]) -> bool:
    if re.search(r"last.?resort", Path(path).name.lower()):  # each of its glyphs is an empty box
        return False
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(path)
        ImageFont.truetype(path, 12)  # bitmap-only (emoji) fonts fail here
        return all(face.get_char_index(codepoint) for codepoint in codepoints)
    except (OSError, RuntimeError):  # a damaged or foreign font file
        return False
