"""A reward for measurements; worker processes import this file, so it imports nothing."""


def parity(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Returns 1 for completions with an even checksum: about half of those of any policy."""
    return [float(sum(map(ord, completion)) % 2 == 0) for completion in completions]
