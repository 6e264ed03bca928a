import os
import subprocess
import sys

import pytest

# A thread that is inside torch when the interpreter goes down aborts the process.
PROGRAM = """
import atexit, sys, threading, torch
from hyperlora.cli import main

def work():
    one = torch.randn(100)
    while True:
        one + one

atexit.register(lambda: print("handled"))
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
main()
"""


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["train", "nothing.yaml", "-o", "x"], 3)])
def test_a_launched_process_ends_with_its_own_code(arguments: list[str], code: int) -> None:
    """Whatever threads of libraries do meanwhile, with what it printed and its exit handlers run."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for _ in range(3):
        done = subprocess.run(command, env=os.environ | launched, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert done.stdout.endswith("handled\n") and len(done.stderr.splitlines()) == (code > 0)
