"""What a backend is: a module with the functions below, on contiguous tensors that the operators
have checked.

row_stats, row_gradient, divergence_sums, divergence_gradient: passes over rows of logits
picked_logits, picked_d_hidden, picked_d_weight: products with a few rows of the lm_head a token
attention_forward, attention_backward: dual-chunk attention
serves(x), serves_attention(q): why the backend cannot take the tensor, or None
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

KERNELS: dict[str, ModuleType] = {
    name: import_module(f"{__name__}.{name}")
    for name, needs in (("cpu", "q3mega._cpu"), ("triton", "triton"), ("cuda", "q3mega._cuda"))
    if find_spec(needs) is not None
}
