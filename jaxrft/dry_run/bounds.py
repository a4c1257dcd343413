"""What decoding cannot do without, counted from the shape of a decoder: bytes of memory a token."""

import math
from dataclasses import dataclass

from jaxrft.lm import model
from jaxrft.lm.model import ModelConfig


@dataclass(frozen=True)
class Decode:
    """A decode loop as one chip runs it."""

    config: ModelConfig
    rows: int = 256  # of this chip
    group_size: int = 8
    prompt_length: int = 256
    new_tokens: int = 1024
    model_parallel: int = 1  # chips that share heads, hidden units and vocabulary
    item_size: int = 2  # bytes of a number; 2 = bfloat16

    @property
    def position_bytes(self) -> int:
        """The bytes of a row's keys and values of one position, all layers."""
        c = self.config
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.item_size // self.model_parallel

    @property
    def weight_bytes(self) -> int:
        """The bytes of the weights that every token is computed with: all but an embedding that is no unembedding."""
        rows = model.base(self.config)
        used = [row for row in rows if row.name != "embed" or self.config.tie_word_embeddings]
        return sum(math.prod(row.shape) for row in used) * self.item_size // self.model_parallel

    @property
    def cache_bytes(self) -> int:
        """The bytes of all rows' keys and values of their own tokens."""
        return self.position_bytes * self.rows * self.new_tokens

    def must_move(self, position: int) -> int:
        """Counts the bytes of a pass that reads `position` own positions of each row and writes one.

        All weights are read once, and so are the prompts, a group's as one.
        """
        prompts = self.rows // self.group_size * self.prompt_length
        return self.weight_bytes + self.position_bytes * (prompts + self.rows * (position + 1))
