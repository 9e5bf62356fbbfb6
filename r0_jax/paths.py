"""Paths as people type them: with `~`, relative ones, and URLs of object stores."""

import os
import re
from pathlib import Path

_URL = re.compile(r"(gs|s3):/|[A-Za-z][A-Za-z0-9+.-]*://")


def expand(path: str) -> str:
    """Return the path with the home folder in place of a leading `~`."""
    return os.path.expanduser(path)


def absolute(path: str) -> str:
    """Return the path as every folder understands it: relative ones begin in the current folder.

    A leading `~` is expanded. "" and URLs stay as they are.
    """
    return path if not path or _URL.match(path) else str(Path(expand(path)).absolute())


def real(path: str) -> str:
    """Return the one spelling that all paths to the same file share; "" and URLs stay."""
    return path if not path or _URL.match(path) else os.path.realpath(expand(path))
