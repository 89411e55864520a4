"""A teacher behind a vLLM server: its text, and its best tokens at every position of a text.

A position's best tokens come as log-probabilities of the prompt, one request a document, on the
endpoint and with the retries of sampling (docs/engines.md).
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from q3mega.data.batch import Batch
from q3mega.data.tokenizer import Tokenizer
from q3mega.engine import parallel
from q3mega.errors import UserError
from q3mega.model import Qwen3Shape
from q3mega.rollout.base import Completion, SamplingParams
from q3mega.rollout.servers import vllm
from q3mega.rollout.servers.client import RequestResult
from q3mega.rollout.servers.sampler import ServerSampler

# letters, digits, several scripts and special tokens: other tokenizers give other ids
PROBE = "<|im_start|>user\nΔ 12+345 = 数学 naïve\n<think></think><|im_end|>"


class ServedTeacher:
    """A `Sampler`, and a teacher of `distillation_topk`, over the server at `url` (without /v1).

    shape: the teacher's. All ranks that share a model call it, in the same order; the first of
    them asks. Raises UserError for a server that is not up, and for another tokenizer than ours
    where the server has one.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Tokenizer,
        shape: Qwen3Shape,
        *,
        timeout: float = 3600.0,
        key_env: str | None = None,
    ) -> None:
        self.url, self.shape, self.ids = url, shape, tokenizer.vocab_size
        self.server = ServerSampler([url], tokenizer, timeout=timeout, key_env=key_env)
        at = self.server.servers[0]
        theirs = self.server.run(lambda client: vllm.ids_of(client, at, PROBE))
        if theirs is None:
            logging.getLogger(__name__).warning("%s has no tokenizer to compare with ours", url)
        elif theirs != tokenizer.encode(PROBE):
            raise UserError(
                f"teacher_at={url}: its tokenizer gives other ids than {tokenizer.path}'s; teacher "
                "and student must share one"
            )

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[list[Completion]]:
        """See `Sampler`."""
        return parallel.from_first(lambda: self.server.generate(prompts, params))

    def top_logprobs(self, batches: Sequence[Batch], k: int) -> list[tuple[Tensor, Tensor]]:
        """(ids (T, K) int64, log-probabilities (T, K) fp32) of the K likeliest next tokens at every
        position of each batch, at temperature 1.

        After a document's last token nothing is predicted: its row repeats the one before. Raises
        RolloutServerFailed when the server gave no usable answer, UserError for what it refuses.
        """
        return parallel.from_first(lambda: self._asked(batches, k))

    def _asked(self, batches: Sequence[Batch], k: int) -> list[tuple[Tensor, Tensor]]:
        documents = [
            part.tolist() for b in batches for part in b.tokens.split(b.cu_seqlens.diff().tolist())
        ]
        how: dict[str, Any] = {"prompt_logprobs": k, "temperature": 1.0, "seed": 0}
        requests = {
            name: vllm.request(document, 1, name, **how)
            for name, document in ((f"q3mega-teach-{i}", d) for i, d in enumerate(documents))
        }
        try:
            choices = self.server.ask_all(requests)
        except UserError as error:
            raise UserError(
                f"teacher_topk={k}: {error}; a server tells as many as its --max-logprobs"
            ) from None
        rows = iter([self._best(d, c, k) for d, c in zip(documents, choices, strict=True)])
        found = []
        for batch in batches:
            parts = [next(rows) for _ in batch.cu_seqlens[1:]]
            ids, logprobs = (torch.cat(column) for column in zip(*parts, strict=True))
            found.append((ids, logprobs))
        return found

    def _best(self, document: list[int], found: RequestResult, k: int) -> tuple[Tensor, Tensor]:
        """(T, K) each; the server's row i is what could stand in the place of token i + 1."""
        rows = found.prompt_logprobs
        best = [
            of_tokenizer(sorted(row.items(), key=lambda pair: -pair[1])[:k], self.ids)
            for row in rows
        ]
        if len(best) != len(document) - 1 or any(len(row) != k for row in best):
            raise UserError(
                f"teacher_at={self.url} gave no {k} log-probabilities of each of {len(document)} "
                "tokens: is it a vLLM 0.32?"
            )
        best = best + best[-1:]
        if not best:
            return torch.arange(k)[None], torch.full((1, k), -math.log(k))
        ids = torch.tensor([[token for token, _ in row] for row in best])
        return ids, torch.tensor([[logprob for _, logprob in row] for row in best])


def of_tokenizer(best: list[tuple[int, float]], ids: int) -> list[tuple[int, float]]:
    """As many pairs (id, log-probability), none beyond a tokenizer's `ids`: the server's padding
    rows give way to the lowest other ids, with the least log-probability of the row, below which
    theirs lies."""
    known = [pair for pair in best if pair[0] < ids]
    if len(known) == len(best):
        return best
    named, least = {token for token, _ in known}, min(logprob for _, logprob in best)
    spare = (i for i in range(ids) if i not in named)
    return known + [(token, least) for token, _ in zip(spare, best[len(known) :], strict=False)]
