"""The old name of ``megactx.apps.ingest``."""

from megactx.framework.renamed import run_as

if __name__ == "__main__":
    run_as("megactx.apps.ingest")
