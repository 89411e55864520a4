"""Held-out loss by kind of document, and the load of a mixture's experts."""

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from q3mega.algorithms.losses import supervised
from q3mega.corpus import documents
from q3mega.data.batch import Batch, Sample, pack
from q3mega.data.tokenizer import Tokenizer
from q3mega.engine import Engine, LMHead, parallel

_T = TypeVar("_T")


def _texts(kind: str, seed: int, n: int, heldout: bool = False) -> list[str]:
    return list(itertools.islice(documents.documents(kind, seed, heldout=heldout), n))


def loss_by_kind(
    engine: Engine, tokenizer: Tokenizer, kinds: Iterable[str], sequence: int, seed: int
) -> dict[str, dict[str, float]]:
    """Nats a token on documents of each kind that training has not read."""
    results = {}
    for kind in kinds:
        draw = partial(_texts, kind, seed, 48, heldout=True)
        texts = tokenizer.encode_batch(parallel.from_first_data_rank(draw))
        total, n = nll(engine, texts, sequence)
        results[f"loss_{kind}"] = {"value": total / n, "n": int(n)}
    return results


def nll(engine: Engine, documents: Iterable[list[int]], sequence: int) -> tuple[float, float]:
    """(sum of nats, number of tokens) over the first `sequence` tokens of each document."""
    tokens = [ids[:sequence] for ids in documents if len(ids) > 1]
    samples = [Sample(t, [0.0] + [1.0] * (len(t) - 1)) for t in tokens]
    parts = engine.evaluate(pack(parallel.local_share(samples), 4 * sequence), _nll)
    total, n = np.array(parallel.gather_over_data(parts)).sum(0)
    return total, n


def _nll(head: LMHead, batch: Batch) -> tuple[float, float]:
    return float(supervised(head, batch)[0]), float(batch.loss_weights.sum())


def expert_load(
    engine: Engine, tokenizer: Tokenizer, kinds: Iterable[str], seed: int
) -> dict[str, Any]:
    """Each layer's busiest expert's tokens over the mean (1 = balance), on fresh documents."""
    routers = [layer.mlp.router for chunk in engine.chunks for layer in chunk.decoder.layers]
    counts = [torch.zeros(engine.shape.experts) for _ in routers]

    def count(layer: int) -> Callable[..., None]:
        def hook(router: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            counts[layer] += output[1].sum(0).cpu()  # the routing map (tokens, experts)

        return hook

    hooks = [router.register_forward_hook(count(i)) for i, router in enumerate(routers)]
    for kind in kinds:
        texts = tokenizer.encode_batch(
            parallel.from_first_data_rank(partial(_texts, kind, seed, 32))
        )
        samples = [Sample(t[:256], [0.0] * len(t[:256])) for t in texts]
        engine.evaluate(pack(samples, 4096), lambda head, batch: None)
    for hook in hooks:
        hook.remove()
    counts = [parallel.sum_over_tokens(total) for total in counts]
    imbalance = [float(total.max() / total.mean()) for total in counts]
    loads = parallel.gather_over_pipeline(imbalance)
    return {
        "expert_load_worst_layer": {"value": max(loads), "n": len(loads)},
        "expert_load_best_layer": {"value": min(loads), "n": len(loads)},
    }
