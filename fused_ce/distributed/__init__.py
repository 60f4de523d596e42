"""Cross entropy of sharded vocabularies, on torch.distributed."""

from .functional import vocab_parallel_cross_entropy
from .linear import vocab_parallel_linear_cross_entropy

__all__ = ["vocab_parallel_cross_entropy", "vocab_parallel_linear_cross_entropy"]
