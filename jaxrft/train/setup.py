"""Opens and checks all that a run needs."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrft import mesh as meshes
from jaxrft.config import Config
from jaxrft.lm import model
from jaxrft.lm.policy import LanguageModel, open_model
from jaxrft.report.console import Display
from jaxrft.report.visits import Visits
from jaxrft.rewards.pool import Pool
from jaxrft.streams import stream_key
from jaxrft.tasks import table
from jaxrft.tasks.embeddings import embedding_source, make_embedder
from jaxrft.tasks.load import open_mixture, uses_embeddings
from jaxrft.tasks.projections import open_predictor
from jaxrft.tasks.table import TaskTable
from jaxrft.train import step as steps
from jaxrft.train.devices import computing_on
from jaxrft.train.evaluate import compile_evaluation, compile_pass_rates
from jaxrft.train.state import TrainState
from jaxrft.train.step import Run
from jaxrft.types import Tasks


def set_up(config: Config, mesh: Mesh, pool: Pool) -> tuple[Run, TrainState]:
    """Opens and checks all that the run needs, and makes its first state."""
    if config.select.name != "dots":  # which needs a predictor
        steps.make_selector(config, None)  # or its mistakes show only when the policy is loaded
    lm = open_model(config, mesh)
    rows = open_mixture(config, lm.tokenizer)
    if rows.embeddings is None and uses_embeddings(config):
        rows = with_policy_embeddings(config, mesh, lm, rows)
    run, state = steps.assemble(config, mesh, lm, rows, open_predictor(config, rows, mesh))
    return run._replace(
        pool=pool,
        visits=Visits(rows.domain, rows.domains),
        evaluate=compile_evaluation(config, lm, mesh, pool),
        measure=compile_pass_rates(config, lm, mesh, pool),
    ), state


def measured_tasks(run: Run, state: TrainState, step: int, stopped: Callable[[], bool]) -> Tasks:
    """The tasks with pass rates of the policy that the state holds, of those tasks that the selector wants them of.

    Raises Stopped when `stopped`.
    """
    number, wanted = len(run.table.lengths), run.selector.measure
    assert wanted is not None
    ids = np.asarray(wanted(stream_key(run.config.seed, step, "measure"), number))
    rates = run.measure(model.whole(state.params, run.lm.frozen), step, run.table, ids, stopped)
    return run.tasks._replace(pass_rates=meshes.place_table(rates, run.mesh, number))


def with_policy_embeddings(config: Config, mesh: Mesh, lm: LanguageModel, rows: TaskTable) -> TaskTable:
    """The tasks with embeddings by the policy that the run starts from, the same bits at every start on this mesh."""
    number, embedder = len(rows.lengths), make_embedder(lm, config, mesh, rows)
    found = np.zeros((number, lm.config.hidden_size), np.float32)
    done, visible = 0, jax.process_index() == 0
    with computing_on(mesh, config), Display(number, visible=visible, unit="embedding of prompt") as display:
        for ids in table.batches(rows.lengths, config.batch_size):
            found[ids] = embedder(ids)
            done += len(ids)
            display.advance(done, "")
        display.say(f"the policy's embeddings of {number:,} prompts are made")
        return rows._replace(embeddings=found, embedded_by=embedding_source(lm, config, mesh))
