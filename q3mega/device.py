"""Which device there is, and megatron-core's first import.

Every module that imports megatron-core imports this one before it. Nothing is changed by that but
what `_import_megatron` undoes itself. `engine.megatron_patches` lets megatron-core run without a
GPU, when an engine is started.
"""

import contextlib
import importlib.util
import sys
import types
import typing
import warnings
from collections.abc import Iterator

import torch

CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available()
BACKEND = "nccl" if HAS_GPU else "gloo"
HAS_TRANSFORMER_ENGINE = HAS_GPU and importlib.util.find_spec("transformer_engine") is not None


def device() -> torch.device:
    """This process's device."""
    return torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else CPU


def _import_megatron() -> None:
    """Import megatron-core eagerly, since its modules look at their surroundings when they load."""
    with _override_in_typing(), contextlib.ExitStack() as stack:
        if not HAS_GPU:
            stack.enter_context(_no_compiler())
            if importlib.util.find_spec("triton") is None:
                _stand_in_for_triton()
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # "Transformer Engine / Apex is not installed"
        import megatron.core.models.gpt
        import megatron.core.optimizer  # noqa: F401


@contextlib.contextmanager
def _override_in_typing() -> Iterator[None]:
    """emerging-optimizers 0.3.0 imports `override` from typing, where Python 3.12 has it."""
    if hasattr(typing, "override"):
        yield
        return
    typing.override = lambda method: method  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del typing.override  # type: ignore[attr-defined]


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    """megatron-core 0.19.2 compiles its fusions for GPUs; a CPU computes them as they are."""
    compiler = torch.compile
    torch.compile = lambda fn=None, **_: fn or (lambda f: f)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def _stand_in_for_triton() -> None:
    """The two modules on our path that import triton unconditionally; a CPU calls neither."""
    stash = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
    stash.__dict__.update(
        GLOBAL_BLOCK_SIZE=1024, paged_stash_copy_kernel=None, paged_stash_pop_kernel=None
    )
    muon = types.ModuleType("emerging_optimizers.triton_kernels")
    muon.__dict__.update(HAS_TRITON_340=False)
    sys.modules.update({module.__name__: module for module in (stash, muon)})


_import_megatron()
