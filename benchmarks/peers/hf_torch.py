"""Hugging Face's `generate` and an update in plain PyTorch, on the shape and lengths of ours.

    python -m benchmarks.peers.hf_torch REQUEST

The model is Qwen2 with random weights. A logits processor makes each completion as long as the list
says. The update computes each prompt in every row, as `generate` and TRL do, keeps all activations,
and takes one AdamW step after clipping by the global norm, as ours does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import LogitsProcessor, LogitsProcessorList, Qwen2Config, Qwen2ForCausalLM

from benchmarks import _serve
from benchmarks._serve import Request, Subject
from benchmarks._shape import Shape

END = 0  # token, also of padding
EPSILON = 0.2  # of the clip range
LEARNING_RATE = 1e-6


class ForceEnds(LogitsProcessor):
    """Makes the end token certain where a row's length is reached, and impossible before."""

    def __init__(self, lengths: tuple[int, ...], prompt_length: int):
        """Takes the lengths [R] of completions behind prompts of `prompt_length` tokens."""
        self.lengths = torch.tensor(lengths)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns the logits [R, V] of the next token."""
        last = self.lengths <= input_ids.shape[1] - self.prompt_length + 1
        scores[last] = -torch.inf
        scores[:, END] = torch.where(last, 0.0, -torch.inf)
        return scores


def make_model(shape: Shape) -> Qwen2ForCausalLM:
    """Returns Qwen2 with random weights."""
    torch.manual_seed(shape.seed)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
        max_position_embeddings=shape.prompt_length + shape.new_tokens,
        eos_token_id=END,
        pad_token_id=END,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    return model.to(getattr(torch, shape.dtype)).eval()


class Peer:
    """A model, its optimizer, and the latest completions."""

    def __init__(self, request: Request):
        """Makes random prompts, and random completions of the wanted lengths."""
        shape = request.shape
        self.shape = shape
        self.lengths = request.lengths
        self.model = make_model(shape)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        prompts = torch.randint(1, shape.vocabulary, (shape.prompts, shape.prompt_length))
        self.prompts = prompts.repeat_interleave(shape.group_size, dim=0)
        completions = torch.randint(1, shape.vocabulary, (shape.rows, max(self.lengths)))
        self.sequences = torch.cat([self.prompts, completions], dim=1)

    def rollout(self) -> None:
        """Samples completions of all prompts."""
        processor = ForceEnds(self.lengths, self.shape.prompt_length)
        with torch.inference_mode():
            sequences = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                self.prompts,
                attention_mask=torch.ones_like(self.prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=self.shape.new_tokens,
                logits_processor=LogitsProcessorList([processor]),
            )
        self.sequences = sequences.clone()

    def learn(self) -> None:
        """Takes one step of AdamW by the clipped objective, micro-batch by micro-batch."""
        rows, steps = self.shape.rows, self.sequences.shape[1] - self.shape.prompt_length
        mask = torch.arange(steps)[None] < torch.tensor(self.lengths)[:, None]
        advantages = torch.randn(rows, 1)
        total = mask.sum()
        for start in range(0, rows, self.shape.micro_batch_rows):
            part = slice(start, start + self.shape.micro_batch_rows)
            logprobs = self._logprobs(self.sequences[part], mask[part])
            ratio = torch.exp(logprobs - logprobs.detach())
            clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
            objective = torch.minimum(ratio * advantages[part], clipped * advantages[part])
            loss = -(objective * mask[part]).sum() / total
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _logprobs(self, sequences: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns the log-probabilities [rows, T] of completions."""
        prompt = torch.ones_like(sequences[:, : self.shape.prompt_length])
        attention = torch.cat([prompt, mask.to(prompt.dtype)], dim=1)
        steps = mask.shape[1]
        output = self.model(sequences, attention_mask=attention, logits_to_keep=steps + 1)
        logits = output.logits[:, :-1].float()
        tokens = sequences[:, -steps:, None]
        return torch.log_softmax(logits, dim=-1).gather(-1, tokens)[..., 0]

    def step(self) -> None:
        """Samples and learns."""
        self.rollout()
        self.learn()


@contextmanager
def open_subject(request: Request) -> Iterator[Subject]:
    """Opens what a request asks for."""
    torch.set_num_threads(request.shape.threads)
    yield _serve.time_peer(Peer(request), request)


if __name__ == "__main__":
    _serve.serve(open_subject)
