"""Checkpoints by transformers and data in the columns that people have: train, stop, go on, open
the export again.
"""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.config import SelectConfig, TasksConfig
from jaxrft.lm import model, weights
from jaxrft.train.loop import train

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

QUESTIONS = [
    (f"Ann has {i} apples and buys {i + 3} more. How many does she have?", 2 * i + 3)
    for i in range(16)
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def policy(world):
    """A random Qwen2 and a byte-level BPE tokenizer, written by transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([f"user {question} assistant" for question, _ in QUESTIONS], trainer)
    text = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    lm = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=352, num_key_value_heads=2, tie_word_embeddings=True, **shape
        )
    )
    lm.generation_config.eos_token_id = [2, 0]
    lm.save_pretrained(world / "qwen2")
    text.save_pretrained(world / "qwen2")
    return str(world / "qwen2")


def gsm8k(folder):
    """A jsonl with the columns of GSM8K."""
    rows = [
        {"question": question, "answer": f"She adds.\n#### {answer}"}
        for question, answer in QUESTIONS
    ]
    return TasksConfig(helpers.write_rows(folder / "gsm8k.jsonl", rows)), SelectConfig("uniform")


def verl(folder):
    """A parquet with the columns of verl, and the pass rates of GURU, some of them missing."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "data_source": "apples",
            "prompt": [{"role": "user", "content": question}],
            "ability": "math",
            "reward_model": {"ground_truth": str(answer), "style": "rule"},
            "extra_info": {"index": answer},
            "qwen2.5_7b_pass_rate": None if answer == 5 else 0.25,
            "qwen3_30b_pass_rate": float("nan") if answer == 7 else 0.75,
        }
        for question, answer in QUESTIONS
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "verl.parquet")
    rates = ("qwen2.5_7b_pass_rate", "qwen3_30b_pass_rate")
    return TasksConfig(str(folder / "verl.parquet"), pass_rate_columns=rates), SelectConfig("bots")


@pytest.mark.parametrize(("data", "reward"), [(gsm8k, "gsm8k"), (verl, "math")])
def test_three_steps_a_stop_and_three_more_open_in_transformers(data, reward, policy, tmp_path):
    tasks, select = data(tmp_path)
    rewards = {"rewards": (reward, "graders:letters"), "reward_completions": "text"}
    changes = {"tasks": tasks, "select": select} | rewards
    configure = functools.partial(helpers.make_config, policy, "", tmp_path / "run", **changes)
    train(configure(steps=3))
    state = train(configure(steps=6))
    assert [line["step"] for line in helpers.metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert all(
        line["rewards/error"] == line["rewards/timeout"] == 0
        for line in helpers.metrics(tmp_path / "run")
    )

    assert not np.array_equal(
        state.params["gate"], weights.load(policy, weights.read_config(policy))["gate"]
    )

    exported = tmp_path / "run/policy"
    text = transformers.AutoTokenizer.from_pretrained(exported)
    lm = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    assert lm.generation_config.eos_token_id == [2, 0]
    tokens = np.array([text.encode(QUESTIONS[0][0])], np.int32)
    with torch.no_grad():
        wanted = lm(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    config = weights.read_config(exported)
    decoder, params = model.decoder(config), jax.tree.map(np.asarray, state.params)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, _ = decoder.apply(params, tokens, positions, jnp.ones(tokens.shape, bool))
    np.testing.assert_allclose(decoder.unembed(params, hidden), wanted, atol=1e-4)
