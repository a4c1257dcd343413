"""Grades completions: reward functions by name, and the pool of processes that runs them.

Nothing here imports jax, so that a worker starts fast; `math` is loaded by name, for it brings
sympy.
"""

from jaxrft.rewards.functions import exact as exact
from jaxrft.rewards.functions import gsm8k as gsm8k
from jaxrft.rewards.functions import verl as verl
from jaxrft.rewards.lookup import REWARDS as REWARDS
from jaxrft.rewards.lookup import resolve as resolve
from jaxrft.rewards.pool import Graded as Graded
from jaxrft.rewards.pool import Pool as Pool
