"""A sweep over several grids: their union, where Hydra's own sweeper knows one product of all choices.

    hydra:
      sweeper:
        grids:
          - {pooling: "mean,query", depth: "d1,d2"}  # four jobs
          - {gistnet: blockmean}  # and a fifth

What the command line gives holds for every grid, and wins over a grid's own value.
"""

import sys
import types
from collections.abc import Mapping

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import OverrideParseException
from hydra.plugins.sweeper import Sweeper


class Grids(BasicSweeper):
    """Hydra's basic sweeper, once per grid.

    Args:
        max_batch_size: most jobs that a launcher gets at once.
        params: choices of every grid, as in Hydra's basic sweeper.
        grids: each a mapping of settings to choices.
    """

    def __init__(self, max_batch_size: int | None = None, params=None, grids=()):
        super().__init__(max_batch_size, params)
        self.grids = list(grids) or [{}]

    def split_arguments(self, overrides, max_batch_size):
        """Parsed overrides of the command line -> chunks of jobs, each a list of overrides; no job twice.

        Raises:
            ValueError: a grid that is no mapping of settings to choices, or of which the choices cannot be read.
        """
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        jobs = []
        for index, grid in enumerate(self.grids):
            if not isinstance(grid, Mapping):
                raise ValueError(f"hydra.sweeper.grids[{index}]={grid}: it must be a mapping of settings to choices")
            try:
                own = parser.parse_overrides([f"{key}={_choices(choices)}" for key, choices in grid.items()])
            except OverrideParseException as error:
                raise ValueError(f"hydra.sweeper.grids[{index}]: {error.override} cannot be read") from error
            jobs += BasicSweeper.split_arguments([*own, *overrides], None)[0]
        jobs = list(dict.fromkeys(map(tuple, jobs)))
        return [list(chunk) for chunk in self.split_overrides_to_chunks([list(job) for job in jobs], max_batch_size)]


def _choices(value) -> str:
    return "null" if value is None else str(value)


def register() -> None:
    """Make ``Grids`` known to Hydra, which builds sweepers of ``hydra_plugins`` only. Safe to repeat."""
    try:
        import hydra_plugins
    except ImportError:  # no other plugin is installed
        hydra_plugins = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
        hydra_plugins.__path__ = []
    hydra_plugins.megactx = sys.modules["hydra_plugins.megactx"] = sys.modules[__name__]
    Grids.__module__ = "hydra_plugins.megactx"
    if Grids not in Plugins.instance().discover(Sweeper):
        Plugins.instance().register(Grids)
