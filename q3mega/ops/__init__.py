"""The operators: dual-chunk attention and the lm-head losses, from hidden states.

Each front is its plain PyTorch definition; `dispatch` says which backend serves it.
"""

import q3mega.ops.fused  # noqa: F401  (its operators register)
from q3mega.ops.distill_loss import DistillOutput, distill_loss
from q3mega.ops.dual_chunk_attention import dual_chunk_attention
from q3mega.ops.grpo_loss import GrpoOutput, grpo_loss
from q3mega.ops.linear_logprob import LinearLogprobOutput, linear_logprob

__all__ = [
    "DistillOutput",
    "GrpoOutput",
    "LinearLogprobOutput",
    "distill_loss",
    "dual_chunk_attention",
    "grpo_loss",
    "linear_logprob",
]
