"""What the numbers of a run say: metrics, intervals, the report with its controls, plots, context use of a base."""
