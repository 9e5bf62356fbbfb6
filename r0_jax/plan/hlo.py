"""The text of a compiled program (HLO) as values: module, computations, instructions."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "bf16": 16,
    "f16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "c128": 128,
    "f8e4m3fn": 8,
    "f8e5m2": 8,
}
# A computation is a head, `%name (p: f32[8]) -> f32[8] {` (the entry's begins with ENTRY), and its
# instructions, one a line. This is one of them, as XLA wrote it for eight devices:
#
#   ROOT %all-gather = f32[8,1000]{1,0} all-gather(%get-tuple-element.22), channel_id=2,
#     replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}
#
#   ROOT                      the computation's result
#   %all-gather               name
#   f32[8,1000]               shape of the result; of several in parentheses: (s32[], f32[8,4])
#   {1,0}                     layout; a TPU adds tiles, T(8,128), and a memory, S(1), unless HBM
#   all-gather                opcode
#   (%get-tuple-element.22)   operands, of the same computation
#   channel_id=2, ...         attributes: here who takes part, eight devices of the first axis
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|called_computations|branch_computations)="
    r"\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_GROUP = re.compile(
    r"replica_groups=(?:\{\{(?P<listed>[\d,]+)\}"
    r"|\[\d+,(?P<size>\d+)\]"
    r"|mesh\[(?P<mesh>[^\]]*)\][^{]*\{(?P<axes>[^}]*)\})"
)
_BETWEEN_SLICES = re.compile(
    r'_xla_megascale_target="\{([\d,]+)\}.*'
    r'_xla_megascale_transfer_type="(\w+)"'
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Describe an array.

    Attributes:
      kind: the type of its elements, such as "bf16"; "token" and others take no bytes.
      in_hbm: False where it lies in a memory of the chip itself.
    """

    kind: str
    sizes: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        """Return its bytes, wherever it lies."""
        return math.prod(self.sizes) * _BITS.get(self.kind, 0) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Describe one line of a computation.

    Attributes:
      shapes: those of its result; the arrays of a tuple follow each other.
      operands: names of instructions of the same computation.
      called: names of the computations that it runs: a fusion, a call, a loop's body, branches.
      condition: of a loop, the name of the computation that ends it.
      number: of a parameter its place, of a constant its value; None unless a whole number.
      less_than: whether it compares by "less than".
      trips: of a loop, how often it goes round; None where the compiler does not know.
      target: of a custom call, the name of what it calls.
      group: of a collective, the chips in one of its groups.
      slices, transfer: of a send to other slices, their number and the collective that it belongs
        to, such as "all-reduce"; otherwise 0 and "".
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    is_root: bool
    called: tuple[str, ...] = ()
    condition: str | None = None
    number: int | None = None
    less_than: bool = False
    trips: int | None = None
    target: str = ""
    group: int = 1
    slices: int = 0
    transfer: str = ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Hold instructions by name, in the order of the text."""

    instructions: Mapping[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """Return the instruction whose result is the computation's."""
        return next(x for x in self.instructions.values() if x.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Return the parameters, by their place."""
        return {x.number: x for x in self.instructions.values() if x.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    """Hold computations by name, and the name of the one that runs first."""

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Return the module of an optimized program in its long text form."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            current[match[2]] = _instruction(*match.groups())
        elif match := _COMPUTATION.match(line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
    return Module({name: Computation(found) for name, found in computations.items()}, entry)


def _instruction(root: str | None, name: str, shape: str, opcode: str, rest: str) -> Instruction:
    end = _closing(rest)
    inside, attributes = rest[:end], rest[end:]
    found: dict[str, Any] = {}
    if opcode in ("parameter", "constant") and (match := re.match(r"\d+", inside)):
        found["number"] = int(match[0])
    if opcode == "compare":
        found["less_than"] = "direction=LT" in attributes
    if opcode == "while":
        found["condition"] = _CONDITION.search(attributes)[1]
        if match := _TRIPS.search(attributes):
            found["trips"] = int(match[1])
    if opcode == "custom-call" and (match := _TARGET.search(attributes)):
        found["target"] = match[1]
    if opcode == "send" and (match := _BETWEEN_SLICES.search(attributes)):
        found["slices"] = match[1].count(",") + 1
        found["transfer"] = match[2].lower().replace("_", "-")
    return Instruction(
        name,
        opcode,
        shapes=tuple(_shapes(shape)),
        operands=tuple(_OPERAND.findall(inside)),
        is_root=bool(root),
        called=_called(attributes),
        group=_group(attributes),
        **found,
    )


def _called(attributes: str) -> tuple[str, ...]:
    if "=%" not in attributes and "={%" not in attributes:  # as in most: searching takes longer
        return ()
    found = _CALLED.findall(attributes)
    return tuple(name.strip("% ") for names in found for name in names.split(","))


def _shapes(text: str) -> Iterator[Shape]:
    for kind, sizes, layout in _ARRAY.findall(text):
        yield Shape(kind, tuple(map(int, filter(None, sizes.split(",")))), "S(" not in layout)


def _group(attributes: str) -> int:
    if not (match := _GROUP.search(attributes)):
        return 1
    if match["listed"]:
        return match["listed"].count(",") + 1
    if match["size"]:
        return int(match["size"])
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match["mesh"]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match["axes"]))


def _closing(text: str) -> int:
    """Return the index at which the list of operands ends."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return i
    return len(text)
