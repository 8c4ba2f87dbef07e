"""Figures as JSON takes them."""


def without_nan(value):
    """Nested dicts and lists for JSON, which has no NaN and no infinity: ``None`` in their place."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) or value != value else value
