"""Builds fused_ce._C. Only the extension is described here; everything else stands in pyproject.toml.

Each instruction set needs flags of its own, which setuptools cannot give to a single source. So this file writes a
build.ninja and lets ninja do the rest: in parallel, only what changed, headers included.
Heeded from the environment: CXX (or CC), CPPFLAGS, CFLAGS, CXXFLAGS, LDFLAGS; FUSED_CE_BUILD_ISAS=base (or avx2)
leaves out the other instruction sets, for a short edit loop; FUSED_CE_BUILD=0 leaves out the extension, and gives a
package of Python alone, which runs torch's operators on a CPU and Triton's kernels on a GPU.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

COMMON = ["-O2", "-std=gnu++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
COMMON += ["-Wall", "-Wextra", "-Wno-psabi"]  # psabi: no wide vector crosses from one object file to another
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86 = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *AVX512,
        "-mfma",
        "-mf16c",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ],  # g++ 12 warns of its own intrinsics
}
PYTHON = ("arguments", "bindings", "python", "tensors")  # what knows Python
# One build serves 3.10 and all later versions; a Python without the GIL has no such API.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")
LIMITED_API = "-DPy_LIMITED_API=0x030A0000"
LINK = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]

ROOT = Path(__file__).resolve().parent
HEADERS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h"))
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
# Should an inline function ever be in several objects, the linker keeps the first: not one an old processor lacks.
SOURCES.sort(key=lambda source: Path(source).stem in X86)


def environment(*names: str) -> list[str]:
    return [word for name in names for word in shlex.split(os.environ.get(name, ""))]


def find_compiler() -> tuple[list[str], str]:
    """The compiler as words of a command, and the machine it compiles for."""
    plus = {"clang": "clang++", "gcc": "g++", "cc": "c++"}
    from_cc = [re.sub(r"\b(clang|gcc|cc)\b(?!\+)", lambda name: plus[name[0]], word) for word in environment("CC")]
    found = [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
    compiler = environment("CXX") or from_cc or found[:1] or ["g++"]
    try:
        answer = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(
            f"fused_ce needs a C++17 compiler, g++ or clang++, but `{shlex.join(compiler)}` did not run ({error}). "
            "Install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install), or name yours in CXX; "
            "or set FUSED_CE_BUILD=0 for the package without its C++ kernels."
        ) from None
    return compiler, answer.stdout.strip()


def accepted(compiler: list[str], flags: list[str], code: str) -> bool:
    """Whether a library of this code compiles and links with the flags, beside the user's own."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(code)
        words = ["-fPIC", *flags, *environment("CPPFLAGS", "CXXFLAGS"), *LINK, *environment("LDFLAGS")]
        command = [*compiler, *words, str(source), "-o", str(source.with_suffix(".so"))]
        return not subprocess.run(command, capture_output=True).returncode


def hardening(compiler: list[str]) -> tuple[list[str], list[str]]:
    """Flags of the compiler and of the linker that stop a wrong write early, as far as they have them.

    A distribution's or user's own _FORTIFY_SOURCE stays; sanitizers and -O0 do not go with it.
    """
    asked = " ".join(environment("CPPFLAGS", "CFLAGS", "CXXFLAGS"))
    compile_flags = ["-fstack-protector-strong"]
    free = accepted(compiler, ["-O2"], "#ifdef _FORTIFY_SOURCE\n#error taken\n#endif\n")
    if free and not ("-fsanitize" in asked or "-O0" in asked):
        compile_flags.append("-D_FORTIFY_SOURCE=2")
    found = [flag for flag in compile_flags if accepted(compiler, ["-O2", flag], "int nothing;\n")]
    link_flags = ["-Wl,-z,relro", "-Wl,-z,now"]
    return found, [flag for flag in link_flags if accepted(compiler, [flag], "int nothing;\n")]


def openmp(compiler: list[str]) -> list[str]:
    """["-fopenmp"] where it compiles and links; [] elsewhere (Apple's clang), which gives single-threaded kernels."""
    code = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
    return ["-fopenmp"] if accepted(compiler, ["-fopenmp"], code) else []


class NinjaBuild(build_ext):
    """build_ext that lets ninja compile and link."""

    def build_extension(self, ext: Extension) -> None:
        # One folder for every kind of install: an editable install would build in a temporary one, from nothing.
        folder = Path("build", f"ninja-{self.plat_name}-{sys.implementation.cache_tag}")
        library = folder / "_C.so"
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        self.write_rules(folder, library)
        # PATH may hold another ninja, or in an isolated build none: take the one of the package imported here.
        program = next(file.locate() for file in metadata.files("ninja") if file.match("bin/ninja"))
        # `make -j` offers its jobs in MAKEFLAGS, which ninja cannot take from the recipe of another program.
        own = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
        if subprocess.run([program, "-f", folder / "build.ninja"], cwd=ROOT, env=own).returncode:
            raise CompileError("ninja could not build fused_ce._C: the compiler's own message stands above.")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(ROOT / library), str(target))

    def copy_extensions_to_source(self) -> None:
        for earlier in ROOT.glob("fused_ce/_C.*.so"):  # one for this Python alone would be preferred to the new one
            earlier.unlink()
        super().copy_extensions_to_source()

    def write_rules(self, folder: Path, library: Path) -> None:
        from ninja import ninja_syntax

        def words(*flags: str) -> str:
            return ninja_syntax.escape(shlex.join(flags))

        compiler, machine = find_compiler()
        parallel, (hard, relro) = openmp(compiler), hardening(compiler)
        x86 = machine.startswith(("x86_64", "amd64"))
        wanted = os.environ.get("FUSED_CE_BUILD_ISAS", ",".join(X86)).split(",")
        isas = [name for name in X86 if x86 and name in wanted]
        common = [*COMMON, *hard, *parallel, *(f"-DFUSED_CE_{name.upper()}" for name in isas)]
        python = [*([LIMITED_API] if LIMITED else []), *(f"-isystem{path}" for path in self.include_dirs)]
        user = environment("CPPFLAGS", "CFLAGS", "CXXFLAGS")  # last, so that they win
        with open(ROOT / folder / "build.ninja", "w") as file:
            ninja = ninja_syntax.Writer(file, width=10_000)
            ninja.variable("builddir", str(folder))
            compile_command = f"{words(*compiler, *common)} $flags -MD -MF $out.d -c $in -o $out {words(*user)}"
            link_command = f"{words(*compiler, *LINK, *relro, *parallel)} $in -o $out {words(*environment('LDFLAGS'))}"
            ninja.rule("compile", compile_command, "compile $in", depfile="$out.d", deps="gcc")
            ninja.rule("link", link_command, "link $out")
            objects = []
            for source in SOURCES:
                name = Path(source).stem
                if name in X86 and name not in isas:
                    continue
                flags = python if name in PYTHON else X86.get(name, [])
                objects += ninja.build(str(folder / f"{name}.o"), "compile", source, variables={"flags": words(*flags)})
            ninja.build(str(library), "link", objects)


if os.environ.get("FUSED_CE_BUILD", "1") == "0":
    setup()
else:
    setup(
        ext_modules=[Extension("fused_ce._C", SOURCES, depends=HEADERS, py_limited_api=LIMITED)],
        cmdclass={"build_ext": NinjaBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
    )
