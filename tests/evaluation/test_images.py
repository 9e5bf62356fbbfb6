"""PNGs, grids and contact sheets, including prompts that no installed font can draw."""

import os
import subprocess
import unicodedata

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager, ft2font
from PIL import ExifTags, Image, ImageFont, ImageOps

from r0_jax.errors import InputError
from r0_jax.evaluation import images

FONTS = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")


def gradient(count=1, size=16):
    values = np.linspace(0, 1, count * size * size * 3, dtype=np.float32)
    return values.reshape(count, size, size, 3)


def test_to_uint8_rounds_clips_and_survives_divergence():
    pixels = np.array([-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 7.0, np.nan, np.inf], np.float32)
    expected = np.array([0, 0, 0, 1, 255, 255, 0, 255], np.uint8)
    np.testing.assert_array_equal(images.to_uint8(pixels.reshape(1, 8, 1)).ravel(), expected)
    as_bytes = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    np.testing.assert_array_equal(images.to_uint8(as_bytes), as_bytes)
    half = jnp.full((1, 2, 2, 3), 0.5, jnp.bfloat16)
    assert (images.to_uint8(half) == 128).all()


def test_png_round_trip_with_its_text(tmp_path):
    path = tmp_path / "new" / "image.png"
    prompt = "一个红色的圆 → “naïve”"
    images.save_png(path, gradient()[0], {"prompt": prompt, "seed": 7})
    loaded = images.load_png(path)
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(images.to_uint8(loaded), images.to_uint8(gradient()[0]))
    images.save_png(tmp_path / "again.png", loaded)
    np.testing.assert_array_equal(images.load_png(tmp_path / "again.png"), loaded)
    with Image.open(path) as png:
        assert png.text == {"prompt": prompt, "seed": "7"}


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    images.save_png(path, gradient()[0])
    before = path.read_bytes()

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(InputError, match=r"cannot write .*image\.png: No space left"):
        images.save_png(path, 1 - gradient()[0])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["image.png"]  # no temporary file is left behind


