"""Checks the shapes and dtypes of arguments at public functions, arrays and tracers alike.

Shapes are written in the axis letters of `jaxrft.types`, one letter an axis. Both are known when a
program is traced, so that a check costs nothing when the program runs.
"""

from collections.abc import Sequence

import chex
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxrft.errors import InputError, shown

Kinds = DTypeLike | tuple[DTypeLike, ...]  # see `check_dtypes`
REAL = (bool, int, float)  # anything but complex numbers and keys
Argument = tuple[ArrayLike | None, str] | tuple[ArrayLike | None, str, Kinds]


def check_shapes(**arguments: Argument) -> dict[str, int]:
    """Returns the size of each letter; raises InputError for the first argument whose shape does
    not fit, or else for the first whose dtype does not.

    `check_shapes(prompts=(prompts, "BP", int), mask=(mask, "BP"))`: a letter has one size in all
    arguments of a call, that of the first argument that has it. A digit is a size. The third entry
    is as in `check_dtypes`, and may be left out. An argument that is None is left out.
    """
    sizes: dict[str, int] = {}
    for name, (array, letters, *_) in arguments.items():
        if array is None:
            continue
        shape = getattr(array, "shape", None)
        axes = f"[{', '.join(letters)}]"
        if shape is None:
            raise InputError(f"{name} is {shown(array)}: it must be an array {axes}")
        expected = [int(letter) if letter.isdigit() else sizes.get(letter) for letter in letters]
        if not _has_shape(array, expected):
            known = [
                letter if size is None else str(size)
                for letter, size in zip(letters, expected, strict=True)
            ]
            sizes_of_call = f", here [{', '.join(known)}]" if known != list(letters) else ""
            raise InputError(f"{name} has shape {shape}: it must be {axes}{sizes_of_call}")
        sizes |= dict(zip(letters, shape, strict=True))
    for name, (array, _, *kinds) in arguments.items():
        if kinds:
            check_dtypes(kinds[0], **{name: array})
    return sizes


def check_same_shape(**arguments: ArrayLike | None) -> None:
    """Raises InputError unless all arguments have one shape, those that are None left out.

    The error names the first argument whose shape is not that of the first one.
    """
    first = ""
    shape = ()
    for name, array in arguments.items():
        if array is None:
            continue
        if not hasattr(array, "shape"):
            raise InputError(f"{name} is {shown(array)}: it must be an array")
        if not first:
            first = name
            shape = jnp.shape(array)
        if not _has_shape(array, shape):
            raise InputError(
                f"{name} has shape {jnp.shape(array)}: it must be {shape}, as that of {first}"
            )


def check_dtypes(kinds: Kinds, **arguments: ArrayLike | None) -> None:
    """Raises InputError for the first argument that is of none of the kinds.

    A kind is bool, int (of any width), float (of any width) or a dtype: `check_dtypes(int,
    tokens=tokens)`. Arguments that are None are left out.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    for name, array in arguments.items():
        if array is not None and not any(_has_dtype(array, kind) for kind in kinds):
            wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
            raise InputError(
                f"{name} is {getattr(array, 'dtype', shown(array))}: its dtype must be {wanted}"
            )


def _has_shape(array: ArrayLike, wanted: Sequence[int | None]) -> bool:
    try:
        chex.assert_shape(array, tuple(wanted))
    except AssertionError:
        return False
    return True


def _has_dtype(array: ArrayLike, kind: DTypeLike) -> bool:
    try:
        chex.assert_type(array, kind)
    except AssertionError:
        return False
    return True
