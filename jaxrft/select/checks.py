"""Checks arguments of selectors, tables of tasks and feedback, before they become beliefs.

The kinds of arguments are real numbers in a `Range`, counts, flags, and one of a few words. Numbers
may be Python's, numpy's or JAX's. Any other value raises an InputError that names the argument and
the value. Tracers and descriptions of arrays have no values: only shape and dtype are checked.
"""

import difflib
import operator
from collections.abc import Callable, Iterable
from typing import NamedTuple, SupportsIndex, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxrft.errors import InputError, shown
from jaxrft.select.topk import Balance
from jaxrft.shapes import REAL, check_dtypes, check_shapes
from jaxrft.types import Array, Feedback, Projections, Tasks

AnyArray = np.ndarray | Array


class Range(NamedTuple):
    """The real numbers that an argument may be."""

    fits: Callable[[AnyArray], AnyArray]  # elementwise
    wanted: str


# Products and quotients of three numbers between these are ordinary float32 numbers.
SMALLEST = 1e-12
LARGEST = 1e12
COUNTED = 2**24  # float32 counts no further
MOST = 2**31 - 1  # int32

SHARE = Range(lambda x: (x >= 0) & (x <= 1), "in [0, 1]")
BELOW_ONE = Range(lambda x: (x >= 0) & (x < 1), "in [0, 1)")
BETWEEN = Range(lambda x: (x > 0) & (x < 1), "in (0, 1)")
POSITIVE = Range(lambda x: (x >= SMALLEST) & (x <= LARGEST), "positive, from 1e-12 to 1e12")
NOT_NEGATIVE = Range(lambda x: (x >= 0) & (x <= LARGEST), "0 or more, at most 1e12")


def check(name: str, value: ArrayLike, allowed: Range, *, per_task: bool = False) -> None:
    """Raises InputError unless `value` is a real number that, as a float32, is in the range
    `allowed`.

    `per_task`: an array [N] of such numbers is valid, too.
    """
    array = value if isinstance(value, Tracer) else as_array(value)
    wanted = f"numbers {allowed.wanted}, one or [N]" if per_task else f"a number {allowed.wanted}"
    if array is None or array.dtype == np.bool_ or not are_numbers(array) or array.ndim > per_task:
        raise InputError(f"{name} is {shown(value)}: it must be {wanted}")
    if isinstance(array, Tracer):
        return
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float32)
    if not np.all(allowed.fits(rounded)):
        precision = " as a float32 too" if np.all(allowed.fits(array)) else ""
        raise InputError(f"{name} is {shown(value)}: it must be {allowed.wanted}{precision}")


def check_belief(target: ArrayLike, prior: tuple[ArrayLike, ArrayLike]) -> None:
    """Raises InputError unless `target` is a pass rate apart from 0 and 1 and `prior` two positive
    numbers.
    """
    check("target", target, BETWEEN)
    pair = isinstance(prior, tuple | list) or (isinstance(prior, AnyArray) and np.ndim(prior) > 0)
    if not pair or len(prior) != 2:
        raise InputError(
            f"prior is {shown(prior)}: it must be two positive numbers, "
            "pseudo-successes and -failures"
        )
    for count in prior:
        check("prior", count, POSITIVE, per_task=True)


def check_count(
    name: str, value: object, least: int = 1, *, most: int = MOST, wanted: str = ""
) -> int:
    """Returns `value` as an int; raises InputError unless it is a whole number from `least` to
    `most`.
    """
    try:
        boolean = isinstance(value, bool)
        number = operator.index(value) if isinstance(value, SupportsIndex) and not boolean else None
    except TypeError:  # a tracer among others: sizes are known when a program is compiled
        number = None
    if number is None or number < least or (number > most and wanted):
        raise InputError(
            f"{name} is {shown(value)}: it must be {wanted or f'a whole number, at least {least}'}"
        )
    if number > most:
        raise InputError(f"{name} is {shown(value)}: it must be at most {most}")
    return number


