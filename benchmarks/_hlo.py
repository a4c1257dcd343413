"""Counts the memory traffic of a compiled program from the text of its optimized HLO.

What an instruction reads and writes is the bytes of its operands and results that are in the
device's main memory, padded to tiles: memory spaces such as VMEM, S(1) in a layout, cost nothing. A
slice or gather reads as much as it returns, a dynamic-update-slice writes its update in place, a
fusion reads each parameter as its body uses it, and a while loop's body counts once a trip.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jaxrft.errors import InputError

BITS = {
    **{
        "pred": 8,
        "s4": 4,
        "u4": 4,
        "s8": 8,
        "u8": 8,
        "s16": 16,
        "u16": 16,
        "s32": 32,
        "u32": 32,
        "s64": 64,
    },
    **{"u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128},
}
FREE = {
    *(
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "opt-barrier",
        "domain",
    ),
    *("partition-id", "replica-id"),
}
SLICES = {"slice", "dynamic-slice", "gather"}
ALIASES = {"bitcast", "get-tuple-element", "copy-done"}  # their value is their first operand's
COLLECTIVES = {
    *(
        "all-gather",
        "all-reduce",
        "all-to-all",
        "ragged-all-to-all",
        "reduce-scatter",
        "collective-permute",
    ),
    *("collective-broadcast", "send", "recv"),
}
PALLAS = "tpu_custom_call"
ALLOCATIONS = ("AllocateBuffer",)

_LEAF = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"%([\w.\-]+)")


class Leaf(NamedTuple):
    """An array of a type."""

    dtype: str
    shape: tuple[int, ...]
    layout: str  # such as 1,0:T(8,128)(2,1)S(1), as printed

    @property
    def bytes(self) -> int:
        """The bytes that it takes, its minor dimensions padded to the first tile."""
        order, _, tiling = self.layout.partition(":")
        sizes = [self.shape[int(axis)] for axis in order.split(",") if axis] or [*self.shape][::-1]
        tile = re.match(r"T\(([\d,]+)\)", tiling)
        if tile and self.shape:
            minor = [int(size) for size in tile[1].split(",")][::-1]
            sizes += [1] * (len(minor) - len(sizes))
            sizes[: len(minor)] = [t * -(-size // t) for size, t in zip(sizes, minor, strict=False)]
        if self.dtype.startswith("f8"):
            return math.prod(sizes)
        return math.prod(sizes) * BITS.get(self.dtype, 0) // 8

    @property
    def in_memory(self) -> bool:
        """Whether it is in main memory."""
        return not re.search(r"S\([1-9]\d*\)", self.layout)


@dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str  # what follows the operands
    arguments: str  # what is between the parentheses
    root: bool

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The arrays of its result."""
        return tuple(_leaves(self.type))

    def called(self, attribute: str) -> str:
        """Returns the name of the computation that an attribute names."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        if not match:
            raise InputError(
                f"{self.name} has no {attribute}: this is no optimized HLO that can be read"
            )
        return match[1]


Computation = dict[str, Instruction]  # by name, in order


class Traffic(NamedTuple):
    """What one instruction moves."""

    instruction: Instruction
    trips: int
    read: int  # bytes, of one trip
    written: int

    @property
    def bytes(self) -> int:
        """The bytes of all trips."""
        return self.trips * (self.read + self.written)


class Exchange(NamedTuple):
    """What one instruction exchanges between chips."""

    instruction: Instruction
    trips: int
    size: int  # bytes of its largest array, of one trip

    @property
    def bytes(self) -> int:
        """The bytes of all trips."""
        return self.trips * self.size


class Loop(NamedTuple):
    """A while loop of the program whose number of trips depends on data."""

    name: str
    limit: int  # the smallest count that ends it
    traffic: tuple[Traffic, ...]  # of one trip
    exchanges: tuple[Exchange, ...]  # of one trip

    @property
    def bytes(self) -> int:
        """The bytes of one trip."""
        return sum(each.bytes for each in self.traffic)


class Block(NamedTuple):
    """An operand or result of a Pallas kernel, as its BlockSpec says."""

    shape: tuple[int, ...]
    item_size: int  # bytes
    index_map: Callable[..., tuple[int, ...]]  # of the indices of the grid


def pallas_bytes(grid: Sequence[int], blocks: Sequence[Block]) -> int:
    """Counts the bytes that a kernel moves: a block each time that its index changes, in the order
    of the grid.
    """
    total = 0
    for block in blocks:
        latest = None
        for step in _grid_steps(grid):
            index = block.index_map(*step)
            if index != latest:
                total += math.prod(block.shape) * block.item_size
            latest = index
    return total


def _grid_steps(grid: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yields the indices of a grid, the last one changing fastest."""
    for flat in range(math.prod(grid)):
        step = []
        for size in reversed(grid):
            flat, index = divmod(flat, size)
            step.append(index)
        yield tuple(reversed(step))


