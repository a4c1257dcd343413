"""Reuses informative reference groups in the training batch.

A reference set is rolled out to measure pass rates. Its informative groups take slots of the batch,
those nearest the target pass rate first, and save that many new rollouts. Their samples come from
the policy that is trained. They are chosen by their outcome, which changes the weight of their
tasks in the gradient. It changes nothing within a group: given the number of successes, every
sample of the group is as likely to be among them.
"""

import numpy as np

from jaxrft.types import Array


def batch_sizes(slots: int, *, multiple: int = 1) -> tuple[int, ...]:
    """Lists the numbers of tasks that `select` may be asked for, of a batch of `slots`.

    They are the quarters of the batch, rounded up to multiples of `multiple`, as a mesh may need
    them. Each is a compiled program. At least a quarter of the batch is selected, so that the
    belief is tested in every step.
    """
    return tuple(sorted({-(-slots * part // (4 * multiple)) * multiple for part in (1, 2, 3, 4)}))


def batch_size_index(slots: int, informative: int | Array, *, multiple: int = 1) -> Array:
    """Finds the smallest of the `batch_sizes` that reference groups can fill up to the batch.

    `informative`: the number of informative reference groups. Returns an index into `batch_sizes`,
    [] int32.
    """
    sizes = np.array(batch_sizes(slots, multiple=multiple), np.int32)
    return (sizes < slots - informative).sum(dtype=np.int32)
