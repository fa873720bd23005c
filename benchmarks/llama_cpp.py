"""llama.cpp, to be measured beside: found or built, fed and understood.

It comes with the source distribution of llama-cpp-python; its own programs measure it. A folder
that was built before is used as it is; otherwise it is built below the cache folder, never in this
repository.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.engine_client import EngineFailure, environment
from benchmarks.record import ROOT

RELEASE = "0.3.36"
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize", "llama-imatrix")
LOGITS_SOURCE = Path(__file__).with_name("llama_logits.cpp")
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    *(f"-DLLAMA_{name}=OFF" for name in ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES")),
    "-DLLAMA_BUILD_SERVER=OFF",
)

# llama-batched-bench ends now and then before its log, and so its result, has been written.
PRINT_TRIES = 6
NO_REPACKING = "--no-repack"

# Runs a command and prints the most memory it had, in KiB.
PEAK_OF_CHILD = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""

# gcc 12 thinks that loading a tile configuration reads 8 of its 64 bytes and leaves the stores of
# the others out: every AMX product would die of SIGILL. One line keeps them.
AMX_FILE = "ggml/src/ggml-cpu/amx/mmq.cpp"
AMX_CALL = "_tile_loadconfig(&tc);"
AMX_FENCE = '__asm__ volatile("" : : "r"(&tc) : "memory");'


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp's programs and sources.

    Attributes:
        programs: folder of llama-bench and the others, and of the shared libraries.
        source: folder of llama.cpp's sources, for its headers.
        unpacked: models that llama-batched-bench was found to die of with repacked weights.
    """

    programs: Path
    source: Path
    unpacked: set[Path] = field(default_factory=set, compare=False)

    def run(self, program: str, *arguments: object, threads: int) -> str:
        """Run a program to its end and return what it printed.

        Raises:
            EngineFailure: it failed; the last line it wrote says why.
        """
        command = [str(self.programs / program), *map(str, arguments)]
        done = subprocess.run(
            command, env=self._environment(threads), capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise EngineFailure(f"{program} ended with status {done.returncode}: {last}")
        return done.stdout

    def _environment(self, threads: int) -> dict[str, str]:
        return environment(threads) | {"LD_LIBRARY_PATH": str(self.programs)}

    def prefill_seconds(self, model: Path, tokens: int, threads: int) -> float:
        """Return what llama-bench finds for reading a prompt once, after its warm-up."""
        arguments = ["-m", model, "-t", threads, "-p", tokens, "-n", 0, "-r", 1, "-o", "json"]
        return parse_bench(self.run("llama-bench", *arguments, threads=threads))

    def decode_seconds(self, model: Path, tokens: int, threads: int) -> float:
        """Return what llama-bench finds for writing so many tokens once, after its warm-up."""
        arguments = ["-m", model, "-t", threads, "-p", 0, "-n", tokens, "-r", 1, "-o", "json"]
        return parse_bench(self.run("llama-bench", *arguments, threads=threads))

    def batched_decode_seconds(
        self, model: Path, prompt: int, tokens: int, batch: int, threads: int
    ) -> float:
        """Return what llama-batched-bench finds for sequences that write side by side."""
        room = max(batch * (prompt + tokens), 256 * batch)
        arguments = [
            *("-m", model, "-t", threads, "-tb", threads, "-c", room, "-npp", prompt),
            *("-ntg", tokens, "-npl", batch, "--output-format", "jsonl"),
        ]
        printed = ""
        for _ in range(PRINT_TRIES):
            packed = model not in self.unpacked
            extra = [] if packed else [NO_REPACKING]
            try:
                printed = self.run("llama-batched-bench", *arguments, *extra, threads=threads)
            except EngineFailure as failure:
                if not packed:
                    raise
                # With AMX it dies where several sequences meet packed weights; a user would find
                # the option that helps, so that is what is measured, and said.
                print(f"  {model.name}: {failure}; trying {NO_REPACKING}", file=sys.stderr)
                self.unpacked.add(model)
                continue
            if printed.strip():
                break
        return parse_batched_bench(printed)

    def first_token_seconds(self, model: Path, ids: Sequence[int], threads: int) -> float:
        """Return the seconds from the start of a process to the first token of a prompt."""
        program = self.logits_program()
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(program), str(model), str(threads), "first", *map(str, ids)],
            env=self._environment(threads),
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout is not None
            line = process.stdout.readline()
            taken = time.perf_counter() - started
        if not line:
            raise EngineFailure(f"llama.cpp gave no token for {model.name}")
        return taken

    def peak_bytes(self, model: Path, tokens: int, threads: int) -> int:
        """Return the most memory of a llama-bench that reads a prompt and writes 16 tokens."""
        arguments = ["-m", model, "-t", threads, "-p", tokens, "-n", 16, "-r", 1]
        command = [str(self.programs / "llama-bench"), *map(str, arguments)]
        # A child's maximum begins with that of its parent, so a small process stands between.
        done = subprocess.run(
            [sys.executable, "-S", "-c", PEAK_OF_CHILD, *command],
            env=self._environment(threads),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise EngineFailure(f"llama-bench ended with status {done.returncode}")
        return int(done.stdout) * 1024

    def logits(self, model: Path, ids: Sequence[int], threads: int, folder: Path) -> Tensor:
        """Return the logits after each of the tokens, float32 [T, V]."""
        out = folder / f"{model.stem}.logits"
        self._ask(model, threads, "logits", out, *ids)
        values = np.fromfile(out, dtype=np.float32)
        out.unlink()
        return torch.from_numpy(values).unflatten(0, (len(ids), -1))

    def greedy(self, model: Path, ids: Sequence[int], tokens: int, threads: int) -> list[int]:
        """Continue a prompt with the likeliest token each time."""
        return [int(one) for one in self._ask(model, threads, "greedy", tokens, *ids).split()]

    def _ask(self, model: Path, threads: int, *arguments: object) -> str:
        command = [str(self.logits_program()), str(model), str(threads), *map(str, arguments)]
        done = subprocess.run(
            command, env=self._environment(threads), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise EngineFailure(f"llama.cpp and {model.name}: {done.stderr.strip()}")
        return done.stdout

    def logits_program(self) -> Path:
        """Build the program that gives logits, once for a cache folder, and return its path."""
        program = cache_folder() / f"llama_logits-{LOGITS_SOURCE.stat().st_mtime_ns}"
        if not program.exists():
            program.parent.mkdir(parents=True, exist_ok=True)
            includes = [f"-I{self.source / folder}" for folder in ("include", "ggml/include")]
            libraries = [f"-L{self.programs}", "-lllama", "-lggml", "-lggml-base"]
            unfinished = program.with_suffix(".part")
            build = ["c++", "-O2", "-std=c++17", *includes, str(LOGITS_SOURCE), *libraries]
            build += [f"-Wl,-rpath,{self.programs}", "-o", str(unfinished)]
            subprocess.run(build, check=True)
            unfinished.rename(program)
        return program


def cache_folder() -> Path:
    """Return where large things are kept between runs: outside the repository."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jamba-lm-benchmarks"


def find_or_build(folder: Path | None) -> LlamaCpp:
    """Return llama.cpp: in `folder`, in the cache, or built there now, which takes minutes.

    Args:
        folder: where it was built before: the folder of its programs, or one above it.
    """
    if folder is not None:
        found = find(folder)
        if found is None:
            sys.exit(
                f"error: no llama.cpp in {folder}: expected {', '.join(PROGRAMS)} and the sources "
                "(vendor/llama.cpp); leave --llama-cpp out to have it built"
            )
        return found
    home = cache_folder() / f"llama.cpp-{RELEASE}"
    return find(home) or build(home)


def find(folder: Path) -> LlamaCpp | None:
    """Look for the programs and the sources in a folder and below."""
    places = [folder, folder / "bin", folder / "build" / "bin"]
    programs = [place for place in places if all((place / name).exists() for name in PROGRAMS)]
    above = [folder, *folder.resolve().parents[:2]]
    headers = [
        header
        for place in above
        for header in sorted(place.glob("*/vendor/llama.cpp/include/llama.h"))
    ]
    if not programs or not headers:
        return None
    return LlamaCpp(programs[0].resolve(), headers[0].parents[1].resolve())


def build(home: Path) -> LlamaCpp:
    """Download llama-cpp-python's sources and build the programs in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    requirement = f"llama-cpp-python=={RELEASE}"
    subprocess.run(
        [*pip, "--no-binary", "llama-cpp-python", requirement, "-d", str(home)], check=True
    )
    (archive,) = home.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(home, filter="data")
    source = archive.with_name(archive.name.removesuffix(".tar.gz")) / "vendor" / "llama.cpp"
    keep_amx_configuration(source / AMX_FILE)
    cmake = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
    out = home / "build"
    subprocess.run([cmake, "-S", str(source), "-B", str(out), *CMAKE_OPTIONS], check=True)
    subprocess.run([cmake, "--build", str(out), "--parallel", "--target", *PROGRAMS], check=True)
    found = find(home)
    assert found is not None, f"llama.cpp was built in {out}, and its programs are not there"
    return found


def keep_amx_configuration(path: Path) -> None:
    """Put the line that gcc 12 needs before each load of a tile configuration, once."""
    text = path.read_text(encoding="utf-8")
    if AMX_FENCE not in text:
        path.write_text(text.replace(AMX_CALL, f"{AMX_FENCE} {AMX_CALL}"), encoding="utf-8")


def gguf_file(llama: LlamaCpp, checkpoint: Path, kind: str, threads: int) -> Path:
    """Return the checkpoint as a GGUF file beside it, made when it is not there.

    Args:
        llama: for the types that llama-quantize makes.
        checkpoint: a folder in Hugging Face's layout.
        kind: F32, F16, BF16, or one of llama.cpp's quantised types.
        threads: to quantise with.
    """
    out = checkpoint.with_name(f"{checkpoint.name}-{kind}.gguf")
    if out.exists():
        return out
    unfinished = out.with_suffix(".part.gguf")
    if kind in ("F32", "F16", "BF16"):
        convert(checkpoint, unfinished, kind)
    else:
        # From the widest type that the checkpoint's own values fit into.
        wide = gguf_file(llama, checkpoint, "BF16", threads)
        llama.run("llama-quantize", wide, unfinished, kind, threads, threads=threads)
    unfinished.rename(out)
    return out


def convert(checkpoint: Path, out: Path, kind: str) -> None:
    """Write a GGUF file of a checkpoint with `jamba convert`."""
    code = "import sys; from jamba_lm.cli.main import main; sys.exit(main())"
    arguments = ["convert", str(checkpoint), str(out), "--type", kind.lower()]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment(1),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise EngineFailure(f"jamba convert: {done.stderr.strip().splitlines()[-1]}")


def parse_bench(printed: str) -> float:
    """Return the seconds of the one test in the JSON that llama-bench prints."""
    tests: list[dict[str, Any]] = json.loads(printed)
    if len(tests) != 1 or len(tests[0]["samples_ns"]) != 1:
        raise EngineFailure(f"llama-bench ran {len(tests)} tests, expected one of one sample")
    return float(tests[0]["samples_ns"][0]) / 1e9


def parse_batched_bench(printed: str) -> float:
    """Return the seconds of writing in the one line of JSON that llama-batched-bench prints."""
    # Its log goes to the same place, now and then without a line of its own.
    results = [json.loads(found) for found in re.findall(r"\{[^{}]*\}", printed)]
    if len(results) != 1:
        raise EngineFailure(
            f"llama-batched-bench printed {len(results)} results, expected one: "
            f"{' '.join(printed.split())[-200:]!r}"
        )
    return float(results[0]["t_tg"])
