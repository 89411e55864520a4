"""What is installed: this package's version, those it stands on, and which backend serves what."""

import importlib.util
import json
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from q3mega.errors import UserError

_PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "triton",
    "transformer-engine",
    "vllm",
    "sglang",
)

_NOT_BUILT = "not built: pip install ."


def findings() -> Iterator[tuple[str, str]]:
    """(what, what is there or why it is not) of everything that this package can use."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in _PACKAGES:
        yield package, _version(package)
    if importlib.util.find_spec("torch"):
        import torch

        yield "cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        cards = [torch.cuda.get_device_name(i) for i in range(count)]
        yield "gpu", ", ".join(cards) or "none"
        from q3mega.ops import dispatch

        for op in dispatch.OPERATORS:
            for backend, state in dispatch.backends(op).items():
                yield f"{op} {backend}", state
        from q3mega.ops.backends import KERNELS

        yield "C++ operators", KERNELS["cpu"].build() if "cpu" in KERNELS else _NOT_BUILT
    if importlib.util.find_spec("megatron"):
        from q3mega import device

        yield (
            "linear layers, experts",
            "Transformer Engine's, grouped; fp8 can be had"
            if device.HAS_TRANSFORMER_ENGINE
            else "megatron-core's own; fp8 needs a GPU and Transformer Engine",
        )
    from q3mega.sandbox import confined

    try:
        yield "sandbox", confined.LEVELS[confined.confinement()]
    except UserError as error:
        yield "sandbox", str(error)
    built = importlib.util.find_spec("q3mega._data")
    yield "C++ data helpers", str(built.origin) if built else _NOT_BUILT


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def version() -> str:
    """The version, with the commit where the source is a checkout or was installed from one."""
    commit = _commit()
    return f"q3mega {_version('q3mega')}" + (f" ({commit})" if commit else "")


def _commit() -> str:
    source = Path(__file__).resolve().parents[2]
    if (source / ".git").exists():
        git = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=10"]
        try:
            return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""
    try:
        url = metadata.distribution("q3mega").read_text("direct_url.json")
        return str(json.loads(url or "{}")["vcs_info"]["commit_id"])[:10]
    except (metadata.PackageNotFoundError, ValueError, KeyError):
        return ""
