"""Check the project on a GPU in three parts of less than 8 minutes each: build and test the kernels, measure all.

    python -m scripts.gpu_check [--part 1] [--output gpu_check.json] [--only SECTION ...]

Part 1 builds and tests the CUDA kernels, part 2 measures them and runs the other tests of the operator, and part 3
compares and measures Grounding DINO; without --part all of them run. It needs torch, the CUDA toolkit (nvcc) and g++;
sections that need more packages are skipped without them, and the table names the packages to install.
Sections are in scripts/benchmarks/gpu_sections.py. Each runs in its own process with a time limit, because an error of
a kernel ends all CUDA calls of a process. The results are written after each section: JSON, and tables for
scripts/benchmarks/README.md. A run with the same output file adds to it and keeps measurements that it does not repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from scripts.benchmarks.gpu_sections import ROOT, SECTIONS, Results
from scripts.benchmarks.gpu_tables import measurements, summary
from vg.files import replacing

MODULES = {"pillow": "PIL"}  # modules that are not named like their package


def run_sections(names: list[str], output: Path) -> dict[str, Results]:
    """Run the sections, add them to the results in the file, and write both files after each one."""
    found: dict[str, Results] = json.loads(output.read_text()) if output.exists() else {}
    for name in names:
        print(f"== {name}", flush=True)
        result = run_section(name)
        earlier = found.get(name, {})
        if not result["passed"] and "measured" not in result and "measured" in earlier:
            result["measured"] = earlier["measured"]  # which has its own date and machine
        found = {key: {**found, name: result}[key] for key in SECTIONS if key == name or key in found}
        with replacing(output, is_file=True) as path:
            path.write_text(json.dumps(found, indent=2) + "\n")
        with replacing(output.with_suffix(".md"), is_file=True) as path:
            path.write_text(f"{summary(found)}\n\n{measurements(found)}\n")
    return found


def run_section(name: str) -> Results:
    """Run a section in a new process and return its results, what its benchmark measured so far, and its error."""
    section = SECTIONS[name]
    missing = [package for package in section.needs if find_spec(MODULES.get(package, package)) is None]
    if missing:
        return {"passed": None, "install": " ".join(missing), "section_seconds": 0.0}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, sys.argv[0], "--section", name, "--output", folder]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            problem = f"the process ended with {process.wait(section.seconds)}"
        except subprocess.TimeoutExpired:
            problem = f"stopped after {section.seconds} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
        result: Results = {"passed": False, "error": problem}
        with suppress(OSError, ValueError):  # missing, or cut off
            result = json.loads(Path(folder, "results.json").read_text())
        with suppress(OSError, ValueError):
            result["measured"] = json.loads(Path(folder, "measured.json").read_text())
    return {**result, "section_seconds": round(time.perf_counter() - start, 1)}


def check(name: str, folder: Path) -> None:
    """Run a section in this process and write its results or its error to the folder."""
    try:
        result = {"passed": True, **SECTIONS[name].run(folder)}
    except Exception as error:
        traceback.print_exc()
        result = {"passed": False, "error": f"{type(error).__name__}: {error}"}
    Path(folder, "results.json").write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path, names = Path("gpu_check.json"), list(SECTIONS)
    parser.add_argument("--part", type=int, choices=(1, 2, 3), help="only the sections of this part (default: all)")
    parser.add_argument("--output", type=Path, default=path, help="JSON file; tables: .md (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SECTION", help=", ".join(names))
    parser.add_argument("--section", help=argparse.SUPPRESS)  # in the process of a section, whose output is a folder
    options = parser.parse_args()
    if options.section:
        return check(options.section, options.output)
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA GPU: run this check on a machine with a GPU")
    chosen = [name for name in options.only if options.part in (None, SECTIONS[name].part)]
    found = run_sections(chosen, options.output)
    print(f"{summary(found)}\n\n{measurements(found)}")
    sys.exit(any(found[name]["passed"] is False for name in chosen))


if __name__ == "__main__":
    main()
