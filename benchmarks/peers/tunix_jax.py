"""The sampler and the GRPO loss of google-tunix, on the shape and lengths of ours.

    python -m benchmarks.peers.tunix_jax REQUEST

The model is tunix's Qwen2 with random weights; its logits make each completion as long as the list
says. An update is the gradient of tunix's `grpo_loss_fn`, without KL, clipped by the global norm,
and one AdamW update, jitted as its trainer does it. A step is both, without tunix's data pipeline,
reward workers and logging.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler  # pyright: ignore[reportMissingImports]
from tunix.models.qwen2.model import ModelConfig, Qwen2  # pyright: ignore[reportMissingImports]
from tunix.rl.algo_core import grpo_loss_fn  # pyright: ignore[reportMissingImports]
from tunix.rl.common import TrainExample  # pyright: ignore[reportMissingImports]
from tunix.rl.grpo.grpo_learner import GRPOConfig  # pyright: ignore[reportMissingImports]

from benchmarks import _serve
from benchmarks._serve import Request, Subject
from benchmarks._shape import Shape

END = 0  # token, also of padding
IMPOSSIBLE = -1e9  # a logit
LEARNING_RATE = 1e-6


class Numbers:
    """A tokenizer of texts that are token ids with spaces between them."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        """Returns the text."""
        return " ".join(map(str, ids))

    def bos_id(self) -> int | None:
        """Returns None: texts have no beginning."""
        return None

    def eos_id(self) -> int:
        """Returns the end."""
        return END

    def pad_id(self) -> int:
        """Returns the padding."""
        return END


class ForcedQwen2(Qwen2):
    """Qwen2 whose end token is certain where a row's length is reached, and impossible before."""

    def __init__(
        self, config: ModelConfig, shape: Shape, lengths: tuple[int, ...], *, rngs: nnx.Rngs
    ):
        """Takes the lengths [R] of completions behind prompts of the shape."""
        super().__init__(config, rngs=rngs)
        self.lengths = lengths
        self.prompt_length = shape.prompt_length

    def __call__(self, input_tokens, positions, cache, attention_mask=None, *arguments, **options):
        """Returns what Qwen2 does; logits with a cache are those of the sampler."""
        logits, cache = super().__call__(
            input_tokens, positions, cache, attention_mask, *arguments, **options
        )
        if cache is None:
            return logits, cache
        number = positions - (self.prompt_length - 1)  # of the token that is drawn, from 0
        last = number >= jnp.array(self.lengths)[:, None] - 1
        ended = jnp.full_like(logits, IMPOSSIBLE).at[..., END].set(0.0)
        return jnp.where(last[..., None], ended, logits.at[..., END].set(IMPOSSIBLE)), cache


def model_config(shape: Shape) -> ModelConfig:
    """Returns the configuration of Qwen2."""
    dtype = jnp.dtype(shape.dtype)
    return ModelConfig(
        num_layers=shape.layers,
        vocab_size=shape.vocabulary,
        embed_dim=shape.width,
        hidden_dim=shape.mlp,
        num_heads=shape.heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.kv_heads,
        norm_eps=1e-6,
        rope_theta=10_000,
        use_tied_embedding=True,
        dtype=dtype,
        param_dtype=dtype,
    )


@nnx.jit
def make_update(optimizer: nnx.Optimizer, model: Qwen2, grads: nnx.State) -> None:
    """Updates the model."""
    optimizer.update(model, grads)


@nnx.jit
def gradient(model: Qwen2, example: TrainExample) -> nnx.State:
    """Returns the gradient of the loss of a micro-batch."""
    config = GRPOConfig(num_generations=2, num_iterations=1, beta=0.0, epsilon=0.2)
    config.temperature = 1.0  # which tunix's learner takes from its rollouts' config
    loss = partial(grpo_loss_fn, algo_config=config, pad_id=END, eos_id=END)
    grads, _ = nnx.grad(loss, has_aux=True)(model, example)
    return grads


class Peer:
    """A model, its optimizer, its sampler, and completions to learn from."""

    def __init__(self, request: Request):
        """Makes random prompts, and random completions of the wanted lengths."""
        shape = request.shape
        self.shape = shape
        self.lengths = request.lengths
        self.model = ForcedQwen2(
            model_config(shape), shape, request.lengths, rngs=nnx.Rngs(shape.seed)
        )
        transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE))
        self.optimizer = nnx.Optimizer(self.model, transform, wrt=nnx.Param)
        rng = np.random.default_rng(shape.seed)
        prompts = rng.integers(1, shape.vocabulary, (shape.prompts, shape.prompt_length))
        self.prompts = np.repeat(prompts, shape.group_size, axis=0).astype(np.int32)
        self.texts = [" ".join(map(str, row)) for row in self.prompts]
        self.tokens = rng.integers(1, shape.vocabulary, (shape.rows, shape.new_tokens)).astype(
            np.int32
        )
        self.mask = np.arange(shape.new_tokens)[None] < np.array(self.lengths)[:, None]
        self.advantages = rng.normal(size=shape.rows).astype(np.float32)
        self.count = 0

    def rollout(self) -> None:
        """Samples completions of all prompts."""
        shape = self.shape
        if not self.count:
            cache = CacheConfig(
                cache_size=shape.prompt_length + shape.new_tokens,
                num_layers=shape.layers,
                num_kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
            )
            self.sampler = Sampler(self.model, Numbers(), cache)
        self.count += 1
        self.sampler.transformer_state = nnx.variables(self.model)
        output = self.sampler(
            self.texts,
            max_generation_steps=shape.new_tokens,
            max_prompt_length=shape.prompt_length,
            temperature=1.0,
            top_p=1.0,
            seed=self.count,
            pad_output=True,
            return_logprobs=True,
        )
        jax.block_until_ready(output.tokens)

    def learn(self) -> None:
        """Takes one step of AdamW, micro-batch by micro-batch."""
        size = self.shape.micro_batch_rows
        total = gradient(self.model, self._example(slice(0, size)))
        for start in range(size, self.shape.rows, size):
            grads = gradient(self.model, self._example(slice(start, start + size)))
            total = jax.tree.map(jnp.add, total, grads)
        make_update(self.optimizer, self.model, total)
        jax.block_until_ready(nnx.state(self.model, nnx.Param))

    def _example(self, rows: slice) -> TrainExample:
        return TrainExample(
            prompt_ids=jnp.asarray(self.prompts[rows]),
            prompt_mask=jnp.ones(self.prompts[rows].shape, bool),
            completion_ids=jnp.asarray(self.tokens[rows]),
            completion_mask=jnp.asarray(self.mask[rows]),
            advantages=jnp.asarray(self.advantages[rows]),
            ref_per_token_logps=None,
            old_per_token_logps=None,
        )

    def step(self) -> None:
        """Samples and learns."""
        self.rollout()
        self.learn()


@contextmanager
def open_subject(request: Request) -> Iterator[Subject]:
    """Opens what a request asks for."""
    yield _serve.time_peer(Peer(request), request)


if __name__ == "__main__":
    _serve.serve(open_subject)
