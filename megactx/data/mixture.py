"""Several sources, one per domain, as one source."""

import hashlib
from collections.abc import Iterator
from functools import partial

from .documents import Part, as_dataset, parts_of
from .files import check_domain


class Mixture:
    """The documents of several sources; each one's documents take the domain that it is listed under.

    Args:
        sources: domain -> source. How often each is drawn is not decided here, but by ``data.weights``.
    """

    def __init__(self, sources: dict):
        if not sources:
            raise ValueError("data.source.sources is empty: give at least one domain with its source")
        self.sources = dict(sources)
        for domain in self.sources:
            check_domain(domain)

    def fingerprint(self) -> str:
        parts = [f"{domain}={source.fingerprint()}" for domain, source in sorted(self.sources.items())]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def parts(self) -> list[Part]:
        """The parts of the sources, domain by domain."""
        return [
            Part(f"{domain}={part.fingerprint}", partial(_labelled, part, domain))
            for domain, source in sorted(self.sources.items())
            for part in parts_of(source)
        ]

    def load(self):
        """-> ``datasets.Dataset`` with string columns ``text``, ``domain``, ``source``, in memory."""
        return as_dataset(document for part in self.parts() for document in part.documents())


def _labelled(part: Part, domain: str) -> Iterator[dict]:
    return ({**document, "domain": domain} for document in part.documents())