def _leaves(text: str) -> Iterator[Leaf]:
    for dtype, shape, layout in _LEAF.findall(re.sub(r"/\*.*?\*/", "", text)):
        yield Leaf(dtype, tuple(int(size) for size in shape.split(",") if size), layout)


class Program:
    """The computations of a module, and what they move."""

    def __init__(self, text: str, kernels: Mapping[str, int] | None = None):
        """Reads the text of a module; `kernels` are the bytes of Pallas kernels by a part of their
        lines.
        """
        self.kernels = dict(kernels or {})
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation = {}
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations.setdefault(match[2], {})
                self.entry = match[2] if match[1] else self.entry
            elif match := _INSTRUCTION.match(line):
                instruction = _parse(line[match.end() :], match[2], bool(match[1]))
                current[instruction.name] = instruction
        if not self.entry:
            raise InputError(
                "the text has no ENTRY computation: give the text of an optimized HLO module"
            )

    def loops(self) -> list[Loop]:
        """Returns the loops of the entry computation whose numbers of trips depend on data, in
        order.
        """
        loops = []
        for each in self.computations[self.entry].values():
            if each.opcode == "while" and self.trip_count(each) is None:
                limit = _limit(self._flat(each.called("condition")))
                parts = [each.called("body"), each.called("condition")]
                traffic = [item for part in parts for item in self.traffic(part)]
                exchanges = [item for part in parts for item in self.exchanges(part)]
                loops.append(Loop(each.name, limit, tuple(traffic), tuple(exchanges)))
        return loops

    def traffic(self, computation: str, trips: int = 1) -> Iterator[Traffic]:
        """Yields what each instruction of a computation moves; inner loops of unknown length count
        once.
        """
        for name, each, times in self._executed(computation, trips):
            read, written = self._moved(self.computations[name], each)
            if read or written:
                yield Traffic(each, times, read, written)

    def exchanges(self, computation: str) -> Iterator[Exchange]:
        """Yields what each instruction of a computation exchanges between chips, wherever its
        arrays are.
        """
        for _, each, times in self._executed(computation, 1):
            parts = self._flat(each.called("calls")) if each.opcode == "fusion" else [each]
            sizes = [
                max((leaf.bytes for leaf in part.leaves), default=0)
                for part in parts
                if part.opcode.removesuffix("-start") in COLLECTIVES
            ]
            if sizes:
                yield Exchange(each, times, sum(sizes))

    def _executed(self, computation: str, trips: int) -> Iterator[tuple[str, Instruction, int]]:
        """Yields the instructions that run, each with its computation and its trips; of branches
        the largest.
        """
        for each in self.computations[computation].values():
            if each.opcode == "while":
                inner = trips * (self.trip_count(each) or 1)
                yield from self._executed(each.called("body"), inner)
                yield from self._executed(each.called("condition"), inner)
            elif each.opcode == "conditional":
                branches = {
                    name: sum(item.bytes for item in self.traffic(name)) for name in _branches(each)
                }
                yield from self._executed(max(branches, key=branches.__getitem__), trips)
            elif each.opcode == "call":
                yield from self._executed(each.called("to_apply"), trips)
            elif each.opcode == "async-start":
                yield from self._executed(each.called("calls"), trips)
            else:
                yield computation, each, trips

    def trip_count(self, loop: Instruction) -> int | None:
        """Returns how often a while loop's body runs; None = that depends on data.

        A loop whose condition is a single comparison with a constant counts from 0 in steps of 1,
        as those of `jax.lax.scan` do.
        """
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(match[1])
        condition = self._flat(loop.called("condition"))
        opcodes = [each.opcode for each in condition if each.opcode not in FREE]
        opcodes = [opcode for opcode in opcodes if opcode not in ("fusion", "copy")]
        constants = _constants(condition)
        return constants[0] if opcodes == ["compare"] and len(constants) == 1 else None

    def _flat(self, computation: str) -> list[Instruction]:
        """Returns the instructions of a computation and of the fusions in it."""
        instructions = []
        for each in self.computations[computation].values():
            instructions.append(each)
            if each.opcode == "fusion":
                instructions += self._flat(each.called("calls"))
        return instructions

    def _moved(self, computation: Computation, each: Instruction) -> tuple[int, int]:
        """Returns the bytes that an instruction reads and writes."""
        operands = [computation[name] for name in each.operands if name in computation]
        if each.opcode in FREE or each.opcode.endswith("-done"):
            return 0, 0
        if each.opcode == "fusion":
            body = each.called("calls")
            read = sum(self._read(body, place) for place in range(len(each.operands)))
            return read, self._written(body)
        if each.opcode == "copy-start":  # (destination, source, context)
            to, source, *_ = each.leaves
            return _size([source]), _size([to])
        if each.opcode in ("slice-start", "dynamic-slice-start"):  # ((operands), result, context)
            to = each.leaves[-2]
            return to.bytes, _size([to])
        if each.opcode in SLICES:
            rest = sum(_size(operand.leaves) for operand in operands[1:])
            sliced = _size(each.leaves[:1]) or each.leaves[0].bytes
            return rest + sliced * all(leaf.in_memory for leaf in operands[0].leaves), _size(
                each.leaves
            )
        if each.opcode == "dynamic-update-slice":
            update, *indices = operands[1:]
            read = sum(_size(operand.leaves) for operand in (update, *indices))
            return read, update.leaves[0].bytes if each.leaves[0].in_memory else 0
        if each.opcode == "custom-call":
            return self._custom(each, operands)
        return sum(_size(operand.leaves) for operand in operands), _size(each.leaves)

    def _custom(self, each: Instruction, operands: list[Instruction]) -> tuple[int, int]:
        """Returns what a call of something that is no HLO moves; a Pallas kernel's is given, never
        its own estimate.
        """
        if any(target in each.attributes for target in ALLOCATIONS):
            return 0, 0
        if PALLAS not in each.attributes:
            return sum(_size(operand.leaves) for operand in operands), _size(each.leaves)
        for name, moved in self.kernels.items():
            if name in each.name or name in each.attributes:
                return moved, 0
        raise InputError(
            f"{each.name} is a Pallas kernel whose grid is not known: add its blocks to KERNELS"
        )

    def _read(self, body: str, place: int) -> int:
        """Returns the bytes that a fusion reads of its operand number `place`."""
        computation = self.computations[body]
        parameter = self._parameter(body, place)
        full = _size(parameter.leaves)
        return min(full, self._used(computation, parameter, full)) if full else 0

    def _used(self, computation: Computation, value: Instruction, full: int) -> int:
        """Returns the bytes of a value of `full` bytes that a fusion's instructions look at."""
        total = 0
        for each in computation.values():
            for place, name in enumerate(each.operands):
                if name != value.name:
                    continue
                if each.opcode in ALIASES:
                    total += self._used(computation, each, full)
                elif each.opcode in SLICES and place == 0:
                    total += each.leaves[0].bytes
                elif each.opcode == "dynamic-update-slice" and place == 0:
                    total += self._used(computation, each, full)
                elif each.opcode == "fusion":
                    total += self._read_inner(each.called("calls"), place, full)
                    if self._is_passed_on(each.called("calls"), place):
                        total += self._used(computation, each, full)
                elif each.opcode != "tuple":
                    return full
        return total

    def _read_inner(self, body: str, place: int, full: int) -> int:
        """Returns what `_read` does for a fusion within a fusion, whose parameters have no memory
        of their own.
        """
        return self._used(self.computations[body], self._parameter(body, place), full)

    def _is_passed_on(self, body: str, place: int) -> bool:
        """Decides whether a fusion within a fusion returns its operand number `place` itself,
        perhaps updated.
        """
        computation = self.computations[body]
        value = next(each for each in computation.values() if each.root)
        while value.opcode in (*ALIASES, "dynamic-update-slice"):
            value = computation[value.operands[0]]
        return value == self._parameter(body, place)

    def _parameter(self, body: str, place: int) -> Instruction:
        instructions = self.computations[body].values()
        parameters = (each for each in instructions if each.opcode == "parameter")
        return next(each for each in parameters if each.arguments.strip() == str(place))

    def _written(self, body: str) -> int:
        """Returns the bytes that a fusion writes: of an update in place, those of the update."""
        computation = self.computations[body]
        root = next(each for each in computation.values() if each.root)
        results = (
            [computation[name] for name in root.operands] if root.opcode == "tuple" else [root]
        )
        return sum(self._result(computation, each) for each in results)

    def _result(self, computation: Computation, value: Instruction) -> int:
        if not _size(value.leaves):
            return 0
        source = value
        while source.opcode == "bitcast":
            source = computation[source.operands[0]]
        if source.opcode == "dynamic-update-slice":
            return computation[source.operands[1]].leaves[0].bytes
        if source.opcode == "fusion":
            return self._written(source.called("calls"))
        if source.opcode == "parameter":
            return 0
        return _size(value.leaves)


