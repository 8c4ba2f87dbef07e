"""The old place of ``megactx.lm.chunked_head``, until all rooms have the new one."""

from megactx.lm.chunked_head import CHUNK_ELEMENTS, OBJECTIVES, nll, score, score_exactly

__all__ = ["CHUNK_ELEMENTS", "OBJECTIVES", "nll", "score", "score_exactly"]
