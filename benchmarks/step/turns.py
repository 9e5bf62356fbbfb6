"""Programs that are timed in turns, each in a process of its own that waits while others run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from r0_jax.errors import InputError

ROOT = Path(__file__).parents[2]


class First(NamedTuple):
    """What the first step of a side was.

    Attributes:
      metrics: by the names of the package's train step.
      gradient: file of the gradient of the loss, by the names of the checkpoint.
      seconds: that it took, with all compilation.
      flops: of a step, on average; 0 where the side does not count them.
    """

    metrics: dict[str, float]
    gradient: str
    seconds: float
    flops: float = 0.0


class Side(Protocol):
    """A program that takes training steps."""

    def first(self) -> First:
        """Compile, and take step 0 from the pretrained weights."""

    def run(self, begin: int, steps: int) -> float:
        """Take the steps from number `begin` on; return their seconds."""


def serve(side: Side, answers: Any) -> None:
    """Do what standard input asks for until it ends; write a line for each to `answers`."""
    for line in sys.stdin:
        asked = json.loads(line)
        found = side.first()._asdict() if asked["what"] == "first" else side.run(**asked["steps"])
        print(json.dumps(found), file=answers, flush=True)


def take_stdout() -> Any:
    """Return standard output, and make what libraries print there go to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


class Worker:
    """A side in another process; a context manager."""

    def __init__(self, module: str, *arguments: str):
        self.module = module
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "2"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        if any(error):
            self.process.kill()
        self.process.wait()

    def first(self) -> First:
        """Let the side take its first step."""
        return First(**self._ask(what="first"))

    def run(self, begin: int, steps: int) -> float:
        """Return the seconds of the steps from `begin` on."""
        return self._ask(what="run", steps={"begin": begin, "steps": steps})

    def _ask(self, **asked: Any) -> Any:
        try:
            print(json.dumps(asked), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise InputError(f"{self.module} ended with status {self.process.wait()}: see above")
        return json.loads(answer)
