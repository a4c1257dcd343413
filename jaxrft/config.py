"""The configuration of a run: frozen dataclasses, read from a configs/*.py, changed by flags,
written as JSON.
"""

import contextlib
import dataclasses
import datetime
import difflib
import json
import math
import os
import re
import runpy
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

from jaxrft.errors import InputError
from jaxrft.fields import (
    INT32,
    Checked,
    FilePath,
    Seed,
    bare,
    expand_path,
    shown,
    type_mismatches,
)
from jaxrft.host.files import JSON, UnreadableJSON, parse_json, read_regular
from jaxrft.host.yaml_files import parse_yaml
from jaxrft.suites import SUITES

MIN_TEMPERATURE = 1e-6  # logits below 1e30 stay float32
MAX_PENALTY = 1e3  # as a factor or a divisor of logits, which thus stay finite
MAX_STOP = 1024  # bytes of stop strings, each a state that every token moves
MIN_TIMEOUT = 1e-3  # seconds, the unit of poll(), of which none is no time at all
MAX_TIMEOUT = 2**31 // 1000  # seconds; poll() counts milliseconds in 32 bits
MAX_WORKERS = 1024  # processes; the largest hosts have fewer cores
MAX_REPLAYED = 2**40  # tokens of a replay buffer, 12 TB: more than the devices of any host hold

# Fields that say how completions are sampled, which evaluations may have for themselves.
SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("stop", "max_completion_length"),
)

# Resume compatibility: whether a resumed run may have another value of a field. Without a rule it
# may.
FIXED = {
    "resume": "fixed"
}  # random streams, selector state and replayed groups depend on the value
FIXED_WITH_REPLAY = {"resume": "fixed with replay"}
CONTENT = {"resume": "content"}  # the value may change, but not the content of the files it names


@dataclass(frozen=True)
class TasksConfig:
    """Where tasks come from."""

    source: FilePath = ""
    """A .parquet, .jsonl, .json or .csv file, `builtin:NAME` for a generated family,
    `gym:FAMILY[?OPTION=VALUE&...]` for one of reasoning_gym, `tfds:NAME[/CONFIG][:VERSION]` for a
    prepared TFDS data set, or `hub:OWNER/NAME[@REVISION]` for one of the Hugging Face hub."""
    split: str = "train"
    """Which split of a TFDS or hub data set."""
    subset: str | None = None
    """Which configuration of a hub data set; needed only where there are several."""
    data_dir: FilePath | None = None
    """Folder of the prepared TFDS data sets; TFDS' own default otherwise."""
    name: str = ""
    """Name of the set in metrics; that of the suite, file, family or data set by default."""
    suite: str | None = None
    """The benchmark that the source holds, whose columns, prompt and, of held-out sets, reward and
    domains are used: gsm8k, math500, aime24, aime25, amc23, minerva_math, olympiadbench or
    gpqa_diamond."""
    prompt_column: str | None = None
    """Column of the prompts; found by itself for the columns of TRL, verl, GURU and GSM8K."""
    answer_column: str | None = None
    """Column of the ground truths, handed to rewards as `answer`; found by itself for the columns
    of TRL, verl, GURU and GSM8K."""
    pass_rate_columns: tuple[str, ...] = ()
    """Columns with the pass rates of reference policies, weakest policy first."""
    embeddings: FilePath | None = None
    """A .safetensors file of `jaxrft prepare embeddings` with a row for every prompt, for selectors
    that use the similarity of prompts."""
    domain_column: str | None = None
    """Column of the tasks' domains; `domain` if there is such a column, else the name of the set is
    the domain of all its tasks."""
    system_prompt: str | None = None
    """System message put before prompts that have none. If the tasks have a column of this name,
    its text takes precedence for the tasks that have one."""
    limit: int | None = None
    """Use only the first `limit` tasks."""
    reward: str | None = None
    """Of a held-out set, the reward that grades it; that of its suite, else `rewards` by
    default."""
    num_samples: int | None = None
    """Of a held-out set, samples a task; evaluation.num_samples by default."""
    weight: float | None = None
    """In a mixture, the set's share of the pool relative to the other weights. Sets are thinned at
    random, by the seed, to the largest pool in which all shares hold; no task is repeated. Without
    weights every task is in the pool."""

    @property
    def title(self) -> str:
        """Returns the name of the set.

        This is `name` if given, else that of the suite, the file, the built-in family or the data
        set.
        """
        if self.name or self.suite:
            return self.name or str(self.suite)
        kind, _, rest = self.source.partition(":")
        if kind in ("tfds", "gym"):  # NAME/CONFIG:VERSION, NAME?OPTION=VALUE
            return re.split("[/:?]", rest)[0]
        return rest.rsplit("/", 1)[-1] if kind in ("builtin", "hub") else Path(self.source).stem

    @property
    def graded_by(self) -> str | None:
        """Returns the reward that grades a held-out set; None for those of the config."""
        if self.reward is not None or self.suite is None:
            return self.reward
        return SUITES[self.suite].reward


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out tasks."""

    tasks: tuple[TasksConfig, ...] = ()
    """Held-out sets; each gives eval/<name>/greedy, eval/<name>/avg@k, eval/<name>/pass@k for k =
    1, 2, 4, ..., num_samples, eval/<name>/maj@k where rewards extract answers, lengths, and avg@k
    by domain."""
    num_samples: int = 8
    """Samples a task (the k of avg@k and the largest of pass@k); 0 = greedy only."""
    temperature: float | None = None
    """Temperature of the samples; that of training by default."""
    top_p: float | None = None
    """Nucleus of the samples; that of training by default."""
    top_k: int | None = None
    """Likeliest tokens that are sampled among; as in training by default, 0 = all."""
    min_p: float | None = None
    """Least probability of a token, as a share of the likeliest's; as in training by default."""
    repetition_penalty: float | None = None
    """Repetition penalty, of greedy completions too; as in training by default."""
    stop: tuple[str, ...] | None = None
    """Stop strings, of greedy completions too; as in training by default."""
    max_completion_length: int | None = None
    """Tokens, of greedy completions too; as in training by default."""
    batch_size: int | None = None
    """Tasks rolled out at once; the training batch size by default."""


