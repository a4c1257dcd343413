"""How the groups of a probe, rolled out in order to know, save rollouts in order to learn.

Those that are informative take places of a batch, the ones nearest the target pass rate first. They
are of the policy that is trained. That their outcome is known when they are taken gives their tasks
another weight in the gradient and changes nothing else: whatever the number of right samples in a
group, each of its samples may be among them.
"""

import numpy as np

from jaxrft.types import Array


def portions(places: int, *, multiple: int = 1) -> tuple[int, ...]:
    """Lists the numbers of a batch's `places` that may be left for tasks yet to be chosen.

    They are the quarters of the batch, rounded up to multiples of `multiple`, as a mesh may want
    them. Each is a compiled program. At least a quarter is always left, or no belief would be
    tested.
    """
    return tuple(sorted({-(-places * part // (4 * multiple)) * multiple for part in (1, 2, 3, 4)}))


def portion(places: int, informative: int | Array, *, multiple: int = 1) -> Array:
    """Finds the smallest of the `portions` that reference groups can fill up to the batch.

    `informative`: the number of informative reference groups. Returns the index of the portion,
    [] int32.
    """
    sizes = np.array(portions(places, multiple=multiple), np.int32)
    return (sizes < places - informative).sum(dtype=np.int32)
