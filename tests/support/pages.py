"""HTML pages as a browser reads them, and folders of runs that a report is written of."""

import json
import math
from html.parser import HTMLParser

import numpy as np

from r0_jax.evaluation import images


def entry(value, half=0.0):
    return {"value": value, "ci95": [value - half, value + half]}


def evaluation():
    """The contents of an eval.json."""
    return {
        "models": {
            "base_25_guided": {
                "seconds_per_image": entry(0.8, 0.01),
                "judge_accuracy": {"value": 0.99, "ci95": [0.971, 0.996]},
                "reward/<b>[red]|x": entry(0.25, 0.0123),
                "network_calls": entry(50),
            },
            "r0_4": {
                "judge_accuracy": entry(0.9, 0.0186),
                "network_calls": entry(4),
                "unheard_of": entry(12.0, 3.0),
                "frechet_distance": {"value": math.nan, "ci95": [math.nan, math.nan]},
                "diversity": {"value": 0.5, "ci95": None},
            },
        },
        "prompts": 300,
    }


class Page(HTMLParser):
    """Checks that tags close in order, and keeps text and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.attributes = [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def write_run(workdir):
    """What a run leaves in a folder that a report reads."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "eval.json").write_text(json.dumps(evaluation()), encoding="utf-8")
    (workdir / "config.json").write_text('{"steps": 3, "note": "<i>红</i>"}', encoding="utf-8")
    with open(workdir / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(3):
            values = {"reward/hps": 0.1 * step, "heldout/clip": 0.2, "norm/grads": math.nan}
            file.write(json.dumps({"step": step, **values}) + "\n")
    image = np.random.default_rng(0).random((64, 64, 3))
    folder = workdir / "samples" / "eval"
    records = []
    for index in range(20):
        images.save_png(folder / "r0_4" / f"{index}.png", image * index / 20)
        files = {"base_25_guided": f"base_25_guided/{index}.png", "r0_4": f"r0_4/{index}.png"}
        records.append({"index": index, "prompt": f"<script>{index}</script> 红", "files": files})
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")
    for step in (0, 5, 10, 20, 30, 40, 50, 100):
        images.save_png(workdir / "samples" / f"step_{step:06d}.png", np.full((900, 700, 3), 0.5))