@dataclass(frozen=True)
class SelectConfig:
    """The selector of the next tasks, and the union of the selectors' hyper-parameters."""

    name: str = field(default="uniform", metadata=FIXED)
    """Selector: uniform, easy_to_hard, mopps, greso, retire, bots, dots or adaptive. adaptive needs
    nothing but the tasks, bots the pass rates of reference policies on them."""
    order: Literal["shuffled", "replacement", "sequential"] = "shuffled"
    """uniform: epochs in random order, every batch drawn afresh, or epochs in the order of the
    table.
    """
    decay: float = 0.1
    """bots: pull of the posterior towards its prior each step, in [0, 1]; 0 keeps all evidence."""
    rho: float = 0.1
    """bots: weight of implicit against explicit evidence, in [0, 1]."""
    momentum: float = 0.9
    """bots: smoothing of the capability estimated on each batch, in [0, 1)."""
    per_domain: bool = field(default=False, metadata=FIXED)
    """bots: estimate the capability for each domain; helps where domains improve at different
    rates. False is as in the paper.
    """
    balance: Literal["none", "proportional", "equal"] = "none"
    """Slots of a batch by domain: none = not balanced, proportional to the tasks of each, or equal.
    """
    target: float = 0.5
    """bots, mopps, dots: pass rate whose neighbors are chosen, in (0, 1)."""
    prior: tuple[float, float] = (1.0, 1.0)
    """bots, mopps: pseudo-successes and pseudo-failures of a task not seen yet."""
    discount: float = 0.5
    """mopps: factor on a task's evidence at its next visit, in [0, 1]."""
    candidates: int = 8
    """mopps: size of the candidate pool, in multiples of batch_size."""
    explore: float = 0.5
    """greso: initial base b of the probability b^z with which a task is rolled out again after z
    zero-variance visits in a row, in [0.05, 0.95]."""
    explore_step: float = 0.01
    """greso: change of the base b per step, in [0, 1)."""
    zero_variance: float = 0.25
    """greso: target fraction of zero-variance groups, in [0, 1]."""
    retire_above: float = 0.9
    """retire: a task is retired while its last pass rate is at least this, in (0, 1]."""
    review: float = 0.02
    """retire: share of the slots of a batch for retired tasks, in [0, 1]."""
    predictor: FilePath | None = field(default=None, metadata=CONTENT)
    """dots: a .safetensors file of `jaxrft prepare predictor`, trained on embeddings such as those
    of the tasks.
    """
    num_references: int = field(default=256, metadata=CONTENT)
    """dots: tasks of a reference set. Their measured pass rates predict those of all other tasks.
    Reference groups whose rewards differ are trained on, in place of newly chosen ones."""
    reference_every: int = 2
    """dots: steps from one reference set to the next."""
    temperature: float = 1e-3
    """dots: tasks are drawn with probability proportional to exp(-|pass rate - target| /
    temperature)."""
    utility: Literal["informative", "signal"] = "informative"
    """adaptive: the value of rolling out a task: informative = the probability that the rewards of
    its group differ (suits scale_rewards group); signal = the mean of 4 p (1 - p), p its pass rate
    (suits scale_rewards none)."""
    kappa: float = 0.3
    """adaptive: exploration weight: how much the standard deviation of a task's believed pass rate
    adds to its utility, 0 or more."""
    epsilon: float = 0.02
    """adaptive: share of the slots for the tasks rolled out longest ago, in [0, 1]."""
    per_token: bool = field(default=False, metadata=FIXED)
    """adaptive: utility per expected completion token, not per rollout."""
    embeddings: Literal["policy", "none"] = field(default="none", metadata=CONTENT)
    """adaptive, dots: embeddings of tasks without `tasks.embeddings`: policy = computed by the
    policy at the start, or none."""


Adapted = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters that are trained in place of the weights, W + alpha / rank * A B; they
    start at B = 0.
    """

    rank: int = 0
    """Rank of the adapters; 0 = finetune every weight. LoRA wants about ten times the
    learning_rate.
    """
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    targets: tuple[Adapted, ...] = get_args(Adapted)
    """Weights of each layer that have adapters: of attention (q, k, v, o) and of the MLP (gate, up,
    down).
    """


@dataclass(frozen=True)
class ReplayConfig:
    """Groups of earlier steps that are trained on again in place of fresh rollouts."""

    capacity: int = field(default=0, metadata=FIXED)
    """Size of the replay buffer, of the latest groups whose rewards were not all equal; 0 = no
    replay."""
    fresh_fraction: float = 0.5
    """Share of batch_size that is rolled out in a step; all of it while the buffer has too few
    groups for the rest."""
    max_age: int | None = None
    """Steps after which a group is not trained on again; no limit by default."""
    draw: Literal["uniform", "advantage"] = "uniform"
    """Which groups are drawn: any, or with chances in proportion to their mean |advantage|."""
    clip_center: Literal["behavior", "proximal"] = "behavior"
    """Policy around which the ratios of replayed tokens are clipped. behavior: the one that sampled
    them, as in the paper of DOTS. proximal: the one before the update, as in its published code,
    which costs another forward pass over the batch."""


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh; their product is the number of devices, -1 takes the remaining
    devices."""

    data: int = -1
    """Copies of the policy, each with its own rows."""
    fsdp: int = 1
    """Shards of parameters and optimizer state, each with its own rows."""
    model: int = 1
    """Shards of heads, hidden units and vocabulary (tensor parallelism)."""


