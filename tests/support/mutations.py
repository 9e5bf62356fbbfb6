"""Seeded ways to spoil a file: its bytes, the values of its JSON, its header, or what it is."""

import copy
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

NESTED = 20_000  # brackets; Python's json gives up at a thousand
HUGE = 10**400  # no float holds it
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 255, 4097, 10**6, 10**9, 2**31, 2**63, 10**18, -(10**18),
    HUGE, 0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf"), "", " ", "a", "../x",
    "/etc/passwd", "\x00", "\x1b[2J", "\ud800", "红", "x" * 100_000, "(.*.*)*X", [], [[]], {}, [0],
    [1, 2, 3], [None], ["a"], [-1] * 3, [10**9] * 4, [0] * 10_000, {"a": 1}, {"": {}},
)  # fmt: skip
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"
)
PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"

Spoil = Callable[[Path, random.Random], str]  # spoils a file and says how


def spoil(path: Path, rng: random.Random) -> str:
    """Spoil a file in one of the ways that suit it; return the way, for the report."""
    ways: list[Spoil] = [_bytes] * 4 + [_kind]
    if path.suffix == ".json":
        ways += [_json] * 10
    elif path.suffix == ".jsonl":
        ways += [_lines] * 6
    elif path.suffix in (".safetensors", ".npy"):
        ways += [_header] * 8
    elif path.suffix == ".txt":
        ways += [_text] * 4
    return rng.choice(ways)(path, rng)


def value(rng: random.Random) -> Any:
    """Return a value that a field may not expect."""
    return copy.deepcopy(rng.choice(VALUES))  # or one case would change those of the next


def _bytes(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data) + 1)
    match rng.randrange(9):
        case 0:
            how, data = "cut short", data[:at]
        case 1:
            how, data = "empty", bytearray()
        case 2:
            how = "bits flipped"
            for _ in range(rng.choice((1, 3, 30))):
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 3:
            how = "bytes inserted"
            data[at:at] = rng.randbytes(rng.choice((1, 8, 1000)))
        case 4:
            how = "a piece deleted"
            del data[at : at + rng.choice((1, 8, 1000))]
        case 5:
            how = "a piece repeated"
            data[at:at] = data[max(0, at - rng.choice((1, 100, 10_000))) : at]
        case 6:
            how, data = "random", bytearray(rng.randbytes(rng.choice((1, 100, 10_000))))
        case 7:
            how = "zeros"
            data[at : at + 100] = bytes(100)
        case _:
            how, data = "another file", bytearray(rng.choice((POINTER, PAGE)))
    path.write_bytes(data)
    return how


def _kind(path: Path, rng: random.Random) -> str:
    """Replace the file by something that is none."""
    path.unlink()
    match rng.randrange(5):
        case 0:
            os.mkfifo(path)
            return "a pipe"
        case 1:
            path.mkdir()
            return "a folder"
        case 2:
            path.symlink_to("nowhere")
            return "a link to nothing"
        case 3:
            path.symlink_to("/dev/zero")
            return "a link to a device"
    return "missing"


def _json(path: Path, rng: random.Random) -> str:
    try:
        parsed = json.loads(path.read_text("utf-8"))
    except ValueError:
        return _bytes(path, rng)
    if rng.random() < 0.05:
        path.write_text(rng.choice(("[", '{"a":')) * NESTED, "utf-8")
        return "nested JSON"
    how = "a value of JSON"
    for _ in range(rng.choice((1, 1, 2, 5))):
        parsed = mutate(parsed, rng)
    path.write_text(_dump(parsed), "utf-8", "surrogatepass")
    return how


def _lines(path: Path, rng: random.Random) -> str:
    lines = path.read_text("utf-8").split("\n")
    at = rng.randrange(len(lines))
    try:
        lines[at] = _dump(mutate(json.loads(lines[at]), rng))
    except ValueError:
        lines[at] = rng.choice(("[" * NESTED, "{", "null", "3", _dump(value(rng))))
    path.write_text("\n".join(lines), "utf-8", "surrogatepass")
    return "a value of JSON"


