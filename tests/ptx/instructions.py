"""Each instruction as a function of the threads that execute it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .code import Instruction
from .faults import Unknown
from .memory import WINDOW
from .operations import operation, unpacked
from .rounding import UINT, Array, split_type

if TYPE_CHECKING:
    from .machine import Machine, Run

HINTS = {"cs", "ca", "cg", "nc", "volatile", "relaxed", "L1::evict_first", "L1::evict_last", "L2::cache_hint"}


def compiled(i: Instruction, machine: Machine) -> Run | None:
    """None for what decides where to go next."""
    base, *mods = i.op.split(".")
    if base in ("bra", "ret", "exit"):
        return None
    if base in ("griddepcontrol", "prefetch"):
        return lambda mask: None
    if base == "ld" and mods[0] == "param":
        write, name = machine.registers.writer(i.operands[0], mods[-1]), i.operands[1][1:-1].strip()
        return lambda mask: write(machine.params[name], mask)
    makers = {"ld": _memory, "st": _memory, "mov": _move, "shfl": _shuffle, "redux": _redux, "cvta": _copy}
    makers |= {"bar": _barrier, "barrier": _barrier, "mapa": _map, "createpolicy": _policy}
    makers |= {"stmatrix": _matrix, "ldmatrix": _matrix}
    return makers.get(base, _compute)(i, mods, machine)


def _compute(i: Instruction, mods: list[str], machine: Machine) -> Run:
    registers = machine.registers
    if half := unpacked(i.op):  # two numbers into one register, the upper first
        write = registers.writer(i.operands[0], "b32")
        high, low = (registers.reader(text, "f32", i) for text in i.operands[1:])
        return lambda mask: write(half(low()).astype(np.uint32) | half(high()).astype(np.uint32) << np.uint32(16), mask)
    run, sources, result = operation(i.op, machine.noise)
    if i.op[:3] in ("min", "max") and len(i.operands) == 4:  # of three, from sm_100 on
        two, sources = run, (*sources, sources[0])
        run = lambda a, b, c: two(two(a, b), c)  # noqa: E731
    if len(i.operands) != len(sources) + 1:
        raise Unknown(i.text)
    write = registers.writer(i.operands[0], result)
    reads = [registers.reader(text, kind, i) for text, kind in zip(i.operands[1:], sources, strict=True)]
    return lambda mask: write(run(*[read() for read in reads]), mask)


def _copy(i: Instruction, mods: list[str], machine: Machine) -> Run:
    write, read = (
        machine.registers.writer(i.operands[0], mods[-1]),
        machine.registers.reader(i.operands[1], mods[-1], i),
    )
    return lambda mask: write(read(), mask)


def _move(i: Instruction, mods: list[str], machine: Machine) -> Run:
    """Also of one register into several, and of several into one."""
    to, source = i.operands
    registers, bits = machine.registers, split_type(mods[-1])[1]
    if to.startswith("{"):
        names = [name.strip() for name in to.strip("{} ").split(",")]
        part = bits // len(names)
        writes, read = [registers.writer(name, f"b{part}") for name in names], registers.reader(source, mods[-1], i)

        def unpack(mask: Any) -> None:
            parts = read().astype(UINT[bits]).view(UINT[part]).reshape(-1, len(names))
            for k, write in enumerate(writes):
                write(np.ascontiguousarray(parts[:, k]), mask)

        return unpack
    if source.startswith("{"):
        names = [name.strip() for name in source.strip("{} ").split(",")]
        part, write = bits // len(names), registers.writer(to, mods[-1])
        reads = [registers.reader(name, f"b{part}", None) for name in names]  # a half that nobody reads may be anything

        def pack(mask: Any) -> None:
            parts = np.broadcast_arrays(*(read() for read in reads))
            write(np.stack(parts, -1).view(UINT[bits])[:, 0], mask)

        return pack
    return _copy(i, mods, machine)


def _memory(i: Instruction, mods: list[str], machine: Machine) -> Run:
    space, store = mods[0], i.op.startswith("st")
    if space not in ("global", "shared", "shared::cluster") or not set(mods[1:-1]) <= {*HINTS, "v2", "v4"}:
        raise Unknown(i.text)
    at, values = i.operands[:2] if store else i.operands[1::-1]
    names = [name.strip() for name in values.strip("{} ").split(",")]
    count = next((int(mod[1:]) for mod in mods if mod in ("v2", "v4")), 1)
    width = split_type(mods[-1])[1] // 8
    if len(names) != count:
        raise Unknown(i.text)
    where = machine.registers.address(at, i)
    if store:
        reads = [machine.registers.reader(name, f"b{8 * width}", i) for name in names]
        return lambda mask: machine.access.store(i, space, where(), [read() for read in reads], mask)
    writes = [machine.registers.writer(name, mods[-1]) for name in names]

    def load(mask: Any) -> None:
        for write, value in zip(writes, machine.access.load(i, space, where(), width, count, mask), strict=True):
            write(value, mask)

    return load


def _matrix(i: Instruction, mods: list[str], machine: Machine) -> Run:
    """stmatrix, ldmatrix: 8 x 8 numbers of 16 bits a register; lanes 8 k to 8 k + 7 name the k-th's rows."""
    store, count = i.op.startswith("st"), next((int(mod[1:]) for mod in mods if re.fullmatch(r"x[124]", mod)), 0)
    at, values = i.operands if store else i.operands[::-1]
    names = [name.strip() for name in values.strip("{} ").split(",")]
    if "m8n8" not in mods or mods[-1] != "b16" or mods[-2] not in ("shared", "shared::cta") or len(names) != count:
        raise Unknown(i.text)
    where, lane = machine.registers.address(at, i), machine.lane
    reads = [machine.registers.reader(name, "b32", i) for name in names] if store else []
    writes = [] if store else [machine.registers.writer(name, "b32") for name in names]

    def places(k: int, j: int) -> Array:
        """Of the j-th number that each thread holds of matrix k."""
        rows = machine.all_threads(where())
        row, column = lane // 4, 2 * (lane % 4) + j
        if "trans" in mods:
            row, column = column, row
        at: Array = rows[machine.thread - lane + 8 * k + row] + 2 * column
        return at

    def run(mask: Any) -> None:
        machine.whole_warps(mask, i)
        named = machine.all_threads(where())[lane < 8 * count]
        if (named % 16).any():
            machine.faults.add("alignment", i, "a row of a matrix that does not begin at 16 bytes")
        for k in range(count):
            if store:
                whole = np.ascontiguousarray(machine.all_threads(reads[k]()))
                for j, half in enumerate(whole.view(np.uint16).reshape(-1, 2).T):
                    machine.access.store(i, "shared", places(k, j), [np.ascontiguousarray(half)], mask)
            else:
                halves = [machine.access.load(i, "shared", places(k, j), 2, 1, mask)[0] for j in range(2)]
                writes[k](halves[0].astype(np.uint32) | halves[1].astype(np.uint32) << np.uint32(16), mask)

    return run


