"""Locates rewards, by name or by function, so that a fresh process can load them.

Worker processes import this file, so it stays clear of jax.
"""

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any, NamedTuple

from jaxrft.errors import InputError, Missing
from jaxrft.fields import expand_path
from jaxrft.host.terminal import escaped

Reward = Callable[..., list[float | None]]

REWARDS = {
    "choice": "jaxrft.rewards.choice:choice",
    "code": "jaxrft.rewards.code:code",
    "code_solved": "jaxrft.rewards.code:code_solved",
    "exact": "jaxrft.rewards.functions:exact",
    "gsm8k": "jaxrft.rewards.functions:gsm8k",
    "gym": "jaxrft.rewards.gym:gym",
    "gym_solved": "jaxrft.rewards.gym:gym_solved",
    "logic": "jaxrft.rewards.logic:logic",
    "logic_solved": "jaxrft.rewards.logic:logic_solved",
    "number": "jaxrft.rewards.functions:number",
    "math": "jaxrft.rewards.mathematics:math",
}

# those that read tests or solutions of puzzles, not ground truths as texts
STRUCTURED_REWARDS = ("code", "code_solved", "gym", "gym_solved", "logic", "logic_solved")


class Source(NamedTuple):
    """Where a function is defined."""

    module: str | None  # None: only the file is known, as of a script run as __main__
    file: str | None  # loaded where the module cannot be imported by its name
    attribute: str  # dotted from the module's top level


def resolve(reward: str | Reward) -> Reward:
    """Loads the function behind a name of `REWARDS`, a path `package.module:function` or a path
    `folder/file.py:function`.

    Returns a function as it is. Modules are found as python finds them, then in the current
    directory. Raises InputError for a reward that does not load.
    """
    if not isinstance(reward, str):
        return reward
    source = locate(reward)
    try:
        for folder in [*folders([source]), *([] if reward in REWARDS else [os.getcwd()])]:
            if folder not in sys.path:
                sys.path.append(folder)
        return load(source)
    except (ImportError, LookupError) as error:
        failure = sentence(error)
        raise InputError(f"reward {reward}: {failure}{remedy(failure, [source])}") from error


def locate(reward: str | Reward, path: Sequence[str] = ()) -> Source:
    """Locates the definition of a reward without importing it.

    Relative paths of files begin in the current directory, or in a folder of `path`. Raises
    InputError for a reward that a fresh process cannot find.
    """
    if not isinstance(reward, str):
        return _locate_function(reward)
    file, colon, attribute = reward.rpartition(":")
    if file.endswith(".py") and attribute:
        return Source(None, _file(reward, file, path), attribute)
    if not colon and reward.endswith(".py"):
        raise InputError(f"reward {reward} names a file only: give {reward}:FUNCTION")
    module, colon, attribute = REWARDS.get(reward, reward).partition(":")
    if colon and module and attribute:
        return Source(module, None, attribute)
    near = difflib.get_close_matches(reward, REWARDS, n=1)
    hint = (
        f"did you mean {near[0]}?"
        if near
        else (
            f"give one of {', '.join(REWARDS)} or a path package.module:function or "
            "folder/file.py:function"
        )
    )
    raise InputError(f"no reward is named {reward!r}: {hint}")


def _file(reward: str, name: str, path: Sequence[str]) -> str:
    """Returns the absolute path of a reward's file; raises Missing if there is none."""
    name = expand_path(name, "the file of a reward")
    candidates = [os.path.abspath(os.path.join(folder, name)) for folder in ["", *path]]
    file = next(filter(os.path.isfile, candidates), None)
    if file is None:
        raise Missing(
            f"reward {reward}: there is no file {candidates[0]}: correct the path or bring the file"
        )
    return file


def folders(sources: Iterable[Source]) -> list[str]:
    """Lists the folders of the files that are named by their paths: they may import each other."""
    files = [source.file for source in sources if source.module is None and source.file]
    return list(dict.fromkeys(os.path.dirname(file) for file in files))


