"""A teacher's K best tokens of every position, on disk: 4 bytes a candidate.

A candidate is one little-endian uint32: the id in the upper 18 bits (Qwen3's 151,936 ids need 18;
16 are too few), the log-probability in the lower 14 as steps of 1/512 nat below 0, so down to -32
with an error of at most 0.1 % of the probability. K = 64 takes 256 bytes a token, 1/2374 of the
fp32 logits.

    FOLDER/topk.bin     (tokens, K) uint32, document after document
    FOLDER/topk.ends    (documents,) uint64: tokens up to each document's end
    FOLDER/topk.json    k, vocab_size, documents; written last, so an unfinished store has none
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from q3mega.data.batch import Sample
from q3mega.errors import UserError

ID_BITS, STEPS_A_NAT = 18, 512
STEP_BITS = 32 - ID_BITS
LAST_STEP = (1 << STEP_BITS) - 1
ENTRY, END = np.dtype("<u4"), np.dtype("<u8")


class TeacherTopK:
    """The reader: document i as `store[i]` -> (ids (T, K) int64, log-probabilities (T, K) fp32).

    What `ops.distill_loss` takes as teacher_topk. Files are mapped, not read. Raises UserError for
    a folder that holds no finished store, or one whose files do not fit together.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            about = json.loads((folder / "topk.json").read_text())
            self.k, self.vocab_size = int(about["k"]), int(about["vocab_size"])
            documents = int(about["documents"])
            self.ends = np.fromfile(folder / "topk.ends", END)
            size = (folder / "topk.bin").stat().st_size
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{folder}: holds no finished top-k store ({e}); write it again"
            ) from None
        tokens = int(self.ends[-1]) if len(self.ends) else 0
        if len(self.ends) != documents or size != tokens * self.k * ENTRY.itemsize:
            raise UserError(
                f"{folder}: topk.bin has {size} bytes for {len(self.ends)} of "
                f"{documents} documents, {tokens} tokens of {self.k}; write it again"
            )
        shape = (tokens, self.k)
        self.entries = (
            np.memmap(folder / "topk.bin", ENTRY, "r", shape=shape)
            if size
            else np.zeros(shape, ENTRY)
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, document: int) -> tuple[Tensor, Tensor]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        start = int(self.ends[document - 1]) if document else 0
        entries = np.asarray(self.entries[start : int(self.ends[document])])
        ids = (entries >> STEP_BITS).astype(np.int64)
        logprobs = (entries & LAST_STEP).astype(np.float32)
        logprobs *= np.float32(-1 / STEPS_A_NAT)
        return torch.from_numpy(ids), torch.from_numpy(logprobs)


class WithTeacher(Sequence[Sample]):
    """samples[i] with document i of a store as columns teacher_ids and teacher_logprobs (T, K),
    read when its turn comes. A store's row is what the teacher says after a token; a column stands
    at the token it predicts, so it is one place later."""

    def __init__(self, samples: Sequence[Sample], store: TeacherTopK) -> None:
        if len(samples) != len(store):
            raise UserError(f"a store of {len(store)} documents for {len(samples)} samples")
        self.samples, self.store = samples, store

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: Any) -> Any:
        ids, logprobs = (part.roll(1, 0) for part in self.store[i])
        return replace(self.samples[i], columns={"teacher_ids": ids, "teacher_logprobs": logprobs})


class TopKWriter:
    """`with TopKWriter(folder, k=64, vocab_size=151_936) as store: store.add(ids, logprobs)`.

    The store is there once the block ends; a block that fails leaves none. An old one of the same
    folder is gone as soon as the block begins.
    """

    def __init__(self, folder: str | Path, *, k: int, vocab_size: int) -> None:
        if not 1 <= k <= vocab_size <= 1 << ID_BITS:
            raise UserError(
                f"k={k}, vocab_size={vocab_size}: k at most the vocabulary, and that at most "
                f"{1 << ID_BITS}, what {ID_BITS} bits name"
            )
        self.folder, self.k, self.vocab_size = Path(folder), k, vocab_size
        self.ends: list[int] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "topk.json").unlink(missing_ok=True)
        self.file = (self.folder / "topk.bin").open("wb")
        return self

    def add(self, ids: Tensor, logprobs: Tensor) -> None:
        """One document: ids (T, K) and their log-probabilities (T, K).

        Raises UserError for another shape, an id out of the vocabulary or a log-probability above
        0 (rounding apart) or NaN.
        """
        if ids.shape != logprobs.shape or ids.dim() != 2 or ids.shape[1] != self.k:
            raise UserError(
                f"ids {tuple(ids.shape)}, logprobs {tuple(logprobs.shape)}: must both be "
                f"(T, {self.k})"
            )
        # numpy, in place: passes this small are not worth threads, which busy cores make wait
        id_array, steps = ids.cpu().numpy(), logprobs.float().cpu().numpy()
        if id_array.size and not 0 <= id_array.min() <= id_array.max() < self.vocab_size:
            raise UserError(
                f"ids lie in {id_array.min()}..{id_array.max()}: the vocabulary has "
                f"0..{self.vocab_size - 1}"
            )
        if steps.size and not steps.max() < 1e-3:  # NaN is no less
            raise UserError(f"logprobs up to {float(steps.max())}: must be at most 0")
        steps = steps * np.float32(-STEPS_A_NAT)
        np.clip(np.rint(steps, out=steps), 0, LAST_STEP, out=steps)
        entries = id_array.astype(ENTRY)
        entries <<= STEP_BITS
        entries |= steps.astype(ENTRY)
        self.file.write(entries.data)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(ids))

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if error is None:
            np.array(self.ends, END).tofile(self.folder / "topk.ends")
            about = {"k": self.k, "vocab_size": self.vocab_size, "documents": len(self.ends)}
            (self.folder / "topk.json").write_text(json.dumps(about))
