"""torch's profiler in a run: a trace and a table of operators in the run folder."""

from lightning.pytorch.profilers import PyTorchProfiler


class Trace(PyTorchProfiler):
    """Lightning's, which ends with the training.

    What Lightning's own does after it has reported (the last checkpoint starts it again) never ends, and fails when the
    profiler is thrown away.

    Args:
        folder: the run folder; ``*.pt.trace.json`` and ``fit-trace.txt`` go there.
    """

    def __init__(self, folder: str):
        # Names of modules come from hooks on ``forward``, and a GistNet is called by other names.
        super().__init__(dirpath=folder, filename="trace", record_module_names=False)
        self.reported = False

    def describe(self) -> None:
        super().describe()
        self.reported = True

    def start(self, action_name: str) -> None:
        if not self.reported:
            super().start(action_name)