@dataclass(frozen=True)
class Config(Checked):
    """A run of `jaxrft train`.

    In paths, ~ and environment variables are expanded; see `jaxrft.fields` for the rules of all
    values.
    """

    model: FilePath = field(metadata=CONTENT)
    """Folder of a Hugging Face checkpoint, config.json, safetensors and tokenizer, or its id on the
    hub, owner/name[@revision], which is downloaded unless it is in the cache."""
    tasks: TasksConfig | tuple[TasksConfig, ...] = field(metadata=CONTENT)
    """Training tasks: one set, or a mixture of several."""
    output_dir: FilePath
    """Folder of the run: metrics.jsonl, config.json, checkpoints/, policy/, and adapter/ with
    LoRA.
    """
    evaluation: EvalConfig = EvalConfig()
    select: SelectConfig = SelectConfig()
    lora: LoRAConfig = field(default=LoRAConfig(), metadata=CONTENT)
    replay: ReplayConfig = ReplayConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: bool = False
    """Run as one of several processes. TPU pods and SLURM jobs find each other by themselves;
    elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."""

    steps: int = 100
    """Training steps; each selects batch_size tasks, rolls them out and updates the policy."""
    seed: Seed = field(default=0, metadata=FIXED)
    """Seed of every random stream."""
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata=CONTENT)
    """Number type of the policy's arithmetic; trained parameters, optimizer state and the exported
    policy are always float32. In bfloat16 rollout and learner round differently, so that the first
    ratios are 1 only to within a few per cent."""
    gather_for_rollout: bool = True
    """Gather the policy over `fsdp` once a rollout. False gathers a layer at a time for every
    token, much slower, for when a copy in `dtype` (split over `model` only) does not fit next to
    the training state."""

    attention: Literal["xla", "pallas", "cudnn"] = "xla"
    """Implementation of attention: xla everywhere; pallas, a kernel for TPUs with which completions
    are decoded, and which reads the cache up to the current token only; cudnn for updates on GPUs,
    which keeps no scores. The last two have not been timed yet.
    """

    batch_size: int = field(default=32, metadata=FIXED)
    """Tasks per step."""
    num_generations: int = field(default=8, metadata=FIXED)
    """Rollouts per task; at least 2, since advantages compare them."""
    dynamic_sampling: int = 0
    """Rounds a step in which more tasks may be chosen and rolled out, at most batch_size at a time,
    in place of those whose successes are all equal (DAPO); 0 = none. All rollouts are counted, and
    the selector learns from all of them.
    """
    chat_template_kwargs: str = field(default="{}", metadata=CONTENT)
    """Arguments of chat templates next to the messages, as JSON, such as {"enable_thinking":
    false}. A column of the same name has those of single tasks."""
    chat_template_date: str | None = field(default=None, metadata=CONTENT)
    """Today's date for chat templates that write it, such as 2025-01-31; by default
    the first day of the run in output_dir, so that its prompts do not change."""
    max_prompt_length: int = field(default=1024, metadata=CONTENT)
    """Longest prompt, in tokens; tasks with longer ones are dropped and counted, never cut."""
    max_completion_length: int = field(default=1024, metadata=FIXED_WITH_REPLAY)
    """Longest completion, in tokens; sampling stops there."""
    max_concurrent_rows: int = 0
    """Completions decoded at once; the other prompts wait, and enter when half of the completions
    have ended. 0 = as many as the devices have memory for, by estimate. An evaluation decodes at
    least two groups on each shard. It changes no number beyond rounding.
    """
    temperature: float = 1.0
    """Sampling temperature; ratios and log-probabilities are taken at it too."""
    top_p: float = 1.0
    """Nucleus sampling; 1 = off."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 = off."""
    min_p: float = 0.0
    """Sample no token less likely than this share of the likeliest's probability; 0 = off. Applied
    last, as in transformers: repetition_penalty, temperature, top_k, top_p, min_p."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that stand in the prompt or the completion so far, or multiplies
    them where they are below 0; 1 = off, and above 1 they become less likely. Ratios and
    log-probabilities are those of the policy without it."""
    stop: tuple[str, ...] = ()
    """Stop strings: a completion is finished by the token in which one of them ends, wherever in a
    token it begins or ends, as in transformers. In a shell $'\\n\\n' is two ends of lines."""

    rewards: tuple[str, ...] = ("math",)
    """Names (exact, number, gsm8k, math, choice, code, code_solved, gym, gym_solved, logic,
    logic_solved) or paths, package.module:function or folder/file.py:function; one reward each.
    Modules are also looked for next to the config, then in the current directory."""
    reward_path: tuple[FilePath, ...] = ()
    """Folders in which the files of rewards are looked for; that of the config is added if one of
    them lies there."""
    reward_weights: tuple[float, ...] | None = None
    """Weights of the rewards in the sum that is trained on; 1 each by default. A reward that is
    None does not apply to the sample and is left out; a sample whose success is None, or on which a
    grader failed, is not learned from."""
    overlong_buffer: int = 0
    """Tokens before max_completion_length over which a penalty grows from 0 to overlong_penalty; 0
    = no penalty. It lowers the reward that is trained on, never the success."""
    overlong_penalty: float = 1.0
    """Penalty of a completion of max_completion_length tokens."""
    success_reward: str | None = None
    """Reward in [0, 1] that selectors count as success. By default, of each task, the first of
    `rewards` that is not None for it, among those whose values lie in [0, 1]."""
    skip_special_tokens: bool = False
    """Tokens left out of the completions that rewards read: False = only BOS, EOS and padding;
    True, as TRL, all special tokens, such as <think> where it is one.
    """
    reward_timeout: float = 10.0
    """Seconds one completion's grading may take before its worker is killed; `math` gives up by
    itself before that.
    """
    reward_completions: Literal["trl", "text"] = "trl"
    """Form of a completion whose prompt is a list of messages, for rewards: trl = a list with the
    assistant's message, or text; completions of text prompts are text."""
    reward_workers: int | None = None
    """Grading processes a host; the number of cores, at most 8, by default."""

    loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "dapo"
    """Clipped objective. grpo: mean over sequences of the mean over their tokens; dapo: mean over
    all tokens; dr_grpo: sum over tokens, divided by rows x max_completion_length; gspo: as grpo,
    with the ratio of the whole sequence (it wants an epsilon of about 3e-4); cispo: mean over all
    tokens, each with a gradient, weighted by its ratio up to 1 + epsilon_high."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divisor of advantages: the standard deviation of the group, that of the batch, or none."""
    epsilon: float = 0.2
    """Clip range of the ratio below 1, and above it unless epsilon_high is given."""
    epsilon_high: float | None = None
    """Clip range of the ratio above 1 (clip-higher)."""
    delta: float | None = None
    """Bound, above 1 + epsilon_high, of the ratio of tokens with a negative advantage (two-sided
    clipping).
    """
    kl_coef: float = 0.0
    """Weight of the KL divergence between the policy and the starting policy; 0 = none, and no
    forward pass of the latter."""
    kl_estimator: Literal["k3", "k3_corrected"] = "k3"
    """k3, whose gradient is on average that of KL(reference || policy), or, with a factor policy /
    what sampled the token, k3_corrected, whose gradient is that of KL(policy || reference)
    (DeepSeek-V3.2, TRL's default)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 = none."""
    mask_truncated_completions: bool = False
    """Leave completions without an end out of the loss."""
    importance_sampling_correction: Literal["none", "token", "sequence"] = field(
        default="none", metadata=FIXED_WITH_REPLAY
    )
    """Multiplies token losses by an importance weight: the probability under the policy, over that
    under what top_p, top_k, min_p and repetition_penalty really sampled from; of each token or of
    the whole sequence."""
    importance_sampling_mode: Literal["truncate", "mask"] = "truncate"
    """truncate sets an importance weight above importance_sampling_cap to the cap; mask sets it to
    0, which drops the token or sequence."""
    importance_sampling_cap: float = 2.0
    """Largest importance weight; see importance_sampling_mode."""
    num_iterations: int = 1
    """Passes over the rollouts of each step."""
    mini_batch_size: int | None = None
    """Tasks per optimizer update; batch_size by default."""
    micro_batch_size: int | None = None
    """Completions of full length for which a forward and backward pass has memory; changes no
    number. A pass computes as many tokens, or fewer where more would be no faster."""
    remat: Literal["auto", "full", "dots", "none"] = "auto"
    """Activations that the backward pass recomputes: full = all of every layer, for the least
    memory; dots = all but results of matrix products; none = none, the fastest; auto = the fastest
    that the devices have memory for, by estimate.
    """

    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Optimizer updates of linear warm-up."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up: stays, or falls linearly or along half a
    cosine until the last update of `steps`. A run that resumes with other `steps` follows the
    schedule of these from there on."""
    min_learning_rate_ratio: float = 0.0
    """Final learning rate of a schedule that falls, as a share of learning_rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Largest global norm of a gradient; a larger gradient is scaled down to it."""
    max_skipped_updates: int = 10
    """An update whose loss or gradient is not finite is skipped. After this number in a row the
    run stops, with the batch of the last in <output_dir>/not-finite-<step>.safetensors."""

    eval_steps: int = 0
    """Steps between evaluations, which also take place at the start and the end; 0 = never."""
    save_steps: int = 50
    """Steps between checkpoints; the last step has one too."""
    keep_checkpoints: int = 3
    """Number of newest checkpoints that are kept."""
    keep_best: str | None = None
    """Metric of an evaluation, such as gsm8k_test/avg@4: the policy of the step at which it was
    highest is kept in <output_dir>/best, a Hugging Face folder. None = only the last policy is
    exported."""
    early_stopping_patience: int = 0
    """Evaluations without an improvement of keep_best after which the run ends, saved and exported;
    0 = it takes all steps."""
    resume: Literal["auto", "never"] = "auto"
    """auto resumes the run in output_dir if there is one; never refuses a folder that holds a run.
    """
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that get the metrics too, each by its package: tensorboard (tensorboardX), wandb
    (WANDB_MODE=offline needs no network), trackio. A resumed run continues its tracked run.
    """
    log_completions_steps: int = 10
    """Steps between samples of completions on the console, of which all are saved in
    <output_dir>/completions; 0 = never."""

    def __post_init__(self) -> None:
        """Expands paths; raises InputError for a value of another type or out of its range."""
        if isinstance(self.chat_template_kwargs, dict):
            text = json.dumps(self.chat_template_kwargs, default=str)
            raise InputError(f"chat_template_kwargs is a dict: it must be JSON text, {text!r:.200}")
        super().__post_init__()
        for name, value, expected in type_mismatches("", self, Config):
            raise InputError(f"{name} is {shown(value)}: it must be {expected}")
        check(self)

    @property
    def task_sets(self) -> tuple[TasksConfig, ...]:
        """Returns the training sets as a tuple, also where there is only one."""
        return (self.tasks,) if isinstance(self.tasks, TasksConfig) else self.tasks

    @property
    def clip_above(self) -> float:
        """Returns the clip range of the ratio above 1: `epsilon_high` if given, else `epsilon`."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def tasks_per_update(self) -> int:
        """Counts the tasks of one optimizer mini-batch."""
        return self.batch_size if self.mini_batch_size is None else self.mini_batch_size

    @property
    def updates_per_step(self) -> int:
        """Counts the optimizer updates of a step."""
        return self.num_iterations * (self.batch_size // self.tasks_per_update)

    @property
    def num_updates(self) -> int:
        """Counts the optimizer updates of the run."""
        return self.steps * self.updates_per_step

    @property
    def fresh_batch_size(self) -> int:
        """Counts the tasks that a step rolls out when replay fills the rest of the batch."""
        return (
            round(self.replay.fresh_fraction * self.batch_size)
            if self.replay.capacity
            else self.batch_size
        )

    @property
    def eval_batch_size(self) -> int:
        """Counts the tasks that an evaluation rolls out at once."""
        return self.batch_size if self.evaluation.batch_size is None else self.evaluation.batch_size

    def samples_of(self, tasks: TasksConfig) -> int:
        """Returns the number of samples a task of a held-out set."""
        return self.evaluation.num_samples if tasks.num_samples is None else tasks.num_samples

    @property
    def rows_per_micro_batch(self) -> int:
        """Counts the completions of one forward and backward pass."""
        rows = self.tasks_per_update * self.num_generations
        return rows if self.micro_batch_size is None else self.micro_batch_size


def graded_by(config: Config, tasks: TasksConfig) -> Config:
    """Returns the config whose rewards are those that grade a held-out set."""
    if tasks.graded_by is None:
        return config
    return dataclasses.replace(
        config, rewards=(tasks.graded_by,), reward_weights=None, success_reward=None
    )


# The groups of the help page. A field that no group names is in that of the field before it.
GROUPS = {
    "model and data": (
        "model",
        "lora",
        "tasks",
        "max_prompt_length",
        "chat_template_kwargs",
        "chat_template_date",
        "seed",
    ),
    "rollouts": (
        "steps",
        "batch_size",
        "num_generations",
        "max_completion_length",
        "max_concurrent_rows",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "stop",
        "gather_for_rollout",
    ),
    "rewards": (
        "rewards",
        "reward_path",
        "reward_weights",
        "overlong_buffer",
        "overlong_penalty",
        "success_reward",
        "skip_special_tokens",
        "reward_timeout",
        "reward_completions",
        "reward_workers",
    ),
    "selection": ("select", "dynamic_sampling", "replay"),
    "update": ("loss_type",),  # and all below it, up to max_skipped_updates
    "evaluation": ("evaluation", "eval_steps", "keep_best"),
    "checkpoints and logs": (
        "output_dir",
        "save_steps",
        "keep_checkpoints",
        "resume",
        "log_completions_steps",
    ),
    "devices": ("mesh", "distributed", "dtype", "attention"),
}

# Fields by their range; those that may be None are not checked then.
AT_LEAST_ONE = (
    "steps batch_size max_prompt_length max_completion_length num_iterations reward_workers "
    "max_skipped_updates keep_checkpoints save_steps evaluation.batch_size "
    "evaluation.max_completion_length"
).split()
NOT_NEGATIVE = (
    "max_concurrent_rows top_k kl_coef entropy_coef overlong_penalty learning_rate "
    "warmup_steps weight_decay early_stopping_patience evaluation.top_k eval_steps seed "
    "log_completions_steps dynamic_sampling evaluation.num_samples"
).split()
POSITIVE = ("epsilon_high", "importance_sampling_cap", "max_grad_norm", "lora.alpha")


def _largest_of_evaluation(c: Config) -> str:
    """Names the largest size of an evaluation, the one to lower."""
    sizes = {
        "evaluation.batch_size": c.eval_batch_size,
        "evaluation.num_samples": c.evaluation.num_samples,
        "evaluation.max_completion_length": c.evaluation.max_completion_length or 0,
    }
    return max(sizes, key=lambda name: sizes[name])


def check(config: Config) -> None:
    """Raises InputError, one sentence, for the first value that cannot work."""
    for requirements in (_ranges, _loss, _rewards, _replay, _update, _schedule, _limits):
        _require(config, requirements(config))
    check_templates(config)
    check_sets(config)
    check_held_out(config)
    if config.keep_best is not None:
        check_best(config)
    if config.select.name == "dots":
        check_dots(config)
    _require(config, _unused(config))


Requirement = tuple[str, bool, str]  # a dotted field, whether it fits, and what it must be
SIZES = ("batch_size", "num_generations", "max_prompt_length", "max_completion_length")


def _require(config: Config, requirements: list[Requirement]) -> None:
    """Raises InputError for the first field that does not fit."""
    for name, fits, expected in requirements:
        if not fits:
            raise InputError(f"{name} is {shown(attrgetter(name)(config))}: it must be {expected}")


def _each(
    config: Config, names: Sequence[str], fits: Callable[[float], bool], expected: str
) -> Iterator[Requirement]:
    """Yields the requirement that each of the fields is None or fits."""
    for name in names:
        value = attrgetter(name)(config)
        yield name, value is None or fits(value), expected


def _ranges(config: Config) -> list[Requirement]:
    """Returns the requirements that each field lies in its range, whatever the others are."""
    c = config
    return [
        *_each(c, AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        *_each(c, NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        *_each(c, POSITIVE, lambda value: value > 0, "positive"),
        (
            "num_generations",
            c.num_generations >= 2,
            "at least 2, because an advantage compares the samples of a task",
        ),
        ("temperature", c.temperature > 0, "positive; evaluation is greedy by itself"),
        ("top_p", 0 < c.top_p <= 1, "in (0, 1]"),
        *_each(c, ("evaluation.top_p",), lambda value: 0 < value <= 1, "in (0, 1]"),
        *_each(c, ("min_p", "evaluation.min_p"), lambda value: 0 <= value <= 1, "in [0, 1]"),
        *_each(
            c,
            ("repetition_penalty", "evaluation.repetition_penalty"),
            lambda value: 1 / MAX_PENALTY <= value <= MAX_PENALTY,
            f"in [{1 / MAX_PENALTY:g}, {MAX_PENALTY:g}]; 1 = off",
        ),
        *_stop_strings("stop", c.stop),
        *_stop_strings("evaluation.stop", c.evaluation.stop or ()),
        *_each(
            c,
            ("evaluation.temperature",),
            lambda value: value >= MIN_TEMPERATURE,
            f"at least {MIN_TEMPERATURE:g}; evaluation is greedy by itself too",
        ),
    ]


def _loss(config: Config) -> list[Requirement]:
    """Returns the requirements of the loss."""
    c = config
    return [
        ("epsilon", 0 < c.epsilon < 1, "in (0, 1)"),
        (
            "delta",
            c.delta is None or c.loss_type != "cispo",
            "None with cispo, which bounds all ratios from above",
        ),
        (
            "delta",
            c.delta is None or c.delta > 1 + c.clip_above,
            f"above 1 + epsilon_high, {1 + c.clip_above:g}",
        ),
        (
            "importance_sampling_mode",
            c.importance_sampling_mode == "truncate" or c.importance_sampling_correction != "none",
            "truncate while importance_sampling_correction is none, which weighs nothing: set "
            "that too",
        ),
        (
            "kl_estimator",
            c.kl_estimator == "k3" or c.kl_coef > 0,
            "k3 while kl_coef is 0, which takes no KL: set kl_coef too",
        ),
    ]


def _rewards(config: Config) -> list[Requirement]:
    """Returns the requirements of the rewards."""
    c = config
    return [
        (
            "overlong_buffer",
            0 <= c.overlong_buffer <= c.max_completion_length,
            f"in tokens, from 0 to max_completion_length {c.max_completion_length}",
        ),
        ("reward_timeout", c.reward_timeout > 0, "positive, in seconds"),
        ("rewards", len(c.rewards) >= 1, "at least one reward"),
        (
            "reward_weights",
            c.reward_weights is None or len(c.reward_weights) == len(c.rewards),
            "one for each reward",
        ),
        (
            "success_reward",
            c.success_reward in (None, *c.rewards),
            f"one of the rewards {', '.join(c.rewards)}",
        ),
    ]


def _replay(config: Config) -> list[Requirement]:
    """Returns the requirements of the replay of groups."""
    c = config
    return [
        ("replay.capacity", c.replay.capacity >= 0, "0 or more; 0 = no replay"),
        (
            "replay.fresh_fraction",
            c.replay.capacity == 0 or 0 < c.fresh_batch_size < c.batch_size,
            f"such that at least one of batch_size {c.batch_size} tasks is fresh and one replayed",
        ),
        (
            "replay.capacity",
            c.replay.capacity == 0 or c.replay.capacity >= c.batch_size - c.fresh_batch_size,
            f"at least {c.batch_size - c.fresh_batch_size}, the groups that a step draws",
        ),
        ("replay.max_age", c.replay.max_age is None or c.replay.max_age >= 1, "at least 1 step"),
    ]


def _update(config: Config) -> list[Requirement]:
    """Returns the requirements of the weights that an update trains, and of its batches."""
    c = config
    return [
        ("lora.rank", c.lora.rank >= 0, "0 or more; 0 finetunes every weight"),
        (
            "lora.targets",
            len(c.lora.targets) >= 1,
            "at least one weight; lora.rank 0 finetunes every weight",
        ),
        (
            "mini_batch_size",
            divides(c.tasks_per_update, c.batch_size),
            f"a divisor of batch_size {c.batch_size}",
        ),
        (
            "micro_batch_size",
            divides(c.rows_per_micro_batch, c.tasks_per_update * c.num_generations)
            and (
                divides(c.rows_per_micro_batch, c.num_generations)
                or divides(c.num_generations, c.rows_per_micro_batch)
            ),
            f"in rows, a divisor of a mini-batch's {c.tasks_per_update * c.num_generations} "
            f"and a divisor or a multiple of num_generations {c.num_generations}",
        ),
    ]


def _stop_strings(name: str, stop: tuple[str, ...]) -> list[Requirement]:
    """Returns the requirements of stop strings."""
    size = sum(len(text.encode()) for text in stop)
    return [
        (name, all(stop), "texts of at least one character; leave the empty one out"),
        (name, size <= MAX_STOP, f"at most {MAX_STOP:,} bytes of UTF-8 in all, not {size:,}"),
    ]


def _schedule(config: Config) -> list[Requirement]:
    """Returns the requirements of the learning rate's schedule."""
    c = config
    decays = c.learning_rate_schedule != "constant"
    return [
        ("min_learning_rate_ratio", 0 <= c.min_learning_rate_ratio <= 1, "in [0, 1]"),
        (
            "min_learning_rate_ratio",
            decays or c.min_learning_rate_ratio == 0,
            "left as it is while learning_rate_schedule is constant: set that too",
        ),
        (
            "warmup_steps",
            not decays or c.warmup_steps < c.num_updates,
            f"less than the {c.num_updates:,} updates of the run, over the rest of which the "
            "learning rate falls",
        ),
    ]


