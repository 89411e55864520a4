"""What a backend is: the kernels below, on contiguous tensors that the operators have checked.

row_stats, row_gradient, divergence_sums, divergence_gradient: passes over rows of logits.
attention_forward, attention_backward: dual-chunk attention.
serves(x): why not, or None.
"""

from importlib.util import find_spec
from types import ModuleType

from q3mega.ops.backends import cpu

KERNELS: dict[str, ModuleType] = {"cpu": cpu}
if find_spec("triton") is not None:
    from q3mega.ops.backends import triton

    KERNELS["triton"] = triton
