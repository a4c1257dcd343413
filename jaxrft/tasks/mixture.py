"""Several sets of tasks as one table: one after the other, thinned where weights ask for it."""

import random
from collections.abc import Sequence

import numpy as np

from jaxrft.tasks import files
from jaxrft.tasks.table import Dropped, TaskTable, keys, take
from jaxrft.types import InputError


def mix(tables: dict[str, TaskTable], weights: Sequence[float] | None = None, *, seed: int = 0) -> TaskTable:
    """The tasks of all `tables`, by the name of their set, in that order.

    With `weights`, one a set, each is thinned to the largest pool in which the sets' sizes relate as their weights
    (rounded, at least one task of each); which tasks stay depends on the seed and the set's name only. A column, or
    the pass rates, that a set does not have are None and NaN in its rows. Raises InputError for sets with pass rates
    of different numbers of policies, and with embeddings made in different ways.
    """
    if weights is not None:
        sizes = shares([len(table.lengths) for table in tables.values()], weights)
        tables = {
            name: _thinned(name, table, size, seed) for (name, table), size in zip(tables.items(), sizes, strict=True)
        }
    parts = list(tables.values())
    if len(parts) == 1:
        return parts[0]
    domains = tuple(dict.fromkeys(name for part in parts for name in part.domains))
    width = max(part.tokens.shape[1] for part in parts)
    return TaskTable(
        tokens=np.concatenate([np.pad(part.tokens, ((0, 0), (0, width - part.tokens.shape[1]))) for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        prompts=[prompt for part in parts for prompt in part.prompts],
        columns=files.joined([(part.columns, len(part.prompts)) for part in parts]),
        reference_pass_rates=_joined_rates(tables),
        embeddings=_joined_embeddings(tables),
        embedded_by=parts[0].embedded_by,
        rows=np.concatenate([part.rows for part in parts]),
        domain=np.concatenate([_renumbered(part, domains) for part in parts]),
        domains=domains,
        dropped=tuple(dropped for part in parts for dropped in part.dropped),
    )


def shares(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many of the `counts` tasks of each set stay, so that they relate as the weights and none could be more."""
    scale = min(count / weight for count, weight in zip(counts, weights, strict=True))
    return [max(1, min(count, round(scale * weight))) for count, weight in zip(counts, weights, strict=True)]


def duplicates(table: TaskTable) -> int:
    """How many tasks have the prompt and the ground truth of an earlier one."""
    return len(table.prompts) - len(set(keys(table.prompts, table.columns)))


def _thinned(name: str, table: TaskTable, size: int, seed: int) -> TaskTable:
    """`size` tasks of a table in their order, drawn without replacement."""
    count = len(table.lengths)
    if size == count:
        return table
    drawn = sorted(random.Random(f"{seed} {name}").sample(range(count), size))
    left_out = Dropped(name, count - size, "thinned out by the weights of the mixture")
    return take(table, np.array(drawn), left_out)


def _joined_rates(tables: dict[str, TaskTable]) -> np.ndarray | None:
    """[N, K], NaN for the tasks of sets without pass rates; None if no set has any."""
    rates = {name: table.reference_pass_rates for name, table in tables.items()}
    policies = {name: known.shape[1] for name, known in rates.items() if known is not None}
    if not policies:
        return None
    (first, number), *others = policies.items()
    for name, other in others:
        if other != number:
            raise InputError(
                f"{first} has the pass rates of {number} reference policies but {name} of {other}: name as many in the "
                "pass_rate_columns of each set, the same policies in the same order"
            )
    unknown = {name: np.full((len(table.lengths), number), np.nan, np.float32) for name, table in tables.items()}
    return np.concatenate([unknown[name] if known is None else known for name, known in rates.items()])


def _joined_embeddings(tables: dict[str, TaskTable]) -> np.ndarray | None:
    """[N, E]; None if no set has any."""
    (first, whole), *others = tables.items()
    for name, table in others:
        if table.embedded_by != whole.embedded_by:
            here, there = (
                ", ".join(f"{key} {value}" for key, value in (found.embedded_by or {}).items()) or "none"
                for found in (whole, table)
            )
            raise InputError(
                f"the embeddings of {first} are {here}, but those of {name} {there}: make both with one model, best in "
                "one file for the mixture"
            )
    parts = [table.embeddings for table in tables.values() if table.embeddings is not None]
    return np.concatenate(parts) if parts else None


def _renumbered(table: TaskTable, domains: tuple[str, ...]) -> np.ndarray:
    """The table's domains [N] as indices into `domains`."""
    return np.array([domains.index(name) for name in table.domains], np.int32)[table.domain]