def _limits(config: Config) -> list[Requirement]:
    """Returns the requirements that keep values within the limits of a machine."""
    c = config
    positions = c.max_prompt_length + c.max_completion_length
    rows = c.batch_size * c.num_generations
    evaluated = c.eval_batch_size * max(1, c.evaluation.num_samples)
    eval_length = c.evaluation.max_completion_length or c.max_completion_length
    eval_positions = c.max_prompt_length + eval_length
    return [
        (
            "temperature",
            c.temperature >= MIN_TEMPERATURE,
            f"at least {MIN_TEMPERATURE:g}, so that logits stay finite",
        ),
        ("reward_timeout", c.reward_timeout >= MIN_TIMEOUT, f"at least {MIN_TIMEOUT:g} seconds"),
        ("reward_timeout", c.reward_timeout <= MAX_TIMEOUT, f"at most {MAX_TIMEOUT:,} seconds"),
        ("reward_workers", (c.reward_workers or 0) <= MAX_WORKERS, f"at most {MAX_WORKERS:,}"),
        (
            "rewards",
            len(set(c.rewards)) == len(c.rewards),
            "different rewards: give one twice the weight instead",
        ),
        (
            "reward_weights",
            c.reward_weights is None or any(c.reward_weights),
            "not all 0, which leaves no reward",
        ),
        ("lora.targets", len(set(c.lora.targets)) == len(c.lora.targets), "different weights"),
        ("report_to", len(set(c.report_to)) == len(c.report_to), "different trackers"),
        (
            max(SIZES, key=lambda name: getattr(c, name)),  # the one to lower
            rows * positions <= INT32,
            "such that batch_size x num_generations x (max_prompt_length + "
            f"max_completion_length), {c.batch_size:,} x {c.num_generations:,} x {positions:,}, "
            f"is at most {INT32:,} tokens",
        ),
        (
            _largest_of_evaluation(c),
            evaluated * eval_positions <= INT32 or not c.evaluation.tasks,
            "such that evaluation.batch_size x evaluation.num_samples x (max_prompt_length + "
            f"max_completion_length), {c.eval_batch_size:,} x {c.evaluation.num_samples:,} x "
            f"{eval_positions:,}, is at most {INT32:,} tokens",
        ),
        (
            "replay.capacity",
            c.replay.capacity * c.num_generations * positions <= MAX_REPLAYED,
            f"at most {MAX_REPLAYED // (c.num_generations * positions):,} groups of "
            f"{c.num_generations:,} x {positions:,} tokens",
        ),
    ]


