"""The old name of ``megactx.apps.generate``."""

from megactx.framework.renamed import run_as

if __name__ == "__main__":
    run_as("megactx.apps.generate")
