"""Memory while code runs."""

import mmap
import os
from pathlib import Path

import pytest
import torch

from hyperlora.peak_memory import peak_memory

MIB = 2**20


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux resets a peak of memory")
@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="pages of files cannot be sent away")
def test_pages_of_files_that_leave_hide_no_memory(tmp_path: Path) -> None:
    """A kernel may drop mapped pages that can be read again; the work has not found its memory there."""
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * 20 * MIB)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == len(mapped) // mmap.PAGESIZE  # every page is resident
        with peak_memory(torch.device("cpu")) as peak:
            mapped.madvise(mmap.MADV_DONTNEED)
            held = torch.ones(40 * MIB // 4)
            measured = peak() / MIB
            del held
    assert 38 < measured < 50
