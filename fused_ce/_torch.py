"""Every private name of torch that the package uses, found once, here; and what else of torch needs care.

Where a version of torch lacks one, its stand-in gives the careful answer: the call then runs torch's own operators, or
costs a copy, but is never wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function


def _find(path: str, otherwise: Any = None) -> Any:
    """What `path` names inside torch, or `otherwise`."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return otherwise if found is None else found


# Whether a torch.func transform is at work.
transforms_active: Callable[[], bool] = _find("_C._are_functorch_transforms_active", lambda: True)

# Modes that watch torch's functions and operators, and what records them for torch.jit.trace (where changes in place
# would go unseen, that is always said to be at work). A default device is such a mode too, one that only looks at
# functions that make tensors.
_function_modes: Callable[[], int] = _find("_C._len_torch_function_stack", lambda: -1)
_function_mode: Callable[[int], object] = _find("_C._get_function_stack_at", lambda i: None)
_DEVICE_CONTEXT = "torch.utils._device"  # the module of its class
_dispatch_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack", lambda: 1)
_HAS_VERSIONS = _find("Tensor._version") is not None
_tracing_state: Callable[[], object] = _find("_C._get_tracing_state" if _HAS_VERSIONS else "", lambda: "unknown")

# Whether the backward that runs now was asked to keep its graph.
keeps_graph: Callable[[], bool] = _find("_C._autograd._get_current_graph_task_keep_graph", lambda: True)

# Whether a tensor holds zeros that take no memory, as autograd makes them.
_is_zero: Callable[[Tensor], bool] = _find("_is_zerotensor", lambda tensor: False)

# The hooks that saved tensors go through (checkpointing, offloading), or None.
_saved_tensor_hooks: Callable[[bool], object] = _find("_C._autograd._top_saved_tensors_default_hooks", lambda _: "any")

# Whether a vmap over upstream gradients (is_grads_batched, or torch.func's) made this tensor.
_is_legacy_batched: Callable[[Tensor], bool] = _find("_C._functorch.is_legacy_batchedtensor", lambda tensor: True)
_is_wrapped: Callable[[Tensor], bool] = _find("_C._functorch.is_functorch_wrapped_tensor", lambda tensor: True)

_unwrap_if_dead: Callable[[Tensor], Tensor] = _find("_C._functorch.unwrap_if_dead", lambda tensor: tensor)

# Swaps all that two storages hold. Without it, the memory of a tensor made elsewhere cannot be resized.
swap: Callable[[Any, Any], None] | None = _find("UntypedStorage._swap_data_ptr_")

_PLAIN = (Tensor, torch.nn.Parameter, type(None))
_PID = os.getpid()
T = TypeVar("T")

_HAS_LEVELS = _find("autograd.forward_ad._current_level") is not None
_UNPACKS_ONE = _find("_C._autograd.SavedTensor.unpack") is not None
_HAS_BASES = _find("Tensor._is_view") is not None and _find("Tensor._base") is not None


def dual_level_active() -> bool:
    """Whether forward-mode differentiation is at work."""
    return not _HAS_LEVELS or forward_ad._current_level >= 0


def is_watched() -> bool:
    """Whether something records or intercepts torch's functions; or changes in place would go unseen."""
    modes = _function_modes()
    if modes and (modes < 0 or any(type(_function_mode(i)).__module__ != _DEVICE_CONTEXT for i in range(modes))):
        return True
    return _tracing_state() is not None


def is_dispatched() -> bool:
    """Whether something watches torch's operators: it is to see the kernels as one of them."""
    return _dispatch_modes() > 0


def is_overridden(tensors: tuple[Any, ...]) -> bool:  # of Tensor | None
    """Whether a subclass or a mode is to see the call of a torch function with them."""
    return has_torch_function(tensors) and (is_watched() or any(type(tensor) not in _PLAIN for tensor in tensors))


# The above as functions that answer with something true where it is at work, and what matters to 16 bits only.
WATCHERS: tuple[Callable[[], object], ...] = (
    transforms_active,
    dual_level_active,
    _function_modes,
    _dispatch_modes,
    _tracing_state,
)
WATCHERS_OF_HALVES = (partial(torch.is_autocast_enabled, "cpu"),)


def has_hooks() -> bool:
    """Whether saved tensors go through hooks."""
    return _saved_tensor_hooks(True) is not None


def saved(ctx: Any) -> Callable[[int], Any]:
    """Gives the i-th tensor that a Function saved, or None.

    Only that one is asked whether it was changed in place since (a RuntimeError), where torch can ask one. All of them
    at once cost a fifth of one by one, but that one was changed is then an error of all.

    Raises:
        RuntimeError: the graph was freed.
    """
    try:
        return ctx.saved_tensors.__getitem__  # type: ignore[no-any-return]
    except RuntimeError:
        if not _UNPACKS_ONE:
            raise
        packed = ctx._raw_saved_tensors
        return lambda i: packed[i].unpack()


def under_transforms() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return transforms_active() or dual_level_active()


def is_transformed(upstream: Tensor | None) -> bool:
    """Whether a backward with this upstream gradient is itself differentiated or vectorised."""
    if upstream is None:
        return False
    return under_transforms() or _is_legacy_batched(upstream) or _is_wrapped(upstream)


def apply_of(function: Any) -> Callable[..., Any]:
    """`function.apply`, less what that does for torch.func, whose calls do not come here: 2 us of a small call."""
    return super(torch.autograd.Function, function).apply  # type: ignore[no-any-return]


