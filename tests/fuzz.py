"""Random calls against float64 and against torch: `python tests/fuzz.py SECONDS SEED cpu|triton|reference|any`.

A mismatch is printed with the command that repeats it, `python tests/fuzz.py --one SEED INDEX BACKEND`; the exit status
is then 1.
"""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
BACKEND = sys.argv[-1]
if BACKEND == "triton":
    os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported

import numpy as np
import torch
import torch.nn.functional as F
from accuracy import bits
from fuzz_bad import REFUSALS, spoiled
from fuzz_calls import Drawn, draw
from fuzz_exact import Answers, Exact, answers, as_rows
from fuzz_judge import LIMITS, differs, gradient_faults, is_beyond_limits, stats_faults
from oracle import composed
from torch import Tensor

from fused_ce import cross_entropy
from fused_ce.options import FLOATS, Options

torch_loss = F.cross_entropy
PLAIN = ("ignore_index", "reduction", "label_smoothing")
# Plain operators of PyTorch round more often than the kernels do.
SLACK = {"reference": 6.0}
STRICT = ("cpu", "any", "reference")  # where float32 losses are held to 4 ULP


def main() -> int:
    if sys.argv[1] == "--one":
        found = list(faults(int(sys.argv[2]), int(sys.argv[3]), Counter()))
        print(*found or ["as it should be"], sep="\n")
        return bool(found)
    seconds, seed = float(sys.argv[1]), int(sys.argv[2])
    seen: Counter[str] = Counter()
    torch.set_num_threads(1)
    begin, index, wrong = time.monotonic(), 0, 0
    while time.monotonic() - begin < seconds:
        for fault in faults(seed, index, seen):
            wrong += 1
            print(f"python tests/fuzz.py --one {seed} {index} {BACKEND}\n    {fault}", flush=True)
        index += 1
    print("options: " + ", ".join(f"{name} {count}" for name, count in sorted(seen.items())))
    print(f"{index} calls of seed {seed} on {BACKEND}, {index / seconds:.0f} a second: {wrong} mismatches")
    return wrong > 0


def faults(seed: int, index: int, seen: Counter[str]) -> Iterator[str]:
    """What is wrong with a call, in words."""
    call = draw(seed, index, BACKEND)
    rng = Random(f"bad {seed} {index}")
    if call.input.numel() and rng.random() < 0.1:
        seen.update(["bad"])
        yield from bad_faults(call, rng)
        return
    seen.update(f"{name}={value}".replace("torch.", "") for name, value in call.notes.items())
    try:
        for fault in _faults(call):
            yield f"{fault}; {described(call)}"
    except Exception as error:
        yield f"{type(error).__name__}: {error}; {described(call)}"


def described(call: Drawn) -> str:
    shapes = f"{tuple(call.input.shape)} {call.input.stride()}, {tuple(call.target.shape)} {call.target.stride()}"
    return f"{shapes}, {call.notes}, {call.keywords}, threads {call.threads}, g_lse {call.g_lse is not None}"


def _faults(call: Drawn) -> Iterator[str]:
    if is_beyond_limits(call, BACKEND):
        return
    if call.target.dtype == torch.uint8 and call.weight is not None and call.keywords["label_smoothing"] > 0:
        return  # torch refuses it for want of a kernel, and so is it refused with keywords that torch does not have
    theirs = plain_error(call)
    if theirs is not None:
        ours = error_of(lambda: run(call))
        if type(ours) is not type(theirs):
            yield f"torch raises {theirs!r}, fused_ce {ours!r}"
        return
    given = [tensor for tensor in (call.input, call.target, call.weight) if tensor is not None]
    before = [bits(tensor.resolve_neg()) for tensor in given]
    loss, stats, grad, d_target = run(call)
    if not all(torch.equal(old, bits(tensor.resolve_neg())) for old, tensor in zip(before, given, strict=True)):
        yield "an argument was changed"
    exact = answers(call, SLACK.get(BACKEND, 1.0), BACKEND in STRICT)
    if falls_back(call):
        if not is_plain(call):
            return  # torch's operators, as exact as those are
        exact = None
    hard = call.notes["values"] == "extreme"
    if hard and loss.dtype.itemsize > call.input.itemsize and "sums beyond float32 of a float64 loss" in LIMITS:
        return
    # An infinite weight times what rounds to 0, and inf - inf: which of NaN and infinity stands there is nobody's.
    reference = torchs(call) if hard or exact is None or call.notes["weight"] == "inf" else None
    rows = call.input.shape[:1] + call.input.shape[2:] if call.input.dim() > 1 else ()
    yield from shape_faults(call, loss, grad, rows)
    if exact is None:
        for name, ours, theirs in (("loss", loss, reference[0]), ("gradient", grad, reference[1])):
            if not torch.equal(ours.nan_to_num(nan=7.0), theirs.to(ours.dtype).nan_to_num(nan=7.0)):
                yield f"{name}: not torch's own, which the call falls back to"
        return
    yield from differs("loss", loss.reshape(exact.loss.value.shape), exact.loss, reference and reference[0])
    yield from gradient_faults(call, grad, exact, reference)
    if d_target is not None and not hard and call.upstream.isfinite().all():
        got = torch.from_numpy(as_rows(d_target)).to(d_target.dtype)
        # A scale, or a distance between logits, that rounds to 0 makes a NaN of infinity.
        where = np.isfinite(exact.d_target.value) | (call.notes["weight"] != "inf")
        where &= ~(np.isinf(exact.d_target.value) & (call.notes["upstream"] == "subnormal"))
        yield from differs("gradient of the target", got, exact.d_target, where=where)
    if stats is not None and not hard:
        yield from stats_faults(call, stats, exact)
    if is_plain(call):
        yield from oracle_faults(call, exact)
    if call.notes["rank"] == 2 and BACKEND in ("cpu", "any"):
        again = run(call._replace(threads=3 - call.threads))
        pairs = ((loss, again[0]), (grad, again[2]))
        if not all((torch.eq(bits(a), bits(b)) | (a.isnan() & b.isnan())).all() for a, b in pairs):
            yield f"other bits with {3 - call.threads} threads"


