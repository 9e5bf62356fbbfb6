"""Bytes that a compiled program moves, counted in its HLO text: through HBM, and between chips.

The compiler's own count takes the body of a loop once. Here every computation is read once, and
counted as often as it runs: a loop as often as the compiler knows it to, or as the caller expects.
"""

import dataclasses
import math
import re

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
# These move nothing by themselves.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "iota",
    "domain",
}
# Of a send to the same chips of other slices: those slices, and what it is a part of.
_BETWEEN_SLICES = re.compile(
    r'_xla_megascale_target="\{([\d,]+)\}.*'
    r'_xla_megascale_transfer_type="(\w+)"'
)
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass
class Cost:
    """Of one chip and one run. `hbm_bytes` are read or written; `collective_bytes` is what it sends
    to other chips of its slice, by kind, and `dcn_bytes` what it sends to other slices, both as a
    ring sends it."""

    hbm_bytes: float = 0.0
    collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    dcn_bytes: float = 0.0

    def add(self, other: "Cost", times: float) -> None:
        self.hbm_bytes += times * other.hbm_bytes
        self.dcn_bytes += times * other.dcn_bytes
        for kind, value in other.collective_bytes.items():
            self.collective_bytes[kind] = self.collective_bytes.get(kind, 0.0) + times * value


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    is_root: bool


def cost(hlo: str, while_trips: float = 1.0) -> Cost:
    """Of the entry computation of an optimized module in its long text form.

    `while_trips` is how often each loop of unknown length goes round on average.
    """
    computations, entry = _parse(hlo)
    found: dict[str, Cost] = {}

    def of(name: str) -> Cost:
        if name not in found:
            found[name] = _cost_of(computations[name], computations, of, while_trips)
        return found[name]

    return of(entry)


