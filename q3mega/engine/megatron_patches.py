"""What this package changes in megatron-core 0.19.2, and in torch where there is no GPU.

Nothing is changed on import. `apply` is called by who starts an engine: `parallel.initialise` and
`Engine`. The patches lean on internals of one release, which is why that release is pinned.
"""

import contextlib
import functools
import logging
import queue
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from q3mega import device

# isort: split
import megatron.core
import torch
import torch.utils._device
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.strategies import filesystem_async

VERSION = "0.19.2"
_LOG = logging.getLogger(__name__)
_FACTORIES = [
    "zeros", "ones", "empty", "full", "rand", "randn", "randint", "arange", "tensor", "eye",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "as_tensor",
]  # fmt: skip


@functools.cache
def apply() -> None:
    """Apply every patch, once in a process."""
    _check_version()
    _queue_of_threads()
    _recompute_without_transformer_engine()
    _quiet_loggers()
    if not device.HAS_GPU:
        _patch_torch()
        _patch_megatron()


def _check_version() -> None:
    """Warn of a release whose internals may be other ones."""
    if megatron.core.__version__.partition("+")[0] != VERSION:
        _LOG.warning(
            "megatron-core is %s, and its patches are for %s: pip install megatron-core==%s",
            megatron.core.__version__, VERSION, VERSION,
        )  # fmt: skip


def _queue_of_threads() -> None:
    """Checkpoint writers are threads here. megatron-core would start a process for their queue."""
    filesystem_async._results_queue = queue.Queue()


def _recompute_without_transformer_engine() -> None:
    """`CheckpointWithoutOutput` takes its own default, False, for "fp8 is on", and then needs
    Transformer Engine."""
    if find_spec("transformer_engine") is None:
        tensor_parallel.CheckpointWithoutOutput.__init__.__defaults__ = (None,)


def _quiet_loggers() -> None:
    """Warnings about what is meant so: no Transformer Engine, and the one way of writing
    checkpoints behind that needs no further package, which is called deprecated."""
    for name in (
        "dist_checkpointing.strategies.torch", "tensor_parallel.random", "models.gpt.gpt_model",
        "transformer.moe.moe_utils",
    ):  # fmt: skip
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)


class _Stream:
    """Everything on a CPU is already in order. Stays a class: callers use it in type unions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., "_Stream"]:
        return lambda *args, **kwargs: self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the state layout of Transformer Engine's and Apex's (`step` in the group).

    torch.optim.AdamW keeps `step` per parameter, which megatron-core's distributed optimizer cannot
    load back; with this layout CPU and GPU checkpoints are also alike.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **_: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """See `torch.optim.Optimizer`."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            step = group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in params:
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                first, second = state["exp_avg"], state["exp_avg_sq"]
                first.lerp_(p.grad, 1 - beta1)
                second.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                scale = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(first, scale, value=-group["lr"] / (1 - beta1**step))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = device.CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return build


def _patch_torch() -> None:
    """megatron-core says "cuda" in a few dozen places: those get their CPU meaning."""
    cuda: Any = torch.cuda

    def answer(names: str, value: Any) -> None:
        for name in names.split():  # one function object a name: dynamo refuses shared ones
            setattr(cuda, name, lambda *args, _value=value, **kwargs: _value)

    answer("current_device", device.CPU)
    answer("device_count", 1)
    answer("set_device synchronize empty_cache manual_seed_all", None)
    answer("current_stream default_stream", _Stream())
    answer("stream", contextlib.nullcontext())
    cuda.Stream = _Stream
    cuda.Event = type("Event", (_Stream,), {})
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    torch.utils._device._device_constructors()  # `with torch.device(...)` remembers the originals
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment]
    type_name = tensor.type

    def cuda_type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # megatron's optimizers sort parameters by the string "torch.cuda.FloatTensor"
        name = type_name(self, *args, **kwargs)
        return name if args or kwargs else name.replace("torch.", "torch.cuda.", 1)

    tensor.type = cuda_type_name


def _patch_megatron() -> None:
    """Random state, token counts and Adam of megatron-core take their CPU meaning."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    patched: Any = random
    patched._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    patched._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    def to_cpu(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return value.numpy() if as_numpy and torch.is_tensor(value) else value

    for module in (moe, dispatcher):
        module.maybe_move_tensor_to_cpu = to_cpu  # type: ignore[attr-defined]
    for module in (optimizer, distributed):
        module.Adam = FusedAdam  # type: ignore[attr-defined]
    patched = optimizer
    patched.USING_PYTORCH_OPTIMIZER = False
    patched = distributed
    patched.HAVE_APEX_OR_TE = patched.USING_APEX_OPTIMIZER = True