def check_generations(num_generations: object) -> int:
    """Returns the number of rollouts a task as an int; raises InputError unless it is a whole
    number, at least 1.
    """
    return check_count("num_generations", num_generations, most=COUNTED)


def check_batch(batch_size: object, num_tasks: int) -> int:
    """Returns the batch size as an int.

    Raises InputError unless it is a whole number known when the program is compiled, and at most
    the number of tasks, for ids are distinct.
    """
    if isinstance(batch_size, Tracer):
        raise InputError(
            f"batch_size is {shown(batch_size)}: name it in jax.jit(..., "
            "static_argnames='batch_size')"
        )
    size = check_count("batch_size", batch_size)
    if num_tasks < size:
        raise InputError(
            f"batch_size is {size} but there are {num_tasks} tasks: give more tasks, or lower it"
        )
    return size


def check_select(
    key: Array, table: Array, tasks: Tasks, *, batch_size: object, exclude: Array | None
) -> int:
    """Returns the batch size as an int, for arguments of `select` that fit the state, of which
    `table` has N rows.

    Raises InputError for a key that is none, for what `check_batch` refuses, and for tables and
    masks of other shapes.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == np.uint32):
        raise InputError(f"key is {shown(key)}: give one key, such as jax.random.key(0)")
    check_shapes(key=(key, "" if dtype != np.uint32 else "2"))
    size = check_batch(batch_size, table.shape[0])
    check_shapes(
        state=(table, "N"),
        exclude=(exclude, "N", bool),
        domain=(tasks.domain, "N"),
        reference_pass_rates=(tasks.reference_pass_rates, "NK"),
        embeddings=(tasks.embeddings, "NE"),
    )
    return size


def check_flag(name: str, value: object) -> bool:
    """Returns `value` as a bool; raises InputError for anything but True and False."""
    array = None if isinstance(value, Tracer) else as_array(value)
    if array is None or array.ndim or array.dtype != np.bool_:
        raise InputError(f"{name} is {shown(value)}: it must be True or False")
    return bool(array)


def check_choice(name: str, value: object, options: Iterable[str], of: str = "") -> None:
    """Raises InputError unless `value` is one of the words `options`."""
    options = tuple(options)
    if isinstance(value, str) and value in options:
        return
    near = difflib.get_close_matches(value, options, n=1) if isinstance(value, str) else []
    hint = f"did you mean {near[0]}? (" if near else "choose one of "
    raise InputError(
        f"no {name} {shown(value)}{of}: {hint}{', '.join(options)}{')' if near else ''}"
    )


def check_balance(balance: object) -> None:
    """Raises InputError unless `balance` is one of `topk.Balance`."""
    check_choice("balance", balance, get_args(Balance), " of the domains")


def check_table(tasks: Tasks, num_tasks: object, *, balance: Balance = "none") -> int:
    """Returns the number of tasks as an int, and checks every field of the table.

    Raises InputError for a field of `Tasks` that is not an array with a row a task or has invalid
    values, and for a `balance` without domains.
    """
    num_tasks = check_count("the number of tasks", num_tasks, most=COUNTED)
    if not isinstance(tasks, Tasks):
        raise InputError(f"the tasks are {shown(tasks)}: give them as jaxrft.types.Tasks")
    if tasks.projections is not None:
        check_projections(tasks.projections, num_tasks)
    if tasks.reference_pass_rates is not None:
        check_references(tasks.reference_pass_rates, num_tasks)
    if tasks.embeddings is not None:
        check_embeddings(tasks.embeddings, num_tasks)
    if tasks.domain is not None:
        check_domains(tasks.domain, num_tasks)
    if balance != "none":
        count_domains(tasks, num_tasks)
    return num_tasks


def check_references(rates: Array, num_tasks: int, *, least: int = 1) -> None:
    """Raises InputError unless reference pass rates are [N, K >= `least`] in [0, 1] or NaN."""
    _check_numbers("reference_pass_rates", rates)
    if rates.ndim != 2 or rates.shape[0] != num_tasks or rates.shape[1] < least:
        raise InputError(
            f"reference pass rates have shape {rates.shape}: they must be [{num_tasks}, K], a "
            f"row a task and a column for each of at least {least} reference policies, weakest "
            "first (tasks.pass_rate_columns)"
        )
    first_outside = _first_outside(rates)
    if first_outside is not None:
        index, rate = first_outside
        row, column = divmod(index, rates.shape[1])
        raise InputError(
            f"reference pass rate of task {row}, column {column} is {rate:g}: "
            "it must lie in [0, 1], or be NaN where it is unknown"
        )


def check_embeddings(embeddings: Array, num_tasks: int) -> None:
    """Raises InputError unless embeddings are [N, E] and of a size whose squares are float32
    numbers.
    """
    _check_numbers("embeddings", embeddings)
    if embeddings.ndim != 2 or embeddings.shape[0] != num_tasks or not embeddings.shape[1]:
        raise InputError(
            f"embeddings of shape {embeddings.shape} for {num_tasks} tasks: give "
            "one row for each task"
        )
    wrong = _rows_not_finite(embeddings)
    if wrong is not None:
        count, first = wrong
        raise InputError(
            f"embeddings of {count} tasks are not finite, first of task {first}: leave those "
            f"tasks out, or give no embeddings (a number above {LARGEST:g} is not finite here)"
        )


def check_projections(projections: Projections, num_tasks: int) -> None:
    """Raises InputError unless both are [N, h] and finite."""
    parts = tuple(projections) if isinstance(projections, Projections) else ()
    for part in parts:
        _check_numbers("projections", part)
    shapes = {part.shape for part in parts}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise InputError(
            f"Tasks.projections are {shown(projections)}: give what attention.project returns, "
            "two arrays [N, h]"
        )
    (rows, _), *_ = shapes
    if rows != num_tasks:
        raise InputError(
            f"tasks.projections have {rows} rows but there are {num_tasks} tasks: project them all"
        )
    for part in parts:
        wrong = _rows_not_finite(part)
        if wrong is not None:
            raise InputError(
                f"the projection of task {wrong[1]} is not finite: project embeddings that are"
            )


def check_domains(domain: Array, num_tasks: int) -> None:
    """Raises InputError unless domains are a whole number for each task, from 0 up, below the
    number of tasks.
    """
    _check_numbers("domain", domain)
    if not jnp.issubdtype(domain.dtype, jnp.integer):
        raise InputError(f"domains are {domain.dtype}: number them from 0")
    if domain.shape != (num_tasks,):
        raise InputError(
            f"domains have shape {domain.shape}: there must be one for each of {num_tasks} tasks"
        )
    if not _has_no_values(domain):
        least, most = _extremes(domain)
        if least < 0 or most >= num_tasks:
            raise InputError(
                f"domains are numbered from {least} to {most}: number them from 0, without "
                "leaving any out"
            )


def count_domains(tasks: Tasks, num_tasks: int) -> int:
    """Returns how many domains there are, numbered from 0; their bound `num_tasks` while a tracer
    hides them.

    Raises InputError for domains that are missing, not a whole number a task, or numbered from
    elsewhere.
    """
    if tasks.domain is None:
        raise InputError(
            "this selector needs the tasks' domains, but none are given: "
            "set tasks.domain_column, or pass them in Tasks.domain"
        )
    check_domains(tasks.domain, num_tasks)
    return num_tasks if _has_no_values(tasks.domain) else _extremes(tasks.domain)[1] + 1


def check_feedback(feedback: Feedback) -> Feedback:
    """Returns the feedback as JAX's arrays; raises InputError unless each has one number a task,
    and ids are integers.

    A program cannot look at the numbers: see `credible`.
    """
    shapes = [np.shape(x) for x in feedback]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise InputError(
            f"ids, successes, trials and tokens have shapes {shapes}: give one entry a task in each"
        )
    arrays = Feedback(*map(jnp.asarray, feedback))
    numbers = arrays._asdict()
    check_dtypes(int, ids=numbers.pop("ids"))
    check_dtypes(REAL, **numbers)
    return arrays


def credible(feedback: Feedback, num_tasks: int) -> Feedback:
    """Returns the feedback with its invalid rows set to padding: 0 trials of task 0.

    A row is valid if 0 <= successes <= trials, trials is from 1e-12 to 1e12, and id is that of a
    task; a NaN makes its row invalid, and no other. Invalid tokens become 0, which is unknown.
    Valid rows stay the same bit for bit. A compiled program cannot raise errors: `Session.record`
    raises one for the rows that this function drops.
    """
    ids, successes, trials, tokens = check_feedback(feedback)
    possible = (successes >= 0) & (successes <= trials) & (ids >= 0) & (ids < num_tasks)
    valid = POSITIVE.fits(trials.astype(jnp.float32)) & possible
    known = valid & NOT_NEGATIVE.fits(tokens.astype(jnp.float32))
    return Feedback(*map(_only, (valid, valid, valid, known), (ids, successes, trials, tokens)))


def _only(mask: AnyArray, values: Array) -> Array:
    return jnp.where(mask, values, jnp.zeros((), values.dtype))


def as_array(values: object) -> np.ndarray | None:
    """Converts values of any library to a numpy array; None where numpy cannot."""
    try:
        return np.asarray(values)
    # rows that differ in length, torch's gradients and bfloat16, whatever an __array__ raises
    except Exception:
        return None


def are_numbers(values: AnyArray | jax.ShapeDtypeStruct) -> bool:
    """Returns whether an array holds real numbers of any kind, bfloat16 and truth values among
    them.
    """
    kind = values.dtype
    return (
        kind == np.bool_ or jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.floating)
    )


def _has_no_values(values: object) -> bool:
    """Returns whether only shape and dtype are known: of a tracer, and of an array that a dry run
    describes.
    """
    return isinstance(values, Tracer | jax.ShapeDtypeStruct)


def _check_numbers(name: str, values: object) -> None:
    """Raises InputError unless a field of `Tasks` is an array of numbers."""
    if not isinstance(values, AnyArray | jax.ShapeDtypeStruct) or not are_numbers(values):
        raise InputError(
            f"Tasks.{name} is {shown(values)}, not an array of numbers: give an "
            "array with one row a task"
        )


def _first_outside(rates: Array) -> tuple[int, float] | None:
    """Returns (index, rate) of the first of the flattened rates outside [0, 1]; None if there is
    none, and for a tracer.
    """
    if _has_no_values(rates):
        return None
    # on the device: a process may hold a part of the table only
    with jax.ensure_compile_time_eval():
        outside = ((rates < 0) | (rates > 1)).reshape(-1)
        if not bool(outside.any()):
            return None
        index = int(outside.argmax())
        return index, float(rates.reshape(-1)[index])


def _rows_not_finite(values: Array) -> tuple[int, int] | None:
    """Returns how many rows of [N, E] hold NaN or more than LARGEST, and the first; None for none
    and for a tracer.
    """
    if _has_no_values(values):
        return None
    with jax.ensure_compile_time_eval():
        with np.errstate(over="ignore"):
            broken = ~(abs(values.astype(np.float32)) <= LARGEST).all(axis=1)
        count = int(broken.sum())
        return (count, int(broken.argmax())) if count else None


def _extremes(values: Array) -> tuple[int, int]:
    """Returns the least and the greatest of whole numbers."""
    with jax.ensure_compile_time_eval():
        return int(values.min()), int(values.max())
