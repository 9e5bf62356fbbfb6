"""The report of a benchmark that takes minutes and gigabytes."""

from benchmarks import load


def test_a_section_takes_the_place_of_its_own_and_of_nothing_else(tmp_path):
    path = tmp_path / "performance.md"
    load.put_section(path, f"{load.TITLE}\n\nold\n")
    path.write_text(path.read_text("utf-8") + "\n## Training\n\nfast\n", "utf-8")
    load.put_section(path, f"{load.TITLE}\n\nnew\n")
    assert path.read_text("utf-8") == (
        f"# Performance\n\n{load.TITLE}\n\nnew\n\n## Training\n\nfast\n")


def test_what_is_exported_has_the_size_of_sdxl_and_is_there_once():
    fields = load.read_json(load.ROOT / "tests/data/configs/sdxl-base-1.0-unet.json")
    shapes = load.network(fields).shapes
    assert load.size(shapes, 1) == 2_567_463_684
    where = load.split(shapes)
    copied = [x.size for name, x in shapes.items() if where[name].is_fully_replicated]
    assert sum(copied) < 100
