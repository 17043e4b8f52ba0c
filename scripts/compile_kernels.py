"""Compile every Triton kernel without a GPU and hold the outcome against a table: compile_kernels.py. See --help.

For every kernel, in every configuration that may be picked: registers, spills, shared memory, tensor core instructions
and warnings of the assembler. Ends with 1 where something is worse than in the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shardwright.kernels.triton.compilation import COMPILER, SHARED_BYTES, Compiled, compile_all

TABLE = Path(__file__).resolve().parents[1] / "tests" / "kernels" / "compiled.json"


def faults(found: Compiled, expected: dict[str, Any] | None, capability: int, same_compiler: bool) -> Iterator[str]:
    """Yield what is wrong with a compiled kernel."""
    if expected is None:
        yield "is not in the table; look at it, then update the table with --write"
        return
    if found.shared_bytes > SHARED_BYTES[capability]:
        yield f"needs {found.shared_bytes} bytes of shared memory, there are {SHARED_BYTES[capability]}"
    if found.matrix != expected["matrix"]:
        yield f"has the tensor core instructions {found.matrix}, had {expected['matrix']}"
    if new := set(found.warnings) - set(expected["warnings"]):
        yield f"makes the assembler warn: {'; '.join(sorted(new))}"
    for figure in ("registers", "spill_bytes", "shared_bytes") if same_compiler else ():
        if getattr(found, figure) > expected[figure]:
            yield f"has {figure} {getattr(found, figure)}, had {expected[figure]}"


def compile_and_tell(capability: int, wanted: str) -> dict[str, Compiled]:
    """Return what became of the kernels of a compute capability, by label."""
    found = {}
    for label, compiled in compile_all(capability, wanted):
        found[label] = compiled
        print(f"sm_{capability} {label}: {compiled}", flush=True)
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel and compare with a table.")
    parser.add_argument("--only", default="", help="regular expression that a kernel's label must match")
    parser.add_argument("--capability", type=int, choices=sorted(SHARED_BYTES), help="default: all")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} instead")
    args = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"compiler": COMPILER, "kernels": {}}
    same_compiler = table["compiler"] == COMPILER
    found: dict[str, Any] = {}
    num_faults = 0
    capabilities = [args.capability] if args.capability else sorted(SHARED_BYTES)
    with ProcessPoolExecutor(len(capabilities), multiprocessing.get_context("spawn")) as pool:
        outcomes = list(pool.map(compile_and_tell, capabilities, [args.only] * len(capabilities)))
    for capability, outcome in zip(capabilities, outcomes, strict=True):
        expected = table["kernels"].get(str(capability), {})
        for label, compiled in outcome.items():
            found.setdefault(str(capability), {})[label] = asdict(compiled)
            for fault in () if args.write else faults(compiled, expected.get(label), capability, same_compiler):
                num_faults += 1
                print(f"sm_{capability} {label} {fault}", file=sys.stderr)
    if not found:
        parser.error(f"--only {args.only} matches no kernel")
    if args.write:
        old = table["kernels"] if same_compiler and (args.only or args.capability) else {}
        kernels = old | {key: (old.get(key, {}) if args.only else {}) | labels for key, labels in found.items()}
        TABLE.write_text(json.dumps({"compiler": COMPILER, "kernels": kernels}, indent=1) + "\n")
    sys.exit(1 if num_faults else 0)


if __name__ == "__main__":
    main()
