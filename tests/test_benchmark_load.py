"""The report of a benchmark that takes minutes and gigabytes."""

from benchmarks import load


def test_a_section_takes_the_place_of_its_own_and_of_nothing_else(tmp_path):
    path = tmp_path / "performance.md"
    load.put_section(path, f"{load.TITLE}\n\nold\n")
    path.write_text(path.read_text("utf-8") + "\n## Training\n\nfast\n", "utf-8")
    load.put_section(path, f"{load.TITLE}\n\nnew\n")
    assert path.read_text("utf-8") == (
        f"# Performance\n\n{load.TITLE}\n\nnew\n\n## Training\n\nfast\n")


def test_the_full_model_that_is_exported_is_shallower_and_valid():
    fields = load.read_json(load.ROOT / "tests/data/configs/sdxl-base-1.0-unet.json")
    whole, half = (load.size(load.network(x).shapes, 1) for x in (fields, load.shallower(fields)))
    assert whole == 2_567_463_684 and 0.4 < half / whole < 0.6
