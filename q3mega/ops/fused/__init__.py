"""The operators as `torch.library` calls that backends serve, with their gradients."""

from q3mega.ops.fused import (  # noqa: F401  (they register)
    distill_loss,
    dual_chunk_attention,
    grpo_loss,
    linear_logprob,
)