def run(call: Drawn) -> tuple[Tensor, Any, Tensor, Tensor | None]:
    """fused_ce's loss, output (with return_stats), gradient, and gradient of the target."""
    torch.set_num_threads(call.threads)
    try:
        return _run(call)
    finally:
        torch.set_num_threads(1)


def _run(call: Drawn) -> tuple[Tensor, Any, Tensor, Tensor | None]:
    x = call.input.detach().requires_grad_()
    t = call.target.detach().requires_grad_() if call.wants_target else call.target
    logits = x.clone() if call.keywords["inplace"] else x
    keywords = {**call.keywords, "backend": None if BACKEND == "any" else BACKEND}
    device = call.notes["default device"]
    with nullcontext() if device is None else torch.device(device):
        if call.notes["elementwise_mean"]:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                result = cross_entropy(logits, t, call.weight, **{**keywords, "reduction": "elementwise_mean"})
            assert any("elementwise_mean" in str(warning.message) for warning in told), "elementwise_mean: no warning"
        else:
            result = cross_entropy(logits, t, call.weight, **keywords)
        return _differentiated(call, x, t, result)


def _differentiated(call: Drawn, x: Tensor, t: Tensor, result: Any) -> tuple[Tensor, Any, Tensor, Tensor | None]:
    stats = result if call.keywords["return_stats"] else None
    loss = result.loss if stats is not None else result
    outputs, upstream = [loss], [call.upstream]
    if call.g_lse is not None:
        outputs, upstream = [loss, stats.lse], [call.upstream, call.g_lse]
    grads = torch.autograd.grad(outputs, [x, t] if call.wants_target else [x], upstream)
    return loss.detach(), stats, grads[0], grads[1] if call.wants_target else None


def bad_faults(call: Drawn, rng: Random) -> Iterator[str]:
    """What is wrong with how a call is refused, or not."""
    bad = spoiled(call, rng)
    x, keywords = bad.args[0], {**bad.torchs, **bad.ours}
    before = bits(x.resolve_neg()).clone() if isinstance(x, Tensor) and x.dtype in FLOATS else None
    keywords.setdefault("backend", None if BACKEND == "any" else BACKEND)
    ours = error_of(lambda: cross_entropy(*bad.args, **keywords))
    theirs = error_of(lambda: torch_loss(*bad.args, **bad.torchs))
    text = f"{bad.name}, {bad.torchs}, {bad.ours}: torch raises {theirs!r}, fused_ce {ours!r}; {call.notes}"
    if before is not None and not torch.equal(before, bits(x.resolve_neg())):
        yield f"written to, {text}"
    if BACKEND == "triton" and bad.name in ("target past the end", "target below 0"):
        return  # nothing waits for a GPU to have looked: NaN
    if bad.is_ours or bad.ours:
        # Given a dtype, it is as if the logits had been of that one.
        may_run = not bad.is_ours and (theirs is None or bad.ours.get("dtype"))
        if not isinstance(ours, REFUSALS) and (ours is not None or not may_run):
            yield f"not refused as it should be, {text}"
    elif bad.name == "targets on another device" and isinstance(ours, NotImplementedError):
        return  # what a backend that was asked for by its name says
    elif type(ours) is not type(theirs) or first_line(ours) != first_line(theirs):
        yield f"refused in other words, {text}"


