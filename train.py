"""Train any part of MegaContext: ``python train.py experiment=gist_stage1``. ``--help`` lists what there is."""

import sys

from megactx.framework.app import run

if __name__ == "__main__":
    sys.exit(run())