def _redux(i: Instruction, mods: list[str], machine: Machine) -> Run:
    if len(mods) != 3 or mods[1] not in ("min", "max", "add"):
        raise Unknown(i.text)
    write, read = (
        machine.registers.writer(i.operands[0], mods[-1]),
        machine.registers.reader(i.operands[1], mods[-1], i),
    )
    reduce = {"min": np.fmin.reduce, "max": np.fmax.reduce, "add": np.add.reduce}[mods[1]]

    def run(mask: Any) -> None:
        machine.whole_warps(mask, i)
        values = machine.all_threads(read()).reshape(-1, 32)
        write(np.repeat(reduce(values, 1, dtype=values.dtype), 32), mask)

    return run


def _shuffle(i: Instruction, mods: list[str], machine: Machine) -> Run:
    how = mods[1]
    to, source, by, clamp, _ = i.operands
    if "|" in to or how not in ("bfly", "idx", "up", "down"):
        raise Unknown(i.text)
    registers, lane = machine.registers, machine.lane
    write, read = registers.writer(to, "b32"), registers.reader(source, "b32", i)
    step, bound = registers.reader(by, "u32", i), registers.reader(clamp, "u32", i)

    def run(mask: Any) -> None:
        machine.whole_warps(mask, i)
        n, c = step().astype(np.int64), bound().astype(np.int64)
        segment, limit = (c >> 8) & 31, c & 31
        last = (lane & segment) | (limit & ~segment)
        other = {"bfly": lane ^ n, "up": lane - n, "down": lane + n, "idx": (lane & segment) | (n & ~segment)}[how]
        inside = other >= last if how == "up" else other <= last
        values = machine.all_threads(read())
        write(values[machine.thread - lane + np.where(inside, other, lane)], mask)

    return run


def _barrier(i: Instruction, mods: list[str], machine: Machine) -> Run:
    if i.op in ("bar.sync", "barrier.sync", "barrier.sync.aligned") and i.operands == ["0"]:

        def run(mask: Any) -> None:
            machine.everyone(mask, i)
            machine.barriers.barrier()

    elif mods[:1] == ["cluster"] and mods[1] in ("arrive", "wait"):

        def run(mask: Any) -> None:
            machine.everyone(mask, i)
            (machine.barriers.arrive if mods[1] == "arrive" else machine.barriers.wait)(i)

    else:
        raise Unknown(i.text)
    return run


def _map(i: Instruction, mods: list[str], machine: Machine) -> Run:
    """mapa: the address of the same place in another CTA of the cluster."""
    if i.op != "mapa.shared::cluster.u32":
        raise Unknown(i.text)
    registers, ctas = machine.registers, machine.code.ctas
    write = registers.writer(i.operands[0], "u32")
    at, rank = (registers.reader(text, "u32", i) for text in i.operands[1:])

    def run(mask: Any) -> None:
        to: Array = rank().astype(np.int64)
        if (to >= ctas).any():
            machine.faults.add("cluster", i, f"rank {int(to.max())} of {ctas}")
        write((at().astype(np.int64) + ((to % ctas + 1) << WINDOW)).astype(np.uint32), mask)

    return run


def _policy(i: Instruction, mods: list[str], machine: Machine) -> Run:
    write = machine.registers.writer(i.operands[0], "b64")
    return lambda mask: write(np.zeros(1, np.uint64), mask)
