"""The Triton kernels in Triton's interpreter: all forms of codes, any shape, few tokens and many."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")


def test_products_on_a_gpu_are_the_twins() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(Path(__file__).with_name("weight_only_worker.py"))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout == "done\n", run.stderr[-2000:]
