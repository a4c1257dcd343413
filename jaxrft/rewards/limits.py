"""Bounds the cost of comparing an answer: by its nesting, by the size of its numbers, and by
processor time.
"""

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import sympy
from sympy.core.cache import clear_cache

BITS = 1 << 17  # 2002^5000 is an answer, 10^9! is an attack
DEPTH = 40  # brackets: the time of math-verify's parser grows by more than their number
_UNFINISHED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
_OPENING = "([{"
_CLOSING = ")]}"


class OutOfTime(BaseException):
    """Processor time is used up. It is not an Exception, since sympy catches those."""


@contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in its body after `seconds` of this process' own processor time, which does
    not depend on the load of the machine.

    Python code and long integers heed it, other C code only when it returns. Does nothing outside
    of the main thread, where Python takes no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGPROF, _raise)
    try:
        # and again, for a bare `except:` may swallow the first
        signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)
        yield
    except OutOfTime:
        signal.setitimer(signal.ITIMER_PROF, 0)
        clear_cache()  # assumptions that it was about to settle are left as "unknown"
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _raise(number: int, frame: object) -> None:
    raise OutOfTime


def too_deep(text: str) -> bool:
    """Checks whether brackets are nested more than DEPTH deep."""
    depth = 0
    for character in text:
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth > DEPTH:
            return True
    return False


def too_large(answers: list) -> bool:
    """Checks whether evaluating what math-verify parsed takes numbers of more than BITS bits.

    Integrals, sums, products, limits and derivatives are unbounded: an answer is what remains when
    they are done.
    """
    return any(_bits(answer) > BITS for answer in answers if not isinstance(answer, str))


def _bits(node: sympy.Basic | sympy.MatrixBase) -> float:
    """Estimates the largest log2 of a numerator or denominator met while `node` is evaluated.

    A symbol counts as 1 bit.
    """
    if isinstance(node, _UNFINISHED):
        return math.inf
    if isinstance(node, sympy.Rational):
        return math.log2(max(abs(node.p), node.q))
    if isinstance(node, sympy.Float):
        return abs(node._mpf_[2] + node._mpf_[3])
    parts = [
        _bits(part) for part in (node.flat() if isinstance(node, sympy.MatrixBase) else node.args)
    ]
    if max(parts, default=0) > BITS:
        return math.inf
    match node:
        case sympy.Pow():
            return max(parts[0], 1.0) * _most(node.args[1])
        case sympy.exp():
            return 2 * _most(node.args[0])
        case sympy.factorial() | sympy.factorial2() | sympy.binomial() | sympy.gamma():
            return parts[0] * _most(node.args[0])
        case sympy.Mul() | sympy.Add():
            return sum(parts)
    return max(parts, default=1.0)


def _most(node: sympy.Basic) -> float:
    """Bounds the absolute value of an expression.

    The bound of a rational number is its absolute value, or infinity if its numerator or
    denominator has 1,000 bits or more.
    """
    if isinstance(node, sympy.Rational):
        return abs(node.p / node.q) if _bits(node) < 1000 else math.inf
    return 2.0 ** min(_bits(node), 1000)
