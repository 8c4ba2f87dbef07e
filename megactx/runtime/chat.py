"""The old name of ``megactx.apps.chat``."""

from megactx.framework.renamed import run_as

if __name__ == "__main__":
    run_as("megactx.apps.chat")
