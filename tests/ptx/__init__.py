"""Executes the PTX that Triton compiles, without a GPU, and checks every access on the way: `python -m ptx`.

All threads of a program, or of a cluster, run in lockstep, one NumPy array a register, with the addresses that the
call's tensors would have. Reported, besides numbers that are not what `fuzz_exact` allows:

    bounds      an access outside of the elements of the tensors passed (what lies between rows counts as outside)
    alignment   an address that is no multiple of the whole width of the access, 16 bytes for v4.b32
    race        two threads at one place with no barrier between, one of them writing (equal values are no race)
    programs    two programs of a launch at one place, one of them writing
    cluster     remote shared memory before the first or after the last cluster barrier; arrive and wait unpaired
    barrier     a barrier, shuffle or reduction that not all threads reach
    uninit      a register read before it is written, or shared memory

It does not model: timing, caches, what ptxas makes of the PTX, the memory model beyond barriers, the real error of
approximate instructions (`--noise` puts ex2, div.full and lg2 off by 2^-22.5), schedules other than lockstep (programs
can be run in any order). No speed follows from what it counts, and nothing it passes was run on a device. What it does
not know is an `Unknown` that names the instruction.
"""
