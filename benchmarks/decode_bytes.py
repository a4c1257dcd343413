"""Counts the bytes that a decode loop moves, in the compiler's program, and those it must move.

    python -m benchmarks.decode_bytes --models Qwen/Qwen2.5-1.5B --topologies v5e:2x2 v5p:2x2x1

Compiles the segments of a rollout ahead of time, each as a run compiles it
(`jaxrft.lm.policy.CompiledRollout`), in bfloat16, and counts a pass of the body of the decode loop
from its optimized HLO (see `_hlo.py`). That needs no TPU but the package libtpu: pip install
".[tpu]". The topology `cpu` compiles for this machine. Figures are those of one chip: --fsdp
chips have --rows each, and --model-parallel chips share heads, hidden units and vocabulary.

What a pass must move: all weights once, keys and values up to the position, a group's prompt once,
and one new position of each row. `full` is the ratio at the last position. `mean` is the ratio of
the sums over all positions, where a loop that reads free slots too pays for them. Each segment
counts from the position where the one before ends. With --attention pallas the kernel counts by its
grid and blocks: a block each time that its index changes.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import _script
from benchmarks._hlo import Block, Exchange, Program, Traffic, pallas_bytes
from benchmarks._script import whole_number
from jaxrft import mesh as meshes
from jaxrft.config import Config, TasksConfig
from jaxrft.dry_run.bounds import Decode
from jaxrft.dry_run.programs import decode_arguments, devices
from jaxrft.errors import InputError
from jaxrft.fields import path_argument
from jaxrft.lm import model, pallas_attention, published, weights
from jaxrft.lm.attention import attend_slots, cache_of
from jaxrft.lm.policy import LanguageModel
from jaxrft.lm.rollout import cache_lengths
from jaxrft.lm.segments import Batch, compile_rollout

MODELS = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-8B")
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1")
SHOWN = 8  # instructions that move the most
ATTENTION = {"xla": attend_slots, "pallas": pallas_attention.attend_slots}
COUNTS = ("rows", "group_size", "prompt_length", "new_tokens", "fsdp", "model_parallel")
LENGTHS = ("all", "ends", "last")  # of the cache, which are compiled


class Segment(NamedTuple):
    """A compiled program that decodes with a cache of one length."""

    length: int  # slots
    text: str  # of its optimized HLO
    seconds: float  # that it took to compile
    temporaries: int = 0  # bytes, of `memory_analysis`; the cache is not among them
    cost_analysis: float = 0.0  # "bytes accessed" by the compiler, bodies of loops once


@dataclass(frozen=True)
class Counted:
    """What a compiled decode loop moves, of one chip and one pass; bytes."""

    bytes: int  # of the last loop, whose cache is the largest
    must: int  # at the last position
    full: float  # bytes / must
    mean: float | None  # the same, summed over all positions; None = not all segments are known
    loops: tuple[tuple[int, int], ...]  # (limit, bytes) of each at its last pass
    averages: tuple[tuple[int, int], ...]  # (limit, bytes) of each, the mean of its passes
    compile_seconds: tuple[float, ...]  # of each that was compiled
    cost_analysis: float
    temporaries: int
    cache: int  # bytes of all rows' keys and values
    copies: int  # instructions of a pass that read and write at least as much as a layer has keys
    exchanged: int  # bytes of what is exchanged between chips
    largest: tuple[str, ...]  # instructions that move the most, of the last loop
    exchanges: tuple[str, ...]  # instructions that exchange the most, of the last loop


def compile_segments(
    decode: Decode, topology: str, *, fsdp: int = 1, lengths: str = "all", attention: str = "xla"
) -> Iterator[Segment]:
    """Compiles a rollout's segments for a topology, or for this machine's own processor if it is
    `cpu`.
    """
    count = fsdp * decode.model_parallel
    chips = jax.devices("cpu") if topology == "cpu" else devices(topology)
    if len(chips) < count:
        raise InputError(
            f"fsdp x model-parallel is {count}: it must be at most {len(chips)}, "
            f"the chips of {topology}"
        )
    mesh = meshes.make(1, fsdp, decode.model_parallel, devices=chips[:count])
    prompts = fsdp * decode.rows // decode.group_size
    config = Config(
        model="policy",
        tasks=TasksConfig(),
        output_dir="run",
        dtype="bfloat16",
        batch_size=prompts,
        num_generations=decode.group_size,
        max_completion_length=decode.new_tokens,
    )
    kind = cache_of(meshes.platform(mesh), decode.config.head_dim)
    policy = model.decoder(
        decode.config, dtype=jnp.bfloat16, attend_slots=ATTENTION[attention], kind=kind
    )
    lm = LanguageModel(decode.config, policy, None, {}, None, (0,), Path())
    programs = compile_rollout(lm, config, mesh)
    array = partial(meshes.describe_array, mesh)
    arguments = Batch(
        {row.name: array(row.shape, jnp.bfloat16, *row.axes) for row in model.base(decode.config)},
        jax.ShapeDtypeStruct((), jnp.int32),
        array((prompts, decode.prompt_length), jnp.int32, "batch", None),
        array((prompts,), jnp.int32, "batch"),
        array((prompts,), jnp.int32, "batch"),
    )
    chosen = {
        "all": programs.cache_lengths,
        "ends": programs.cache_lengths[:: len(programs.cache_lengths) - 1 or 1],
    }
    with jax.set_mesh(mesh):
        # where all is on one chip, the program that lays it out need not be compiled
        if count == 1:
            place = partial(meshes.describe, where=meshes.sharding(mesh))
            described = jax.tree.map(place, programs.start.eval_shape(arguments))
        else:
            started = programs.start.lower(arguments).compile()
            described = jax.tree.map(meshes.describe, started.out_info, started.output_shardings)
        for length in chosen.get(lengths, programs.cache_lengths[-1:]):
            start = perf_counter()
            done = programs.decode.lower(
                *decode_arguments(policy, described, length), length=length
            ).compile()
            seconds = perf_counter() - start
            text, memory = done.as_text(), done.memory_analysis()
            assert text is not None
            cost = (done.cost_analysis() or {}).get("bytes accessed", 0.0)
            yield Segment(length, text, seconds, memory.temp_size_in_bytes if memory else 0, cost)


@cache
def kernel_bytes(decode: Decode, length: int, slot: int) -> int:
    """Counts the bytes of a call of the kernel that attends to a cache of `length` slots up to
    `slot`.
    """
    c = decode.config
    heads = decode.rows * c.num_kv_heads // decode.model_parallel
    queries = c.num_heads // c.num_kv_heads
    plan = pallas_attention.plan(heads, queries, c.head_dim, length, decode.item_size)

    def block(part: pallas_attention.Block, item_size: int) -> Block:
        def index(*step: int) -> tuple[int, ...]:
            return tuple(map(int, part.index_map(*step, [slot])))

        return Block(part.shape, item_size, index)

    read = [block(part, decode.item_size) for part in (plan.queries, plan.keys, plan.keys)]
    numbers = (plan.scalars, plan.queries, plan.scalars, plan.scalars)  # the first is read
    return pallas_bytes(plan.grid, [*read, *(block(part, 4) for part in numbers)])


def ratios(decode: Decode, loops: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Returns (full, mean): bytes moved over bytes that must be, at the last position and summed
    over all.

    `loops` are (limit, bytes of a pass), in order.
    """
    if not loops:
        raise InputError("the program has no loop whose end depends on data: it is no decode loop")
    moved = must = 0
    start = 1  # the first token needs no pass of the loop
    for limit, bytes_of_pass in loops:
        positions = range(start, min(limit, decode.new_tokens))
        moved += len(positions) * bytes_of_pass
        must += sum(decode.bytes_per_pass(position) for position in positions)
        start = max(start, limit)
    if not must:
        raise InputError(
            f"the loops end at {[limit for limit, _ in loops]}: no limit fits new-tokens"
        )
    return loops[-1][1] / decode.bytes_per_pass(decode.new_tokens - 1), moved / must


