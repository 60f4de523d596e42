"""Cross entropy for PyTorch: loss and gradient in one pass over the logits, or from hidden states, on CPU and GPU."""

__version__ = "0.2.0"  # before the imports: the operators are named after it

from .backends.pool import empty_cache
from .backends.triton.launch import check_targets
from .functional import CrossEntropyOutput, cross_entropy
from .linear.functional import linear_cross_entropy
from .linear.module import LinearCrossEntropyLoss
from .logprobs import linear_token_logprobs, token_logprobs
from .missing import warn as _warn
from .module import CrossEntropyLoss
from .patching import is_patched, left_out, patch, patched, unpatch

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyOutput",
    "LinearCrossEntropyLoss",
    "__version__",
    "check_targets",
    "cross_entropy",
    "empty_cache",
    "is_patched",
    "left_out",
    "linear_cross_entropy",
    "linear_token_logprobs",
    "patch",
    "patched",
    "token_logprobs",
    "unpatch",
]

_warn()
