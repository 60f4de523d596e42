"""Before its first launch on a device that nobody has reported on, a kernel is held against torch's operators.

A variant (what Triton compiles once: a kernel, its traits, its tiling, the dtypes, the layout) first runs on a few
samples of the call's own data, and up to four rows of what it gives are compared with `reference` in float64 on the
CPU. That waits for the device, once a variant, and never inside the capture of a CUDA graph. A variant that is right is
not looked at again. One that is not makes the device decline all of this backend, with one warning: torch's operators
run instead, for the call in progress too.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...contract import Call, Forward, Gradients, Schedule, Upstream
from .. import reference
from .arguments import Tiling, Traits
from .compare import differs, divisors_of, sample
from .plan import Cut
from .readable import number
from .rows import Matrix
from .targets import is_capturing

SETTING = os.environ.get("FUSED_CE_SELF_CHECK")  # "0": never; "1": under the interpreter too; read once
REPORTED: frozenset[str] = frozenset()  # names of the devices whose results stand in benchmarks/results/
TRIES = 3  # calls without a row that can be compared, before a variant is let through


class Variant(NamedTuple):
    """What Triton compiles once, nearly: the divisibility of sizes is in the tiling's ALIGN."""

    key: tuple[Any, ...]

    def __str__(self) -> str:
        words = []
        for part in self.key:
            if isinstance(part, Traits):
                words += [name for name, is_so in part._asdict().items() if is_so]
            elif isinstance(part, Tiling):
                words += [f"{name}={value}" for name, value in part._asdict().items()]
            else:
                words.append(str(part).removeprefix("torch."))
        return " ".join(words)

    @property
    def device(self) -> torch.device:
        device = self.key[1]
        assert isinstance(device, torch.device)
        return device


_settled: set[tuple[Any, ...]] = set()  # keys of variants
PASSED: list[Variant] = []
UNCOMPARED: list[Variant] = []  # let through after TRIES calls
DECLINED: dict[torch.device, str] = {}  # and what was found
_tried: dict[Variant, int] = {}


def declines(device: torch.device) -> bool:
    return bool(DECLINED) and device in DECLINED


def unsettled(kernel: str, call: Call, plan: Cut, views: list[Matrix | None], *more: Any) -> Variant | None:
    """The variant that a launch would run, if it is to be compared first."""
    input, target, weight, options = call
    if not _is_wanted(input.device):
        return None
    logits, probs = views[0], views[1]
    assert logits is not None
    key = (
        kernel,
        input.device,
        input.dtype,
        target.dtype,
        None if weight is None else weight.dtype,
        options.dtype,
        options.reduction,
        options.grad_scale is None,
        logits.inner is None,
        logits.col is None,
        probs is None or probs.inner is None,
        probs is None or probs.col is None,
        logits.outer is None,
        plan.traits,
        plan.tiling,
        plan.shares,
        *plan.settings.values(),
        *more,
    )
    return None if key in _settled or is_capturing(input.device) else Variant(key)


@functools.cache
def _is_wanted(device: torch.device) -> bool:
    if SETTING == "0":
        return False
    return SETTING == "1" if device.type != "cuda" else torch.cuda.get_device_name(device) not in REPORTED


def forward_is_right(
    variant: Variant, call: Call, schedule: Schedule, run: Callable[[Call], tuple[Forward, Tensor]]
) -> bool:
    """`run` gives the result of a call and the losses of its rows, by this variant."""

    def findings() -> Iterator[str | None]:
        few = _few(call)
        result, losses = run(few._replace(input=_copied(few.input)) if call.options.inplace else few)
        g = number(call.options.grad_scale, call.options.dtype or call.input.dtype, torch.device("cpu"))
        exact = sample(few, divisors_of(few), torch.ones((), device="cpu") if g is None else g, None)
        if exact is None:
            yield None
            return
        yield exact.loss_differs(losses, result.loss)
        if schedule == "fused":
            assert result.grad is not None
            yield exact.grad_differs(result.grad)
        if result.stats is not None:
            yield exact.stats_differ(result.stats)

    return _judge(variant, findings)


def backward_is_right(
    variant: Variant,
    call: Call,
    grad: Tensor | None,
    saved: Tensor,
    upstream: Upstream,
    wants_target: bool,
    run: Callable[[Call, Tensor | None, Tensor, Upstream], Gradients],
) -> bool:
    """`run` gives the gradients from a call, a gradient to overwrite, what was saved, and the upstream gradients."""

    def findings() -> Iterator[str | None]:
        few = _few(call)
        loss, lse = upstream.loss, None if upstream.lse is None else _first(upstream.lse, call)
        # Where the upstream gradient is the expected one, the kernel would leave the gradient as it is.
        few_upstream = Upstream(_first(loss, call) if grad is None else loss * 0.5, lse)
        few_call = few._replace(input=_copied(few.input)) if call.options.inplace else few
        few_saved = torch.cat([saved[: few.row_shape.numel()], saved[-1:]])
        result = run(few_call, None if grad is None else _first(grad, call).clone(), few_saved, few_upstream)
        D, count = saved[-1, :2].tolist() if call.options.reduction == "mean" else (1.0, 1.0)
        exact = sample(few, (D, count), few_upstream.loss, few_upstream.lse)
        if exact is None:
            yield None
            return
        yield exact.grad_differs(result.input)
        if wants_target:
            assert result.target is not None
            yield exact.target_grad_differs(result.target)

    return _judge(variant, findings)


