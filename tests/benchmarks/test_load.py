"""What a benchmark of minutes and gigabytes works on."""

from published import config_of

from benchmarks import load


def test_what_is_exported_has_the_size_of_sdxl_and_is_there_once():
    fields = config_of("stable_diffusion_xl/unet")
    shapes = load.network(fields).shapes
    assert load.size(shapes, 1) == 2_567_463_684
    where = load.split(shapes)
    copied = [x.size for name, x in shapes.items() if where[name].is_fully_replicated]
    assert sum(copied) < 100