def remedy(failure: str, sources: Iterable[Source]) -> str:
    """Returns the end of the sentence `failure`: what to do if the module of a reward is not found.

    It is empty for other failures, such as a module that the reward's own module lacks.
    """
    modules = [source.module for source in sources if source.module]
    if not any(f"No module named {module.split('.')[0]!r}" in failure for module in modules):
        return ""
    return (
        "; put the file next to the config or into the current directory, or name it by its path, "
        "as in folder/file.py:function"
    )


def _locate_function(function: Reward) -> Source:
    name = getattr(function, "__qualname__", repr(function))
    for module in _modules(function):
        attribute = _attribute(module, name, function)
        if attribute is None:
            continue
        file = getattr(module, "__file__", None)
        if module.__name__ != "__main__":
            return Source(module.__name__, file and os.path.abspath(file), attribute)
        if module.__spec__ is not None:  # python -m package.module
            return Source(module.__spec__.name, None, attribute)
        if file:
            return Source(None, os.path.abspath(file), attribute)
        raise InputError(
            f"reward {name} is defined in an interactive session, where workers "
            "cannot find it: import it"
        )
    raise InputError(
        f"reward {name} cannot be found by a worker process: define it, or give it a name, at "
        "the top level of a module"
    )


def _modules(function: Reward) -> Iterator[ModuleType]:
    """Yields the modules that may hold a function: its own, the script, then all others."""
    for name in (getattr(function, "__module__", None), "__main__", *sys.modules):
        if isinstance(module := sys.modules.get(name or ""), ModuleType):
            yield module


def _attribute(module: ModuleType, qualname: str, function: Reward) -> str | None:
    """Finds the name under which a module holds this very function: its own, else any, else None.

    A decorated function may have another name than its own. So may a function that a call made,
    such as TRL's `get_soft_overlong_punishment(100, 20)`.
    """
    first, *rest = qualname.split(".")
    # not by getattr, which makes lazy modules import what they name
    value = vars(module).get(first)
    for part in rest:
        value = getattr(value, part, None)
    if value is function:
        return qualname
    return next((name for name, value in list(vars(module).items()) if value is function), None)


def load(source: Source) -> Callable[..., Any]:
    """Imports the module and returns the function; raises ImportError or LookupError, a
    sentence.
    """
    value: Any = _module(source)
    for part in source.attribute.split("."):
        if not hasattr(value, part):
            near = difflib.get_close_matches(part, vars(value), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise LookupError(f"{source.module or source.file} defines no {part!r}{hint}")
        value = getattr(value, part)
    if not callable(value):
        raise LookupError(
            f"{source.attribute!r} of {source.module or source.file} is not a function"
        )
    return value


def _module(source: Source) -> ModuleType:
    """Imports the module by name, or its file where the name is not found or leads to another file.

    It may do so in a worker, which looks in the current directory last.
    """
    if source.module:
        try:
            module = importlib.import_module(source.module)
            if source.file is None or _same_file(getattr(module, "__file__", None), source.file):
                return module
        except ModuleNotFoundError as error:
            if source.file is None or not f"{source.module}.".startswith(f"{error.name}."):
                raise
    # A name that is not __main__ leaves out what a script does under `if __name__ == "__main__"`.
    name = source.module
    if name is None:
        name = f"__jaxrft_{source.file}__"  # two files may have the same name
    elif name in sys.modules:
        name = f"__jaxrft_{name}__"
    if name not in sys.modules:
        spec = importlib.util.spec_from_loader(name, SourceFileLoader(name, source.file or ""))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _same_file(path: str | None, other: str) -> bool:
    return path is not None and os.path.realpath(path) == os.path.realpath(other)


def sentence(error: BaseException) -> str:
    """Returns an error on one line of bounded length: its kind and its message, if it can be read.

    An InputError is a sentence already, and has room for its remedy.
    """
    try:
        message = str(error)
    except Exception:  # `__str__` of a user's own error
        message = "its message cannot be read"
    length = 1000 if isinstance(error, InputError) else 300
    return escaped(f"{type(error).__name__}: {message}".replace("\n", " ")[:length], keep="")
