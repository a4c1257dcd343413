"""Makes tasks of reasoning_gym and scores answers to them, in processes that import little else.

Some of reasoning_gym's scorers evaluate an answer as Python. Here `eval` takes arithmetic and
literals, and what sympy's parser makes of an expression; a name, an attribute or a call that is not
in `_CALLS` ends the scoring, and the answer is worth 0. So an answer stays data, and what the
process of a scoring says is the scorer's verdict. A sandbox and its limits stand around it for what
an answer may cost.

    python -m jaxrft.rewards.inside.gym    # makes tasks; see `main`
"""

from __future__ import annotations

import ast
import builtins
import json
import math
import os
import sys

from . import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

_DATASETS = 64  # that are kept, each of one family and one configuration
_LITERALS = (
    ast.Expression,
    ast.Constant,
    ast.List,
    ast.Tuple,
    ast.Set,
    ast.Dict,
    ast.BinOp,
    ast.UnaryOp,
    ast.operator,
    ast.unaryop,
    ast.Load,
)
_NAMED = (*_LITERALS, ast.Name, ast.Call)
# functions that sympy's parser may call: those that it writes itself, and elementary ones
_CALLS = frozenset(
    "Integer Float Rational Symbol Abs sqrt cbrt exp log ln sin cos tan sec csc cot asin acos atan "
    "acot sinh cosh tanh asinh acosh atanh".split()
)
_WITH_TEXT = frozenset(("Integer", "Float", "Rational", "Symbol"))  # what sympy's parser writes
_PR_SET_DUMPABLE = 4
_eval = builtins.eval
_exec = builtins.exec
_datasets: dict[str, object] = {}


class Refused(ValueError):
    """Reports an answer that is more than data."""


