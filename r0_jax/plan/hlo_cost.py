"""Bytes that a compiled program moves, counted in its HLO text: through HBM, and between chips.

The compiler's own count takes the body of a loop once. Here a computation counts as often as it
runs: a loop as often as the compiler says that it goes round, or as often as the caller expects.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

from r0_jax.plan import hlo
from r0_jax.plan.hlo import Computation, Instruction, Module, Shape

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
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass
class Cost:
    """The bytes of one chip in one run.

    Attributes:
      hbm_bytes: read or written in HBM.
      collective_bytes: sent to other chips of the slice, by kind, as a ring sends them.
      dcn_bytes: sent to other slices, also as a ring sends them.
    """

    hbm_bytes: float = 0.0
    collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    dcn_bytes: float = 0.0

    def add(self, other: "Cost", times: float) -> None:
        """Add what so many runs of another program cost."""
        self.hbm_bytes += times * other.hbm_bytes
        self.dcn_bytes += times * other.dcn_bytes
        for kind, value in other.collective_bytes.items():
            self.collective_bytes[kind] = self.collective_bytes.get(kind, 0.0) + times * value


def cost(text: str, while_trips: float = 1.0) -> Cost:
    """Return the cost of an optimized module's entry computation; `text` is its long form.

    `while_trips` is how often each loop of unknown length goes round on average.
    """
    module = hlo.parse(text)
    found: dict[str, Cost] = {}

    def of(name: str) -> Cost:
        if name not in found:
            found[name] = _cost_of(module.computations[name], module, of, while_trips)
        return found[name]

    return of(module.entry)


def _cost_of(
    computation: Computation, module: Module, of: Callable[[str], Cost], while_trips: float
) -> Cost:
    total = Cost()
    for one in computation.instructions.values():
        if one.opcode == "while":
            total.add(of(one.called[0]), _trips(one, module, while_trips))
        elif one.opcode == "conditional":
            total.add(max((of(name) for name in one.called), key=lambda c: c.hbm_bytes), 1.0)
        elif one.opcode == "call":
            total.add(of(one.called[0]), 1.0)
        elif one.opcode not in _FREE and not one.opcode.endswith("-done"):
            fused = _fused(one, module)
            total.hbm_bytes += _moved(one, computation, module, fused)
            inside = fused.instructions.values() if fused else ()
            for inner in (one, *inside):
                around = fused or computation
                if kind := _collective(inner, fused):
                    total.add(Cost(0.0, {kind: _sent(inner, kind, around)}), 1.0)
                elif inner.opcode == "send":
                    total.dcn_bytes += _sent_to_slices(inner, around)
    return total


def _fused(one: Instruction, module: Module) -> Computation | None:
    """Return the computation of a fusion; None of any other instruction."""
    return module.computations.get(one.called[0]) if one.opcode == "fusion" and one.called else None


def _trips(loop: Instruction, module: Module, otherwise: float) -> float:
    """Return how often a loop goes round.

    The compilers of CPUs and GPUs say it. A TPU's does not; but loops of JAX count from 0 up to
    the one constant that their condition compares with.
    """
    if loop.trips is not None:
        return float(loop.trips)
    condition = module.computations[loop.condition].instructions.values()
    bounds = [one.number for one in condition if one.opcode == "constant"]
    if len(bounds) == 1 and bounds[0] is not None and any(one.less_than for one in condition):
        return float(bounds[0])
    return otherwise


def _moved(
    one: Instruction, computation: Computation, module: Module, fused: Computation | None
) -> float:
    """Return the bytes of HBM that an instruction reads and writes.

    What lies in the chip's own fast memory moves none. Where an operand is only sliced, or a
    result is written into another array, the slice counts.
    """
    around = computation.instructions
    if one.target == "AllocateBuffer":
        return 0.0
    result = _result(one)
    if one.opcode in ("dynamic-slice", "slice", "slice-start"):
        whole = _in_hbm(around[one.operands[0]].shapes)
        return min(whole, _bytes(result)) + _in_hbm(result)
    if one.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(around[one.operands[1]].shapes)
    read = [_in_hbm(around[name].shapes) if name in around else 0.0 for name in one.operands]
    written = _in_hbm(result)
    if fused is not None:
        read = [
            min(whole, _read(fused.parameters[i].name, fused, module))
            for i, whole in enumerate(read)
        ]
        written = min(written, _written(fused.root, one.shapes, fused, module))
    return sum(read) + written


def _result(one: Instruction) -> tuple[Shape, ...]:
    """Return the shapes of what an instruction makes.

    An instruction that starts what ends later names its operands too: before what it makes or,
    of a copy, behind it.
    """
    if not one.opcode.endswith("-start") or one.opcode == "all-reduce-start":
        return one.shapes
    count = len(one.operands)
    return one.shapes[:1] if one.opcode == "copy-start" else one.shapes[count : 2 * count]


def _read(name: str, computation: Computation, module: Module) -> float:
    """Return the bytes that a fusion reads of a value.

    It is infinite unless the value is only sliced, here or in a fusion within.
    """
    total = 0.0
    for user in computation.instructions.values():
        for i, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode in ("dynamic-slice", "slice") and i == 0:
                total += _bytes(user.shapes)
            elif user.opcode == "fusion":
                inner = module.computations[user.called[0]]
                total += _read(inner.parameters[i].name, inner, module)
            elif user.opcode == "bitcast" and not user.is_root:
                total += _read(user.name, computation, module)
            elif user.opcode != "dynamic-update-slice" or i != 0:  # of which nothing is read
                return math.inf
    return total


def _written(
    one: Instruction, shapes: tuple[Shape, ...], computation: Computation, module: Module
) -> float:
    """Return the bytes that a fusion writes of a result that has these shapes outside of it."""
    inside = computation.instructions
    if one.opcode == "dynamic-update-slice":
        return _bytes(inside[one.operands[1]].shapes)
    if one.opcode == "bitcast" and one.operands[0] in inside:
        return _written(inside[one.operands[0]], shapes, computation, module)
    if one.opcode == "fusion":
        inner = module.computations[one.called[0]]
        return _written(inner.root, shapes, inner, module)
    if one.opcode == "tuple" and len(shapes) == len(one.operands):
        return sum(
            min(_in_hbm((part,)), _written(inside[name], (part,), computation, module))
            for part, name in zip(shapes, one.operands, strict=True)
        )
    return math.inf


def _bytes(shapes: Iterable[Shape]) -> float:
    return sum((shape.bytes for shape in shapes), 0.0)


def _in_hbm(shapes: Iterable[Shape]) -> float:
    """Return the bytes of those arrays that lie in HBM."""
    return sum((shape.bytes for shape in shapes if shape.in_hbm), 0.0)


def _collective(one: Instruction, fused: Computation | None) -> str | None:
    kind = next((kind for kind in _COLLECTIVES if one.opcode in (kind, f"{kind}-start")), None)
    if kind == "all-reduce" and fused:
        # A reduce-scatter, as the TPU's compiler writes it: nobody gets what others keep.
        root, inside = fused.root, fused.instructions
        while root.opcode == "bitcast" and root.operands[0] in inside:
            root = inside[root.operands[0]]
        if root.opcode == "dynamic-slice" and root.operands[0] == one.name:
            return "reduce-scatter"
    return kind


def _sent(one: Instruction, kind: str, computation: Computation) -> float:
    size = _given(one, computation)
    return size if kind == "collective-permute" else size * _rounds(kind, one.group)


def _given(one: Instruction, computation: Computation) -> float:
    """Return the bytes of all operands, wherever they lie."""
    around = computation.instructions
    return sum((_bytes(around[name].shapes) for name in one.operands if name in around), 0.0)


def _rounds(kind: str, count: int) -> float:
    """Return how often a ring of `count` members sends what each of them puts in."""
    if kind == "all-gather":  # each sends its part to all others
        return count - 1.0
    return (count - 1) / count * (2 if kind == "all-reduce" else 1)


def _sent_to_slices(one: Instruction, computation: Computation) -> float:
    if not one.slices:  # to the host
        return 0.0
    size = _given(one, computation)
    if one.transfer in _COLLECTIVES[:-1]:
        return size * _rounds(one.transfer, one.slices)
    return size
