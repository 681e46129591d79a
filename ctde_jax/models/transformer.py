"""A small decoder-only transformer (Vaswani et al., 2017).

Blocks normalize their inputs (pre-norm), attention is causal, and position embeddings are learned.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int32

from ctde_jax.errors import InputError, check_at_least
from ctde_jax.models.base import Model
from ctde_jax.models.layers import Dropout, embed
from ctde_jax.models.linear import Linear
from ctde_jax.models.nnx_modules import from_nnx


class Block(nnx.Module):
    """Causal self-attention and a position-wise MLP, each with a residual connection."""

    def __init__(self, hidden_size: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.attention_norm = nnx.LayerNorm(hidden_size, rngs=rngs)
        # `mix` and `contract` end the residual branches; `initializers.residual` needs these names.
        self.query, self.key, self.value, self.mix = (
            Linear(hidden_size, hidden_size, use_bias=False, rngs=rngs) for _ in range(4)
        )
        self.perceptron_norm = nnx.LayerNorm(hidden_size, rngs=rngs)
        self.expand = Linear(hidden_size, 4 * hidden_size, rngs=rngs)
        self.contract = Linear(4 * hidden_size, hidden_size, rngs=rngs)

    def __call__(
        self, x: Float[Array, "examples length hidden_size"], dropout: Dropout
    ) -> Float[Array, "examples length hidden_size"]:
        """Applies the block; both branches have dropout."""

        def split_heads(
            x: Float[Array, "examples length hidden_size"],
        ) -> Float[Array, "examples length heads features"]:
            return x.reshape(*x.shape[:2], self.heads, -1)

        # Attention branch.
        normed = self.attention_norm(x)
        query, key, value = (
            split_heads(layer(normed)) for layer in (self.query, self.key, self.value)
        )
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + dropout(self.mix(seen.reshape(x.shape)))

        # MLP branch.
        return x + dropout(self.contract(nnx.gelu(self.expand(self.perceptron_norm(x)))))


class Transformer(nnx.Module):
    """Predicts the next token at every position of a window."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        hidden_size: int,
        blocks: int,
        heads: int,
        dropout_rate: float,
        *,
        rngs: nnx.Rngs,
    ):
        start = nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(vocabulary, hidden_size, embedding_init=start, rngs=rngs)
        self.places = nnx.Embed(length, hidden_size, embedding_init=start, rngs=rngs)
        self.blocks = nnx.List([Block(hidden_size, heads, rngs=rngs) for _ in range(blocks)])
        self.norm = nnx.LayerNorm(hidden_size, rngs=rngs)
        self.out = Linear(hidden_size, vocabulary, use_bias=False, rngs=rngs)
        self.dropout = Dropout(dropout_rate, rngs=rngs)

    def __call__(
        self, tokens: Int32[Array, "examples length"]
    ) -> Float[Array, "examples length vocabulary"]:
        """Maps tokens to logits of the next token at every position."""
        x = embed(tokens, self.tokens)
        # A longer input would fail only in the addition below, or broadcast a table of one row.
        length = x.shape[1]
        longest = self.places.num_embeddings
        if length > longest:
            raise InputError(
                "length", f"must be at least the {length} tokens of an input, got {longest}."
            )

        # Tokens and positions are embedded; dropout also applies to their sum.
        x = self.dropout(x + self.places.embedding[None, :length])
        for block in self.blocks:
            x = block(x, self.dropout)
        return self.out(self.norm(x))


def transformer(
    vocabulary: int,
    length: int,
    hidden_size: int = 96,
    blocks: int = 2,
    heads: int = 4,
    dropout_rate: float = 0.0,
) -> Model:
    """Builds a decoder-only transformer over the tokens from 0 to `vocabulary - 1`.

    Blocks normalize their inputs, attention is causal, and position embeddings are learned (Vaswani
    et al., 2017). The model maps `int32[examples, length]` to logits,
    `float32[examples, length, vocabulary]`, also for inputs that are shorter than `length`.

    Args:
        vocabulary: Vocabulary size.
        length: Maximum number of tokens in a window.
        hidden_size: Embedding size, which is the hidden size of every block.
        blocks: Number of blocks.
        heads: Number of attention heads.
        dropout_rate: Dropout rate of the embeddings and of the branches of each block.

    Raises:
        InputError: The heads do not divide the hidden size, or a number is out of range.

    Examples:
        >>> model = ctde.models.transformer(vocabulary=65, length=128)
        >>> tokens = np.zeros((1, 128), np.int32)
        >>> params, _ = jax.eval_shape(model.init, jax.random.key(0), tokens)
        >>> ctde.models.count_params(params)
        247872
    """
    check_at_least(
        1, vocabulary=vocabulary, length=length, hidden_size=hidden_size, blocks=blocks, heads=heads
    )
    if hidden_size % heads:
        raise InputError("heads", f"must divide the hidden_size of {hidden_size}, got {heads}.")
    return from_nnx(
        lambda rngs: Transformer(
            vocabulary, length, hidden_size, blocks, heads, dropout_rate, rngs=rngs
        )
    )
