"""Models larger than memory: compressed block by block, from a checkpoint on disk into another one."""

from factorformer.streaming.compress import compress_checkpoint, streams

__all__ = ["compress_checkpoint", "streams"]
