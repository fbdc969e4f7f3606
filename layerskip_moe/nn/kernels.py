"""The C++ in `cpp/`, compiled for this machine when first needed, kept, and loaded as
`torch.ops.layerskip_moe_few_rows`.

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
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from layerskip_moe.files import cache_folder, replacing

_SOURCES = Path(__file__).with_name("cpp")
_STABLE_SINCE = "0x020a000000000000"  # PyTorch 2.10
_FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=off", "-std=c++20", "-shared", "-fPIC", "-Wno-psabi", "-Wno-attributes"),
    f"-DTORCH_TARGET_VERSION={_STABLE_SINCE}",
)

_loaded: bool | None = None  # None: not tried yet
_wanted: ContextVar[bool] = ContextVar("kernels_wanted", default=True)


@contextmanager
def using_kernels(wanted: bool) -> Iterator[None]:
    """Use the operators for a while, or do without them, in this thread."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def has_kernels() -> bool:
    """Whether the operators are to be used and are there; they are compiled and loaded at the first call. Warns, once,
    where they cannot be: without a C++ compiler, for instance."""
    global _loaded
    if not _wanted.get():
        return False
    if _loaded is None:
        try:
            _load(_library())
        except (OSError, NotImplementedError, subprocess.CalledProcessError) as error:  # NotImplementedError: no locks
            told = getattr(error, "stderr", None) or str(error)
            warnings.warn(
                "decoding on the CPU will be several times slower than it could be: its kernels, which need g++ 11 or "
                f"clang, and room in {cache_folder()} ($LAYERSKIP_MOE_CACHE), could not be made: {told.strip()[-300:]}",
                stacklevel=2,
            )
            _loaded = False
        else:
            _loaded = True
    return _loaded


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(library)
    except OSError:
        library.unlink(missing_ok=True)  # the next process makes it anew
        raise


def _library() -> Path:
    """The compiled library's file, compiled now if need be. Of several processes one compiles, the rest wait."""
    import filelock

    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler was found")
    key = "\n".join(
        [*(path.read_text() for path in sorted(_SOURCES.iterdir())), *_FLAGS, compiler, torch.__version__, _processor()]
    )
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
    command = [compiler, *_FLAGS, f"-I{include}", str(_SOURCES / "few_rows.cpp"), "-o", str(target), f"-L{libraries}"]
    command += ["-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()}"
