"""Several sets of tasks as one table: one after the other, thinned where weights ask for it."""

import random
from collections.abc import Sequence

import numpy as np

from jaxrft.tasks import files
from jaxrft.tasks.table import Dropped, TaskTable, keys, take
from jaxrft.types import InputError


def mix(
    tables: dict[str, TaskTable], weights: Sequence[float] | None = None, *, seed: int = 0
) -> TaskTable:
    """Concatenates the tasks of all `tables`, which are given by the names of their sets.

    With `weights`, one for each set, sets are thinned to the largest sizes that relate as their
    weights (rounded, at least one task of each). Which tasks stay depends on the seed and the set's
    name only. In the rows of a set that has no such column, or no pass rates, the column is None
    and the pass rates are NaN. Raises InputError for sets with pass rates of different numbers of
    policies, and with embeddings made in different ways.
    """
    if weights is not None:
        sizes = proportional_sizes([len(table.lengths) for table in tables.values()], weights)
        tables = {
            name: _thinned(name, table, size, seed)
            for (name, table), size in zip(tables.items(), sizes, strict=True)
        }
    parts = list(tables.values())
    if len(parts) == 1:
        return parts[0]
    domains = tuple(dict.fromkeys(name for part in parts for name in part.domains))
    width = max(part.tokens.shape[1] for part in parts)
    return TaskTable(
        tokens=np.concatenate(
            [np.pad(part.tokens, ((0, 0), (0, width - part.tokens.shape[1]))) for part in parts]
        ),
        lengths=np.concatenate([part.lengths for part in parts]),
        prompts=[prompt for part in parts for prompt in part.prompts],
        columns=files.concatenate([(part.columns, len(part.prompts)) for part in parts]),
        reference_pass_rates=_joined_rates(tables),
        embeddings=_joined_embeddings(tables),
        embedded_by=parts[0].embedded_by,
        rows=np.concatenate([part.rows for part in parts]),
        domain=np.concatenate([_renumbered(part, domains) for part in parts]),
        domains=domains,
        dropped=tuple(dropped for part in parts for dropped in part.dropped),
    )


def proportional_sizes(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Computes the largest sizes, at most `counts`, that relate as the weights.

    They are rounded, and at least 1.
    """
    scale = min(count / weight for count, weight in zip(counts, weights, strict=True))
    return [
        max(1, min(count, round(scale * weight)))
        for count, weight in zip(counts, weights, strict=True)
    ]


def duplicates(table: TaskTable) -> int:
    """Counts the tasks that have the prompt and the ground truth of an earlier one."""
    return len(table.prompts) - len(set(keys(table.prompts, table.columns)))


def _thinned(name: str, table: TaskTable, size: int, seed: int) -> TaskTable:
    """Draws `size` tasks of a table without replacement; they keep their order."""
    count = len(table.lengths)
    if size == count:
        return table
    drawn = sorted(random.Random(f"{seed} {name}").sample(range(count), size))
    dropped = Dropped(name, count - size, "thinned out by the weights of the mixture")
    return take(table, np.array(drawn), dropped)


def _joined_rates(tables: dict[str, TaskTable]) -> np.ndarray | None:
    """Concatenates the pass rates of all tables, [N, K]; None if no set has any.

    They are NaN for the tasks of sets without pass rates. Raises InputError when K differs between
    sets.
    """
    rates = {name: table.reference_pass_rates for name, table in tables.items()}
    policies = {name: known.shape[1] for name, known in rates.items() if known is not None}
    if not policies:
        return None
    (first, number), *others = policies.items()
    for name, other in others:
        if other != number:
            raise InputError(
                f"{first} has the pass rates of {number} reference policies but {name} of "
                f"{other}: name the same policies, in the same "
                "order, in the pass_rate_columns of each set"
            )
    unknown = {
        name: np.full((len(table.lengths), number), np.nan, np.float32)
        for name, table in tables.items()
    }
    return np.concatenate(
        [unknown[name] if known is None else known for name, known in rates.items()]
    )


def _joined_embeddings(tables: dict[str, TaskTable]) -> np.ndarray | None:
    """Concatenates the embeddings of all tables, [N, E]; None if no set has any.

    Raises InputError for embeddings made in different ways.
    """
    (first, reference), *others = tables.items()
    for name, table in others:
        if table.embedded_by != reference.embedded_by:
            expected, actual = (
                ", ".join(f"{key} {value}" for key, value in (each.embedded_by or {}).items())
                or "none"
                for each in (reference, table)
            )
            raise InputError(
                f"the embeddings of {first} are {expected}, but those of {name} {actual}: make "
                "both with one model, best in one file for the mixture"
            )
    parts = [table.embeddings for table in tables.values() if table.embeddings is not None]
    return np.concatenate(parts) if parts else None


def _renumbered(table: TaskTable, domains: tuple[str, ...]) -> np.ndarray:
    """Maps the domain [N] of each task of a table to its index in `domains`."""
    return np.array([domains.index(name) for name in table.domains], np.int32)[table.domain]
