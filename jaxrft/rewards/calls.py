"""How rewards are called: by keyword, with everything that TRL's trainer gives and they take.

Worker processes import this file, so it stays clear of jax.
"""

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

# Arguments that rewards may have next to the columns of the tasks. No column may have such a name.
GIVEN = (
    "prompts",
    "completions",
    "completion_ids",
    "truncated",
    "trainer_state",
    "log_extra",
    "log_metric",
)


class Signature(NamedTuple):
    """The keywords of a function."""

    required: tuple[str, ...]  # those without a default
    names: tuple[str, ...]  # all that it names
    takes_any: bool  # whether it has **kwargs

    def accepted(self, given: Mapping[str, T]) -> dict[str, T]:
        """Returns those of the keywords that the function can be given."""
        return {
            name: value for name, value in given.items() if self.takes_any or name in self.names
        }


class TrainerState(SimpleNamespace):
    """Holds the fields of transformers' TrainerState that this package has: `global_step` and
    `max_steps`.

    `global_step` counts the steps done, `max_steps` those of the whole run.
    """

    def __getattr__(self, name: str) -> object:
        """Raises AttributeError with the fields that there are."""
        raise AttributeError(f"trainer_state has only {' and '.join(vars(self))} here, not {name}")


def signature_of(function: Callable[..., object]) -> Signature:
    """Returns the keywords that a function takes.

    A wrapper that takes nothing but *args and **kwargs has the signature of the function that it
    wraps. A function that hides its signature takes everything. Raises TypeError for a parameter
    without default that can be given by position only.
    """
    parameters = _parameters(function)
    for parameter in parameters:
        if parameter.kind == parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise TypeError(
                f"it takes {parameter.name} by position only, and rewards are called by keyword"
            )
    keywords = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = tuple(p.name for p in keywords if p.default is p.empty)
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    return Signature(required, tuple(p.name for p in keywords), takes_any)


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(function, follow_wrapped=False).parameters.values())
    except ValueError:  # such as a function of C
        return [inspect.Parameter("keywords", inspect.Parameter.VAR_KEYWORD)]
    forwards = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    wrapped = getattr(function, "__wrapped__", None)
    return _parameters(wrapped) if forwards and wrapped is not None else parameters


def awaited(result: object) -> object:
    """Returns what a reward returned, or what its coroutine does, run in the one event loop of this
    process.
    """
    return _event_loop().run(_wait(result)) if inspect.isawaitable(result) else result


@functools.cache
def _event_loop() -> Any:
    import asyncio  # slow to import, and rarely needed

    return asyncio.Runner()


async def _wait(result: Awaitable[object]) -> object:
    return await result


def keywords(
    chunk: Mapping[str, Sequence[object]],
    i: int,
    state: Mapping[str, object] | None,
    takes: Signature,
) -> dict:
    """Returns the arguments of a reward for completion `i` of a chunk: lists of length 1, and TRL's
    three extras.

    `log_extra` and `log_metric` do nothing, since there is no trainer's table or log.
    """
    extras: dict[str, object] = {"log_extra": _ignore, "log_metric": _ignore}
    if state is not None:
        extras["trainer_state"] = TrainerState(**state)
    given = {name: [values[i]] for name, values in chunk.items()}
    return given | takes.accepted(extras)


def _ignore(name: str, value: object) -> None:
    """Drops a value that TRL's trainer would log."""
