"""Breaks lines on purpose, one at a time, in a copy of the checkout, and shows which test sees it.

    python tests/mutants.py            # all of them, an hour and more
    python tests/mutants.py formula    # those whose file, or test, has this word in it

A mutant that survives is a line that no test guards: the program then ends with 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    file: str
    line: str  # stands once in the file
    mutation: str
    test: str  # arguments of pytest: what goes red


PYTHON = [
    # The gate
    ("fused_ce/gate.py", "if _torch.transforms_active():", "if False:", "tests/test_autograd.py"),
    ("fused_ce/gate.py", "if _torch.dual_level_active():", "if False:", "tests/test_autograd.py"),
    ("fused_ce/gate.py", "    if _torch.is_watched():", "    if False:", "tests/test_contract.py tests/test_gate.py"),
    ("fused_ce/_torch.py", "    dual_level_active,\n    _function", "    _function", "tests/test_glance.py"),
    ("fused_ce/_torch.py", "    _dispatch_modes,\n", "", "tests/test_glance.py"),
    ("csrc/tensors.cpp", "input.dtype.bits == 16 &&", "false &&", "tests/test_glance.py"),
    ("fused_ce/gate.py", "call.input.is_neg() or call.target.is_neg()", "call.target.is_neg()", "tests/test_functional.py -k negative"),
    ("fused_ce/gate.py", "options.ignore_index < 0 and rank > 0", "rank > 0", "tests/test_functional.py"),
    ("fused_ce/gate.py", "torch.promote_types(own, dtype) is dtype)", "False)", "tests/test_gate.py"),
    ("fused_ce/gate.py", "        call = _with_memory(call)\n    return call, backend", "        pass\n    return call, backend", "tests/test_safety.py -k freed"),
    ("fused_ce/gate.py", "_torch_cross_entropy(", "F.cross_entropy(", "tests/test_gate.py -k assigned"),
    ("fused_ce/gate.py", "(\"target\", call.target), (\"weight\", call.weight)", "(\"target\", call.target),", "tests/test_safety.py -k in_place"),
    ("fused_ce/gate.py", "dtype = torch.promote_types(dtype, target.dtype)", "pass", "tests/test_functional.py"),
    ("fused_ce/gate.py", "if _torch.shares_a_leaf(input):", "if False:", "tests/test_extras.py -k inplace"),
    ("fused_ce/gate.py", "input = torch.where(operators.ignored(input, target, options), 0, input)", "pass", "tests/test_autograd.py"),
    # Sharded vocabularies
    ("fused_ce/distributed/exchange.py", "torch.where(part.m.isnan(), math.inf, part.m)", "part.m", "tests/test_distributed.py -k statistics"),
    ("fused_ce/distributed/exchange.py", "(m == whole) | m.isnan()", "m == whole", "tests/test_distributed.py -k statistics"),
    ("fused_ce/distributed/exchange.py", "_first(m, whole, argmax).amin(0)", "argmax.amax(0)", "tests/test_distributed.py -k statistics"),
    ("fused_ce/distributed/exchange.py", "    _check(told)\n    m, so", "    m, so", "tests/test_distributed_failures.py"),
    ("fused_ce/distributed/exchange.py", "part._replace(q_others=rows.q_others(first, held))", "part._replace(q_others=0 * part.so)", "tests/test_distributed.py -k every_case"),
    ("fused_ce/distributed/sums.py", "masked_fill(rows.counted, math.inf)", "masked_fill(rows.counted, -1)", "tests/test_distributed.py"),
    ("fused_ce/distributed/sums.py", "        fail(error,", "        str([error,", "tests/test_distributed_failures.py"),
    ("fused_ce/distributed/autograd.py", "if torch.is_grad_enabled():", "if False:", "tests/test_distributed.py -k second"),
    ("fused_ce/distributed/autograd.py", "torch.autograd.graph.increment_version(input)", "pass", "tests/test_distributed.py -k in_place"),
    ("fused_ce/distributed/rows.py", "factor = torch.where(", "factor = 0 * torch.where(", "tests/test_distributed.py -k weight"),
    ("fused_ce/distributed/rows.py", "* (g / self.z_D)", "* (g / self.D)", "tests/test_distributed.py -k 'everything or z_loss'"),
    ("fused_ce/distributed/layout.py", "max(columns, -(-total // ranks.size))", "columns", "tests/test_distributed.py -k DTensor"),
    ("fused_ce/distributed/status.py", '("targets", "targets:', '("error", "targets:', "tests/test_distributed_failures.py -k targets"),
    # Private names of torch
    ("fused_ce/_torch.py", '"_C._are_functorch_transforms_active", lambda: True', '"_C._are_functorch_transforms_active", lambda: False', "tests/test_torch.py"),
    ("fused_ce/_torch.py", '"_C._len_torch_function_stack", lambda: -1', '"_C._len_torch_function_stack", lambda: 0', "tests/test_torch.py"),
    ("fused_ce/_torch.py", "__module__ != _DEVICE_CONTEXT", "__module__", "tests/test_gate.py -k device"),
    ("fused_ce/_torch.py", "keep_graph\", lambda: True", "keep_graph\", lambda: False", "tests/test_torch.py"),
    ("fused_ce/_torch.py", "if not _HAS_BASES:\n        return True", "if not _HAS_BASES:\n        return False", "tests/test_torch.py"),
    ("fused_ce/_torch.py", 'return "sum" if size_average is False else "mean"', 'return "mean"', "tests/test_torch.py"),
    # Autograd and operators
    ("fused_ce/autograd.py", "grad = None  # it was made", "pass  # it was made", "tests/test_extras.py -k 'lse or upstream'"),
    ("fused_ce/autograd.py", "(ctx.version is not None and _torch.version(logits) != ctx.version)", "False", "tests/test_between.py"),
    ("fused_ce/autograd.py", "_torch.save_alias(", "str(", "tests/test_between.py -k collected"),
    ("fused_ce/autograd.py", "fused = fused and not _torch.has_hooks()", "pass", "tests/test_between.py -k hooks"),
    ("fused_ce/autograd.py", "fused = fused and not (options.inplace and input.itemsize == 2)", "pass", "tests/test_between.py -k in_place"),
    ("fused_ce/autograd.py", "fused = _waiting() is None", "pass", "tests/test_memory.py"),
    ("fused_ce/autograd.py", "exactly=not options.inplace)", "exactly=False)", "tests/test_between.py -k small_gradients"),
    ("fused_ce/autograd.py", "ctx.backend, _torch.keeps_graph()", "ctx.backend, False", "tests/test_autograd.py"),
    ("fused_ce/autograd.py", "options = frozen(options)", "pass", "tests/test_extras.py"),
    ("fused_ce/ops.py", "backend.saved_shape(call), dtype=torch.float64", "(*call.row_shape, 4), dtype=torch.float64", "tests/test_new_backend.py tests/test_ops.py"),
    ("fused_ce/backends/dispatch.py", "        if not backend.unsupported(call):\n                return backend", "        return backend", "tests/test_dispatch.py"),
    ("fused_ce/backends/dispatch.py", "            if backend is reference:\n                return None\n", "", "tests/test_dispatch.py"),
    # Linear cross entropy
    ("fused_ce/linear/chunks.py", "kept = None if count == len(counted) else", "kept = None if True else", "tests/test_linear.py -k cpu"),
    ("fused_ce/linear/chunks.py", "if plan.masked:", "if False:", "tests/test_linear.py -k reaches"),
    ("fused_ce/linear/chunks.py", "first=i == 0)", "first=True)", "tests/test_linear.py -k cpu"),
    ("fused_ce/linear/chunks.py", "(weight.double() * (rows / total)).to(acc)", "weight", "tests/test_linear.py -k everything-weight"),
    ("fused_ce/linear/chunks.py", "        if plan.kept is not None:\n            dx.zero_()", "", "tests/test_linear.py -k cpu"),
    ("fused_ce/linear/chunks.py", "        if plan.taken == 0:\n            dW.zero_()", "", "tests/test_linear.py -k all-ignored"),
    ("fused_ce/linear/chunks.py", "loss.fill_(math.nan)", "pass", "tests/test_linear.py -k all-ignored"),
    ("fused_ce/linear/composite.py", "with torch.autocast(call.input.device.type, enabled=False):", "if True:", "tests/test_linear_autograd.py -k autocast"),
    ("fused_ce/linear/autograd.py", "if torch.is_grad_enabled() or", "if", "tests/test_linear_autograd.py -k double"),
    ("fused_ce/linear/autograd.py", "options, keep, ctx.narrow)", "options, False, ctx.narrow)", "tests/test_linear_autograd.py -k again"),
    ("fused_ce/linear/autograd.py", "if ctx.fused and g_lse is None and g_entropy is None:", "if ctx.fused:", "tests/test_linear.py -k statistics"),
    ("fused_ce/linear/autograd.py", "            return None\n    else:", "            pass\n    else:", "tests/test_linear_autograd.py -k not_finite"),
    ("fused_ce/linear/autograd.py", " and not _torch.has_hooks()", "", "tests/test_linear_autograd.py -k hooks"),
    ("fused_ce/linear/autograd.py", " and (not _is_narrow(call) or options.grad_scale is not None)", "", "tests/test_linear_autograd.py -k float16"),
    ("fused_ce/linear/composite.py", "x = without_ignored(x,", "x = (lambda x, *_: x)(x,", "tests/test_linear.py -k reaches"),
    ("fused_ce/linear/products.py", "return dtype if _torch.has_products(dtype) else torch.float32", "return dtype", "tests/test_linear_gate.py -k widened"),
    ("fused_ce/linear/products.py", "out.add_(term) if v else out.copy_(term)", "out.copy_(term)", "tests/test_linear.py -k products"),
    # The pool
    ("fused_ce/backends/pool.py", "    _make_resizable(result)", "    pass", "tests/test_pool_uses.py"),
    ("fused_ce/backends/pool.py", "asked.isascii() and ", "", "tests/test_pool.py -k malformed"),
    ("fused_ce/backends/pool.py", "(resource.RLIMIT_AS, resource.RLIMIT_DATA)", "(resource.RLIMIT_AS,)", "tests/test_pool.py -k limited"),
    ("fused_ce/backends/pool.py", "known, address = weakref.ref(storage),", "known, address = (lambda: storage),", "tests/test_pool_uses.py -k cycle"),
    ("fused_ce/backends/pool.py", " and storage.data_ptr() == address:", ":", "tests/test_pool_uses.py -k shared"),
    ("fused_ce/backends/cpu.py", "dt = pool.empty_like(target) if", "dt = torch.empty_like(target) if", "tests/test_pool.py -k probabilities"),
    # The formula
    ("fused_ce/formula.py", "torch.where(held, z.gather(-1, at).squeeze(-1), -torch.inf)", "z.gather(-1, at).squeeze(-1)", "tests/test_row_sums.py -k formula"),
    ("fused_ce/formula.py", "q_drop=part.q_drop + part.q_others * rise", "q_drop=part.q_drop", "tests/test_row_sums.py -k formula"),
    ("fused_ce/formula.py", "e_drop=(part.e_drop + part.so * rise) * shrink", "e_drop=part.e_drop * shrink", "tests/test_row_sums.py -k formula"),
    ("fused_ce/formula.py", "return torch.where(m == -torch.inf, 0, m)", "return m", "tests/test_row_sums.py -k formula"),
    ("fused_ce/formula.py", "torch.where(higher, b.argmax, a.argmax)", "torch.maximum(a.argmax, b.argmax)", "tests/test_row_sums.py -k formula"),
    ("fused_ce/formula.py", "q_others=torch.where(where, sums.q_others + sums.q_y, sums.q_others)", "q_others=sums.q_others", "tests/test_row_sums.py -k formula"),
    ("fused_ce/formula.py", "torch.cosh(x * (options.logit_scale / options.softcap)) ** 2", "torch.cosh(x / options.softcap) ** 2", "tests/test_reference.py"),
    ("fused_ce/formula.py", "e_drop=torch.where(where, sums.e_drop + times_drop(e_y, y_drop), sums.e_drop),", "", "tests/test_entropy.py -k shards"),
    ("fused_ce/formula.py", "return e_c * torch.where(e_c == 0, 0, drop)", "return torch.where(e_c == 0, 0, e_c * drop)", "tests/test_entropy.py -k second"),
    ("fused_ce/autograd.py", "if g_lse is not None or g_entropy is not None:", "if g_lse is not None:", "tests/test_entropy.py -k ways"),
    ("fused_ce/linear/autograd.py", "g_lse is None and g_entropy is None:", "g_lse is None:", "tests/test_entropy.py -k hidden"),
    # The C++ backend, from Python
    ("fused_ce/backends/cpu.py", ".contiguous().resolve_neg()", ".contiguous()", "tests/test_autograd.py -k negative"),
    ("fused_ce/backends/cpu.py", "(grad.itemsize == 2 or not", "(not", "tests/test_between.py -k small_gradients"),
    ("fused_ce/backends/cpu.py", "grad.masked_fill_(operators.ignored(grad, target, options), 0)", "grad", "tests/test_between.py -k ignored"),
    ("fused_ce/backends/cpu.py", 'if schedule == "recompute" or (fused and options.return_stats):', 'if schedule == "recompute":', "tests/test_extras.py"),
]  # fmt: skip
CPP = [
    ("csrc/memory.cpp", "shrink_idle(p, most_used - used);", "", "tests/test_pool.py -k 'no_more or best'"),
    ("csrc/memory.cpp", "  shrink_idle(p, p.most_idle);", "", "tests/test_pool.py -k bounded"),
    ("csrc/memory.cpp", "madvise(data, block.bytes, MADV_FREE)", "false", "tests/test_pool.py -k may_take"),
    ("csrc/memory.cpp", " && block->bytes <= 2 * bytes", "", "tests/test_pool.py -k best"),
    ("csrc/memory.cpp", "  p.idle.erase(best);", "", "tests/test_pool.py -k 'threads or in_use'"),
    ("csrc/memory.cpp", "    pthread_atfork(", "    false && pthread_atfork(", "tests/test_pool.py -k forks"),
    ("csrc/bindings.cpp", "if (!PyCapsule_IsValid(self, UNTAKEN)) return;", "", "tests/test_pool.py -k capsule"),
    ("csrc/tensors.cpp", "uintptr_t(seen.data) < LEAST_ADDRESS", "!seen.data", "tests/test_glance.py"),
    ("csrc/tensors.cpp", "!is_float || !is_true(PyObject_CallMethodNoArgs(tensor, is_neg))", "true", "tests/test_glance.py"),
    ("csrc/tensors.cpp", "overflow || smoothing > 1", "smoothing > 1", "tests/test_glance.py"),
    ("csrc/tensors.cpp", " || ignore_index >= 0", "", "tests/test_glance.py"),
    ("csrc/tensors.cpp", "    if (input.sizes[d] == 0) return false;", "    ;", "tests/test_glance.py"),
    ("csrc/tensors.cpp", " && weight.ours == input.ours", "", "tests/test_glance.py"),
    ("csrc/tensors.cpp", "!(target.ours == DType::uint8 && smoothing > 0)", "true", "tests/test_glance.py"),
    ("csrc/tensors.cpp", "rows.sizes[d] != input.sizes[d ? d + 1 : 0]", "false", "tests/test_glance.py"),
    ("csrc/tensors.cpp", "seen.dims > MAX_DIMS || !dlpack", "!dlpack", "tests/test_glance.py"),
    ("csrc/tensors.cpp", "if (found != count || seen.ours != dtype ||", "if (seen.ours != dtype ||", "tests/test_safety.py -k private"),
    ("csrc/formula.inl.h", "part.q_drop += part.q_others * rise;", "", "tests/test_row_sums.py tests/test_backends.py -k 'cpp or cpu'"),
    ("csrc/formula.inl.h", "part.e_drop = (part.e_drop + part.so * rise) * shrink;", "part.e_drop *= shrink;", "tests/test_row_sums.py -k cpp"),
    ("csrc/formula.inl.h", "return m == -infinity_of(m) ? N{} : m;", "return m;", "tests/test_row_sums.py tests/test_backends.py -k 'cpp or cpu'"),
    ("csrc/formula.inl.h", "sums.q_others += sums.q_y;", "", "tests/test_row_sums.py -k cpp"),
    ("csrc/formula.inl.h", "if (call.probs || call.options.label_smoothing > 0) loss +=", "if (call.probs) loss +=", "tests/test_backends.py -k cpu"),
    ("csrc/along.inl.h", "return holds_y ? (lane_is<I>(y - c) ? V{} : below) : below;", "return below;", "tests/test_functional.py tests/test_backends.py -k 'not triton'"),
    ("csrc/along.inl.h", "z = lane_is<I>(y - c) ? splat(-inf) : z;", "", "tests/test_backends.py -k cpu"),
    ("csrc/along.inl.h", "const double shift = m == -infinity_of(m) ? m : shifted.shift", "const double shift = shifted.shift", "tests/test_backends.py tests/test_extras.py -k cpu"),
    ("csrc/along.inl.h", "for (int64_t b = 1; b < count; b++) sums = combine(sums, rescale(", "for (int64_t b = 2; b < count; b++) sums = combine(sums, rescale(", "tests/test_backends.py -k cpu"),
    ("csrc/along.inl.h", "V z = n < F::lanes ? keep_first<A>(z_c.high, n, -inf) : z_c.high", "V z = z_c.high", "tests/test_backends.py -k cpu"),
    ("csrc/across.inl.h", "return counted ? dx_c : V{};", "return dx_c;", "tests/test_backends.py -k cpu"),
    ("csrc/across.inl.h", "part, is_y ? V{} : e_c, q_c,", "part, e_c, q_c,", "tests/test_backends.py -k cpu"),
    ("csrc/across.inl.h", " & (finds_y != 0)", "", "tests/test_across.py"),
    ("csrc/cross_entropy.h", "if (last > 0 && place.at[last] >= sizes[last]) find(row + by, place);", "", "tests/test_across.py"),
    ("csrc/cross_entropy.cpp", "call.rounds_loss = loss_dtype != acc;", "", "tests/test_across.py"),
    ("csrc/strided_rows.inl.h", "i < whole ? load(", "i < n ? load(", "tests/test_cpu.py -k 'beside or overlap'"),
    ("csrc/cross_entropy.cpp", "if (!given && weights != double(count) && std::isfinite(weights)) call.ratio = weights / double(count);", "", "tests/test_backends.py -k cpu"),
    ("csrc/cross_entropy.cpp", "if (view.strides[d] != stride && dims.sizes[d] != 1) return false;", "", "tests/test_backends.py tests/test_cpu.py -k 'not triton'"),
    ("csrc/cross_entropy.cpp", "return side_by_side >= FEW_ROWS;", "return true;", "tests/test_cpu.py -k apart"),
    ("csrc/blocks.inl.h", "to[i * stride] = room[i];", "to[i] = room[i];", "tests/test_cpu.py -k apart"),
    ("csrc/across.inl.h", "a.high == b.high) & (a.low > b.low)", "a.high == b.high) & (a.low > a.low)", "tests/test_options_accuracy.py"),
    ("csrc/simd/math.inl.h", "x < lowest ? V{} : rest, &t", "rest, &t", "tests/test_options_accuracy.py"),
    ("csrc/simd/math.inl.h", "low_part = (lost + digit) - digit", "low_part = lost", "tests/test_options_accuracy.py"),
    ("csrc/simd/convert.inl.h", "return before < n ? before : n;", "return 0;", "tests/test_cpu.py -k streamed"),
    # Shards of the classes
    ("csrc/shard.inl.h", "y >= 0 && y < call.C ? y : -1;", "y;", "tests/test_parts.py -k far"),
    ("csrc/targets.inl.h", "splat(A(e / double(call.total)))", "splat(A(e / double(call.C)))", "tests/test_parts.py -k cpu"),
    ("csrc/formula.inl.h", "A(e / double(call.total)), share", "A(e / double(call.C)), share", "tests/test_parts.py -k cpu"),
    ("csrc/cross_entropy.cpp", "uint64_t(call.total);", "uint64_t(call.C);", "tests/test_parts.py -k cpu"),
    ("csrc/along.inl.h", "if (row.y < 0 || row.y >= C) sums = put_back(sums);", "", "tests/test_parts.py -k cpu"),
    ("csrc/along.inl.h", "sums.e_drop = call.wants_stats ? sums.e_drop : 0, ", "", "tests/test_parts.py -k cpu"),
    ("csrc/along.inl.h", "double(call.first + top)", "double(top)", "tests/test_parts.py -k cpu"),
    ("csrc/along.inl.h", "if (call.is_part()) store_sums(call, row, {0, 0, 0, 0, 0, 0, 0, -1});", "", "tests/test_parts.py -k cpu"),
    ("csrc/along.inl.h", "sums.m = transform<F>(load_first(row.x.p + top * row.x.stride, 1), call.options).sum();", "", "tests/test_parts.py -k unusual"),
    ("csrc/shard.inl.h", "if (group.labels.y[i] < 0) sums = put_back(sums);", "", "tests/test_parts.py -k cpu"),
    ("csrc/shard.inl.h", "group.m.high = finite(group.m.high);", "", "tests/test_parts.py -k unusual"),
    ("csrc/shard.inl.h", "double(call.first + group.largest[i])", "double(group.largest[i])", "tests/test_parts.py -k cpu"),
    ("csrc/shard.inl.h", "wants_stats ? largest : group.m;", "group.m;", "tests/test_parts.py -k unusual"),
    ("csrc/arguments.cpp", "call.first * (acc_of(call)", "0 * (acc_of(call)", "tests/test_parts.py -k cpu"),
    # The entropy's gradient
    ("csrc/formula.inl.h", "p_scale -= h_scale * mean;", "", "tests/test_entropy.py -k cpu"),
    ("csrc/formula.inl.h", "dz_y += h_scale * (times_drop(row.e_y, sums.m - sums.z_y) - row.e_y * mean);", "", "tests/test_entropy.py -k cpu"),
    ("csrc/formula.inl.h", "sums.e_drop += times_drop(exp_of(-y_drop), y_drop);", "", "tests/test_entropy.py -k shards"),
    ("csrc/along.inl.h", "if (call.wants_stats) sums.e_drop = call.e_drop_column()[i];", "", "tests/test_entropy.py -k cpu"),
    ("csrc/rows.inl.h", " && !call.g_entropy", "", "tests/test_entropy.py -k cpu"),
]  # fmt: skip
TRITON = [
    ("fused_ce/backends/triton/plan.py", " and not options.inplace,", ",", "tests/test_gpu.py -k test_neighbours_in_memory and shared"),
    ("fused_ce/backends/triton/launch.py", "    if target.dtype not in (torch.int64,", "    if call.has_probs:\n        reasons.append('no')\n    if target.dtype not in (torch.int64,", "tests/test_backends.py -k test_contract and triton and probabilities"),
    ("fused_ce/backends/triton/launch.py", "    if target.dtype not in (torch.int64,", "    if input.dim() > 2:\n        reasons.append('no')\n    if target.dtype not in (torch.int64,", "tests/test_backends.py -k test_contract and triton and pixels"),
    ("fused_ce/backends/triton/formula.py", "part.q_drop + part.q_others * rise", "part.q_drop", "tests/test_gpu.py -k test_paths and probabilities"),
    ("fused_ce/backends/triton/formula.py", "(part.e_drop + part.so * rise) * shrink", "part.e_drop * shrink", "tests/test_row_sums.py -k triton"),
    ("fused_ce/backends/triton/formula.py", "higher, m = ~(b.m <= a.m)", "higher, m = (b.m <= a.m)", "tests/test_gpu.py -k test_paths and probabilities"),
    ("fused_ce/backends/triton/formula.py", "tl.where(where, sums.q_others + sums.q_y, sums.q_others)", "sums.q_others", "tests/test_gpu.py -k test_paths and probabilities"),
    ("fused_ce/backends/triton/formula.py", "tl.where(where, sums.q_drop + sums.q_y * y_drop, sums.q_drop)", "sums.q_drop", "tests/test_row_sums.py tests/test_gpu.py -k triton and (row_sums or parts or test_paths)"),
    ("fused_ce/backends/triton/formula.py", "tl.where(where, sums.so + exp(-y_drop, EXACT), sums.so)", "sums.so", "tests/test_gpu.py -k test_paths and probabilities"),
    ("fused_ce/backends/triton/formula.py", 'return tl.where(m == float("-inf"), 0.0, m)', "return m", "tests/test_gpu.py -k test_paths and minus-inf"),
    ("fused_ce/backends/triton/tiles.py", 'z = tl.where(col_mask, z, float("-inf"))', "z = z", "tests/test_gpu.py -k test_paths and everything"),
    ("fused_ce/backends/triton/sweep.py", "tl.where(group.counted, dx, 0.0), mask)  # an ignored", "dx, mask)  # an ignored", "tests/test_backends.py -k test_contract and triton and ignored"),
    ("fused_ce/backends/triton/forward.py", "tl.where(counted, loss, 0.0)", "loss", "tests/test_backends.py -k test_contract and triton and ignored"),
    ("fused_ce/backends/triton/launch.py", 'saved[-1, :2] if options.reduction == "mean" else None,', "None,", "tests/test_backends.py -k test_contract and triton and weight-ignore"),
    ("fused_ce/backends/triton/backward.py", "ratio = D / load_scalar(received.norm, 1, ROW)", "ratio = D / D", "tests/test_backends.py -k test_contract and triton and z-loss-weight"),
    ("fused_ce/backends/triton/forward.py", "ratio = D / load_scalar(shared.norm, 1, ROW)", "ratio = D / D", "tests/test_backends.py -k test_contract and triton and z-loss-weight"),
    ("fused_ce/backends/triton/rows.py", "return math.gcd(16, *strides, *lengths)", "return math.gcd(16, *lengths)", "tests/test_gpu.py -k test_neighbours_in_memory or test_paths"),
    ("fused_ce/backends/triton/rows.py", "return math.gcd(16, *strides, *lengths)", "return math.gcd(16, *strides)", "tests/test_gpu.py -k test_neighbours_in_memory or test_paths"),
    ("fused_ce/backends/triton/plan.py", "same = grad is not None and odd and congruent(logits, grad, vector)", "same = odd", "tests/test_gpu.py -k test_neighbours_in_memory"),
    ("fused_ce/backends/triton/sweep.py", "return (at % VECTOR).to(tl.int32)", "return (at % VECTOR).to(tl.int32) * 0", "tests/test_gpu.py -k test_neighbours_in_memory"),
    ("fused_ce/backends/triton/sweep.py", "(place // VECTOR >= tl.minimum(before, 1)) & (place // VECTOR < whole)", "(place // VECTOR < whole)", "tests/test_gpu.py -k test_neighbours_in_memory"),
    ("fused_ce/backends/triton/sweep.py", "(place // VECTOR >= tl.minimum(before, 1)) & (place // VECTOR < whole)", "(place // VECTOR >= tl.minimum(before, 1)) & (place // VECTOR <= whole)", "tests/test_gpu.py -k test_neighbours_in_memory"),
    ("fused_ce/backends/triton/sweep.py", "(edge < VECTOR - before) & (before > 0), cols < C)", "(edge < VECTOR - before) & (before > 0), cols < 0)", "tests/test_gpu.py -k test_neighbours_in_memory"),
    ("fused_ce/backends/triton/sweep.py", "(edge < VECTOR - before) & (before > 0), cols < C)", "cols < 0, cols < C)", "tests/test_gpu.py -k test_neighbours_in_memory"),
    ("fused_ce/backends/triton/sweep.py", "sink.dt_at + offset(cols, sink.grads.target.col, ALIGN), dt, mask)", "sink.dt_at + offset(cols, sink.grads.target.col, ALIGN), dt, col_mask)", "tests/test_gpu.py -k test_extras_and_their"),
    ("fused_ce/backends/triton/sweep.py", "sink.dt_at + offset(cols, sink.grads.target.col, ALIGN), dt, mask)", "sink.dt_at + offset(cols, sink.grads.target.col, ALIGN), dt, group.row_mask)", "tests/test_gpu.py -k test_extras_and_their"),
    ("fused_ce/backends/triton/tiles.py", "counted & ~exists)\n    return counted, tl.where(exists, y, -1)", "counted & ~exists)\n    return counted, tl.where(exists, y, 0)", "tests/test_backends.py -k test_target_out_of_range and triton"),
    ("fused_ce/backends/triton/tiles.py", "exists = source.read & (y >= 0)", "exists = source.read", "tests/test_backends.py -k test_target_out_of_range and triton"),
    ("fused_ce/backends/triton/backward.py", "    if TRAITS.UNLESS_EXPECTED:\n        if tl.load", "    if TRAITS.UNLESS_EXPECTED:\n        if True or tl.load", "tests/test_gpu.py -k test_expected_upstream"),
    ("fused_ce/backends/triton/kernels.py", "pieces = 1 if call.options.inplace else min", "pieces = min", "tests/test_gpu.py -k test_in_place"),
    ("fused_ce/backends/triton/forward.py", "for p in tl.range(tl.program_id(0), groups, tl.num_programs(0),", "for p in tl.range(tl.program_id(0), tl.program_id(0) + 1, tl.num_programs(0),", "tests/test_gpu.py -k test_several_rows or test_paths"),
    ("fused_ce/backends/triton/backward.py", "for p in range(tl.program_id(0), groups, tl.num_programs(0)):", "for p in range(tl.program_id(0), tl.program_id(0) + 1):", "tests/test_gpu.py -k test_several_rows or fewer_programs"),
    ("fused_ce/backends/triton/sweep.py", "        for t in range(tl.program_id(1), tiles, tl.num_programs(1)):\n            cols =", "        for t in range(tl.program_id(1), tl.program_id(1) + 1):\n            cols =", "tests/test_gpu.py -k test_several_rows or fewer_programs"),
    ("fused_ce/backends/triton/reduce.py", "n, tl.num_programs(0) * BLOCK):", "n, n):", "tests/test_gpu.py -k test_fewer_programs_to_rescale"),
    ("fused_ce/backends/triton/reduce.py", "tl.minimum(CHUNK, N - first), BLOCK):\n        rows = first + start + tl.arange(0, BLOCK)\n        counted", "BLOCK, BLOCK):\n        rows = first + start + tl.arange(0, BLOCK)\n        counted", "tests/test_gpu.py -k test_chunks"),
    ("fused_ce/backends/triton/reduce.py", "    parts += tl.program_id(0) * 2\n", "", "tests/test_gpu.py -k test_chunks"),
    ("fused_ce/backends/triton/tiles.py", "        o, i = (p // groups).to(tl.int64),", "        o, i = (p // groups * 0).to(tl.int64),", "tests/test_gpu.py -k test_several_rows"),
    ("fused_ce/backends/triton/forward.py", "once = group.row_mask & (tl.zeros_like(r) + tl.program_id(1) == 0)", "once = group.row_mask & (tl.zeros_like(r) + tl.program_id(1) == 1)", "tests/test_gpu.py -k test_rows_shared"),
    ("fused_ce/backends/triton/forward.py", "mask = group.row_mask & (cols < C) if t == PIECES - 1 else group.row_mask", "mask = group.row_mask", "tests/test_gpu.py -k test_paths or test_neighbours"),
    ("fused_ce/backends/triton/tiles.py", "at = i.to(tl.int64) * (stride // ALIGN * ALIGN)", "at = i * (stride // ALIGN * ALIGN)", "tests/test_gpu.py -k test_more_than_2_to"),
    ("fused_ce/backends/triton/forward.py", "dx = tl.where(group.counted, dx, 0.0)  # an ignored row may hold NaN", "dx = dx  # an ignored row may hold NaN", "tests/test_backends.py -k test_contract and triton and ignored"),
    ("fused_ce/backends/triton/forward.py", "y, z_y = argmax, finite(m)", "y, z_y = argmax, m", "tests/test_gpu.py -k test_paths and probabilities"),
    ("fused_ce/backends/triton/tiles.py", "(y >= 0) & (y < C)", "(y < C)", "tests/test_backends.py -k test_target_out_of_range and triton"),
    ("fused_ce/backends/triton/tiles.py", "(y >= 0) & (y < C)", "(y >= 0)", "tests/test_backends.py -k test_target_out_of_range and triton"),
    ("fused_ce/backends/triton/forward.py", "tl.where(counted, argmax, -1), mask=mask", "argmax, mask=mask", "tests/test_gpu.py -k test_paths and everything"),
    ("fused_ce/backends/triton/forward.py", "argmax = tl.maximum(stats.argmax, 0).to(tl.int64)", "argmax = stats.argmax.to(tl.int64)", "tests/test_gpu.py -k test_paths and minus-inf"),
    ("fused_ce/backends/triton/formula.py", "tl.where(higher, b.argmax, a.argmax)", "b.argmax", "tests/test_gpu.py -k test_paths or test_extras"),
    ("fused_ce/backends/triton/launch.py", "    dx = spare if spare is not None else input if options.inplace else", "    dx = spare if spare is not None else", "tests/test_gpu.py -k test_in_place"),
    ("fused_ce/backends/triton/sweep.py", "x_at // VECTOR * VECTOR if TILING.SAME else x_at - before", "x_at // VECTOR * VECTOR", "tests/test_gpu.py -k test_neighbours"),
    ("fused_ce/backends/triton/forward.py", "group.number * tl.num_programs(1) + t", "group.number * tl.num_programs(1)", "tests/test_gpu.py -k test_rows_shared"),
    ("fused_ce/backends/triton/sweep.py", "(edge < VECTOR - before) & (before > 0)", "(edge < VECTOR - before)", "tests/test_gpu.py -k test_neighbours"),
    ("fused_ce/backends/triton/formula.py", "higher, m = ~(b.m <= a.m) & (a.m == a.m)", "higher, m = b.m > a.m", "tests/test_row_sums.py -k nan"),
    ("fused_ce/backends/triton/forward.py", "~(z <= highest) & (highest == highest)", "z > highest", "tests/test_gpu.py -k first_nan"),
    ("fused_ce/backends/triton/readable.py", "return tensor.resolve_neg() if tensor.is_neg() else tensor", "return tensor", "tests/test_gpu_inputs.py"),
    ("fused_ce/backends/triton/self_check.py", "if grad is None else loss * 0.5", "if grad is None else loss", "tests/test_self_check.py -k nothing_to_do"),
    ("fused_ce/backends/triton/launch.py", "input.dim() == 0 or target.shape", "input.dim() < 2 or target.shape", "tests/test_backends.py -k test_contract and triton and alone"),
    ("fused_ce/backends/triton/formula.py", "e_drop += tl.where(e_c == 0.0, 0.0, e_c * drop)", "e_drop += e_c * drop", "tests/test_extras.py -k test_stats and triton"),
    ("fused_ce/backends/triton/launch.py", "again=spare is not None and upstream.lse is None)", "again=False)", "tests/test_gpu.py -k test_expected_upstream"),
    ("fused_ce/backends/triton/formula.py", "tl.maximum(a.z_y, b.z_y, tl.PropagateNan.ALL)", "tl.maximum(a.z_y, b.z_y)", "tests/test_gpu.py -k test_paths and nan-of-the-target"),
    ("fused_ce/backends/triton/forward.py", "sums = combine(sums, more, TRAITS.PROBS, EXACT)", "sums = combine(more, sums, TRAITS.PROBS, EXACT)", "tests/test_gpu.py -k test_the_first_of_equal"),
    ("fused_ce/backends/triton/formula.py", "higher, m = ~(b.m <= a.m)", "higher, m = ~(b.m < a.m)", "tests/test_gpu.py -k test_the_first_of_equal"),
    ("fused_ce/backends/triton/formula.py", "q_drop += tl.where(others, q * drop, 0.0)", "q_drop += tl.where(col_mask, q * drop, 0.0)", "tests/test_backends.py -k test_contract and triton and smoothing"),
    ("fused_ce/backends/triton/sweep.py", "is_float32(logits.ptr.dtype)), group.row_mask & col_mask", "is_float32(logits.ptr.dtype)), col_mask", "tests/test_gpu.py -k test_several_rows or extras_and_their"),
    ("fused_ce/backends/triton/forward.py", "at = tl.where(~(z <= highest)", "at = tl.where(~(z < highest)", "tests/test_gpu.py -k test_the_first_of_equal"),
    # A shard of the classes
    ("fused_ce/backends/triton/tiles.py", "q_y = (1.0 - options.e) * t_y + options.e / options.total", "q_y = (1.0 - options.e) * t_y + options.e / options.C", "tests/test_parts_triton.py -k test_options and smoothing"),
    ("fused_ce/backends/triton/tiles.py", "q = (1.0 - options.e) * q + options.e / options.total", "q = (1.0 - options.e) * q + options.e / options.C", "tests/test_parts_triton.py -k test_options and smoothing"),
    ("fused_ce/backends/triton/tiles.py", "total = C if given.shard is None else given.shard.total", "total = C", "tests/test_parts_triton.py -k elsewhere"),
    ("fused_ce/backends/triton/tiles.py", "(here >= 0) & (here < C)", "here < C", "tests/test_parts_triton.py -k elsewhere"),
    ("fused_ce/backends/triton/tiles.py", "(here >= 0) & (here < C)", "here >= 0", "tests/test_parts_triton.py -k elsewhere"),
    ("fused_ce/backends/triton/tiles.py", "y = tl.where(y < 0, y,", "y = tl.where(y < 0, ELSEWHERE,", "tests/test_parts_triton.py -k outside"),
    ("fused_ce/backends/triton/tiles.py", 'tl.where(y == ELSEWHERE, float("-inf"), z_y)', "z_y", "tests/test_parts_triton.py -k elsewhere"),
    ("fused_ce/backends/triton/tiles.py", "tl.where(y == ELSEWHERE, 0.0, q_y)", "q_y", "tests/test_parts_triton.py -k elsewhere"),
    ("fused_ce/backends/triton/tiles.py", "count *= given.sizes[d]", "count *= 1", "tests/test_parts_triton.py -k test_layouts and pixels"),
    ("fused_ce/backends/triton/backward.py", "put_back(sums, y == ELSEWHERE,", "put_back(sums, y == y - 1,", "tests/test_parts_triton.py -k test_options and plain"),
    ("fused_ce/backends/triton/forward.py", "tl.maximum(sums.argmax, 0) + first", "tl.maximum(sums.argmax, 0)", "tests/test_parts_triton.py -k test_options and statistics"),
    ("fused_ce/backends/triton/forward.py", "tl.maximum(sums.argmax, 0) + first", "sums.argmax + first", "tests/test_parts_triton.py -k no-class"),
    ("fused_ce/backends/triton/forward.py", "e_drop, argmax = tl.zeros_like(sums.so),", "e_drop, argmax = sums.e_drop,", "tests/test_parts_triton.py -k test_paths and plain"),
    ("fused_ce/backends/triton/forward.py", "tl.where(group.counted, part[i], 0.0)", "part[i]", "tests/test_parts_triton.py -k ignored"),
    ("fused_ce/backends/triton/kernels.py", "weight[shard.first : shard.first + C]", "weight[:C]", "tests/test_parts_triton.py -k test_options and weight"),
    ("fused_ce/backends/triton/launch.py", "weight.shape != (call.shard.total,)", "weight.shape != (call.classes,)", "tests/test_parts_triton.py -k weights"),
    ("fused_ce/backends/triton/shards.py", "*call.options[:4]", "*call.options[:5]", "tests/test_parts_triton.py -k z-loss"),
    ("fused_ce/backends/triton/shards.py", "readable(sums).contiguous()", "readable(sums)", "tests/test_parts_triton.py -k one_upstream"),
    ("fused_ce/backends/triton/self_check.py", "run(few._replace(input=_copied(few.input))", "run(few._replace(input=few.input.clone())", "tests/test_self_check.py -k few_rows"),
    ("fused_ce/backends/triton/self_check.py", "_copied(_first(into, call))", "_first(into, call)", "tests/test_self_check_shards.py -k right"),
    ("fused_ce/backends/triton/compare.py", "torch.arange(first, first + C", "torch.arange(0, C", "tests/test_self_check_shards.py"),
    ("fused_ce/backends/triton/compare.py", "labels < call.shard.total)]", "labels < call.classes)]", "tests/test_self_check_shards.py"),
]  # fmt: skip
MUTANTS = [Mutant(*fields) for fields in (*PYTHON, *TRITON, *CPP)]


def copy_of_the_checkout(folder: Path) -> None:
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in (*names, *(str(path.relative_to(ROOT)) for path in ROOT.glob("fused_ce/_C*.so"))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def red(folder: Path, mutant: Mutant) -> str:
    """The first test that fails once the line is broken; "" if none does."""
    file = folder / mutant.file
    before = file.read_text()
    if before.count(mutant.line) != 1:
        raise SystemExit(f"{mutant.file} must hold once, not {before.count(mutant.line)} times: {mutant.line}")
    environment = os.environ | {"PYTHONPATH": str(folder), "FUSED_CE_BUILD_ISAS": "base"}
    build = f"{sys.executable} setup.py --quiet build_ext --inplace"
    files, _, words = mutant.test.partition(" -k ")
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--show-capture=no", *files.split()]
    pytest += ["-k", words.strip("'")] if words else []
    file.write_text(before.replace(mutant.line, mutant.mutation))
    try:
        if mutant.file.startswith("csrc"):
            subprocess.run(build, shell=True, cwd=folder, env=environment, check=True, capture_output=True)
        run = subprocess.run(pytest, cwd=folder, env=environment, capture_output=True, text=True)
    finally:
        file.write_text(before)
    if run.returncode in (4, 5):
        raise SystemExit(f"pytest found no test in: {mutant.test}\n{run.stdout}{run.stderr}")
    failed = [line.split()[1] for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else "" if run.returncode == 0 else f"pytest ended with {run.returncode}"


def main() -> int:
    words, survivors = sys.argv[1:], 0
    with tempfile.TemporaryDirectory() as name:
        copy_of_the_checkout(Path(name))
        for mutant in MUTANTS:
            if all(word in " ".join(mutant) for word in words):
                seen = red(Path(name), mutant)
                survivors += not seen
                print(
                    f"{mutant.file}: {mutant.line.strip()}\n  -> {mutant.mutation.strip() or 'nothing'}: {seen or 'SURVIVED'}",
                    flush=True,
                )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
