"""Bytes that the decode loop moves in memory, counted from the compiler's own program, next to what it must move.

    python -m benchmarks.decode_bytes --models Qwen/Qwen2.5-1.5B --topologies v5e:2x2 v5p:2x2x1

Compiles `jaxrft.lm.rollout.generate` ahead of time, in bfloat16, and counts a pass of the body of the decode loop from
its optimized HLO (see `_hlo.py`). That needs no TPU but the package libtpu: pip install "jaxrft[tpu]". The topology
`cpu` compiles for this machine. Figures are those of one chip; --model-parallel splits heads, hidden units and
vocabulary over several.

What a pass must move: all weights once, keys and values up to the position, a group's prompt once, and one new
position of each row. `full` is the ratio at the last position. `mean` is the ratio of the sums over all positions,
where a loop that reads free slots too pays for them. Of a program with several loops each counts up to its limit.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp

from benchmarks import _script
from benchmarks._hlo import Loop, Program, Traffic
from jaxrft import mesh as meshes
from jaxrft.dry_run.programs import devices
from jaxrft.errors import InputError
from jaxrft.fields import path_argument, whole_number
from jaxrft.lm import model, published, weights
from jaxrft.lm.model import ModelConfig
from jaxrft.lm.rollout import generate

MODELS = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-8B")
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1")
ITEM = 2  # bytes of a bfloat16
SHOWN = 8  # instructions that move the most
KERNELS: Mapping[str, int] = {}  # part of a Pallas call's line -> `_hlo.pallas_bytes` of its grid and blocks


@dataclass(frozen=True)
class Decode:
    """A decode loop on one chip."""

    config: ModelConfig
    rows: int = 256
    group_size: int = 8
    prompt_length: int = 256
    new_tokens: int = 1024
    model_parallel: int = 1

    @property
    def position_bytes(self) -> int:
        """The bytes of a row's keys and values of one position, all layers."""
        c = self.config
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * ITEM // self.model_parallel

    @property
    def weight_bytes(self) -> int:
        """The bytes of the weights that every token is computed with: all but an embedding that is no unembedding."""
        rows = model.base(self.config)
        used = [row for row in rows if row.name != "embed" or self.config.tie_word_embeddings]
        return sum(math.prod(row.shape) for row in used) * ITEM // self.model_parallel

    def must_move(self, position: int) -> int:
        """Counts the bytes of a pass that reads `position` own positions of each row and writes one."""
        prompts = self.rows // self.group_size * self.prompt_length
        return self.weight_bytes + self.position_bytes * (prompts + self.rows * (position + 1))


@dataclass(frozen=True)
class Counted:
    """What a compiled decode loop moves, of one chip and one pass; bytes."""

    bytes: int  # of the last loop, whose cache is the largest
    must: int  # at the last position
    full: float  # bytes / must
    mean: float  # the same, summed over all positions
    loops: tuple[tuple[int, int], ...]  # (limit, bytes) of each
    cost_analysis: float  # "bytes accessed" of the whole program by the compiler, bodies of loops once
    temporaries: int  # of `memory_analysis`
    cache: int  # bytes of all rows' keys and values
    copies: int  # instructions of a pass that read and write at least as much as a layer has keys
    largest: tuple[str, ...]  # instructions that move the most, of the last loop


