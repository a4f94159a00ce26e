#!/usr/bin/env python3
"""Compiles every kernel (src/**/*.cu) to the PTX that lies beside it and is part of the program.

    pip install nvidia-cuda-nvrtc-cu12==12.0.140 nvidia-cuda-nvrtc==13.0.88     # no GPU, driver or toolkit needed
    python tools/kernels.py [FILE.cu …]      # write the PTX
    python tools/kernels.py --check          # CI: the PTX is current, and every kernel compiles with CUDA 13 too

The PTX is made by NVRTC 12.0, so that every driver of CUDA 12 and 13 takes it. A kernel says in a line `// archs: 80 90a`
for which architectures: the first is the baseline (NAME.ptx, runs on everything newer), the others have their own files
(NAME.90a.ptx, for that very architecture). `// options: …` adds options of the compiler. Kernels include nothing.
"""

import argparse
import ctypes
import difflib
import re
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PTX_NVRTC = "12.0"
# NVRTC 13 knows nothing older than this.
OLDEST_OF_13 = 75


class Nvrtc:
    """One libnvrtc, through its C interface."""

    def __init__(self, library: Path):
        # libnvrtc looks for its builtins by name alone.
        for builtins in sorted(library.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(str(library))
        self.lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._ok(self.lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = f"{major.value}.{minor.value}"

    def _ok(self, code):
        if code != 0:
            raise RuntimeError(self.lib.nvrtcGetErrorString(code).decode())

    def compile(self, path: Path, arch: str, options: list[str]) -> str:
        program = ctypes.c_void_p()
        source = path.read_bytes()
        self._ok(self.lib.nvrtcCreateProgram(ctypes.byref(program), source, path.name.encode(), 0, None, None))
        try:
            flags = [f"--gpu-architecture=compute_{arch}", "--std=c++17", *options]
            array = (ctypes.c_char_p * len(flags))(*[f.encode() for f in flags])
            code = self.lib.nvrtcCompileProgram(program, len(flags), array)
            size = ctypes.c_size_t()
            self._ok(self.lib.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            self._ok(self.lib.nvrtcGetProgramLog(program, log))
            if code != 0:
                raise SystemExit(f"{path} does not compile for compute_{arch} with NVRTC {self.version}:\n{log.value.decode()}")
            if log.value.strip():
                print(log.value.decode(), file=sys.stderr)
            self._ok(self.lib.nvrtcGetPTXSize(program, ctypes.byref(size)))
            ptx = ctypes.create_string_buffer(size.value)
            self._ok(self.lib.nvrtcGetPTX(program, ptx))
            return ptx.value.decode()
        finally:
            self.lib.nvrtcDestroyProgram(ctypes.byref(program))


def find(major: str, explicit: str | None) -> Path:
    if explicit:
        return Path(explicit)
    places = [Path(p) for p in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}]
    for place in places:
        for inside in ("nvidia/cuda_nvrtc/lib", "nvidia/cu13/lib"):
            library = place / inside / f"libnvrtc.so.{major}"
            if library.exists():
                return library
    package = "nvidia-cuda-nvrtc-cu12==12.0.140" if major == "12" else "nvidia-cuda-nvrtc==13.0.88"
    raise SystemExit(f"no libnvrtc.so.{major}: pip install {package}, or name it with --nvrtc{major}")


def directive(text: str, name: str, default: str) -> list[str]:
    found = re.search(rf"^// {name}: (.+)$", text, re.M)
    return (found.group(1) if found else default).split()


def tidy(ptx: str) -> str:
    """Without the comment that names the build of the compiler, and without spaces at ends of lines."""
    body = ptx[ptx.index(".version"):]
    lines = [line.rstrip() for line in body.splitlines()]
    return "// Made by tools/kernels.py: change the .cu beside it instead.\n" + "\n".join(lines).rstrip() + "\n"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("files", nargs="*", type=Path)
    p.add_argument("--check", action="store_true")
    p.add_argument("--nvrtc12")
    p.add_argument("--nvrtc13")
    a = p.parse_args()
    sources = [f.resolve() for f in a.files] or sorted(ROOT.glob("src/**/*.cu"))
    old = Nvrtc(find("12", a.nvrtc12))
    if old.version != PTX_NVRTC:
        raise SystemExit(f"the PTX is made by NVRTC {PTX_NVRTC}, this is {old.version}")
    new = Nvrtc(find("13", a.nvrtc13)) if a.check else None
    wrong, expected = 0, set()
    for source in sources:
        text = source.read_text()
        archs = directive(text, "archs", "80")
        options = directive(text, "options", "") if "// options:" in text else []
        for i, arch in enumerate(archs):
            target = source.with_suffix(".ptx" if i == 0 else f".{arch}.ptx")
            expected.add(target)
            ptx = tidy(old.compile(source, arch, options))
            if new and int(re.match(r"\d+", arch).group()) >= OLDEST_OF_13:
                new.compile(source, arch, options)
            name = target.relative_to(ROOT)
            if not a.check:
                target.write_text(ptx)
                print(f"{name}: {len(ptx)} bytes")
            elif not target.exists():
                wrong += 1
                print(f"{name} is missing: run tools/kernels.py")
            elif target.read_text() != ptx:
                wrong += 1
                print(f"{name} is not what its source compiles to: run tools/kernels.py")
                have, want = target.read_text().splitlines(), ptx.splitlines()
                print("\n".join(list(difflib.unified_diff(have, want, "committed", "compiled", lineterm="", n=1))[:20]))
    if a.check and not a.files:
        for left in sorted(set(ROOT.glob("src/**/*.ptx")) - expected):
            wrong += 1
            print(f"{left.relative_to(ROOT)} has no kernel that makes it")
    if a.check and not wrong:
        print(f"{len(expected)} files of PTX are current; every kernel compiles with NVRTC {old.version} and {new.version}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