def _unused(config: Config) -> list[Requirement]:
    """Returns the requirements that fields without effect, by the values of others, have their
    defaults.
    """
    c = config
    weighed = c.importance_sampling_correction != "none"
    return [
        (
            "eval_steps",
            c.eval_steps == 0 or bool(c.evaluation.tasks),
            "0 while evaluation.tasks is (), nothing to evaluate on: give held-out tasks there too",
        ),
        (
            "early_stopping_patience",
            c.early_stopping_patience == 0 or c.keep_best is not None,
            "0 while keep_best is None: name the metric that has to improve in keep_best",
        ),
        (
            "overlong_penalty",
            c.overlong_buffer > 0 or c.overlong_penalty == Config.overlong_penalty,
            "left as it is while overlong_buffer is 0, no penalty: set overlong_buffer too",
        ),
        (
            "importance_sampling_cap",
            weighed or c.importance_sampling_cap == Config.importance_sampling_cap,
            "left as it is while importance_sampling_correction is none: set that too",
        ),
        *(
            (
                f"lora.{name}",
                c.lora.rank > 0 or getattr(c.lora, name) == getattr(LoRAConfig, name),
                "left as it is while lora.rank is 0, which finetunes every weight: set "
                "lora.rank too",
            )
            for name in ("alpha", "targets")
        ),
    ]