def _size(leaves: Sequence[Leaf]) -> int:
    """Returns the bytes of the arrays that are in main memory."""
    return sum(leaf.bytes for leaf in leaves if leaf.in_memory)


def _constants(instructions: Sequence[Instruction]) -> list[int]:
    """Returns the integer constants among instructions."""
    constants = [
        each for each in instructions if each.opcode == "constant" and each.type.startswith("s")
    ]
    return [int(each.arguments) for each in constants if re.fullmatch(r"-?\d+", each.arguments)]


def _limit(condition: Sequence[Instruction]) -> int:
    """Returns the smallest count at which a condition is false: a constant, or the number after it
    if it may be met.
    """
    least = min((number for number in _constants(condition) if number > 0), default=0)
    comparisons = [each.attributes for each in condition if each.opcode == "compare"]
    return least + any("direction=LE" in attributes for attributes in comparisons)


def _branches(each: Instruction) -> list[str]:
    """Returns the computations that a conditional chooses from."""
    if match := re.search(r"branch_computations=\{([^}]*)\}", each.attributes):
        return _NAME.findall(match[1])
    return [each.called("true_computation"), each.called("false_computation")]


def _parse(text: str, name: str, root: bool) -> Instruction:
    """Reads what follows the equals sign of an instruction."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    opening = len(opcode)
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=opcode,
        type=kind,
        operands=tuple(_NAME.findall(arguments)),
        attributes=rest[closing + 1 :],
        arguments=arguments,
        root=root,
    )


def _closing(text: str, opening: int) -> int:
    """Returns the place of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise InputError(
        "a line of the HLO has parentheses that do not close: give the whole text of a module"
    )