def test_load_png_says_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match=r"absent\.png: no such file"):
        images.load_png(tmp_path / "absent.png")
    images.save_png(tmp_path / "good.png", np.random.default_rng(0).random((64, 64, 3)))
    data = (tmp_path / "good.png").read_bytes()
    for size in (0, 4, 20, 40, len(data) // 2, len(data) - 200):
        (tmp_path / "bad.png").write_bytes(data[:size])
        with pytest.raises(InputError, match=r"bad\.png"):
            images.load_png(tmp_path / "bad.png")
    (tmp_path / "bad.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"bad\.png is a Git LFS pointer"):
        images.load_png(tmp_path / "bad.png")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_a_cameras_image_is_put_upright(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    # A quarter white: the corner says how the image lies, and is not lost to JPEG.
    lying = Image.fromarray(255 * np.kron([[1, 0], [0, 0]], np.ones((16, 24))).astype(np.uint8))
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[ExifTags.Base.Orientation] = orientation
        lying.save(path, exif=exif)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB")) / np.float32(255)
        assert images.read_shape(path) == expected.shape
        np.testing.assert_array_equal(images.load_png(path), expected)
    assert expected.shape == (48, 32, 3) and expected[-8:, :8].min() > 0.9
    lying.save(path, exif=b"Exif\0\0no EXIF at all")
    assert images.read_shape(path) == images.load_png(path).shape == (32, 48, 3)


def test_no_other_program_decodes_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    (tmp_path / "0.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n", "utf-8"
    )
    with Image.open(tmp_path / "0.png") as image:
        assert image.format == "EPS"  # PIL itself would start Ghostscript
    for read in (images.load_png, images.read_shape):
        with pytest.raises(InputError, match=r"0\.png is not an image"):
            read(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(InputError, match=r"1\.png is a pipe or a device"):
        images.load_png(tmp_path / "1.png")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_an_image_has_its_format_whatever_its_name(tmp_path, form):
    Image.new("RGB", (8, 4), (255, 255, 255)).save(tmp_path / "image", form)
    assert images.load_png(tmp_path / "image").min() > 0.98
    assert images.read_shape(tmp_path / "image") == (4, 8, 3)


def test_a_shape_is_read_without_the_pixels(tmp_path):
    images.save_png(tmp_path / "good.png", gradient()[0][:9])
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    assert images.read_shape(tmp_path / "cut.png") == (9, 16, 3)
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"bad\.png is not an image"):
        images.read_shape(tmp_path / "bad.png")


def test_grid_places_images_row_by_row_and_pads_the_rest_white():
    batch = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = images.grid(batch, columns=2, pad=1)
    assert sheet.shape == (1 + 2 * 3, 1 + 2 * 4, 3)
    assert (sheet[1:3, 1:4] == 10).all() and (sheet[1:3, 5:8] == 20).all()
    assert (sheet[4:6, 1:4] == 30).all() and (sheet[4:6, 5:8] == 255).all()
    for index, image in enumerate(batch):
        np.testing.assert_array_equal(images.tile(sheet, index, 3, columns=2, pad=1), image)
    assert (sheet[[0, 3, 6]] == 255).all() and (sheet[:, [0, 4, 8]] == 255).all()


def test_wrap_keeps_words_and_cuts_with_an_ellipsis():
    font = ImageFont.truetype(os.path.join(FONTS, "DejaVuSans.ttf"), 12)
    text = "a large red circle to the left of a small blue square on green"
    full = images.wrap(text, font, 110, lines=20)
    assert " ".join(full) == text and len(full) > 2
    cut = images.wrap(text, font, 110, lines=2)
    assert cut[0] == full[0] and cut[1].endswith("…") and text.startswith(cut[0])
    assert all(font.getlength(line) <= 110 for line in full + cut)
    assert images.wrap("short", font, 110, lines=2) == ["short"]
    assert images.wrap("", font, 110, lines=2) == []
    assert "".join(images.wrap("x" * 50, font, 60, lines=99)) == "x" * 50
    chinese = images.wrap("大的红色圆形在小的蓝色方形的左边。", font, 50, lines=99)
    assert len(chinese) > 2 and not any(line.startswith("。") for line in chinese)


def test_contact_sheet_labels_every_image(tmp_path):
    path = tmp_path / "sheet.png"
    assert images.contact_sheet(gradient(5), [f"prompt {n}" for n in range(5)], path) is None
    assert os.listdir(tmp_path) == ["sheet.png"]
    labelled = images.load_png(path)
    images.contact_sheet(gradient(5), ["prompt 0", "", "", "", ""], path)
    # Only labels differ: the ink of four of them is gone.
    assert (labelled < 0.5).sum() > (images.load_png(path) < 0.5).sum()


def test_prompts_without_a_font_are_numbered_and_listed(tmp_path, monkeypatch):
    last_resort = [os.path.join(FONTS, "LastResortHE-Regular.ttf"), str(tmp_path / "absent.ttf")]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: last_resort)
    prompts = ["红色的圆", "<b>blue</b>"]
    listing = images.contact_sheet(gradient(2), prompts, tmp_path / "sheet.png")
    assert listing == tmp_path / "sheet.html"
    text = listing.read_text(encoding="utf-8")
    assert "<li>红色的圆</li>\n<li>&lt;b&gt;blue&lt;/b&gt;</li>" in text
    assert '<ol start="0">' in text and 'src="sheet.png"' in text
    # Drawn are "0." and the whole of "1. <b>blue</b>", nothing of what would be empty boxes.
    images.contact_sheet(gradient(2), ["0.", "1. <b>blue</b>"], tmp_path / "numbers.png")
    np.testing.assert_array_equal(
        images.load_png(tmp_path / "sheet.png"), images.load_png(tmp_path / "numbers.png")
    )


def test_an_installed_font_is_used_for_what_the_bundled_one_lacks(monkeypatch):
    fonts = [os.path.join(FONTS, name) for name in ("cmr10.ttf", "STIXGeneral.ttf")]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: fonts)
    assert images.font_for("plain, naïve") == os.path.join(FONTS, "DejaVuSans.ttf")
    character = "\N{MATHEMATICAL SANS-SERIF ITALIC CAPITAL A}"
    assert unicodedata.name(character) and images.font_for(character) == fonts[1]
    assert images.font_for("红") is None


def test_fonts_for_chinese_come_first(monkeypatch):
    paths = [
        "/a/Arial.ttf",
        "/b/wqy-microhei.ttc",
        "/c/NotoSansCJK-Bold.ttc",
        "/c/NotoSansCJK-Regular.ttc",
        "/d/LastResort.otf",
    ]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    monkeypatch.setattr(ft2font, "FT2Font", lambda path: _Everything())
    monkeypatch.setattr(ImageFont, "truetype", lambda path, size: None)
    monkeypatch.setattr(images, "_bundled_font", lambda: "LastResort.ttf")
    assert images.font_for("红") == "/c/NotoSansCJK-Regular.ttc"


class _Everything:
    def get_char_index(self, codepoint):
        return 1