def _parse(hlo: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", {}
    for line in hlo.splitlines():
        if match := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = match.groups()
            operands = tuple(_OPERAND.findall(rest[: _closing(rest)]))
            current[name] = _Instruction(name, shape, opcode, operands, rest, bool(root))
        elif match := _COMPUTATION.match(line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
    return computations, entry


def _closing(text: str) -> int:
    """Where the list of operands ends."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return i
    return len(text)


def _cost_of(instructions, computations, of, while_trips: float) -> Cost:
    total = Cost()
    for one in instructions.values():
        called = [
            name.strip("% ") for group in _CALLED.findall(one.text) for name in group.split(",")
        ]
        if one.opcode == "while":
            total.add(of(called[0]), _trips(one, computations, while_trips))
        elif one.opcode == "conditional":
            total.add(max((of(name) for name in called), key=lambda c: c.hbm_bytes), 1.0)
        elif one.opcode == "call":
            total.add(of(called[0]), 1.0)
        elif one.opcode not in _FREE and not one.opcode.endswith("-done"):
            fused = computations.get(called[0]) if one.opcode == "fusion" and called else None
            total.hbm_bytes += _moved(one, instructions, computations, fused)
            for inner in [one, *(fused or {}).values()]:
                if kind := _collective(inner, fused or {}):
                    total.add(Cost(0.0, {kind: _sent(inner, kind, fused or instructions)}), 1.0)
                elif inner.opcode == "send":
                    total.dcn_bytes += _sent_to_slices(inner, fused or instructions)
    return total


def _trips(loop: _Instruction, computations, otherwise: float) -> float:
    """How often a loop goes round: as a CPU's or GPU's compiler says, or, as JAX's loops count from
    0, up to the one constant that its condition compares with."""
    if said := _TRIPS.search(loop.text):
        return float(said[1])
    condition = computations[_CONDITION.search(loop.text)[1]].values()
    bounds = [one.text for one in condition if one.opcode == "constant"]
    if len(bounds) == 1 and any("direction=LT" in one.text for one in condition):
        return float(re.match(r"\d+", bounds[0])[0])
    return otherwise


def _moved(one: _Instruction, instructions, computations, fused) -> float:
    """Bytes of HBM that an instruction reads and writes. What lies in the chip's own fast memory
    moves none; of an operand that is only sliced, and a result that is written into another, the
    slice counts."""
    if one.opcode == "custom-call" and 'custom_call_target="AllocateBuffer"' in one.text:
        return 0.0
    result = _result(one)
    if one.opcode in ("dynamic-slice", "slice", "slice-start"):
        whole = _bytes(instructions[one.operands[0]].shape)
        return min(whole, _bytes(result, anywhere=True)) + _bytes(result)
    if one.opcode == "dynamic-update-slice":
        return 2 * _bytes(instructions[one.operands[1]].shape)
    read = [
        _bytes(instructions[name].shape) if name in instructions else 0.0 for name in one.operands
    ]
    written = _bytes(result)
    if fused is not None:
        read = [
            min(whole, _read(_parameter(fused, i).name, fused, computations))
            for i, whole in enumerate(read)
        ]
        written = min(written, _written(_root(fused), one.shape, fused, computations))
    return sum(read) + written


def _result(one: _Instruction) -> str:
    """The shape of what an instruction makes: the start of what ends later names its operands too,
    before what it makes or, of a copy, behind."""
    if not one.opcode.endswith("-start") or one.opcode == "all-reduce-start":
        return one.shape
    arrays, count = [match[0] for match in _ARRAY.finditer(one.shape)], len(one.operands)
    return " ".join(arrays[:1] if one.opcode == "copy-start" else arrays[count : 2 * count])


def _parameter(computation, number: int) -> _Instruction:
    return next(
        x
        for x in computation.values()
        if x.opcode == "parameter" and x.text.startswith(f"{number})")
    )


def _root(computation) -> _Instruction:
    return next(x for x in computation.values() if x.is_root)


def _called(one: _Instruction, computations):
    return computations[_CALLED.search(one.text)[1].strip("%")]


def _read(name: str, computation, computations) -> float:
    """Bytes that a fusion reads of a value: infinite where it is not only sliced, here or in a
    fusion within."""
    total = 0.0
    for user in computation.values():
        for i, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode in ("dynamic-slice", "slice") and i == 0:
                total += _bytes(user.shape, anywhere=True)
            elif user.opcode == "fusion":
                inner = _called(user, computations)
                total += _read(_parameter(inner, i).name, inner, computations)
            elif user.opcode == "bitcast" and not user.is_root:
                total += _read(user.name, computation, computations)
            elif user.opcode != "dynamic-update-slice" or i != 0:  # of which nothing is read
                return math.inf
    return total


def _written(one: _Instruction, shape: str, computation, computations) -> float:
    """Bytes that a fusion writes of a result that has this shape outside of it."""
    if one.opcode == "dynamic-update-slice":
        return _bytes(computation[one.operands[1]].shape, anywhere=True)
    if one.opcode == "bitcast" and one.operands[0] in computation:
        return _written(computation[one.operands[0]], shape, computation, computations)
    if one.opcode == "fusion":
        inner = _called(one, computations)
        return _written(_root(inner), shape, inner, computations)
    if one.opcode == "tuple":
        parts = [match[0] for match in _ARRAY.finditer(shape)]
        if len(parts) == len(one.operands):
            return sum(
                min(_bytes(part), _written(computation[name], part, computation, computations))
                for part, name in zip(parts, one.operands, strict=True)
            )
    return math.inf


def _bytes(shape: str, anywhere: bool = False) -> float:
    """Of all arrays in the text of a shape that lie in HBM."""
    total = 0.0
    for kind, sizes, layout in _ARRAY.findall(shape):
        if kind in _BITS and (anywhere or "S(" not in layout):
            total += math.prod(int(size) for size in sizes.split(",") if size) * _BITS[kind] / 8
    return total


def _collective(one: _Instruction, fused) -> str | None:
    kind = next((kind for kind in _COLLECTIVES if one.opcode in (kind, f"{kind}-start")), None)
    if kind == "all-reduce" and fused:
        # A reduce-scatter, as the TPU's compiler writes it: nobody gets what others keep.
        root = _root(fused)
        while root.opcode == "bitcast" and root.operands[0] in fused:
            root = fused[root.operands[0]]
        if root.opcode == "dynamic-slice" and root.operands[0] == one.name:
            return "reduce-scatter"
    return kind


def _sent(one: _Instruction, kind: str, instructions) -> float:
    size = _given(one, instructions)
    if kind == "collective-permute":
        return size
    return size * _rounds(kind, _group(one.text))


def _given(one: _Instruction, instructions) -> float:
    """Bytes of all operands, wherever they lie."""
    return sum(
        _bytes(instructions[name].shape, anywhere=True)
        for name in one.operands
        if name in instructions
    )


def _rounds(kind: str, count: int) -> float:
    """How often a ring of so many sends what each of them puts in."""
    if kind == "all-gather":  # each sends its part to all others
        return count - 1.0
    return (count - 1) / count * (2 if kind == "all-reduce" else 1)


def _sent_to_slices(one: _Instruction, instructions) -> float:
    if not (match := _BETWEEN_SLICES.search(one.text)):  # to the host
        return 0.0
    kind, size = match[2].lower().replace("_", "-"), _given(one, instructions)
    return size * _rounds(kind, match[1].count(",") + 1) if kind in _COLLECTIVES[:-1] else size


def _group(text: str) -> int:
    """Chips that take part in one group of a collective."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 1