def mutate(parsed: Any, rng: random.Random) -> Any:
    """Change one place of a JSON value: another value, a field less, a field more."""
    if isinstance(parsed, dict | list) and parsed and rng.random() < 0.85:
        keys = list(parsed) if isinstance(parsed, dict) else list(range(len(parsed)))
        key = rng.choice(keys)
        match rng.randrange(10):
            case 0:
                del parsed[key]
            case 1 if isinstance(parsed, dict):
                parsed[rng.choice(("../x", "", "\x00", "a/b", "x" * 5000, "_class_name"))] = value(
                    rng
                )
            case 2 if isinstance(parsed, list):
                parsed.extend(parsed * rng.choice((1, 100)))
            case _:
                parsed[key] = mutate(parsed[key], rng)
        return parsed
    if isinstance(parsed, int) and not isinstance(parsed, bool) and rng.random() < 0.4:
        return rng.choice(
            (-parsed, parsed + 1, parsed * 10**6, max(min(parsed, 10**9), -(10**9)) * 1.5)
        )
    return value(rng)


def _dump(parsed: Any) -> str:
    # A whole number of 400 digits is JSON, which Python's own limit would not write.
    return re.sub(r'"HUGE"', "1" + "0" * 400, json.dumps(_replaced(parsed), ensure_ascii=False))


def _replaced(parsed: Any) -> Any:
    if isinstance(parsed, dict):
        return {key: _replaced(x) for key, x in parsed.items()}
    if isinstance(parsed, list):
        return [_replaced(x) for x in parsed]
    return "HUGE" if type(parsed) is int and abs(parsed) >= HUGE else parsed


def _header(path: Path, rng: random.Random) -> str:
    """Change the header of a safetensors or .npy file, whose length stays right."""
    data = path.read_bytes()
    if path.suffix == ".npy":
        size = int.from_bytes(data[8:10], "little")
        text = data[10 : 10 + size].decode("latin1")
        number = rng.choice((0, -1, 10**6, 10**12, 10**30))
        text = rng.choice(
            (
                re.sub(r"\d+", str(number), text, count=rng.choice((1, 2))),
                text.replace("<f4", rng.choice(("<f8", "|O", ">f4", "<i4", "|S9", "<c8", "x"))),
                text.replace("False", "True"),
                "(" * 300 + text,
            )
        )
        text = text.rstrip().ljust(size - 1)[: size - 1] + "\n"
        path.write_bytes(data[:10] + text.encode("latin1") + data[10 + size :])
        return "a header"
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    key = rng.choice([key for key in header if key != "__metadata__"])
    match rng.randrange(6):
        case 0:
            header[key]["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "F8_E4M3", "BOOL", "X"))
        case 1:
            header[key]["shape"] = rng.choice(([], [0], [2**62, 4], [10**9], [1, -1], ["a"]))
        case 2:
            header[key]["data_offsets"] = rng.choice(([0, 0], [0, 2**60], [-4, 4], [4, 0], []))
        case 3:
            header[rng.choice(("a", "", "x" * 9999, "\x1b[2J"))] = header.pop(key)
        case 4:
            header["__metadata__"] = rng.choice(({"a": 1}, [], {"format": None}, {"": "x" * 10**5}))
        case _:
            header = mutate(header, rng)
    text = _dump(header).encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return "a header"


def _text(path: Path, rng: random.Random) -> str:
    lines = path.read_bytes().split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = rng.choice(
        (
            b"\x00", b"\xef\xbb\xbf" + lines[at], b"\x1b[2J" + lines[at], b"\xff\xfe", b"",
            b"x " * 200_000, "𝕏\u202e\u2028".encode(), lines[at] * 50, b"prompt,url", b'{"a": 1}',
        )
    )  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    return "a line"


def remove(path: Path) -> None:
    """Remove whatever `spoil` made of a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