def first_line(error: Exception | None) -> str:
    line = str(error).split("\n")[0]
    return re.sub(r"^Target \S+ is", "Target is", line)  # torch prints a uint8 as a character


def falls_back(call: Drawn) -> bool:
    """Whether the call is one that docs/contract.md leaves to torch."""
    both = call.weight is not None and call.keywords["label_smoothing"] > 0
    return call.input.is_neg() or (call.target.dtype == torch.uint8 and both)


def is_plain(call: Drawn) -> bool:
    return Options(**{**call.keywords, "grad_scale": None}).is_plain


def error_of(work: Callable[[], Any]) -> Exception | None:
    try:
        work()
    except Exception as error:
        return error
    return None


def plain_error(call: Drawn) -> Exception | None:
    options = {name: call.keywords[name] for name in PLAIN}
    x, weight, dtype = call.input, call.weight, call.keywords["dtype"]
    if dtype is not None:
        x, weight = x.to(dtype), None if weight is None else weight.to(dtype)
    return error_of(lambda: torch_loss(x, call.target, weight, **options))


def torchs(call: Drawn) -> tuple[Tensor, Tensor]:
    """Loss and gradient by torch in the dtype that a kernel computes in, or in the call's own where it falls back."""
    acc = torch.float64 if call.input.dtype == torch.float64 else torch.float32
    if falls_back(call):
        acc = call.keywords["dtype"] or call.input.dtype
    options = Options(**{**call.keywords, "dtype": None, "grad_scale": None})
    if isinstance(options.num_items, Tensor):
        options = options._replace(num_items=options.num_items.item())
    leaf = call.input.detach().requires_grad_()
    weight = None if call.weight is None else call.weight.to(acc)
    wide = call.target.is_floating_point() and acc != call.input.dtype and not falls_back(call)
    target = call.target.to(acc) if wide else call.target
    loss = composed(leaf.to(acc), target, weight, options)
    return loss.detach(), torch.autograd.grad(loss, leaf, call.upstream.to(loss.dtype))[0]


def shape_faults(call: Drawn, loss: Tensor, grad: Tensor, rows: tuple[int, ...]) -> Iterator[str]:
    if loss.shape != (rows if call.keywords["reduction"] == "none" else ()) or loss.dtype != call.upstream.dtype:
        yield f"loss of shape {tuple(loss.shape)}, {loss.dtype}"
    if grad.shape != call.input.shape or grad.dtype != call.input.dtype:
        yield f"gradient of shape {tuple(grad.shape)}, {grad.dtype}"


def oracle_faults(call: Drawn, exact: Answers) -> Iterator[str]:
    """The oracle against torch in float64, where torch can express the call; what is in P7 is left out."""
    if call.keywords["label_smoothing"] == 1.0 and call.notes["values"] == "-inf":
        return  # (1 - e) inf is NaN to torch, though (1 - e) is 0
    if call.notes["weight"] == "inf":
        return
    if call.notes["weight"] == "zeros" and call.keywords["label_smoothing"] > 0 and np.isinf(exact.loss.value).all():
        return  # divided by weights that add up to 0: torch adds 0 / 0 for the target to inf for the other classes
    x = call.input.detach().double()
    if not call.target.is_floating_point():
        ignored = call.target == call.keywords["ignore_index"]
        x = torch.where(ignored.unsqueeze(1) if x.dim() > 1 else ignored, 0, x)
    x.requires_grad_()
    target = call.target.double() if call.target.is_floating_point() else call.target
    weight = None if call.weight is None else call.weight.double()
    options = {name: call.keywords[name] for name in PLAIN}
    loss = torch_loss(x, target, weight, **options)
    if call.notes["values"] == "extreme" and call.input.dtype == torch.float64:
        return  # sums overflow there, and not in the oracle's wider type
    coarse = Exact(exact.loss.value, exact.loss.bound + exact.coarse_loss)
    yield from differs("torch against the oracle, loss", loss.detach().reshape(coarse.value.shape), coarse)
    if call.upstream.isfinite().all() and np.isfinite(np.asarray(exact.loss.value, float)).all():
        grad = torch.autograd.grad(loss, x, call.upstream.double())[0]
        coarse = Exact(exact.grad.value, exact.grad.bound + exact.coarse_grad)
        yield from differs("torch against the oracle, gradient", torch.from_numpy(as_rows(grad)), coarse)


if __name__ == "__main__":
    np.seterr(all="ignore")
    if BACKEND == "triton":
        from interpreter import like_hardware

        with like_hardware():
            sys.exit(main())
    sys.exit(main())
