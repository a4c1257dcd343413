"""The shape of a measured step, and the arithmetic and traffic that it cannot do without.

Processes that have neither jaxrft nor JAX read it too, so it imports the standard library alone.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

ATTENTION = ("xla", "pallas", "cudnn")
ITEM_SIZE = {"float32": 4, "bfloat16": 2}  # bytes
Value = TypeVar("Value", int, str)
LENGTHS = ("fixed", "geometric")


def _flag(default: Value, text: str) -> Value:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Shape:
    """A decoder, a batch of prompts, and the machine that they are measured on.

    Its fields are the flags of the scripts. The defaults are a model of 4 million weights and 32
    prompts of 32 tokens with 8 completions each.
    """

    layers: int = _flag(4, "layers of the decoder")
    width: int = _flag(256, "width of the residual stream")
    heads: int = _flag(4, "query heads")
    kv_heads: int = _flag(2, "heads of keys and values")
    mlp: int = _flag(1024, "hidden units of the MLP")
    vocabulary: int = _flag(512, "tokens, at least 96")
    prompts: int = _flag(32, "prompts a step")
    prompt_length: int = _flag(32, "tokens of each prompt")
    group_size: int = _flag(8, "completions of each prompt")
    new_tokens: int = _flag(64, "largest number of tokens of a completion")
    mean_length: int = _flag(64, "mean of the geometric lengths, before new_tokens cuts them")
    micro_batch: int = _flag(0, "rows of a forward and backward pass; 0 = all")
    threads: int = _flag(os.cpu_count() or 1, "cores that each process may use")
    seed: int = _flag(0, "of weights, prompts and completions")
    dtype: str = _flag("float32", "of the arithmetic")
    attention: str = _flag("xla", "what computes attention, as the config's")
    lengths: str = _flag("fixed", "all completions as long as new_tokens, or geometric lengths")
    tail: int = _flag(0, "expected number of completions that do not end before new_tokens")
    max_rows: int = _flag(0, "completions decoded at once; 0 = all")

    @property
    def rows(self) -> int:
        """The number of completions."""
        return self.prompts * self.group_size

    @property
    def micro_batch_rows(self) -> int:
        """The number of rows of a forward and backward pass."""
        return self.micro_batch or self.rows

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.width // self.heads

    @property
    def layer_weights(self) -> int:
        """The number of weights in the matrix products of a layer."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.width * self.mlp

    @property
    def weights(self) -> int:
        """The number of weights that a token is multiplied with, those of the logits included."""
        return self.layers * self.layer_weights + self.vocabulary * self.width


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every field of `Shape`."""
    choices = {"dtype": tuple(ITEM_SIZE), "lengths": LENGTHS, "attention": ATTENTION}
    for each in dataclasses.fields(Shape):
        parser.add_argument(
            f"--{each.name.replace('_', '-')}",
            type=type(each.default),
            default=each.default,
            choices=choices.get(each.name),
            help=f"{each.metadata['help']} ({each.default})",
        )


def from_flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Shape:
    """Returns the shape of parsed flags; ends the program with a sentence if it is none."""
    shape = Shape(**{each.name: getattr(options, each.name) for each in dataclasses.fields(Shape)})
    for name, value in dataclasses.asdict(shape).items():
        least = 0 if name in ("micro_batch", "seed", "tail", "max_rows") else 1
        if isinstance(value, int) and value < least:
            parser.error(f"{name} is {value}: it must be at least {least}")
    if shape.heads % shape.kv_heads or shape.width % shape.heads:
        parser.error(f"heads is {shape.heads}: it must divide width and be a multiple of kv_heads")
    if shape.vocabulary < 96:
        parser.error(f"vocabulary is {shape.vocabulary}: the tokenizer needs at least 96 tokens")
    return shape


def forward_flops(shape: Shape, lengths: Sequence[int]) -> int:
    """Counts the multiplications and additions of a forward pass over completions of `lengths` [R].

    Each prompt is computed once a group, and a completion's last token is not an input. A query
    meets the keys up to its own position. Norms, rotations and softmax are not counted.
    """
    prompt = shape.prompt_length
    inputs = shape.prompts * prompt + sum(length - 1 for length in lengths)
    pairs = shape.prompts * _pairs(0, prompt) + sum(
        _pairs(prompt, length - 1) for length in lengths
    )
    products = 2 * shape.layers * shape.layer_weights * inputs
    logits = 2 * shape.vocabulary * shape.width * sum(lengths)
    attention = 4 * shape.layers * shape.heads * shape.head_dim * pairs
    return products + logits + attention


def _pairs(before: int, tokens: int) -> int:
    """Returns the number of pairs of `tokens` queries and the keys that they see, `before` of them
    older.
    """
    return tokens * before + tokens * (tokens + 1) // 2


def update_flops(shape: Shape, lengths: Sequence[int]) -> int:
    """Counts the operations of a forward and a backward pass: the latter has two products for
    each.
    """
    return 3 * forward_flops(shape, lengths)


def decode_bytes(shape: Shape, lengths: Sequence[int]) -> int:
    """Counts the bytes that decoding completions of `lengths` [R] must read and write.

    A step reads the weights once, the keys and values of live rows up to their position, a group's
    prompt once, and writes one position of each row. Activations and logits are not counted.
    """
    position = 2 * shape.layers * shape.kv_heads * shape.head_dim  # numbers of keys and values
    groups = [
        max(lengths[row : row + shape.group_size])
        for row in range(0, len(lengths), shape.group_size)
    ]
    steps = max(lengths) - 1
    read = steps * shape.weights
    read += position * sum(_pairs(0, length - 1) for length in lengths)
    read += position * shape.prompt_length * sum(length - 1 for length in groups)
    written = position * sum(length - 1 for length in lengths)
    return ITEM_SIZE[shape.dtype] * (read + written)
