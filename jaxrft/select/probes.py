"""How the groups of a probe, rolled out in order to know, save rollouts in order to learn.

Those that are informative take places of a batch, the ones nearest the target pass rate first. They are of the policy
that is trained. That their outcome is known when they are taken gives their tasks another weight in the gradient and
changes nothing else: whatever the number of right samples in a group, each of its samples may be among them.
"""

import numpy as np

from jaxrft.types import Array


def portions(places: int, *, multiple: int = 1) -> tuple[int, ...]:
    """How many of a batch's `places` may be left for tasks yet to be chosen: its quarters, each a compiled program.

    Some always are, or nothing that is believed would be tested. Rounded up to multiples, as a mesh may want them.
    """
    return tuple(sorted({-(-places * part // (4 * multiple)) * multiple for part in (1, 2, 3, 4)}))


def portion(places: int, informative: int | Array, *, multiple: int = 1) -> Array:
    """Index, [] int32, of the smallest of the `portions` that so many informative groups of a probe can fill up."""
    sizes = np.array(portions(places, multiple=multiple), np.int32)
    return (sizes < places - informative).sum(dtype=np.int32)