def prepare(request: dict) -> str:
    """Imports reasoning_gym and makes the data set of a request; returns what fails, or nothing.

    It runs once for each data set, in the first process of a sandbox, whose forks then score. That
    process is closed to others of its user, which could otherwise change what later forks say.
    """
    sys.path += [path for path in request["path"] if path not in sys.path]
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of numpy, whose threads no fork would have
    try:
        if sys.platform == "linux" and os.getpid() == 1:
            import ctypes

            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        import reasoning_gym  # noqa: F401  # pyright: ignore[reportMissingImports]

        if request["dataset"]:
            _dataset(request["dataset"], request["config"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _dataset(name: str, config: dict) -> object:
    """Returns the data set of a family and a configuration, which its scorer belongs to."""
    key = json.dumps([name, config], sort_keys=True)
    if key not in _datasets:
        import reasoning_gym  # pyright: ignore[reportMissingImports]

        if len(_datasets) >= _DATASETS:
            _datasets.pop(next(iter(_datasets)))
        _datasets[key] = reasoning_gym.create_dataset(name, **_fitting(name, config))
    return _datasets[key]


def _fitting(name: str, config: dict) -> dict:
    """Returns a configuration whose lists are tuples where the family's own are."""
    from reasoning_gym.factory import DATASETS  # pyright: ignore[reportMissingImports]

    defaults = vars(DATASETS[name][1]())
    return {
        key: tuple(value) if isinstance(defaults.get(key), tuple) else value
        for key, value in config.items()
    }


def run_score(request: dict, answer: str) -> None:
    """Writes the score of an answer, and nothing that the scorer prints; exits with 0.

    A scorer that fails gives 0, as does one whose score is not finite.
    """
    output = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    dataset = _dataset(request["dataset"], request["config"])
    entry = plain.decode(request["entry"])
    builtins.eval = _guarded_eval
    builtins.exec = _guarded_exec
    try:
        score = float(dataset.score_answer(answer, entry))  # type: ignore[attr-defined]
    except BaseException:
        score = 0.0
    if not math.isfinite(score):
        score = 0.0
    os.write(output, repr(min(max(score, 0.0), 1.0)).encode())
    os._exit(0)


def _guarded_eval(source: object, globals: object = None, locals: object = None) -> object:
    """Evaluates a text that `check` admits for whoever calls; the standard library may do all."""
    frame = sys._getframe(1)
    if _is_standard(frame):
        if globals is None:
            return _eval(source, frame.f_globals, frame.f_locals)  # type: ignore[arg-type]
        return _eval(source, globals, locals)  # type: ignore[arg-type]
    owner = str(frame.f_globals.get("__name__"))
    has_names = owner.startswith("sympy.parsing.")
    tree = check(source, has_names)
    code = compile(tree, "answer", "eval")
    if has_names:
        return _eval(code, globals, locals)  # type: ignore[arg-type]
    return _eval(code, {"__builtins__": {}}, {})


def _guarded_exec(source: object, *arguments: object, **keywords: object) -> None:
    """Executes what the standard library asks for, and the one import of sympy's parser."""
    frame = sys._getframe(1)
    if not _is_standard(frame) and source != "from sympy import *":
        raise Refused("an answer is no program")
    if not arguments and "globals" not in keywords:
        arguments = (frame.f_globals, frame.f_locals)
    _exec(source, *arguments, **keywords)  # type: ignore[arg-type]


def _is_standard(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__"))
    return name.partition(".")[0] in sys.stdlib_module_names - {"__main__"}


def check(source: object, has_names: bool) -> ast.Expression:
    """Returns the tree of a text of literals and arithmetic; raises Refused for any other.

    With `has_names`, as for sympy's parser, names and calls of `_CALLS` are admitted; text is only
    what `Symbol` and the numbers of sympy are made of.
    """
    if not isinstance(source, str):
        raise Refused("an answer is no code")
    tree = ast.parse(source.strip(), mode="eval")
    kinds = _NAMED if has_names else _LITERALS
    texts = set()
    for node in ast.walk(tree):
        if not isinstance(node, kinds):
            raise Refused(f"an answer has no {type(node).__name__}")
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if name not in _CALLS or node.keywords:
                raise Refused("an answer calls no function")
            if name in _WITH_TEXT:
                texts.update(map(id, node.args))
        elif has_names and isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            if id(node) not in texts:
                raise Refused("an answer has no text")
    return tree


def generate(request: dict) -> list[dict[str, object]]:
    """Makes tasks: `items` are (number of a configuration in `configs`, index) in order.

    Each is {"question", "answer", "difficulty", "entry"}; the entry is encoded, since JSON has no
    tuples, and scorers compare some.
    """
    tasks = []
    for number, index in request["items"]:
        entry = _dataset(request["dataset"], request["configs"][number])[index]  # type: ignore
        metadata = entry["metadata"] if isinstance(entry.get("metadata"), dict) else {}
        tasks.append(
            {
                "question": str(entry["question"]),
                "answer": None if entry["answer"] is None else str(entry["answer"]),
                "difficulty": _shown(metadata.get("difficulty")),
                "entry": plain.encode(entry),
            }
        )
    return tasks


def describe(name: str) -> dict[str, object]:
    """Returns all families, and of one of them the default values of its options."""
    from reasoning_gym.factory import DATASETS  # pyright: ignore[reportMissingImports]

    families = sorted(set(DATASETS) - {"composite"})  # one source is one family
    if name not in families:
        return {"families": families}
    values = vars(DATASETS[name][1]())
    options = {key: value for key, value in values.items() if _is_option(value)}
    return {"families": families, "options": options}


def _is_option(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _shown(difficulty: object) -> object:
    """Returns a difficulty as JSON has it, or None."""
    return json.loads(json.dumps(difficulty)) if _is_option(difficulty) else None


def main() -> None:
    """Answers requests, JSON on lines of the standard input, with a line of JSON each.

    {"dataset"} is answered as `describe` does, {"dataset", "configs", "items"} as `generate`. What
    cannot be imported is {"missing": sentence}, what reasoning_gym refuses {"error": sentence}.
    """
    output = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some generators print
    for line in sys.stdin:
        request = json.loads(line)
        answer: object
        try:
            answer = generate(request) if "items" in request else describe(request["dataset"])
        except ImportError as error:
            answer = {"missing": str(error)}
        except (AssertionError, ValueError, TypeError, KeyError, IndexError) as error:
            answer = {"error": str(error) or type(error).__name__}
        output.write(json.dumps(answer) + "\n")
        output.flush()


if __name__ == "__main__":
    main()
