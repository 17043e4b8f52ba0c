"""Every kernel compiles for GPUs that are not here, and the table of what became of it holds."""

import json
import os
import re
import subprocess
import sys

import pytest
from support import ROOT

TABLE = json.loads((ROOT / "tests" / "kernels" / "compiled.json").read_text())


def compile_kernels(*arguments):
    """Run the command in a process of its own: in this one the kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_one_of_each_kernel_compiles():
    """The smallest that has a product, and one that has none; all are compiled nightly."""
    done = compile_kernels(
        "--capability", "90", "--only", r"^(attention tiles|gated_forward silu bfloat16 BLOCK=2048 warps=8)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Compiled(") == 2


@pytest.mark.slow
def test_a_pattern_that_no_kernel_has_is_refused():
    done = compile_kernels("--capability", "90", "--only", "no such kernel")
    assert done.returncode == 2 and "matches no kernel" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("capability", sorted(TABLE["kernels"]))
def test_every_kernel_compiles_as_before(capability):
    done = compile_kernels("--capability", capability)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Compiled(") == len(TABLE["kernels"][capability])


@pytest.mark.parametrize("capability", ["80", "90"])
def test_attention_multiplies_on_tensor_cores(capability):
    """But for tiles of 32, which are too small for products of a warpgroup."""
    instruction = {"80": "HMMA", "90": "HGMMA"}[capability]
    labels = [label for label in TABLE["kernels"][capability] if re.match(r"attention.* head_dim=\d+ (?!32x32)", label)]
    assert len(labels) > 20
    for label in labels:
        found = TABLE["kernels"][capability][label]
        assert instruction in found["matrix"] and not found["warnings"], label