# Options of transformers' apply_chat_template that this package sets itself.
RESERVED_VARIABLES = frozenset(
    (
        "messages conversation chat_template add_generation_prompt continue_final_message "
        "tokenize padding truncation max_length return_tensors return_dict "
        "return_assistant_tokens_mask tokenizer_kwargs sanitize_control_tokens"
    ).split()
)


def check_templates(config: Config) -> None:
    """Raises InputError for arguments that chat templates cannot have."""
    try:
        check_variables(config.chat_template_kwargs)
    except ValueError as error:
        raise InputError(
            f"chat_template_kwargs is {config.chat_template_kwargs!r:.100}: {error}"
        ) from error
    date = config.chat_template_date
    with contextlib.suppress(ValueError):
        if date is None or datetime.date.fromisoformat(date).isoformat() == date:
            return
    raise InputError(f"chat_template_date is {date!r:.100}: it must be a date such as 2025-01-31")


def check_variables(value: object) -> dict[str, JSON]:
    """Returns the variables for chat templates in an object or its JSON text; raises ValueError, a
    phrase.
    """
    try:
        variables = parse_json(value, dict) if isinstance(value, str) else value
    except UnreadableJSON as error:
        raise ValueError(
            f'it must be a JSON object such as {{"enable_thinking": false}}, but {error}'
        ) from error
    if not isinstance(variables, dict) or not all(isinstance(name, str) for name in variables):
        raise ValueError('it must be an object such as {"enable_thinking": false}')
    if fixed := sorted(RESERVED_VARIABLES & variables.keys()):
        raise ValueError(f"{fixed[0]} is set by jaxrft: leave it out")
    for name in ("tools", "documents"):
        entries = variables.get(name)
        if entries is not None and not (
            isinstance(entries, list) and all(isinstance(each, dict) for each in entries)
        ):
            raise ValueError(f"{name} must be a list of objects")
    return variables


def check_best(config: Config) -> None:
    """Raises InputError when no evaluation measures the metric that chooses the best policy."""
    if config.eval_steps == 0:
        raise InputError(
            f"keep_best is {config.keep_best!r} but eval_steps is 0, never: set eval_steps too"
        )
    known = []
    for tasks in config.evaluation.tasks:
        k = config.samples_of(tasks)
        sampled = (f"avg@{k}", *(f"pass@{each}" for each in pass_at(k))) if k else ()
        rewards = (tasks.graded_by,) if tasks.graded_by else success_rewards(config)
        majority = (f"maj@{k}",) if k > 1 and has_majority(rewards) else ()
        known += [f"{tasks.title}/{kind}" for kind in ("greedy", *sampled, *majority)]
    if config.keep_best not in known:
        metrics = ", ".join(known) or "none without evaluation.tasks"
        raise InputError(
            f"keep_best is {config.keep_best!r}: it must be a metric of the evaluations, {metrics}"
        )


def pass_at(k: int) -> tuple[int, ...]:
    """Returns the k of pass@k for `k` samples: their number, and the powers of 2 below it."""
    powers = (1 << i for i in range(k.bit_length()))
    return (k, *(power for power in powers if power < k)) if k else ()


# rewards that extract an answer, on which samples can vote
VOTING = ("choice", "exact", "gsm8k", "number", "math")


def success_rewards(config: Config) -> tuple[str, ...]:
    """Returns the rewards that may be success, as far as the config says."""
    return config.rewards if config.success_reward is None else (config.success_reward,)


def has_majority(rewards: tuple[str, ...]) -> bool:
    """Checks whether each of the rewards that may be success extracts answers to vote on."""
    return all(name in VOTING for name in rewards)


def nearest_suite(name: str) -> str:
    """Returns the remedy for an unknown suite: one with a name like it, or all."""
    near = difflib.get_close_matches(name, SUITES, n=1)
    return f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(SUITES)}"


