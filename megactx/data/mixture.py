"""Several sources, one per domain, as one source."""

import hashlib

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

    def load(self):
        """-> ``datasets.Dataset`` with string columns ``text``, ``domain``, ``source``."""
        from datasets import concatenate_datasets

        parts = []
        for domain, source in sorted(self.sources.items()):
            rows = source.load().select_columns(["text", "source"])
            parts.append(rows.add_column("domain", [domain] * len(rows)))
        return concatenate_datasets(parts)
