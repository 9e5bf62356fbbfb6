"""Prompts with ids and fields, of files as benchmarks give them."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from r0_jax.errors import InputError
from r0_jax.prompts import records


def test_ids_are_a_column_or_none(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("index,prompt_en\n007,a cat\n8, \n9,a dog\n", "utf-8")
    read = records.read(path, column="prompt_en", ids=("index", "id"))
    assert [(prompt.text, prompt.id) for prompt in read] == [("a cat", "007"), ("a dog", "9")]
    assert read[0].fields == {"index": "007", "prompt_en": "a cat"}
    assert [prompt.id for prompt in records.read(path, column="prompt_en")] == [None, None]
    parquet.write_table(
        pyarrow.table({"n": [3], "prompt": ["a"], "tags": [["x"]]}), tmp_path / "p.parquet"
    )
    [prompt] = records.read(tmp_path / "p.parquet", id_column="n")
    assert prompt.id == "3" and prompt.fields["tags"] == ["x"]
    with pytest.raises(InputError, match=r"prompt 0: no id among the fields \(index, prompt_en\)"):
        records.read(path, column="prompt_en", id_column="id")
    with pytest.raises(InputError, match=r"no prompt_zh among the columns \(index, prompt_en\)"):
        records.read(path, column="prompt_zh")
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"id": ["x"], "text": "a"}]), "utf-8")
    with pytest.raises(InputError, match="prompt 0: id should be text or a whole number, not list"):
        records.read(path)


def test_a_folder_of_a_prompt_a_file(tmp_path):
    for name in ("b", "a.1", "10"):
        (tmp_path / f"{name}.txt").write_text(f"prompt of {name},\n in lines\n", "utf-8")
    (tmp_path / "notes.md").write_text("not a prompt", "utf-8")
    read = records.read(tmp_path)
    assert [prompt.id for prompt in read] == ["10", "a.1", "b"]
    assert read[0].text == "prompt of 10, in lines"
    with pytest.raises(InputError, match="holds a prompt a file"):
        records.read(tmp_path, column="prompt")


def test_a_folder_of_lists(tmp_path):
    for style in ("photo", "anime"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} 0", f"{style} 1"]), "utf-8")
    read = records.read(tmp_path)
    assert [(prompt.text, prompt.fields[records.FILE]) for prompt in read] == [
        ("anime 0", "anime"),
        ("anime 1", "anime"),
        ("photo 0", "photo"),
        ("photo 1", "photo"),
    ]
