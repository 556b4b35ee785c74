"""Builds the card for the torch of the running interpreter: `python build.py FOLDER` makes FOLDER/libghost.so.

It needs gcc, nm, torch's CUDA build, and CUDA's headers (nvidia-cuda-crt beside what torch brings). What torch or a
driver's user asks for and no file here answers gets an answer that does nothing and succeeds; a product of cuBLAS
counts as a launch.
"""

from __future__ import annotations

import ctypes.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / name for name in ("runtime.c", "driver.c", "nvml.c", "nccl.c")]
LIBRARIES = ("libtorch_cuda.so", "libtorch_python.so", "libtorch_cpu.so", "libc10_cuda.so")
COMPUTES = re.compile(r"cublas(?!Lt?(Create|Destroy)).*(gemm|gemv|dot|trsm|gels|getr|geqr|LtMatmul$)", re.IGNORECASE)
ALIASES = ("libcuda.so", "libcuda.so.1", "libnvidia-ml.so.1")  # one library under each name that is looked for


def symbols(library: Path, kind: str) -> set[str]:
    """Names of one kind, "T" defined or "U" wanted, in a library's dynamic symbol table."""
    listed = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    return set(re.findall(rf"^[0-9a-f ]* {kind} (\w+)", listed, re.MULTILINE))


def wanted(headers: Path) -> set[str]:
    """What torch imports of the runtime and of cuBLAS, what it looks up in NVML, and every name of the driver."""
    folder = Path(torch.__file__).parent / "lib"
    imported = {name for library in LIBRARIES for name in symbols(folder / library, "U")}
    runtime = {name for name in imported if re.match(r"(__cuda|cuda|cublas)", name)}
    text = (headers / "cuda.h").read_text(encoding="utf-8")
    driver = set(re.findall(r"\b(cu[A-Z]\w+) *\(", text)) | set(re.findall(r"#define +cu[A-Z]\w+ +(cu[A-Z]\w+)", text))
    nvml = {name.decode() for name in re.findall(rb"nvml\w+", (folder / "libc10_cuda.so").read_bytes())}
    return runtime | driver | nvml


def answers(names: set[str]) -> str:
    """C source in which each of `names` does nothing: a product is a launch, everything else succeeds."""
    lines = ["int launch(void);"]
    lines += [f"int {name}(void) {{ return {'launch()' if COMPUTES.match(name) else 0}; }}" for name in sorted(names)]
    return "\n".join(lines) + "\n"


def build(folder: Path) -> None:
    """Compile the card into `folder`, under every name that torch, Triton and NVML look for."""
    nvidia = Path(torch.__file__).parents[1] / "nvidia"
    headers = nvidia / "cu13" / "include"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libghost.so"
    includes = [f"-I{headers}", f"-I{nvidia / 'nccl' / 'include'}"]
    compile = ["gcc", "-O1", "-fPIC", "-shared", "-w", *includes, "-o", str(library)]
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*compile, *map(str, SOURCES)], check=True)
        rest = Path(scratch) / "rest.c"
        rest.write_text(answers(wanted(headers) - symbols(library, "T")), encoding="utf-8")
        subprocess.run([*compile, *map(str, SOURCES), str(rest)], check=True)
    for alias in ALIASES:
        (folder / alias).unlink(missing_ok=True)
        (folder / alias).symlink_to(library.name)


if __name__ == "__main__":
    if ctypes.util.find_library("cuda"):
        sys.exit("this machine has an NVIDIA driver: the ghost card is for machines without one")
    if torch.version.cuda is None:
        sys.exit(f"torch {torch.__version__} is no CUDA build; `make ghost` installs one")
    build(Path(sys.argv[1]))
