"""TRL's GRPOTrainer, a whole step, on the shape and lengths of ours.

    python -m benchmarks.peers.trl_grpo REQUEST

Generation is that of transformers, as without vLLM; the model is Qwen2 with random weights, and a
logits processor makes each completion as long as the list says. No KL, no gradient checkpointing,
one update a step, and a reward that costs nothing. The trainer runs in a thread of its own, whose
steps begin when they are asked for.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from benchmarks import _serve
from benchmarks._serve import Measured, Request, Subject
from benchmarks._shape import Shape
from benchmarks.peers.hf_torch import END, LEARNING_RATE, ForceEnds, make_model

STEPS = 10_000  # more than anyone asks for


class ForcedQwen2(Qwen2ForCausalLM):
    """Qwen2 that generates completions of wanted lengths."""

    lengths: tuple[int, ...] = ()
    prompt_length = 0

    def generate(self, *arguments, **options):
        """Samples as Qwen2 does, with one more logits processor."""
        processor = ForceEnds(self.lengths, self.prompt_length)
        options["logits_processor"] = LogitsProcessorList([processor])
        return super().generate(*arguments, **options)  # pyright: ignore[reportAttributeAccessIssue]


class Turns(TrainerCallback):
    """Lets a step begin when it is asked for."""

    def __init__(self):
        """Starts with no step asked for."""
        self.begin = threading.Semaphore(0)
        self.done = threading.Semaphore(0)
        self.stopping = False

    def on_step_begin(self, args, state, control, **options):
        """Waits."""
        self.begin.acquire()
        if self.stopping:
            raise SystemExit

    def on_step_end(self, args, state, control, **options):
        """Tells that the step is over."""
        self.done.release()


def make_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of texts that are token ids with spaces between them."""
    vocabulary = {str(token): token for token in range(shape.vocabulary)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=str(END)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    ends = dict.fromkeys(("eos_token", "pad_token", "unk_token"), str(END))
    return PreTrainedTokenizerFast(tokenizer_object=words, **ends)


def parity(completions: list[str], **columns: object) -> list[float]:
    """Returns 1 for completions with an even checksum."""
    return [float(sum(map(ord, completion)) % 2 == 0) for completion in completions]


def make_trainer(request: Request, folder: str, turns: Turns) -> GRPOTrainer:
    """Returns a trainer whose steps have the shape's batch."""
    shape = request.shape
    model = make_model(shape)
    model.__class__ = ForcedQwen2
    ForcedQwen2.lengths = request.lengths
    ForcedQwen2.prompt_length = shape.prompt_length
    tokens = torch.randint(1, shape.vocabulary, (4 * shape.prompts, shape.prompt_length))
    prompts = [" ".join(map(str, row)) for row in tokens.tolist()]
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=shape.micro_batch_rows,
        gradient_accumulation_steps=shape.rows // shape.micro_batch_rows,
        num_generations=shape.group_size,
        max_completion_length=shape.new_tokens,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        top_k=0,
        bf16=shape.dtype == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=shape.seed,
    )
    return GRPOTrainer(
        model=model,
        args=config,
        reward_funcs=parity,  # pyright: ignore[reportArgumentType]
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=make_tokenizer(shape),
        callbacks=[turns],
    )


@contextmanager
def open_subject(request: Request) -> Iterator[Subject]:
    """Opens a trainer in a thread; ends the program if something else than a step is asked for."""
    if request.what != "step":
        sys.exit(f"trl_grpo measures a whole step, not {request.what}: leave the peer out")
    turns = Turns()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(request, folder, turns)

        def train() -> None:
            torch.set_num_threads(request.shape.threads)
            try:
                trainer.train()
            finally:
                turns.stopping = True
                turns.done.release()

        thread = threading.Thread(target=train, daemon=True)
        thread.start()

        def run() -> Measured:
            start = time.perf_counter()
            turns.begin.release()
            turns.done.acquire()
            if turns.stopping:
                sys.exit("the trainer ended early: see its words above")
            return {"seconds": time.perf_counter() - start}

        yield Subject(run, lambda: [*request.lengths])
        turns.stopping = True
        turns.begin.release()
        thread.join()


if __name__ == "__main__":
    _serve.serve(open_subject)
