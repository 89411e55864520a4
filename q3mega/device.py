"""The one place that knows whether there is a GPU: lets megatron-core 0.19.2 run on CPU over gloo.

megatron-core says "cuda" in a few dozen places. On a machine with a GPU this module changes
nothing; without one it gives those places their CPU meaning when it is first imported: every
module of ours that imports megatron-core imports this one before it. It leans on internals of one
release, which is why that release is pinned.
"""

import contextlib
import functools
import importlib.util
import logging
import sys
import types
import typing
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available()
BACKEND = "nccl" if HAS_GPU else "gloo"
HAS_TRANSFORMER_ENGINE = HAS_GPU and importlib.util.find_spec("transformer_engine") is not None

_FACTORIES = [
    "zeros", "ones", "empty", "full", "rand", "randn", "randint", "arange", "tensor", "eye",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "as_tensor",
]  # fmt: skip


def device() -> torch.device:
    """This process's device."""
    return torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else CPU


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


def _import_megatron() -> None:
    """Import megatron-core eagerly: its fusions call `torch.compile` then, an empty one here."""
    if importlib.util.find_spec("triton") is None:
        # the two modules on our path that import triton unconditionally; a CPU calls neither
        stash = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
        stash.__dict__.update(
            GLOBAL_BLOCK_SIZE=1024, paged_stash_copy_kernel=None, paged_stash_pop_kernel=None
        )
        muon = types.ModuleType("emerging_optimizers.triton_kernels")
        muon.__dict__.update(HAS_TRITON_340=False)
        sys.modules.update({module.__name__: module for module in (stash, muon)})
    compiler = torch.compile
    torch.compile = lambda fn=None, **_: fn or (lambda f: f)  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Transformer Engine / Apex is not installed"
            import megatron.core.models.gpt
            import megatron.core.optimizer  # noqa: F401
    finally:
        torch.compile = compiler


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return build


def _patch_torch() -> None:
    cuda: Any = torch.cuda

    def answer(names: str, value: Any) -> None:
        for name in names.split():  # one function object a name: dynamo refuses shared ones
            setattr(cuda, name, lambda *args, _value=value, **kwargs: _value)

    answer("current_device", CPU)
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


def _prepare() -> None:
    if not hasattr(typing, "override"):  # Python 3.11: emerging-optimizers imports it from typing
        typing.override = lambda method: method  # type: ignore[attr-defined]
    if not HAS_GPU:
        _import_megatron()
        _patch_torch()
        _patch_megatron()
    for name in ("tensor_parallel.random", "models.gpt.gpt_model", "transformer.moe.moe_utils"):
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)


_prepare()
