"""Warns, once a domain, of domains whose rollouts give no training signal."""

from collections.abc import Iterator

import numpy as np

# The rule of three: after n groups of a domain without a success, fewer than 3 / n of its groups
# have one, with 95 % confidence. After this number it is fewer than a quarter.
SILENT_GROUPS = 12
# Likewise after n samples of a task without a reward, that is 3 groups of G, fewer than 3 / n = 1
# / G of its samples have one: less than one in a group.
SILENT_VISITS = 3


class Visits:
    """Counts the groups rolled out of each task since the process began, and whether they had
    rewards and successes.
    """

    def __init__(self, domain: np.ndarray, domains: tuple[str, ...]):
        """Counts nothing yet, of N tasks whose `domain` [N] is an index into the names
        `domains`.
        """
        self.domain = domain
        self.domains = domains
        self.groups = np.zeros(len(domain), np.int64)
        self.rewarded = np.zeros(len(domain), bool)  # whether any sample had a success, 0 or not
        self.solved = np.zeros(len(domain), bool)  # whether any was above 0
        self.said: set[int] = set()

    def add(self, ids: np.ndarray, success: np.ndarray, valid: np.ndarray) -> None:
        """Counts a group of each of the tasks `ids` [B], their samples next to each other in
        `success` [R].

        `valid` [R] bool: which samples have a success; that of the others is 0. The same task may
        come more than once.
        """
        valid = valid.reshape(len(ids), -1)
        success = success.reshape(valid.shape)
        np.add.at(self.groups, ids, 1)
        np.logical_or.at(self.rewarded, ids, valid.any(axis=1))
        np.logical_or.at(self.solved, ids, (success > 0).any(axis=1))

    def is_empty(self) -> bool:
        """Returns whether no group was counted yet."""
        return not self.groups.any()

    def news(self) -> Iterator[str]:
        """Yields a sentence for each domain without a training signal, once."""
        for number, name in enumerate(self.domains):
            sentence = None if number in self.said else self._sentence(self.domain == number)
            if sentence is not None:
                self.said.add(number)
                yield f"domain {name}: {sentence}"

    def _sentence(self, member: np.ndarray) -> str | None:
        """Explains why the tasks `member` [N] of a domain give no training signal; None if they
        may.
        """
        groups = int(self.groups[member].sum())
        unrewarded = member & (self.groups >= SILENT_VISITS) & ~self.rewarded
        remedy = "add a reward that applies to such tasks, or leave them out"
        if groups >= SILENT_GROUPS and not self.rewarded[member].any():
            return (
                f"no reward that counts as success applied to any of the {groups} groups rolled "
                f"out so far, which therefore give no training signal: {remedy}"
            )
        if unrewarded.any():
            return (
                f"{unrewarded.sum()} of its tasks were rolled out {SILENT_VISITS} times or more, "
                "no reward that counts as "
                f"success applied to them, and they give no training signal: {remedy}"
            )
        if groups >= SILENT_GROUPS and not self.solved[member].any():
            return (
                f"none of the {groups} groups rolled out so far has a success above 0, and most "
                f"likely fewer than {3 / groups:.0%} of its groups can have one: check the "
                "reward with --dry-run, or add easier tasks"
            )
        return None