def compile_decode(decode: Decode, topology: str) -> jax.stages.Compiled:
    """Compiles a rollout for a topology, or for this machine's own processor if it is `cpu`."""
    found = jax.devices("cpu") if topology == "cpu" else devices(topology)
    if len(found) < decode.model_parallel:
        raise InputError(
            f"model-parallel is {decode.model_parallel}: it must be at most {len(found)}, the chips of {topology}"
        )
    mesh = meshes.make(1, 1, decode.model_parallel, devices=found[: decode.model_parallel])

    def described(shape: Sequence[int], dtype: jnp.dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=meshes.sharding(mesh, *axes))

    prompts = decode.rows // decode.group_size
    whole = jnp.dtype(jnp.int32)
    params = {row.name: described(row.shape, jnp.dtype(jnp.bfloat16), *row.axes) for row in model.base(decode.config)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    policy = model.decoder(decode.config, dtype=jnp.bfloat16)

    def sample(*arguments):
        return generate(
            policy,
            *arguments,
            num_generations=decode.group_size,
            max_completion_length=decode.new_tokens,
            eos_ids=(0,),
        )

    arguments = (
        params,
        described(key.shape, key.dtype),
        described((prompts, decode.prompt_length), whole, "batch", None),
        described((prompts,), whole, "batch"),
        described((prompts,), whole, "batch"),
    )
    with jax.set_mesh(mesh):
        return jax.jit(sample).lower(*arguments).compile()


def ratios(decode: Decode, loops: Sequence[Loop]) -> tuple[float, float]:
    """Returns (full, mean): bytes moved over bytes that must be, at the last position and summed over all."""
    if not loops:
        raise InputError("the program has no loop whose end depends on data: it is no decode loop")
    moved = must = 0
    start = 1  # the first token needs no pass of the loop
    for loop in loops:
        positions = range(start, min(loop.limit, decode.new_tokens))
        moved += len(positions) * loop.bytes
        must += sum(decode.must_move(position) for position in positions)
        start = max(start, loop.limit)
    if not must:
        raise InputError(f"the loops end at {[loop.limit for loop in loops]}: no limit fits new-tokens")
    return loops[-1].bytes / decode.must_move(decode.new_tokens - 1), moved / must


def count(decode: Decode, text: str, *, cost: float = 0.0, temporaries: int = 0) -> Counted:
    """Counts what the decode loop in the text of an optimized HLO module moves."""
    loops = Program(text, KERNELS).loops()
    full, mean = ratios(decode, loops)
    last = loops[-1]
    ordered = sorted(last.traffic, key=lambda each: each.bytes, reverse=True)
    layer = decode.position_bytes * decode.rows * decode.new_tokens // (2 * decode.config.num_layers)
    return Counted(
        bytes=last.bytes,
        must=decode.must_move(decode.new_tokens - 1),
        full=full,
        mean=mean,
        loops=tuple((min(loop.limit, decode.new_tokens), loop.bytes) for loop in loops),
        cost_analysis=cost,
        temporaries=temporaries,
        cache=decode.position_bytes * decode.rows * decode.new_tokens,
        copies=sum(each.trips for each in ordered if min(each.read, each.written) >= layer),
        largest=tuple(map(describe, ordered[:SHOWN])),
    )


def describe(each: Traffic) -> str:
    """Returns a line about what an instruction moves."""
    found = each.instruction
    return f"{each.trips} x (read {each.read:,} + write {each.written:,}): {found.name} = {found.type[:80]}"


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
    done = compile_decode(decode, topology)
    text = done.as_text()
    assert text is not None
    if options.hlo:
        options.hlo.mkdir(parents=True, exist_ok=True)
        file = f"{name.rpartition('/')[2]}-{topology.replace(':', '-')}.txt"
        (options.hlo / file).write_text(text)
    cost = (done.cost_analysis() or {}).get("bytes accessed", 0.0)
    memory = done.memory_analysis()
    return count(decode, text, cost=cost, temporaries=memory.temp_size_in_bytes if memory else 0)


HEADER = (
    "| model | topology | a pass, GB | must, GB | full | mean | cost_analysis, GB | temporaries / cache | "
    "as large as a layer's keys, read and written |\n|---|---|--:|--:|--:|--:|--:|--:|--:|"
)


def table_row(name: str, topology: str, found: Counted) -> str:
    """Returns a line of the table."""
    cells = (
        f"{found.bytes / 1e9:.2f}",
        f"{found.must / 1e9:.2f}",
        f"{found.full:.2f}",
        f"{found.mean:.2f}",
        f"{found.cost_analysis / 1e9:.2f}",
        f"{found.temporaries / found.cache:.2f}",
        str(found.copies),
    )
    return f"| {name} | {topology} | {' | '.join(cells)} |"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode_bytes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=[*MODELS], help="ids of the hub whose shapes are known")
    parser.add_argument("--topologies", nargs="+", default=[*TOPOLOGIES], help="such as v5e:2x2, or cpu")
    for name in ("rows", "group_size", "prompt_length", "new_tokens", "model_parallel"):
        default = getattr(Decode, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=whole_number(name, 1), default=default, help=f"({default})")
    parser.add_argument("--json", type=path_argument, help="file of the figures")
    parser.add_argument("--hlo", type=path_argument, help="folder for the texts of the programs")
    options = parser.parse_args(arguments)
    if options.rows % options.group_size:
        parser.error(f"rows is {options.rows}: it must be a multiple of group-size {options.group_size}")
    return options


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = parse_arguments(arguments)
    figures = []
    print(HEADER)
    for name in options.models:
        for topology in options.topologies:
            try:
                found = measure(name, topology, options)
            except jax.errors.JaxRuntimeError as error:
                reason = str(error).splitlines()[0][:200]
                figures.append({"model": name, "topology": topology, "failure": reason})
                print(f"| {name} | {topology} | does not compile: {reason} |", flush=True)
                continue
            figures.append({"model": name, "topology": topology, **asdict(found)})
            print(table_row(name, topology, found), flush=True)
    if options.json:
        command = f"python -m benchmarks.decode_bytes {' '.join(arguments)}"
        settings = {name: getattr(options, name) for name in ("rows", "group_size", "prompt_length", "new_tokens")}
        record = {"command": command, "jax": jax.__version__, **settings}
        options.json.write_text(json.dumps({**record, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    _script.run(main)