def part_is_right(variant: Variant, call: Call, run: Callable[[Call], Tensor]) -> bool:
    """`run` gives the sums of a shard, by this variant."""

    def findings() -> Iterator[str | None]:
        few = _few(call)
        sums, exact = run(few), sample(few, (1.0, 1.0), torch.ones((), device="cpu"), None)
        yield None if exact is None else exact.sums_differ(sums, call.options.return_stats)

    return _judge(variant, findings)


def finish_is_right(
    variant: Variant,
    call: Call,
    sums: Tensor,
    upstream: Upstream,
    into: Tensor,
    run: Callable[[Call, Tensor, Upstream, Tensor], None],
) -> bool:
    """`run` writes the gradient of a shard from the sums of whole rows and the upstream gradients of rows."""

    def findings() -> Iterator[str | None]:
        few = _few(call)
        R = few.rows
        g, g_lse = (t if t is None or t.dim() == 0 else t.reshape(-1)[:R] for t in (upstream.loss, upstream.lse))
        assert g is not None
        few_sums, few_upstream, grad = sums[:, :R].contiguous(), Upstream(g, g_lse), _copied(_first(into, call))
        run(few, few_sums, few_upstream, grad)
        exact = sample(few, (1.0, 1.0), g, g_lse)
        yield None if exact is None else exact.shard_grad_differs(grad, few_sums)

    return _judge(variant, findings)


def rescale_is_right(
    grad: Tensor, upstream: Tensor, expected: Tensor | None, keep: bool, run: Callable[[Tensor, Tensor], Tensor]
) -> bool:
    """`run` gives a gradient made right for an upstream gradient."""
    if declines(grad.device):
        return False
    if not _is_wanted(grad.device):
        return True
    dtypes = grad.dtype, upstream.dtype, None if expected is None else expected.dtype
    key = ("rescale_grad", grad.device, *dtypes, keep)
    if key in _settled or is_capturing(grad.device):
        return True

    def findings() -> Iterator[str | None]:
        few, g = grad.flatten()[:4096].clone(), upstream.new_full((), 3.0)
        before = few.cpu().double()
        wanted = before * 3.0 if expected is None else before * 3.0 / expected.cpu().double()
        yield differs("gradient", run(few, g), wanted, wanted.abs() * 1e-4)

    return _judge(Variant(key), findings)


def _few(call: Call) -> Call:
    """The first samples of a call: four rows, or two images, walked by the kernels as all of them are."""
    return call._replace(input=_first(call.input, call), target=_first(call.target, call))


def _first(tensor: Tensor, call: Call) -> Tensor:
    """The part of the first samples; a call without batch has one, and a number is for all."""
    if call.input.dim() == 1 or tensor.dim() == 0:
        return tensor
    return tensor[: 4 if call.input.dim() == 2 else 2]


def _copied(tensor: Tensor) -> Tensor:
    """With the same strides, by which a kernel's variant goes."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _judge(variant: Variant, findings: Callable[[], Iterator[str | None]]) -> bool:
    """Whether the variant may run; a finding is "" where it is right, and None where no row could be compared."""
    try:
        with torch.no_grad():
            found = list(findings())
    except torch.OutOfMemoryError:
        found = [None]
    wrong = "; ".join(filter(None, found))
    if not wrong:
        if None not in found:
            PASSED.append(variant)
            _settled.add(variant.key)
        else:
            _tried[variant] = _tried.get(variant, 0) + 1
            if _tried[variant] == TRIES:
                UNCOMPARED.append(variant)
                _settled.add(variant.key)
        return True
    DECLINED[variant.device] = f"{variant}: {wrong}"
    warnings.warn(
        f"fused_ce: a Triton kernel does not agree with torch here, so torch's operators run on {variant.device} from "
        f"now on, in this call too. Please report this: {wrong}; variant {variant}; {_machine(variant.device)}. "
        "FUSED_CE_SELF_CHECK=0 takes the kernels without a look at them.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _machine(device: torch.device) -> str:
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    if device.type != "cuda":
        return f"{versions}, Triton's interpreter"
    from torch.utils import collect_env  # here: only a report needs it

    found = torch.cuda.get_device_properties(device)
    driver = collect_env.get_nvidia_driver_version(collect_env.run)  # type: ignore[no-untyped-call]
    return f"{versions}, {found.name}, compute capability {found.major}.{found.minor}, driver {driver}"


def forward_by_torch(call: Call, schedule: Schedule, saved: Tensor | None) -> Forward:
    """What `launch.forward` owes; `saved` has its shape, and holds nothing that `backward_by_torch` would read."""
    result = reference.forward(call, schedule)
    grad = result.grad
    if grad is not None and call.options.inplace:
        grad = call.input.copy_(grad)
    return result._replace(grad=grad, saved=saved)


def backward_by_torch(call: Call, grad: Tensor | None, upstream: Upstream, keep: bool, wants_target: bool) -> Gradients:
    """What `launch.backward` owes, whether its forward ran the kernels or not."""
    if grad is not None and call.options.inplace:
        # The logits are gone.
        return Gradients(reference.rescale(grad, call.target, call.options, upstream.loss, keep))
    return reference.backward(call, None, None, upstream, True, wants_target)


def report() -> Iterator[str]:
    """What was found so far, a line each, for `python -m fused_ce`."""
    for outcome, variants in (("agrees", PASSED), ("not compared", UNCOMPARED)):
        for variant in variants:
            yield f"{outcome}: {variant}"
    for found in DECLINED.values():
        yield f"differs: {found}"