def fill_in(loops: Sequence[tuple[int, int]], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the loops of all `lengths` of the cache, of which the first and the last are known.

    Those in between are taken to move bytes that are linear in the length.
    """
    (_, least), (limit, most) = loops
    slope = (most - least) / (lengths[-1] - lengths[0])
    between = [
        (length + 1, round(least + slope * (length - lengths[0]))) for length in lengths[:-1]
    ]
    return [*between, (limit, most)]


def all_ratios(
    decode: Decode, loops: Sequence[tuple[int, int]], lengths: str
) -> tuple[float, float | None]:
    """Returns `ratios` of the loops of `lengths` of the cache; no mean of the last alone."""
    needed = cache_lengths(decode.new_tokens)
    if lengths == "ends" and len(needed) > len(loops):
        loops = fill_in(loops, needed)
    full, mean = ratios(decode, loops)
    return full, mean if len(loops) == len(needed) else None


def count(decode: Decode, segments: Iterable[Segment], *, lengths: str = "all") -> Counted:
    """Counts what the decode loops of segments, `lengths` of them, move."""
    segments = list(segments)
    needed = cache_lengths(decode.new_tokens)
    loops = []
    averages = []  # (limit, bytes of a pass) as well; what a kernel reads grows from pass to pass
    for segment in segments:
        before = max((length for length in needed if length < segment.length), default=0)
        slots = range(before, segment.length)
        read = [
            kernel_bytes(
                decode,
                segment.length,
                max(slot - 1, 0) // pallas_attention.BLOCK * pallas_attention.BLOCK,
            )
            for slot in slots  # those before it are read from the cache
        ]
        loops += Program(segment.text, {pallas_attention.NAME: read[-1]}).loops()
        average = Program(segment.text, {pallas_attention.NAME: sum(read) // len(read)}).loops()
        averages += [(min(loop.limit, decode.new_tokens), loop.bytes) for loop in average]
    pairs = [(min(loop.limit, decode.new_tokens), loop.bytes) for loop in loops]
    full, _ = all_ratios(decode, pairs, lengths)
    _, mean = all_ratios(decode, averages, lengths)
    last = loops[-1]
    ordered = sorted(last.traffic, key=lambda each: each.bytes, reverse=True)
    exchanged = sorted(last.exchanges, key=lambda each: each.bytes, reverse=True)
    layer = decode.cache_bytes // (2 * decode.config.num_layers)
    return Counted(
        bytes=last.bytes,
        must=decode.bytes_per_pass(decode.new_tokens - 1),
        full=full,
        mean=mean,
        loops=tuple(pairs),
        averages=tuple(averages),
        compile_seconds=tuple(round(segment.seconds, 1) for segment in segments),
        cost_analysis=segments[-1].cost_analysis,
        temporaries=segments[-1].temporaries,
        cache=decode.cache_bytes,
        copies=sum(each.trips for each in ordered if min(each.read, each.written) >= layer),
        exchanged=sum(each.bytes for each in exchanged),
        largest=tuple(map(describe, ordered[:SHOWN])),
        exchanges=tuple(map(describe_exchange, exchanged[:SHOWN])),
    )


def extrapolate(decode: Decode, counted: Mapping[int, Counted], lengths: str) -> Counted:
    """Returns what a decoder moves, from decoders of two other numbers of layers that are otherwise
    the same.

    Every figure is taken to be linear in the number of layers, all of which are compiled alike.
    """
    (few, fewer), (many, more) = sorted(counted.items())

    def linear(low: float, high: float) -> int:
        return round(low + (high - low) * (decode.config.num_layers - few) / (many - few))

    def passes(
        low: Sequence[tuple[int, int]], high: Sequence[tuple[int, int]]
    ) -> tuple[tuple[int, int], ...]:
        return tuple((limit, linear(x, y)) for (limit, x), (_, y) in zip(low, high, strict=True))

    loops = passes(fewer.loops, more.loops)
    averages = passes(fewer.averages, more.averages)
    full, _ = all_ratios(decode, loops, lengths)
    _, mean = all_ratios(decode, averages, lengths)
    return replace(
        more,
        bytes=loops[-1][1],
        must=decode.bytes_per_pass(decode.new_tokens - 1),
        full=full,
        mean=mean,
        loops=loops,
        averages=averages,
        compile_seconds=fewer.compile_seconds + more.compile_seconds,
        cost_analysis=linear(fewer.cost_analysis, more.cost_analysis),
        temporaries=linear(fewer.temporaries, more.temporaries),
        cache=decode.cache_bytes,
        copies=linear(fewer.copies, more.copies),
        exchanged=linear(fewer.exchanged, more.exchanged),
    )


def describe(each: Traffic) -> str:
    """Returns a line about what an instruction moves."""
    instruction = each.instruction
    return (
        f"{each.trips} x (read {each.read:,} + write {each.written:,}): {instruction.name} = "
        f"{instruction.type[:80]}"
    )


def describe_exchange(each: Exchange) -> str:
    """Returns a line about what an instruction exchanges between chips."""
    instruction = each.instruction
    operation = f"{instruction.name} = {instruction.opcode} {instruction.type[:80]}"
    return f"{each.trips} x {each.size:,}: {operation}"


def measure(name: str, topology: str, options: argparse.Namespace) -> Counted:
    """Compiles and counts one model for one topology."""
    keys = published.keys(name)
    if keys is None:
        raise InputError(f"models has {name}: its shape is not known, give one such as {MODELS[0]}")
    decode = Decode(
        config=weights.model_config(keys, name),
        rows=options.rows,
        group_size=options.group_size,
        prompt_length=options.prompt_length,
        new_tokens=options.new_tokens,
        model_parallel=options.model_parallel,
    )
    if options.attention == "pallas":
        platform = "cpu" if topology == "cpu" else "tpu"
        if reason := pallas_attention.unsupported_reason(
            decode.config.head_dim, options.new_tokens, platform
        ):
            raise InputError(f"attention is pallas: {reason}")
    how = {"fsdp": options.fsdp, "lengths": options.lengths, "attention": options.attention}
    counted = {}
    for layers in options.layers or [decode.config.num_layers]:
        compiled = replace(decode, config=decode.config._replace(num_layers=layers))
        segments = [*compile_segments(compiled, topology, **how)]
        counted[layers] = count(compiled, segments, lengths=options.lengths)
        if options.hlo:
            options.hlo.mkdir(parents=True, exist_ok=True)
            for segment in segments:
                file = f"{name.rpartition('/')[2]}-{topology.replace(':', '-')}-{layers}-{segment.length}.txt"  # noqa: E501
                (options.hlo / file).write_text(segment.text)
    return (
        extrapolate(decode, counted, options.lengths)
        if options.layers
        else counted[decode.config.num_layers]
    )


HEADER = (
    "| model | topology | fsdp x model | a pass, GB | must, GB | full | mean | temporaries / "
    "cache | "
    "as large as a layer's keys, read and written | exchanged, MB | compiled in, s |\n"
    "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def table_row(name: str, topology: str, mesh: str, counted: Counted) -> str:
    """Formats a line of the table."""
    cells = (
        f"{counted.bytes / 1e9:.2f}",
        f"{counted.must / 1e9:.2f}",
        f"{counted.full:.2f}",
        "-" if counted.mean is None else f"{counted.mean:.2f}",
        f"{counted.temporaries / counted.cache:.2f}",
        str(counted.copies),
        f"{counted.exchanged / 1e6:.1f}",
        ", ".join(f"{seconds:.0f}" for seconds in counted.compile_seconds),
    )
    return f"| {name} | {topology} | {mesh} | {' | '.join(cells)} |"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode_bytes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", nargs="+", default=[*MODELS], help="ids of the hub whose shapes are known"
    )
    parser.add_argument(
        "--topologies", nargs="+", default=[*TOPOLOGIES], help="such as v5e:2x2, or cpu"
    )
    for name in COUNTS:
        default = getattr(Decode, name, 1)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=whole_number(name, 1), default=default, help=f"({default})")
    parser.add_argument(
        "--lengths",
        choices=LENGTHS,
        default="all",
        help="of the cache, which are compiled; `ends` takes those in between to be linear, "
        "`last` has no mean (all)",
    )
    parser.add_argument(
        "--attention", choices=ATTENTION, default="xla", help="to completions' own tokens (xla)"
    )
    parser.add_argument(
        "--layers",
        type=whole_number("layers", 1),
        nargs=2,
        metavar="N",
        help="compiles decoders of two numbers of layers, and takes all figures to be linear "
        "in it; saves minutes",
    )
    parser.add_argument("--json", type=path_argument, help="file of the figures")
    parser.add_argument("--hlo", type=path_argument, help="folder for the texts of the programs")
    options = parser.parse_args(arguments)
    if options.layers and len({*options.layers}) < 2:
        parser.error(f"layers is {options.layers}: give two numbers that differ")
    if options.rows % options.group_size:
        parser.error(
            f"rows is {options.rows}: it must be a multiple of group-size {options.group_size}"
        )
    return options


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = parse_arguments(arguments)
    figures = []
    mesh = f"{options.fsdp} x {options.model_parallel}"
    print(HEADER)
    for name in options.models:
        for topology in options.topologies:
            try:
                counted = measure(name, topology, options)
            except jax.errors.JaxRuntimeError as error:
                reason = str(error).splitlines()[0][:200]
                figures.append({"model": name, "topology": topology, "failure": reason})
                print(f"| {name} | {topology} | does not compile: {reason} |", flush=True)
                continue
            figures.append({"model": name, "topology": topology, **asdict(counted)})
            print(table_row(name, topology, mesh, counted), flush=True)
    if options.json:
        command = f"python -m benchmarks.decode_bytes {' '.join(arguments)}"
        settings = {
            name: getattr(options, name) for name in (*COUNTS, "lengths", "attention", "layers")
        }
        record = {"command": command, "jax": jax.__version__, **settings}
        options.json.write_text(json.dumps({**record, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    _script.run(main)
