"""Memory in large pages: packed weights and workspaces lie in it, wherever the system has them or not."""

import gc
import mmap
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from resnet_kernels.kernels.cpu import large_pages

MIB = 2**18  # floats

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")


@pytest.mark.parametrize("make", [large_pages.own, large_pages.shared])
@pytest.mark.parametrize("floats", [1, 17, 1000, MIB // 3, MIB, MIB + 1, 3 * MIB + 5, 7 * MIB])
def test_memory_is_an_ordinary_tensor_of_the_size_asked_for(make, floats):
    found = make(floats)
    assert (found.shape, found.dtype, found.device.type, found.requires_grad) == (
        (floats,),
        torch.float32,
        "cpu",
        False,
    )
    assert found.is_contiguous() and found.data_ptr() % 4 == 0
    found.copy_(torch.arange(floats))
    assert torch.equal(found, torch.arange(floats, dtype=torch.float32))


def test_pieces_overlap_nowhere_and_begin_at_cache_lines():
    sizes = [1, 15, 16, 17, 100_000, 3, MIB // 2, 5, MIB // 2, MIB // 2, 7]
    pieces = [large_pages.shared(size) for size in sizes]
    for i, piece in enumerate(pieces):
        piece.fill_(i)
    assert all((piece == i).all() for i, piece in enumerate(pieces))
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces)


@pytest.mark.parametrize("make", [large_pages.own, large_pages.shared])
def test_no_mode_of_the_user_reaches_it(make):
    with torch.inference_mode(), torch.device("meta"):
        found = make(2 * MIB)
    assert found.device.type == "cpu" and not found.is_inference()


@pytest.mark.parametrize("make", [large_pages.own, large_pages.shared])
def test_a_system_without_large_pages_has_memory_too(make, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert make(3 * MIB).fill_(1).sum() == 3 * MIB


def test_a_kernel_that_refuses_them_is_no_error(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *args):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(large_pages.mmap, "mmap", Refusing)
    monkeypatch.setattr(large_pages.mmap, "MADV_HUGEPAGE", 14, raising=False)
    assert large_pages.own(3 * MIB).fill_(1).sum() == 3 * MIB


@pytest.mark.parametrize("make", [large_pages.own, large_pages.shared])
def test_memory_that_cant_be_mapped_is_asked_of_pytorch(make, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(large_pages, "_chunk", large_pages._Chunk())
    monkeypatch.setattr(large_pages.mmap, "mmap", refuse)
    assert make(MIB // 2).fill_(1).sum() == MIB // 2 and make(3 * MIB).fill_(1).sum() == 3 * MIB
    with pytest.raises(RuntimeError, match="allocate"):
        large_pages.own(2**50)


def _flags_at(address: int) -> list[str]:
    """The flags of the mapping that holds an address, as Linux names them: "hg" where large pages were asked for."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@on_linux
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no large pages")
def test_large_pages_are_asked_for_where_they_are_filled():
    whole, rest = large_pages.own(4 * MIB + 1), large_pages.shared(MIB // 8)
    start, page = whole.data_ptr(), 2 << 20
    assert start % page == 0
    assert all("hg" in _flags_at(address) for address in (start, start + 2 * page - 1, rest.data_ptr()))
    # One float is no reason to take a page of 2 MB.
    assert "hg" not in _flags_at(start + 2 * page)


def _mapped_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") // 1024


@on_linux
def test_memory_goes_with_its_last_tensor():
    kept = large_pages.shared(1000)
    before = _mapped_kib()
    for _ in range(200):
        large_pages.own(8 * MIB).zero_()
        large_pages.shared(MIB // 4).fill_(1)
    gc.collect()
    assert _mapped_kib() - before < 64 * 1024  # of 6.5 GB
    kept.fill_(1)


@on_linux
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_and_its_parent_share_no_writes():
    mine = large_pages.shared(1000).fill_(1)
    child = os.fork()
    if child == 0:
        theirs = large_pages.shared(1000).fill_(2)
        os._exit(0 if (mine == 1).all() and (theirs == 2).all() else 1)
    after = large_pages.shared(1000).fill_(3)
    assert os.waitpid(child, 0)[1] == 0
    assert (mine == 1).all() and (after == 3).all()