def save_alias(node: Any, i: int, logits: Tensor) -> None:
    """Let a node keep an alias of the i-th tensor that it saved, with its graph, in place of the tensor itself.

    torch then no longer looks whether it was changed in place: `node.version` is what `version` of it is to be.
    """
    if not has_hooks():
        node._raw_saved_tensors[i].register_hooks(Tensor.detach, _same)
        node.version = version(logits)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; inference tensors do not count their changes."""
    return 0 if tensor.is_inference() else tensor._version


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor; nothing is imported to find out, as there is none before its module is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, getattr(module, "DTensor", ()))


def shares_a_leaf(tensor: Tensor) -> bool:
    """Whether the tensor's memory belongs to a leaf that requires grad, such as a parameter."""
    if not _HAS_BASES:
        return True
    base = tensor._base if tensor._is_view() else tensor
    return base is not None and base.is_leaf and base.requires_grad


def with_memory(tensor: Any) -> Any:  # Tensor | None
    """The tensor, or zeros made real that torch keeps without memory; None as it is.

    Raises:
        RuntimeError: its storage was freed.
    """
    if tensor is None:
        return None
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        alive = _unwrap_if_dead(tensor)  # what a torch.func transform left behind when it ended
        if alive is tensor:
            raise
        return with_memory(alive)
    if (address and not tensor.storage_offset()) or not tensor.numel():
        return tensor
    # Of a storage without memory, the address is what the offset alone makes it.
    if address != tensor.storage_offset() * tensor.itemsize or tensor.is_meta:
        return tensor
    if _is_zero(tensor):
        return tensor.clone()
    raise RuntimeError(
        "The tensor has a non-zero number of elements, but its data is not allocated yet: expected a tensor with its "
        f"storage, got one of shape {tuple(tensor.shape)} whose storage was freed (resized to 0 bytes, as FSDP and "
        "offloading do). Bring it back first, or keep it until backward has run."
    )


def in_any_process(work: Callable[[], T]) -> T:
    """What torch's own operators give, in a forked child too: there they would wait for threads that are not."""
    threads = torch.get_num_threads()
    if os.getpid() == _PID or threads == 1:
        return work()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(threads)


def _reduction_of(size_average: bool | None, reduce: bool | None) -> str:
    """torch's rule for its two deprecated arguments."""
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


_legacy_reduction: Callable[[bool | None, bool | None], str] = _find("nn._reduction.legacy_get_string", _reduction_of)


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The reduction that torch's two deprecated arguments ask for; it warns of them, but a graph cannot."""
    of = _reduction_of if torch.compiler.is_compiling() else _legacy_reduction
    return of(size_average, reduce)


_warn_of_reduction: Callable[[str], int] = _find("nn._reduction.get_enum", lambda name: 1)


def mean_by_its_old_name() -> str:
    """torch still knows "elementwise_mean", and warns of it."""
    _warn_of_reduction("elementwise_mean")
    return "mean"


# x @ W.T + bias by oneDNN, which torch's compiler calls it for; and whether it has 16-bit products for this processor.
_linear: Callable[..., Tensor] | None = _find("ops.mkldnn._linear_pointwise")
_has_bfloat16_products: Callable[[], bool] = _find("ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)
_has_float16_products: Callable[[], bool] = _find("ops.mkldnn._is_mkldnn_fp16_supported", lambda: False)

# Whether torch.addmm takes 16-bit factors and a float32 sum, on CUDA.
ADDS_IN_FLOAT32 = _find("ops.aten.addmm.dtype_out") is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (m, k), (n, k), (n,) -> (m, n)
    """x @ weight.T + bias by oneDNN; any strides, of which it does not heed the bias's."""
    assert _linear is not None
    return _linear(x, weight, None if bias is None else bias.contiguous(), "none", [], "")


def why_no_linear() -> str:
    """Why `linear` cannot be called, in words; "" if it can: once a process it is held against torch's own."""
    if _linear is None or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch does not offer oneDNN's products"
    try:
        x, weight, bias = (torch.linspace(-1, 1, n, device="cpu") for n in (32 * 16, 48 * 16, 48))
        x, weight = x.view(16, 32).t(), weight.view(16, 48).t()
        right = torch.allclose(linear(x, weight, bias), torch.addmm(bias, x, weight.t()), rtol=1e-5, atol=1e-5)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return f"this torch's oneDNN products are called differently ({str(error).splitlines()[0]})"
    return "" if right else "oneDNN's products did not agree with torch.mm"


def _says_yes(question: Callable[[], bool]) -> bool:
    try:
        return bool(question())
    except RuntimeError:
        return False


# Asked at import, because torch.compile cannot look into the questions.
_HALF_PRODUCTS = {
    torch.bfloat16: _says_yes(_has_bfloat16_products),
    torch.float16: _says_yes(_has_float16_products),
}


def has_products(dtype: torch.dtype) -> bool:
    """Whether torch.mm of 16 bits on the CPU has kernels made for this processor."""
    return _HALF_PRODUCTS[dtype]


def surely(condition: Any) -> bool:
    """The condition, or False where the sizes of a graph that is being traced leave it open."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    # Found when it is needed: torch imports that module when it first compiles.
    decide: Callable[[Any], bool] = _find("fx.experimental.symbolic_shapes.guard_or_false", bool)
    return decide(condition)
