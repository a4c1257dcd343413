"""google-tunix's GRPOLearner with prompts that jaxrft chooses: batches that ask a session, and a
line in the reward.

    pip install . google-tunix==0.1.7 transformers    # in an environment of its own
    python notebooks/tunix_grpo.py --selector adaptive
    python notebooks/tunix_grpo.py --selector uniform

A tiny policy learns to rewrite lists of digits on a CPU, in a minute or two. What is printed is the
share of the groups of a batch whose rewards are not all equal: the others teach nothing. In 40
steps of one seed that was 0.17 with `uniform` and 0.46 with `adaptive`, which knows nothing of the
tasks beforehand.

* tunix has no hook that chooses prompts, but it trains on any iterable of batches: `Chosen` is one.
* GRPOLearner asks for a batch when it has learnt from the one before, so feedback is there in time.
  The agentic learner asks off_policy_steps + 1 batches ahead, and a loader with workers does as
  well; `--ahead N` does it here. A session takes several `next` before a `record`; the selector
  learns that much later.
* tunix rewards a batch in parts of rollout_micro_batch_size prompts. To a selector each `record` is
  a step: leave it at the whole batch, or gather the parts.
* The rewards of evaluation prompts are not recorded.
* A resumed run of tunix draws again the batches that it has trained on, in order to skip them. Save
  session.state_dict() beside tunix's checkpoint, load it, and give `Chosen` their number as
  `skipped`.
"""

import argparse
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxrft.select import Session, selectors

TASKS = 16  # of a batch
GENERATIONS = 8  # of a task
PROMPT_TOKENS = 16
COMPLETION_TOKENS = 9

Batch = dict[str, np.ndarray]


class Chosen:
    """Batches of rows for tunix's learner, as the session chooses them; `record` takes what came of
    them.
    """

    def __init__(
        self,
        session: Session,
        columns: Mapping[str, Sequence],
        batches: int,
        *,
        batch_size: int,
        skipped: int = 0,
    ):
        """`columns` have one entry a task, "prompts" among them; the session is not asked for the
        `skipped` batches.
        """
        self.session = session
        self.columns = {name: np.asarray(column) for name, column in columns.items()}
        self.batches = batches
        self.batch_size = batch_size
        self.skipped = skipped
        self.waiting = 0  # tasks chosen, but not recorded
        self.late = 0  # most batches that were not recorded when another was chosen

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.batches):
            if step < self.skipped:
                ids = np.arange(self.batch_size)
            else:
                self.late = max(self.late, -(-self.waiting // self.batch_size))
                ids = self.session.next(self.batch_size)
                self.waiting += len(ids)
            yield {name: column[ids] for name, column in self.columns.items()} | {"task_id": ids}

    def record(self, task_id: np.ndarray, rewards: Sequence[float]) -> float:
        """Tells the session of rollouts [R], those of a task in any order; returns the share of
        informative groups.
        """
        ids, group, trials = np.unique(task_id, return_inverse=True, return_counts=True)
        successes = np.bincount(group, rewards)
        self.session.record(ids, successes, trials)
        self.waiting -= len(ids)
        return float(np.mean((successes > 0) & (successes < trials)))


def drawn_ahead(batches: Iterable[Batch], ahead: int) -> Iterator[Batch]:
    """Yields the batches, each drawn `ahead` batches before it is needed, as a loader with workers
    does.
    """
    drawn = deque()
    for batch in batches:
        drawn.append(batch)
        if len(drawn) > ahead:
            yield drawn.popleft()
    yield from drawn


def train(selector: str, steps: int, *, ahead: int = 0, seed: int = 0) -> tuple[list[float], int]:
    """Returns the share of informative groups of each batch, and the most batches by which feedback
    was late.
    """
    import jax
    import optax
    from transformers import AutoTokenizer
    from tunix.models.qwen2.model import ModelConfig
    from tunix.models.qwen2.params import create_model_from_safe_tensors
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    from jaxrft.assets import TINY
    from jaxrft.tasks import builtin

    rows = builtin.load("digits")
    session = Session(selectors.make(selector, GENERATIONS), len(rows.prompts), seed)
    columns = {"prompts": rows.prompts, "answer": rows.columns["answer"]}
    chosen = Chosen(session, columns, steps, batch_size=TASKS)
    shares = []

    def exact(prompts, completions, answer, task_id, mode, **_):
        texts = [text.removesuffix("<end>").strip() for text in completions]
        rewards = [float(text == right) for text, right in zip(texts, answer, strict=True)]
        if mode == "train":
            shares.append(chosen.record(task_id, rewards))
        return rewards

    rollout = RolloutConfig(
        max_tokens_to_generate=COMPLETION_TOKENS,
        max_prompt_length=PROMPT_TOKENS,
        kv_cache_size=PROMPT_TOKENS + COMPLETION_TOKENS,
        temperature=1.0,
        top_p=1.0,
    )

    def batches() -> Iterator[Batch]:
        for step, batch in enumerate(drawn_ahead(chosen, ahead)):
            # without it tunix samples all steps with one key
            rollout.seed = jax.random.PRNGKey(seed * steps + step)
            yield batch

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    shape = ModelConfig(
        num_layers=2,
        vocab_size=96,
        embed_dim=64,
        hidden_dim=128,
        num_heads=4,
        head_dim=16,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    training = RLTrainingConfig(
        actor_optimizer=optax.adamw(1e-4),
        eval_every_n_steps=steps + 1,
        max_steps=steps,
        mini_batch_size=TASKS,
        train_micro_batch_size=TASKS,
        pbar_description=None,
    )
    cluster = RLCluster(
        actor=create_model_from_safe_tensors(TINY, shape, mesh),
        tokenizer=AutoTokenizer.from_pretrained(TINY),
        cluster_config=ClusterConfig(
            role_to_mesh=dict.fromkeys((Role.ACTOR, Role.ROLLOUT, Role.REFERENCE), mesh),
            training_config=training,
            rollout_config=rollout,
        ),
    )
    algorithm = GRPOConfig(num_generations=GENERATIONS, num_iterations=1, beta=0.0, epsilon=0.2)
    GRPOLearner(cluster, algorithm, reward_fns=exact).train(batches())
    return shares, chosen.late


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--selector", default="adaptive", choices=[*selectors.SELECTORS])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ahead", type=int, default=0, help="batches drawn before they are needed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shares, late = train(options.selector, options.steps, ahead=options.ahead, seed=options.seed)
    share = f"informative groups {np.mean(shares):.3f} of {len(shares)} batches"
    print(f"{options.selector}: {share}, feedback at most {late} batches late")
