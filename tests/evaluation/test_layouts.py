"""Each layout against what the public scorer of its benchmark does to find images and prompts."""

import json
import os
import re

import numpy as np
import pytest

from r0_jax.errors import InputError
from r0_jax.evaluation import images
from r0_jax.evaluation.gallery import Gallery
from r0_jax.evaluation.layouts import CLASSES, LAYOUTS, STYLES, Naming
from r0_jax.prompts.records import FILE, Prompt

SIZE = 8


def shade(prompt, sample):
    """The colour of an image, exact in 8 bits, which tells whose it is."""
    return (20 * prompt + 5 * sample + 5) / 255


def written(out, name, prompts, samples=None, **naming):
    """Write flat images of a layout; return the folder that its scorer is given."""
    layout = LAYOUTS[name]
    naming = Naming(samples or layout.samples, **naming)
    targets = layout.targets(prompts, naming)
    gallery = Gallery(
        out, [prompt.text for prompt in prompts], targets, layout.notes(prompts, naming), {"x": 1}
    )
    gallery.begin(overwrite=False)
    drawn = (
        np.full((1, SIZE, SIZE, 3), shade(target.prompt, sample), np.float32)
        for target in targets
        for sample in target.samples
    )
    gallery.write(gallery.left(), drawn, {})
    assert gallery.finish()
    return out / naming.folder


def seen(path, tolerance=0.0):
    """The shade of an image, which has only one."""
    pixels = images.load_png(path)
    assert np.ptp(pixels) <= tolerance
    return float(pixels.mean())


def quarters(path):
    """The shades of a 2 x 2 grid, which a scorer cuts at half its sides."""
    pixels = images.load_png(path)
    assert pixels.shape == (2 * SIZE, 2 * SIZE, 3)
    parts = [pixels[y : y + SIZE, x : x + SIZE] for y in (0, SIZE) for x in (0, SIZE)]
    assert all(np.ptp(part) == 0 for part in parts)
    return [float(part.mean()) for part in parts]


def plain(*texts, **fields):
    return [Prompt(text, None, {"prompt": text, **fields}) for text in texts]