def check_held_out(config: Config) -> None:
    """Raises InputError for an unknown suite, and for fields that only held-out sets have."""
    for tasks in (*config.task_sets, *config.evaluation.tasks):
        if tasks.suite is not None and tasks.suite not in SUITES:
            hint = nearest_suite(tasks.suite)
            raise InputError(f"the suite of {tasks.source} is {shown(tasks.suite)}: {hint}")
    for tasks in config.task_sets:
        for name in ("reward", "num_samples"):
            if (value := getattr(tasks, name)) is not None:
                raise InputError(
                    f"{name} is {shown(value)} for the set {tasks.title}, but only held-out sets "
                    f"have one: set {'rewards' if name == 'reward' else 'num_generations'}"
                )
    length = config.evaluation.max_completion_length or config.max_completion_length
    most = INT32 // (config.eval_batch_size * (config.max_prompt_length + length))
    for tasks in config.evaluation.tasks:
        if tasks.num_samples is not None and not 0 <= tasks.num_samples <= most:
            raise InputError(
                f"num_samples is {tasks.num_samples} for the held-out set {tasks.title}: it must "
                f"be from 0 to {most:,}, so that a batch has at most {INT32:,} tokens"
            )


def check_dots(config: Config) -> None:
    """Raises InputError unless the config has a predictor, and embeddings of all tasks."""
    if config.select.predictor is None:
        raise InputError(
            "select.predictor is None, but select.name dots needs a file of `jaxrft prepare "
            "predictor`: name one"
        )
    bare = [tasks.title for tasks in config.task_sets if tasks.embeddings is None]
    if bare and config.select.embeddings == "none":
        raise InputError(
            f"{bare[0]} has no embeddings, which select.name dots needs: name a file of `jaxrft "
            "prepare embeddings` in `embeddings` of the set, or choose select.embeddings policy"
        )


def check_sets(config: Config) -> None:
    """Raises InputError for no training sets, sets of one name, and invalid weights."""
    if not config.task_sets:
        raise InputError("tasks is (): give at least one set of tasks")
    for name, sets in (("tasks", config.task_sets), ("evaluation.tasks", config.evaluation.tasks)):
        titles = [tasks.title for tasks in sets]
        if repeated := [title for title in titles if titles.count(title) > 1]:
            raise InputError(
                f"two sets of {name} are called {repeated[0]!r}: give each a `name` of its own"
            )
    for tasks in config.evaluation.tasks:
        if tasks.weight is not None:
            raise InputError(
                f"the held-out set {tasks.title} has a weight: only sets that are "
                "trained on have one"
            )
        if tasks.embeddings is not None:
            raise InputError(
                f"the held-out set {tasks.title} has embeddings: only sets that "
                "are trained on have some"
            )
    for tasks in config.task_sets:
        if tasks.weight is not None and not 0 < tasks.weight < math.inf:
            raise InputError(f"the weight of {tasks.title} is {tasks.weight}: it must be positive")
    remedies = {
        "weight": "give one to all of them or to none",
        "embeddings": "give them to all sets or to none",
    }
    for name, remedy in remedies.items():
        given = [getattr(tasks, name) is not None for tasks in config.task_sets]
        if any(given) and not all(given):
            bare = config.task_sets[given.index(False)].title
            raise InputError(f"{bare} has no {name} but other sets of tasks have: {remedy}")


def divides(divisor: int, number: int) -> bool:
    """Checks whether `divisor` is positive and divides `number`."""
    return divisor > 0 and number % divisor == 0


TEXT_FILES = (".yaml", ".yml", ".json")


def load(path: str) -> Config:
    """Returns the config that a file holds: a Python file that defines `config`, or a YAML or JSON
    file of its fields, such as the config.json of a run.

    A Python file is run. It is the user's own program: never load one that you have not read.
    """
    path = expand_path(path, "CONFIG")
    if not Path(path).is_file():
        run = Path(path) / "config.json"
        hint = f"; the config of that run is {run}" if run.is_file() else ""
        raise InputError(
            f"no config file {path}: give the path of a .py file that defines "
            f"`config = Config(...)`, or of a .yaml or .json file of its fields{hint}"
        )
    if Path(path).suffix in TEXT_FILES:
        return search_for_rewards(_load_text(Path(path)), Path(path).parent)
    if Path(path).suffix != ".py":
        raise InputError(
            f"config {path} is not a Python file, and no YAML or JSON: it must end in .py, "
            f"{', '.join(TEXT_FILES[:-1])} or {TEXT_FILES[-1]}"
        )
    file = str(Path(path).absolute())
    try:
        names = runpy.run_path(
            file, run_name="jaxrft_config"
        )  # which leaves no bytecode next to it
    except Exception as error:  # whatever the user's own program may raise
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        where = f"config {path}{_line_of(error, file)}"
        raise InputError(f"{where}: {reason}{_nearest_field(reason)}") from error
    config = names.get("config")
    if not isinstance(config, Config):
        raise InputError(f"config {path} defines no `config = Config(...)`")
    return search_for_rewards(config, Path(file).parent)


def _load_text(path: Path) -> Config:
    """Reads a config from a YAML or JSON file."""
    parse = partial(parse_json, kind=dict) if path.suffix == ".json" else parse_yaml
    try:
        tree = parse(read_regular(path))
    except (OSError, UnreadableJSON) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"config {path} cannot be read: {reason}; correct the file") from error
    return from_json(tree, f"config {path}")


def search_for_rewards(config: Config, folder: Path) -> Config:
    """Adds `folder`, that of a config, to its reward_path if the file of a reward lies in it."""
    path = str(folder.absolute())
    held_out = [tasks.reward for tasks in config.evaluation.tasks if tasks.reward is not None]
    for reward in (*config.rewards, *held_out):
        place, colon, _ = reward.rpartition(":")
        name = place if place.endswith(".py") else place.partition(".")[0]
        files = [os.path.join(path, name + suffix) for suffix in ("", ".py")]
        if colon and any(map(os.path.exists, files)) and path not in config.reward_path:
            return dataclasses.replace(config, reward_path=(*config.reward_path, path))
    return config


def _line_of(error: Exception, file: str) -> str:
    """Formats the line of `file` that raised the error: ', line <n>', or '' if it is not known."""
    if isinstance(error, SyntaxError):
        return ""  # its message says where
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
    ]
    return f", line {lines[-1]}" if lines else ""


CONFIGS = {
    kind.__name__: kind
    for kind in (
        Config,
        TasksConfig,
        EvalConfig,
        SelectConfig,
        LoRAConfig,
        ReplayConfig,
        MeshConfig,
    )
}


# Fields that earlier versions had, and the remedy for configs that have them.
REMOVED: dict[str, str] = dict.fromkeys(
    ("SelectConfig.tolerance", "SelectConfig.measured", "SelectConfig.measure_every"),
    "the oracle is a measurement now, benchmarks/_oracle.py: leave the field out",
) | {
    "ReplayConfig.clip": "its name is clip_center now, and its values are behavior (before: paper) "
    "and proximal (before: published)",
    "SelectConfig.probe_every": "its name is reference_every now",
}

