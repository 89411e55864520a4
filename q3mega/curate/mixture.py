"""The mixture, by instance: each document's labels give it a weight, the weight its copies.

A weight is the expected number of times that training reads the document: 2.5 is two copies and a
third with probability one half. What is drawn is drawn by the document's hash, so that it depends
on neither the order of the files nor the number of workers.
"""

import hashlib
from collections.abc import Sequence

from q3mega.curate.config import Weight
from q3mega.curate.document import Document

_LABELS = ("domain", "language", "quality", "source")


def weight(factors: Sequence[Weight], d: Document) -> float:
    """The product of the factors whose labels are all the document's; 1 without any."""
    product = 1.0
    for factor in factors:
        pairs = ((getattr(factor, label), getattr(d, label)) for label in _LABELS)
        if all(given is None or given == actual for given, actual in pairs):
            product *= factor.weight
    return product


def draw(
    factors: Sequence[Weight], seed: int, heldout: float, documents: Sequence[Document]
) -> list[str]:
    """Set copies and heldout; what is read no times is dropped. A held-out text is kept once."""
    for d in documents:
        d.heldout = uniform(d.identity, seed, "heldout") < heldout
        w = weight(factors, d)
        d.copies = int(w) + (uniform(d.identity, seed, "copies") < w % 1)
        if d.heldout and d.copies:
            d.copies = 1
    return ["" if d.copies else "weight" for d in documents]


def uniform(identity: int, seed: int, purpose: str) -> float:
    """A number in [0, 1) for a document, another one for each seed and purpose."""
    key = f"{identity}/{seed}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=6).digest()) / 2**48
