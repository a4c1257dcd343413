"""Names the selectors, which a configuration chooses by name; `jaxrft.select.selectors` is this
module.

A new one is a factory that returns a `Selector`, and a row in `SELECTORS`.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable

from jaxrft.errors import InputError, shown
from jaxrft.select.adaptive import adaptive as adaptive
from jaxrft.select.base import Selector as Selector
from jaxrft.select.bots import bots as bots
from jaxrft.select.dots.attention import Params
from jaxrft.select.dots.selector import dots as dots
from jaxrft.select.easy_to_hard import easy_to_hard as easy_to_hard
from jaxrft.select.greso import greso as greso
from jaxrft.select.mopps import mopps as mopps
from jaxrft.select.retire import retire as retire
from jaxrft.select.uniform import uniform as uniform

SELECTORS: dict[str, Callable[..., Selector]] = {
    "uniform": uniform,
    "easy_to_hard": easy_to_hard,
    "mopps": mopps,
    "greso": greso,
    "retire": retire,
    "bots": bots,
    "dots": dots,
    "adaptive": adaptive,
}
USE_EMBEDDINGS = ("adaptive", "dots")


def make(name: str, num_generations: int, **hyper_parameters: object) -> Selector:
    """Makes the selector called `name` with those of `hyper_parameters` that are its own.

    The hyper-parameters of other selectors are left out. Raises InputError for an unknown selector,
    for a hyper-parameter that no selector has, and for `dots` without a predictor.
    """
    if name == "oracle" and name not in SELECTORS:
        raise InputError(
            "no selector 'oracle': it is a measurement now, benchmarks/_oracle.py; choose another"
        )
    if not isinstance(name, str) or name not in SELECTORS:
        near = _nearest(str(name)[:80], SELECTORS) if isinstance(name, str) else "uniform"
        raise InputError(
            f"no selector {shown(name)}: did you mean {near}? ({', '.join(SELECTORS)})"
        )
    known = set().union(*map(fields, SELECTORS))
    for unknown in hyper_parameters.keys() - known:
        raise InputError(
            f"no selector has a field {shown(unknown)}: did you mean {_nearest(unknown, known)}?"
        )
    if name == "dots" and not isinstance(hyper_parameters.get("predictor"), Params):
        raise InputError(
            "the selector dots needs `predictor`, the parameters of a similarity predictor such "
            "as jaxrft prepare predictor trains: give them, or choose another selector"
        )
    options = {field: value for field, value in hyper_parameters.items() if field in fields(name)}
    return SELECTORS[name](num_generations, **options)


def fields(name: str) -> set[str]:
    """Lists the hyper-parameters of the selector called `name`.

    They are the keyword-only arguments of its factory.
    """
    return {
        p.name
        for p in inspect.signature(SELECTORS[name]).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }


def _nearest(name: str, names: Iterable[str]) -> str:
    """Finds the one of `names` that is spelled most like `name`."""
    return difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.0)[0]
