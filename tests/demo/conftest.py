import pytest
import tiny
from runs import write_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny pipeline, base/, and a run that was trained from it, run/."""
    folder = tmp_path_factory.mktemp("demo")
    tiny.stable_diffusion(folder / "base")
    write_run(folder / "run", folder / "base", 2, {10: 0.5})
    return folder