# Dotted fields of earlier configs -> their names now.
RENAMED = {"replay.clip": "replay.clip_center", "select.probe_every": "select.reference_every"}

# Names of TRL, transformers and verl, and usual ones -> fields here.
OTHER_NAMES = {
    "beta": "kl_coef",
    "checkpoint_every": "save_steps",
    "checkpoint_interval": "save_steps",
    "checkpoint_steps": "save_steps",
    "clip_ratio": "epsilon",
    "clip_ratio_high": "epsilon_high",
    "clip_ratio_low": "epsilon",
    "default_local_dir": "output_dir",
    "entropy_coeff": "entropy_coef",
    "eval_every": "eval_steps",
    "eval_interval": "eval_steps",
    "grad_clip": "max_grad_norm",
    "gradient_checkpointing": "remat",
    "group_size": "num_generations",
    "kl_loss_coef": "kl_coef",
    "log_completions": "log_completions_steps",
    "logger": "report_to",
    "lr": "learning_rate",
    "lr_scheduler_type": "learning_rate_schedule",
    "max_new_tokens": "max_completion_length",
    "max_response_length": "max_completion_length",
    "max_steps": "steps",
    "model_name_or_path": "model",
    "num_steps": "steps",
    "ppo_epochs": "num_iterations",
    "ppo_mini_batch_size": "mini_batch_size",
    "resume_from_checkpoint": "resume",
    "reward_funcs": "rewards",
    "save_freq": "save_steps",
    "save_interval": "save_steps",
    "save_total_limit": "keep_checkpoints",
    "stop_strings": "stop",
    "test_freq": "eval_steps",
    "total_training_steps": "steps",
    "train_batch_size": "batch_size",
}


def check_flags(arguments: Sequence[str]) -> None:
    """Raises InputError for a flag that has another name here."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in OTHER_NAMES:
            near = OTHER_NAMES[name].replace("_", "-")
            raise InputError(f"there is no flag {flag}: did you mean --{near}?")


def _nearest_field(message: str) -> str:
    """Returns the end of the message of a call with an unknown field: a field like it, or why it
    was removed.
    """
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    return _remedy(unknown[1], unknown[2]) if unknown else ""


def _remedy(section: str, name: str) -> str:
    """Returns what to do about the unknown field `name` of a dataclass called `section`."""
    if (removed := REMOVED.get(f"{section}.{name}")) is not None:
        return f"; {removed}"
    kind = CONFIGS.get(section)
    names = [each.name for each in dataclasses.fields(kind)] if kind else []
    near = difflib.get_close_matches(name, names, n=1)
    if section == "Config" and name in OTHER_NAMES:
        near = [OTHER_NAMES[name]]
    return f"; did you mean {near[0]}?" if near else ""


def to_json(config: Config) -> str:
    """Serializes the config as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(tree: dict[str, JSON], source: str) -> Config:
    """Builds a config from its JSON, of `to_json`, perhaps of an earlier version.

    Raises InputError, with the `source`, for what is no config.
    """
    for old, new in RENAMED.items():
        section, _, name = old.partition(".")
        values = tree.get(section)
        if isinstance(values, dict) and name in values:
            others = {key: value for key, value in values.items() if key != name}
            tree = tree | {section: others | {new.partition(".")[2]: values[name]}}
    try:
        return _build(Config, tree)
    except InputError as error:
        raise InputError(f"{source} is no config: {error}") from error


Section = TypeVar("Section")


def _build(kind: type[Section], tree: dict[str, JSON], name: str = "") -> Section:
    """Builds a dataclass from the JSON of its fields; `name` is its own dotted one.

    Raises InputError for an unknown field, and for one that is missing.
    """
    fields = {each.name: each for each in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    dotted = {key: f"{name}.{key}".lstrip(".") for key in [*fields, *tree]}
    for key, value in tree.items():
        if key not in fields:
            remedy = _remedy(kind.__name__, str(key)) or f": it is one of {', '.join(fields)}"
            raise InputError(f"{dotted[key]} is {shown(value)}, but no such field is known{remedy}")
    for key, each in fields.items():
        required = each.default is each.default_factory is dataclasses.MISSING
        if required and key not in tree:
            raise InputError(f"{dotted[key]} is missing: give it")
    return kind(**{key: _value(dotted[key], x, fields[key].type) for key, x in tree.items()})


def _value(name: str, value: JSON, kind: object) -> Any:
    """Returns the value of a field of the type `kind`, in which a list is a tuple and an object a
    dataclass.

    What is of another type stays, for `Config` to refuse. Raises InputError for a single value in
    place of a list.
    """
    kind = bare(kind)
    choices = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    lists = [choice for choice in choices if get_origin(choice) is tuple]
    section = next((each for each in CONFIGS.values() if each in choices), None)
    if isinstance(value, dict):
        return value if section is None else _build(section, value, name)
    if isinstance(value, list) and lists:
        kinds = get_args(lists[0])
        items = [kinds[0]] * len(value) if kinds[-1] is ... else [*kinds, *kinds[-1:] * len(value)]
        return tuple(
            _value(f"{name}[{i}]", item, each)
            for i, (item, each) in enumerate(zip(value, items, strict=False))
        )
    if section is not None:
        first = dataclasses.fields(section)[0].name
        raise InputError(f"{name} is {shown(value)}: it must have fields, such as {name}.{first}")
    if lists and len(choices) == 1:
        raise InputError(f"{name} is {shown(value)}: it must be a list, such as [{value}]")
    return value


def resume_rule(
    name: str, fields: tuple[dataclasses.Field, ...] = dataclasses.fields(Config)
) -> str:
    """Returns the rule for a dotted field, or of the section that it is in: the `resume` of its
    metadata, or "free".

    Raises KeyError for a field that does not exist.
    """
    section, _, rest = name.partition(".")
    field = {each.name: each for each in fields}[section]
    if rest and not field.metadata and dataclasses.is_dataclass(field.default):
        return resume_rule(rest, dataclasses.fields(field.default))
    return field.metadata.get("resume", "free")


def flat(tree: JSON, prefix: str = "") -> dict[str, JSON]:
    """Flattens the JSON of a config to {dotted field: value}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v
        for key, value in tree.items()
        for k, v in flat(value, f"{prefix}.{key}".strip(".")).items()
    }


def differences(config: Config, other: dict[str, JSON]) -> dict[str, tuple[JSON, JSON]]:
    """Compares two configs, the other given as JSON, perhaps of an earlier version.

    Fields that its version did not have count as their defaults. What is no config now, such as one
    with a removed field, is compared as it is.

    Returns {differing dotted field: (value of `config`, value of `other`)}.
    """
    here = flat(json.loads(to_json(config)))
    with contextlib.suppress(InputError):
        other = json.loads(to_json(from_json(other, "the other")))
    there = {RENAMED.get(name, name): value for name, value in flat(other).items()}
    return {
        key: (here.get(key), there.get(key))
        for key in here | there
        if here.get(key) != there.get(key)
    }
