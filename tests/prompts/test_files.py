"""Prompts of a user's file: every format and every mistake."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tensorflow_datasets as tfds
import tfds_prompts
from pyarrow import parquet

from r0_jax.errors import InputError
from r0_jax.prompts import files

PROMPTS = ["a red circle", "红色的圆在蓝色方块的左边。", "a red circle", "naïve – “quoted” 🎈"]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def test_txt(tmp_path):
    content = "\ufeff" + "\r\n".join([PROMPTS[0], "", "  ", *PROMPTS[1:], ""])
    assert files.read_prompts(write(tmp_path / "p.txt", content)) == PROMPTS


def test_txt_splits_at_line_ends_only(tmp_path):
    content = "one\u2028line\rtwo\n"
    assert files.read_prompts(write(tmp_path / "p.txt", content)) == ["one\u2028line", "two"]


def test_a_file_is_read_as_far_as_it_is_asked_for(tmp_path):
    path = write(tmp_path / "p.txt", b"one\n\ntwo\n\xff\n")
    assert files.read_prompts(path, count=2) == ["one", "two"]
    found = files.stream_prompts(path)
    assert [next(found), next(found)] == ["one", "two"]
    with pytest.raises(InputError, match="line 4: not UTF-8"):
        next(found)


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_jsonl(tmp_path, bom):
    records = [PROMPTS[0], {"prompt": PROMPTS[1]}, {"caption": PROMPTS[2]}, {"text": PROMPTS[3]}]
    records.append({"text": "no", "caption": "no", "prompt": "yes", "id": 3})
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    assert files.read_prompts(write(tmp_path / "p.jsonl", bom + lines)) == [*PROMPTS, "yes"]


def test_json(tmp_path):
    items = [PROMPTS[0], {"caption": PROMPTS[1]}, *PROMPTS[2:]]
    assert files.read_prompts(write(tmp_path / "p.json", json.dumps(items))) == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("p.txt", "one\ntwo\n \nthree\n", "line 3"),
        ("p.txt", "\none\n", "line 1"),
        ("p.jsonl", '"one"\n\n"three"\n', "line 2"),
        ("p.json", '["one", "two", "", "four"]', "item 3"),
    ],
)
def test_a_blank_prompt_would_shift_numbered_ones(tmp_path, name, content, where):
    path = write(tmp_path / name, content)
    assert "" not in files.read_prompts(path)
    with pytest.raises(
        InputError, match=rf"{name}, {where} is blank, so it is unclear which images"
    ):
        files.read_prompts(path, numbered=True)


def test_blank_prompts_at_the_end_shift_nothing(tmp_path):
    for name, content in [
        ("p.txt", "one\ntwo\n\n \n"),
        ("p.jsonl", '"one"\n"two"\n\n'),
        ("p.json", '["one", "two", ""]'),
    ]:
        assert files.read_prompts(write(tmp_path / name, content), numbered=True) == ["one", "two"]


@pytest.mark.parametrize("name", ["prompt", "caption", "text"])
def test_parquet(tmp_path, name):
    table = pyarrow.table({"id": range(5), name: [*PROMPTS, None]})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert files.read_prompts(tmp_path / "p.parquet") == PROMPTS


def test_tables(tmp_path):
    text = '\ufeffid,prompt,note\r\n1,"a ""big"", red\nbox",x\r\n\r\n2, ,y\r\n3,红,z\r\n'
    path = write(tmp_path / "p.csv", text)
    assert files.read_prompts(path) == ['a "big", red\nbox', "红"]
    assert files.read_texts(path, ["note"])["note"] == ["x", "z"]
    path = write(tmp_path / "p.tsv", "Prompt\tCategory\na cat, sitting\tAnimals\n")
    assert list(files.stream_records(path, "Prompt")) == [
        ("a cat, sitting", {"Prompt": "a cat, sitting", "Category": "Animals"})
    ]


def test_prepared_folder_is_a_tfds_folder(tmp_path):
    tfds_prompts.write({"prompt": PROMPTS, "x": np.zeros((4, 2))}, tmp_path / "prompts")
    assert files.read_prompts(tmp_path / "prompts") == PROMPTS


def write_tfds(folder: Path, features: dict, rows: list[dict], split: str) -> Path:
    class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "foreign"
        VERSION = tfds.core.Version("2.0.0")
        url_infos = None  # nothing is downloaded

        def _info(self):
            columns = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=columns)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(rows)

    builder = Foreign(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def test_foreign_tfds_folder_without_decoding_its_images(tmp_path):
    png = write(tmp_path / "broken.png", b"\x89PNG\r\n\x1a\n")
    features = {"image": tfds.features.Image(), "caption": tfds.features.Text(), "text": np.int64}
    rows = [{"image": str(png), "caption": prompt, "text": 1} for prompt in PROMPTS]
    version = write_tfds(tmp_path, features, rows, split="validation")
    assert sorted(files.read_prompts(version)) == sorted(PROMPTS)  # tfds shuffles on writing
    with pytest.raises(InputError, match=r"no dataset_info\.json; give the folder of one version"):
        files.read_prompts(version.parent)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", None, "p.txt: no such file or directory"),
        ("p.txt", "", "p.txt has no prompts"),
        ("p.txt", "\ufeff\n \n", "p.txt has no prompts"),
        ("p.jsonl", "\n", "p.jsonl has no prompts"),
        ("p.json", "[]", "p.json has no prompts"),
        ("p.txt", b"a\nb\n\xff\xfe\n", "p.txt, line 3: not UTF-8; save the file as UTF-8"),
        ("p.txt", "a red".encode("utf-16-le"), "p.txt: not UTF-8; save the file as UTF-8"),
        ("p.jsonl", b'"a"\n"\xe9"\n', "p.jsonl, line 2: not UTF-8"),
        ("p.jsonl", '"a"\n\n{"prompt": "b"\n', "p.jsonl, line 3: broken JSON: Expecting ','"),
        ("p.jsonl", '{"prompts": "b"}', "p.jsonl, line 1: no prompt or caption or text among"),
        ("p.jsonl", '"a"\n{"prompt": ["b"]}', "p.jsonl, line 2: expected a prompt as text, found"),
        ("p.jsonl", '"a"\n3', "p.jsonl, line 2: expected a prompt as text, found int"),
        ("p.jsonl", '"\\ud83d"', "p.jsonl, line 1: the prompt holds half of a surrogate pair"),
        ("p.json", '["a",\n"b"\n"c"]', "p.json, line 3: broken JSON: Expecting ','"),
        ("p.json", '{"prompt": "a"}', "p.json: expected a list, found dict"),
        ("p.json", '["a", {"id": 1}]', "p.json, item 2: no prompt or caption or text among"),
        ("p.parquet", b"not parquet at all", "p.parquet: not a parquet file, or not a whole one"),
        ("p.md", "prompt\na\n", "p.md: cannot read prompts from .md; give .txt, .csv, .tsv, .json"),
        ("p.csv", "id,url\n1,x\n", "p.csv: no prompt or caption or text among the columns (id, ur"),
        ("p.csv", "", "p.csv: no prompt or caption or text among the columns (none)"),
        ("p.csv", "prompt,id\na,1\nb\n", "p.csv, row 2: 1 cells, but the first line names 2 colu"),
        ("p.tsv", 'prompt\tid\n"a\t1\nb\t2\n', "p.tsv, row 1: 1 cells, but the first line names"),
        ("p.csv", b"prompt\n\xe9\n", "p.csv: a prompt is not UTF-8"),
        ("p.txt", "version https://git-lfs.github.com/spec/v1\n", "p.txt is a Git LFS pointer"),
        ("p", "a\n", "p: cannot read prompts from a file without suffix; give .txt"),
    ],
)
def test_bad_prompt_file(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(InputError) as error:
        files.read_prompts(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(error.value)


def test_bad_parquet_columns(tmp_path):
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"id": [1], "url": ["x"]}), path)
    with pytest.raises(InputError, match=r"no prompt or caption or text among the columns \(id, u"):
        files.read_prompts(path)
    parquet.write_table(pyarrow.table({"prompt": [1, 2]}), path)
    with pytest.raises(InputError, match=r"row 1: expected a prompt as text, found int"):
        files.read_prompts(path)


def test_a_parquet_file_with_two_columns_of_one_name(tmp_path):
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.table(columns, names=["prompt"] * 2), tmp_path / "p.parquet")
    assert files.read_prompts(tmp_path / "p.parquet") == ["a"]


def test_prompts_that_are_not_utf8(tmp_path):
    latin = "café".encode("latin-1")
    text = pyarrow.array([b"a", latin]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": text}), tmp_path / "p.parquet")
    rows = [{"text": b"a"}, {"text": latin}]
    version = write_tfds(tmp_path, {"text": tfds.features.Text()}, rows, split="train")
    for path in (tmp_path / "p.parquet", version):
        with pytest.raises(InputError, match=rf"^{path}: a prompt is not UTF-8: b'caf.xe9'"):
            files.read_prompts(path)


def test_tfds_folder_without_text(tmp_path):
    version = write_tfds(tmp_path, {"label": np.int64}, [{"label": 1}], split="train")
    with pytest.raises(InputError, match=r"no prompt or caption or text among the text feat.*none"):
        files.read_prompts(version)


def test_tfds_folder_of_another_file_format(tmp_path):
    tfds_prompts.write({"prompt": PROMPTS}, tmp_path / "prompts")
    info = tmp_path / "prompts" / "dataset_info.json"
    text = info.read_text(encoding="utf-8")
    info.write_text(text.replace("array_record", "tfrecord"), encoding="utf-8")
    with pytest.raises(InputError, match="prepare it with file_format='array_record'"):
        files.read_prompts(tmp_path / "prompts")


def test_another_text_of_the_same_records(tmp_path):
    rows = [{"prompt": "a sign", "words": "晨光"}, {"caption": "a shop", "words": "茶"}]
    expected = {"prompt": ["a sign", "a shop"], "words": ["晨光", "茶"]}
    lines = "\n\n".join(map(json.dumps, rows))
    for name, content in [
        ("p.jsonl", lines),
        ("p.json", json.dumps([*rows, {"prompt": "", "words": "x"}])),
    ]:
        assert files.read_texts(write(tmp_path / name, content), ["words"]) == expected
    parquet.write_table(pyarrow.table(expected), tmp_path / "p.parquet")
    assert files.read_texts(tmp_path / "p.parquet", ["words"]) == expected
    tfds_prompts.write(expected, tmp_path / "prompts")
    assert files.read_texts(tmp_path / "prompts", ["words"]) == expected
    assert files.read_texts(tmp_path / "prompts") == {"prompt": expected["prompt"]}
    damaged = [rows[0], {"prompt": "a", "words": "x\x1by"}]
    path = write(tmp_path / "p.json", json.dumps(damaged))
    with pytest.warns(UserWarning, match=r"left out of 1 prompt\(s\), first in item 2"):
        assert files.read_texts(path, ["words"])["words"] == ["晨光", "x y"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a", "p.txt, line 1: no field 'words': it is a prompt alone, so give a file wi"),
        ("p.jsonl", '"a"', "p.jsonl, line 1: no field 'words': it is a prompt alone"),
        ("p.jsonl", '{"prompt": "a"}', "p.jsonl, line 1: no words among the fields (prompt); a re"),
        (
            "p.jsonl",
            '\n{"prompt": "a", "words": " "}',
            "p.jsonl, line 2: the field 'words' is blan",
        ),
        (
            "p.json",
            '[{"prompt": "a", "words": 1}]',
            "p.json, item 1: expected a prompt as text, fo",
        ),
    ],
)
def test_another_text_that_is_not_there(tmp_path, name, content, message):
    with pytest.raises(InputError) as error:
        files.read_texts(write(tmp_path / name, content), ["words"])
    assert str(error.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("\n<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
        ("<?xml version='1.0'?>\n<a/>", "a web page"),
        ('["a", "b"]\n', r"JSON: give its name the suffix \.json$"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n', r"JSON: give its name the suffix \.jsonl$"),
        ("id,prompt\n1,a cat\n", "a table with columns"),
        ('"Caption"\t"url"\na\tb\n', "a table with columns"),
    ],
)
def test_a_txt_that_holds_something_else(tmp_path, content, said):
    with pytest.raises(InputError, match=f"p.txt is not a list of prompts but {said}"):
        files.read_prompts(write(tmp_path / "p.txt", content))


@pytest.mark.parametrize(
    "content",
    ["[a cat], in oil\nb", "{red|blue} hat\nb", "<lora:x:1> a cat\nb", "text, bold and large\nb",
     "a prompt, a caption\nb", "prompt\nb"],
)  # fmt: skip
def test_prompts_that_look_like_something_else(tmp_path, content):
    path = write(tmp_path / "p.txt", content)
    assert files.read_prompts(path) == content.split("\n")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet"])
def test_one_rule_for_the_characters_of_all_formats(tmp_path, suffix):
    def path(prompts):
        path = tmp_path / f"p{suffix}"
        if suffix == ".parquet":
            parquet.write_table(pyarrow.table({"prompt": prompts}), path)
        elif suffix == ".txt":
            write(path, "\n".join(prompts))
        else:
            lines = [json.dumps(prompt) for prompt in prompts]
            write(path, "\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
        return path

    counted = {".txt": "line", ".jsonl": "line", ".json": "item", ".parquet": "row"}[suffix]
    with pytest.warns(UserWarning, match=rf"left out of 2 prompt\(s\), first in {counted} 2"):
        found = files.read_prompts(path(["a cat", "\x1b[2Ja\x07dog", "a\ufeffb", "a\tb"]))
    assert found == ["a cat", "[2Ja dog", "ab", "a\tb"]
    with pytest.raises(InputError, match=r"NUL character|not UTF-8"):
        files.read_prompts(path(["a cat", "a\x00b"]))
    with pytest.raises(InputError, match=rf"{counted} 2: 200000 characters are no prompt"):
        files.read_prompts(path(["a cat", "ab" * 100_000]))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("p.json", r"p\.json has 20\.0 GiB, more than 8: split it"),  # it is parsed as a whole
        ("p.txt", r"p\.txt, line 1: longer than 64 MiB"),
    ],
)
def test_a_file_of_many_gigabytes(tmp_path, name, said):
    with open(tmp_path / name, "wb") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(InputError, match=said):
        files.read_prompts(tmp_path / name)


def test_a_tfds_folder_with_a_cut_file_or_a_pipe(tmp_path):
    tfds_prompts.write({"prompt": PROMPTS}, tmp_path / "prompts")
    (records,) = (tmp_path / "prompts").glob("*.array_record*")
    os.truncate(records, records.stat().st_size // 2)
    with pytest.raises(InputError, match="prompts cannot be read"):
        files.read_prompts(tmp_path / "prompts")
    records.unlink()
    os.mkfifo(records)
    with pytest.raises(InputError, match="is a pipe or a device"):
        files.read_prompts(tmp_path / "prompts")
