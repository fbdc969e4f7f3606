"""`few_rows.cpp`, compiled for this machine when it is first needed, kept, and loaded as `torch.ops.layerskip_moe`.

It is written against PyTorch's stable interface, so compiling takes seconds and is redone only for another source,
processor or PyTorch. Knows nothing of what the operators compute. Next: `few_rows.py`, which calls them.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from layerskip_moe.files import cache_folder, replacing

_SOURCE = Path(__file__).with_name("few_rows.cpp")
_STABLE_SINCE = "0x020a000000000000"  # PyTorch 2.10
_FLAGS = (
    "-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-Wno-psabi", f"-DTORCH_TARGET_VERSION={_STABLE_SINCE}"
)  # fmt: skip

_loaded: bool | None = None  # None: not tried yet


def has_kernels() -> bool:
    """Whether the operators are there; they are compiled and loaded at the first call. Warns, once, where they cannot
    be: without a C++ compiler, for instance."""
    global _loaded
    if _loaded is None and not torch.compiler.is_compiling():
        try:
            torch.ops.load_library(_library())
        except (OSError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", None) or str(error)
            warnings.warn(
                "decoding on the CPU will be several times slower than it could be: its kernels need a C++ compiler "
                f"(`apt install g++`), and compiling them failed ({told.strip()[-300:]}).",
                stacklevel=2,
            )
            _loaded = False
        else:
            _describe_operators()
            _loaded = True
    return bool(_loaded)


def _library() -> Path:
    """The compiled library's file, compiled now if need be. Of several processes one compiles, the rest wait."""
    import filelock

    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler was found")
    key = "\n".join([_SOURCE.read_text(), *_FLAGS, compiler, torch.__version__, _processor()])
    library = cache_folder() / "kernels" / f"few_rows.{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(library.with_suffix(".lock")):
        if not library.is_file():
            print("compiling kernels for this machine, which takes some seconds, once", file=sys.stderr, flush=True)
            with replacing(library) as beside:
                _compile(compiler, beside)
    return library


def _compile(compiler: str, target: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    command = [compiler, *_FLAGS, f"-I{include}", str(_SOURCE), "-o", str(target), f"-L{libraries}"]
    command += ["-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()}"


def _describe_operators() -> None:
    """Tell torch.compile what the operators give, without running them."""

    @torch.library.register_fake("layerskip_moe::linear")
    def _(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[0])

    @torch.library.register_fake("layerskip_moe::experts")
    def _(x: Tensor, *_: Tensor | None) -> Tensor:
        return torch.empty_like(x)

    @torch.library.register_fake("layerskip_moe::attend")
    def _(queries: Tensor, *_: object) -> Tensor:
        return queries.new_empty(queries.shape[0], queries.shape[1] * queries.shape[2])