def test_flat_and_the_listing(tmp_path):
    prompts = [Prompt("a", "x", {}), Prompt("红", None, {}), Prompt("b", "x", {})]
    written(tmp_path / "one", "flat", prompts)
    written(tmp_path / "two", "flat", prompts, samples=2)
    for out, ids in (("one", ["x#0", "00001", "x#2"]), ("two", ["x#0_0", "x#0_1", "00001_0"])):
        lines = (tmp_path / out / "prompts.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["id"] for row in rows][:3] == ids
        assert all((tmp_path / out / row["image_path"]).is_file() for row in rows)
    assert rows[2]["prompt"] == "红" and rows[3]["image_path"] == "00001_1.png"
    assert seen(tmp_path / "two" / "00001_1.png") == pytest.approx(shade(1, 1))


def test_hpsv2_lists_styles_and_counts_within_them(tmp_path):
    prompts = [
        Prompt(f"{style} {i}", None, {FILE: style}) for style in STYLES[::-1] for i in range(2)
    ]
    folder = written(tmp_path, "hpsv2", prompts)
    assert set(os.listdir(folder)) == set(STYLES)  # each is looked up as a prompt file
    for style in STYLES:
        for i in range(2):
            row = next(n for n, prompt in enumerate(prompts) if prompt.text == f"{style} {i}")
            path = folder / style / f"{i:05d}.jpg"
            assert seen(path, tolerance=2 / 255) == pytest.approx(shade(row, 0), abs=2 / 255)
    with pytest.raises(InputError, match="prompt 0 has no field style"):
        written(tmp_path, "hpsv2", plain("a"))
    with pytest.raises(InputError, match="prompt 0 is of the style 'oil', not of anime"):
        written(tmp_path, "hpsv2", plain("a", style="oil"))
    with pytest.raises(InputError, match="the scorer of this layout reads 1 of a prompt"):
        written(tmp_path, "hpsv2", prompts, samples=2)


def test_geneval_reads_metadata_and_numbered_samples(tmp_path):
    include = [{"class": "bench", "count": 1}]
    prompts = plain("a photo of a bench", "a photo of two", tag="single_object", include=include)
    folder = written(tmp_path, "geneval", prompts)
    found = sorted(name for name in os.listdir(folder) if name.isdigit())
    assert found == ["00000", "00001"]
    for number, name in enumerate(found):
        record = json.loads((folder / name / "metadata.jsonl").read_text("utf-8"))
        assert record["prompt"] == prompts[number].text and record["include"] == include
        samples = sorted(os.listdir(folder / name / "samples"))
        assert samples == [f"{i:04d}.png" for i in range(4)]
        assert all(re.match(r"\d+\.png", sample) for sample in samples)
        assert seen(folder / name / "samples" / "0002.png") == pytest.approx(shade(number, 2))
    with pytest.raises(InputError, match="prompt 0 has no field include"):
        written(tmp_path / "x", "geneval", plain("a", tag="colors"))


def test_dpg_reads_a_grid_by_the_prompts_file(tmp_path):
    prompts = [Prompt("a", "COCOval2014000000000042", {}), Prompt("b", "7", {})]
    folder = written(tmp_path, "dpg", prompts)
    assert {name.split(".")[0] for name in os.listdir(folder)} == {p.id for p in prompts}
    assert quarters(folder / "7.png") == pytest.approx([shade(1, i) for i in range(4)])
    written(tmp_path / "one", "dpg", prompts, samples=1)
    for bad, said in [
        (plain("a"), "no field id or item_id"),
        ([Prompt("a", "x.1", {})], "reads no id with a dot"),
        ([Prompt("a", "../x", {})], "cannot be the name of a file"),
        ([Prompt("a", "7", {}), Prompt("b", "7", {})], "prompts 0 and 1 would both be"),
    ]:
        with pytest.raises(InputError, match=said):
            written(tmp_path / "x", "dpg", bad)
    with pytest.raises(InputError, match="cuts grids into squares, but images have 8 x 16"):
        LAYOUTS["dpg"].check_shape((16, 8, 3), 4)
    LAYOUTS["oneig"].check_shape((16, 8, 3), 4)


def test_t2i_compbench_reads_prompts_from_names(tmp_path):
    prompts = plain("a green bench and a blue bowl.", "a red car")
    folder = written(tmp_path, "t2i_compbench", prompts, samples=2) / "samples"
    names = sorted(os.listdir(folder), key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == [p.text for p in prompts for _ in range(2)]
    assert names[3] == "a red car_000003.png" and seen(folder / names[3]) == pytest.approx(
        shade(1, 1)
    )
    for bad, said in [("a_b", "would cut it"), ("a/b", "cannot be"), ("x" * 300, "is too long")]:
        with pytest.raises(InputError, match=said):
            written(tmp_path / "x", "t2i_compbench", plain(bad))


def test_unigenbench_reads_by_index(tmp_path):
    prompts = [Prompt("a", "17", {"index": "17"}), Prompt("b", "3", {"index": "3"})]
    written(tmp_path, "unigenbench", prompts, model="mine", language="zh_long")
    folder = tmp_path / "eval_data" / "zh_long" / "mine"
    assert set(os.listdir(folder)) == {f"{i}_{j}.png" for i in (17, 3) for j in range(4)}
    assert seen(folder / "3_2.png") == pytest.approx(shade(1, 2))


def test_oneig_finds_one_grid_by_class_and_id(tmp_path):
    prompts = [Prompt(name, "000", {"category": name.title()}) for name in CLASSES]
    written(tmp_path, "oneig", prompts, model="mine")
    for number, kind in enumerate(CLASSES.values()):
        [path] = (tmp_path / "images" / kind / "mine").glob("000*")
        assert path.suffix == ".webp"
        assert quarters(path) == pytest.approx([shade(number, i) for i in range(4)])
    with pytest.raises(InputError, match="category 'food', not of anime_styl"):
        written(tmp_path / "x", "oneig", [Prompt("a", "1", {"category": "food"})])


def test_longtext_counts_samples_from_one(tmp_path):
    prompts = [Prompt("a", "5", {}), Prompt("b", None, {})]
    folder = written(tmp_path, "longtext", prompts)
    assert set(os.listdir(folder)) == {f"{i:04d}_{j}.png" for i in (5, 1) for j in (1, 2, 3, 4)}
    assert seen(folder / "0005_4.png") == pytest.approx(shade(0, 3))
    with pytest.raises(InputError, match="numbers its prompts, but the id is 'x'"):
        written(tmp_path / "x", "longtext", [Prompt("a", "x", {})])
