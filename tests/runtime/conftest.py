"""Small models and their sessions: see ``small_sessions``."""

from small_sessions import (  # noqa: F401  fixtures
    byte_models,
    byte_tokenizers,
    controller,
    exported,
    foretelling,
    foretelling_models,
    ids,
    make_models,
    models,
)
