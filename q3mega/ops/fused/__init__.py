"""The operators as `torch.library` calls that backends serve, with their gradients."""

from q3mega.ops.fused import distill_loss, dual_chunk_attention, policy  # noqa: F401  (they register)
