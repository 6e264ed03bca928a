import os
import socket
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


PEERS = """
import os
from hyperlora import ranks
from hyperlora.cli import guarded

def work():
    ranks.join()
    assert ranks.agree(7) and not ranks.agree(ranks.own()) and not ranks.agree(-1 - ranks.own())
    if ranks.own() == 1:
        os._exit(9)
    ranks.wait()

guarded(work)
"""


def test_a_lost_process_is_one_line_in_the_others() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PEERS], env=os.environ | place | {"RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 9], errors
    assert errors[0].startswith("hyperlora: error: another process of this run ended"), errors[0]
    assert len(errors[0].splitlines()) == 1
