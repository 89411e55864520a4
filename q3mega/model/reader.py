"""The tensors of a Hugging Face folder, each checked against what its config.json declares."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from q3mega.errors import UserError
from q3mega.model.sizes import Qwen3Shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = ("F32", "BF16", "F16")  # others are quantised, and mean nothing without their scales
_COMPARED = 1 << 14  # rows at once


class Reader:
    """Tensors by name, from one file or many; remembers what was asked for.

    Where a layer's experts are stacked into two tensors, as transformers 5 may save them, `fused`
    has their names.
    """

    def __init__(self, folder: Path, shape: Qwen3Shape) -> None:
        """Raises UserError for a folder without readable files."""
        self.folder, self.used = folder, set[str]()
        self.where: dict[str, Any] = {}
        for path in _files(folder):
            try:
                handle = safe_open(str(path), framework="pt")
            except SafetensorError as error:
                raise UserError(
                    f"checkpoint {path} is damaged ({error}): restore or rebuild it"
                ) from None
            self.where.update(dict.fromkeys(handle.keys(), handle))
        self.sizes = dict(_sizes(shape, self.where))
        self.tied = shape.tied

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def __call__(self, name: str, index: int | None = None) -> Tensor:
        """The tensor, or its part `index` of the first dimension.

        Raises UserError for one that is missing, quantised or of another size than config.json's.
        """
        if name not in self.where:
            raise UserError(f"checkpoint {self.folder} lacks tensor {name}: is it a Qwen3 model?")
        self.used.add(name)
        part = self.where[name].get_slice(name)
        size, dtype = tuple(part.get_shape()), part.get_dtype()
        if dtype not in _FLOATS:
            raise UserError(
                f"checkpoint {self.folder}: {name} is {dtype}: start from the folder in bfloat16"
            )
        if size != self.sizes.get(name, size):
            raise UserError(
                f"checkpoint {self.folder}: {name} would be {size} and must be "
                f"{self.sizes[name]}; its tensors do not fit its config.json"
            )
        return part[:] if index is None else part[index]

    def check_leftovers(self, read: set[str]) -> None:
        """Raise UserError for tensors that are not among those that any rank has asked for."""
        copies = {LM_HEAD} if self.tied else set()
        left = sorted(self.where.keys() - read - copies)
        if left:
            raise UserError(
                f"checkpoint {self.folder} has {len(left)} tensors without a place in this model "
                f"({', '.join(left[:3])}): is it a Qwen3 model, and whole?"
            )

    def check_tied(self) -> None:
        """Raise UserError for a tied model with an lm_head of its own, which is then not tied."""
        if not self.tied or LM_HEAD not in self or EMBEDDING not in self:
            return
        ours, theirs = (self.where[name].get_slice(name) for name in (EMBEDDING, LM_HEAD))
        size = ours.get_shape()
        same = size == theirs.get_shape() and all(
            torch.equal(ours[first : first + _COMPARED], theirs[first : first + _COMPARED])
            for first in range(0, size[0], _COMPARED)
        )
        if not same:
            raise UserError(
                f"checkpoint {self.folder}: tie_word_embeddings is true, but {LM_HEAD} is not "
                f"{EMBEDDING}: set it to false in config.json, or delete {LM_HEAD}"
            )

    def dtype(self) -> torch.dtype:
        """In which every tensor keeps all of its bits: bfloat16 where all are, else float32."""
        return torch.bfloat16 if self.kinds() == ["BF16"] else torch.float32

    def kinds(self) -> list[str]:
        """The tensors' dtypes, in safetensors' words."""
        return sorted({self.where[name].get_slice(name).get_dtype() for name in self.where})


def audit(folder: Path, shape: Qwen3Shape) -> dict[str, str]:
    """Every tensor of the folder and of the shape, by name: "mapped", "missing" or "left over"."""
    reader = Reader(folder, shape)
    held, expected = set(reader.where), set(reader.sizes)
    if shape.tied and LM_HEAD not in held:  # some write a copy of the embedding, too
        expected.remove(LM_HEAD)
    states = {name: "mapped" if name in expected else "left over" for name in held}
    return dict(sorted((states | dict.fromkeys(expected - held, "missing")).items()))


def _files(folder: Path) -> list[Path]:
    """As transformers chooses them: the single file, before an index of many."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.exists():
        other = next(
            (f.name for s in ("bin", "pt", "pth", "gguf") for f in folder.glob(f"*.{s}")), ""
        )
        reason = f" but {other}, which is not read (it may run code)" if other else ""
        remedy = (
            "save it with transformers' save_pretrained"
            if other
            else "give a Hugging Face model folder"
        )
        raise UserError(f"checkpoint {folder} has no {SINGLE}{reason}: {remedy}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index ({error!r}): download it again") from None
    if outside:
        raise UserError(f"{index} names {outside[0]}, which is not a file of its folder: mend it")
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"checkpoint {folder} has no {name}: give a Hugging Face model folder")
    return [folder / name for name in names]


def _sizes(shape: Qwen3Shape, held: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and size of every tensor of a shape; lm_head's also where it is tied."""
    s, rows = shape, (shape.vocab, shape.hidden)
    yield from ((EMBEDDING, rows), (LM_HEAD, rows), ("model.norm.weight", (s.hidden,)))
    attention = {
        "input_layernorm": (s.hidden,),
        "post_attention_layernorm": (s.hidden,),
        "self_attn.q_proj": (s.heads * s.head_dim, s.hidden),
        "self_attn.k_proj": (s.kv_heads * s.head_dim, s.hidden),
        "self_attn.v_proj": (s.kv_heads * s.head_dim, s.hidden),
        "self_attn.o_proj": (s.hidden, s.heads * s.head_dim),
        "self_attn.q_norm": (s.head_dim,),
        "self_attn.k_norm": (s.head_dim,),
    }
    router = {"mlp.gate": (s.experts, s.hidden)} if s.experts else {}
    width = s.moe_ffn if s.experts else s.ffn
    mlp = {
        "gate_proj": (width, s.hidden), "up_proj": (width, s.hidden), "down_proj": (s.hidden, width)
    }  # fmt: skip
    prefixes = [f"mlp.experts.{e}." for e in range(s.experts)] or ["mlp."]
    for layer in range(s.layers):
        prefix = f"model.layers.{layer}."
        for name, size in (attention | router).items():
            yield f"{prefix}{name}.weight", size
        stacked = f"{prefix}mlp.experts."
        if f"{stacked}gate_up_proj" in held:
            yield f"{stacked}gate_up_proj", (s.experts, 2 * s.moe_ffn, s.hidden)
            yield f"{stacked}down_proj", (s.experts, s.hidden, s.moe_ffn)
            continue
        for module in prefixes:
            yield from ((f"{prefix}{module}{name}.weight", size) for name, size in mlp.items())
