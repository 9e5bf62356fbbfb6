"""Regular expressions of configs: which names match, and those that would take years."""

import threading
import time

import pytest

from r0_jax import patterns
from r0_jax.errors import InputError

NAMES = ["a.to_q", "a.to_k", "b.to_q.x"]


def test_whole_names_match():
    assert patterns.matching(r".*\.to_q", NAMES, "lora.targets") == ["a.to_q"]
    found = []
    other = threading.Thread(target=lambda: found.extend(patterns.matching(".*", NAMES, "x")))
    other.start()
    other.join()
    assert found == NAMES  # where no signal comes


@pytest.mark.parametrize("pattern", ["(.*.*)*X", ".*.*.*.*.*.*.*.*.*.*X"])
def test_a_pattern_that_takes_years_is_an_error_in_seconds(pattern, monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"lora.targets=.* takes too long"):
        patterns.matching(pattern, ["a" * 60], "lora.targets")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("pattern", ["(", "*", "a{99999999999999}"])
def test_an_invalid_pattern_is_named(pattern):
    with pytest.raises(InputError, match=r"lora.targets is not a regular expression"):
        patterns.matching(pattern, NAMES, "lora.targets")
