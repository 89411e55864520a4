"""Qwen3 shapes: one row a model (report, tables 1 and 2); exact parameter counts and FLOPs."""

from dataclasses import dataclass

from q3mega.errors import UserError


@dataclass(frozen=True)
class Yarn:
    """YaRN's extension of `original_length` tokens by `factor`, as config.json's rope parameters
    have it. attention_factor: of both rotated operands; None: YaRN's own, from `factor`.
    """

    factor: float
    original_length: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Qwen3Shape:
    """The numbers that make a Qwen3 model. head_dim is explicit and is never hidden / heads.

    vocab: rows of embedding and lm_head, of which a tokenizer may have fewer ids. norm_topk: the
    gates of the experts that a token takes sum to 1.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int = 128
    vocab: int = 151_936
    tied: bool = False
    experts: int = 0
    topk: int = 8
    moe_ffn: int = 0
    router_aux_loss_coef: float = 1e-3  # coefficient of the experts' load-balancing loss
    rope_base: float = 1e6
    max_positions: int = 40_960
    norm_eps: float = 1e-6
    norm_topk: bool = True
    yarn: Yarn | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}: "
                "every key-value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd: rotary pairs need an even one")
        if self.experts and not 1 <= self.topk <= self.experts:
            raise UserError(f"model.topk={self.topk} must lie in 1..model.experts={self.experts}")
        if self.experts and self.topk == 1 and self.norm_topk:
            raise UserError("model.topk=1: a router whose gate is always 1 learns nothing, take 2")

    def attention_parameters(self) -> int:
        """Of a layer's projections."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    def _mlp(self, *, active: bool) -> int:
        if not self.experts:
            return 3 * self.hidden * self.ffn
        used = self.topk if active else self.experts
        return used * 3 * self.hidden * self.moe_ffn + self.hidden * self.experts

    def num_parameters(self, *, active: bool = False, embeddings: bool = True) -> int:
        """Parameters; `active`: only the experts a token uses. Both untied matrices count."""
        norms = 2 * self.hidden + 2 * self.head_dim
        total = (
            self.layers * (self.attention_parameters() + self._mlp(active=active) + norms)
            + self.hidden
        )
        return total + (self.vocab * self.hidden * (1 if self.tied else 2) if embeddings else 0)

    def forward_flops(self, tokens: float, context: float) -> float:
        """Matmul FLOPs of a forward pass over `tokens`, each attending to a mean `context` of keys.

        Training counts three of these (forward and twice backward); a causal sequence of length S
        has context S / 2.
        """
        matrices = self.layers * (self.attention_parameters() + self._mlp(active=True))
        attention = self.layers * 2 * self.heads * self.head_dim * context
        return 2.0 * tokens * (matrices + self.vocab * self.hidden + attention)


BASE_IDS = 151_643  # entries of the released tokenizer without its special tokens
ROWS_MULTIPLE = 128


def rows_over(rows: int, ranks: int) -> int:
    """Rows filled up so that each of `ranks` holds as many."""
    return -(-rows // ranks) * ranks


def rows_for(ids: int) -> int:
    """Rows of the embedding for a tokenizer of so many ids: the released ones for the released
    tokenizer, else the next multiple of 128, which tensor parallelism divides and a GPU likes."""
    if BASE_IDS < ids <= Qwen3Shape.vocab:
        return Qwen3Shape.vocab
    return rows_over(ids, ROWS_MULTIPLE)


def _dense(layers: int, hidden: int, heads: int, ffn: int, tied: bool) -> Qwen3Shape:
    return Qwen3Shape(layers, hidden, heads, kv_heads=8, ffn=ffn, tied=tied)


QWEN3: dict[str, Qwen3Shape] = {
    "qwen3-0.6b": _dense(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _dense(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _dense(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _dense(36, 4096, 32, 12_288, tied=False),
    "qwen3-14b": _dense(40, 5120, 40, 17_408, tied=False),
    "qwen3-32b": _dense(64, 5120, 64, 25_600, tied=False),
    "qwen3-30b-a3b": Qwen3Shape(48, 2048, 32, kv_heads=4, ffn=6144, experts=128, moe_ffn=768),
    "qwen3-235b-a22b": Qwen3Shape(94, 4096, 64, kv_heads=4, ffn=12_288, experts=128, moe_ffn=1536),
}
