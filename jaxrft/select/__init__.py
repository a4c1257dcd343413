"""Which tasks to roll out next: posteriors, evidence, acquisition, and the selectors composed of
them.

Only arrays come in and go out, so that any JAX training loop can use a selector:

>>> import jax
>>> from jaxrft.select import selectors
>>> from jaxrft.types import Feedback, Tasks
>>> selector, tasks = selectors.uniform(num_generations=4), Tasks()
>>> state = selector.init(tasks, 6)
>>> select = jax.jit(selector.select, static_argnames="batch_size")
>>> choice, state = select(jax.random.key(0), state, tasks, batch_size=2)
>>> successes, trials, tokens = jax.numpy.ones(2), jax.numpy.full(2, 4.0), jax.numpy.zeros(2)
>>> state = jax.jit(selector.update)(state, tasks, Feedback(choice.ids, successes, trials, tokens))
>>> int(state.visits.sum())
2
"""

from . import acquisition as acquisition
from . import evidence as evidence
from . import posterior as posterior
from . import registry as registry
from . import topk as topk
from .base import Selector as Selector
from .evidence import Evidence as Evidence
from .posterior import BetaState as BetaState
from .registry import make as make
from .session import Session as Session

selectors = registry
