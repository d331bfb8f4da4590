"""What waits between two blocks: the same tensors from memory and from files, and again after a kill."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eckart.errors import CheckpointError
from eckart.storage import tensor_file
from eckart.storage.cache import Cache
from eckart.storage.shards import read_header
from eckart.storage.tensor_file import read_metadata, read_tensors, write_tensors

SOURCE = str(Path(tensor_file.__file__).parents[2])
BASE = torch.arange(24.0).reshape(4, 6)
ODD = {
    "zebra": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 5, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "no elements, no dimensions": torch.empty(0),
    "whole": torch.tensor([2**62 + 1, -1]),
    "brain": torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "half": torch.tensor([65504.0, float("inf"), float("nan"), -0.0], dtype=torch.float16),
    "byte": torch.tensor([[1], [255]], dtype=torch.uint8),
    "eight": torch.tensor([1.5, -448.0]).to(torch.float8_e4m3fn),
    "complex": torch.tensor([1 + 2j]).conj(),
    "transposed": BASE.mT,
    "rows": BASE[1:3, ::2],
    "base": BASE,
    "expanded": torch.ones(1, 3).expand(4, 3),
    "learnt": torch.nn.Parameter(torch.ones(2, 2)),
}


def bits(tensor):
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)


def same(one, other):
    assert list(one) == list(other)
    for name, tensor in one.items():
        got = other[name]
        assert (got.dtype, got.shape, got.device.type) == (tensor.dtype, tensor.shape, "cpu")
        assert torch.equal(bits(got), bits(tensor)), name
        assert got.is_contiguous()
        assert not got.requires_grad


def refused(*words):
    return pytest.raises(CheckpointError, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


@pytest.mark.parametrize("memory", [0, 2**20], ids=["file", "memory"])
@pytest.mark.parametrize("durable", [False, True])
def test_every_kind_of_tensor_comes_back_as_it_was(memory, durable, tmp_path):
    with Cache(memory, tmp_path / "deep" / "cache", durable=durable) as cache:
        cache.put("out/12/0-7", ODD)
        same(ODD, cache.get("out/12/0-7"))
        cache.put("nothing", {})
        assert cache.get("nothing") == {}
        assert cache.has("nothing")


def test_memory_and_files_give_the_same_layout(tmp_path):
    one = torch.empty_strided((1, 5), (7, 1)).fill_(2.0)
    layouts = []
    for memory in (0, 2**20):
        with Cache(memory, None) as cache:
            cache.put("a", {**ODD, "one": one})
            layouts.append([(t.stride(), t.data_ptr() % 64) for t in cache.get("a").values() if t.numel()])
    assert layouts[0] == layouts[1]


def test_files_are_safetensors_and_aligned(tmp_path):
    size = write_tensors(tmp_path / "a.safetensors", ODD, {"note": "ä\n"})
    assert read_metadata(tmp_path / "a.safetensors")["note"] == "ä\n"
    assert size == (tmp_path / "a.safetensors").stat().st_size
    assert list(read_header(tmp_path / "a.safetensors")) == list(ODD)
    loaded = load_file(tmp_path / "a.safetensors")
    mapped = read_tensors(tmp_path / "a.safetensors")
    same(ODD, mapped)
    for name in ODD:
        assert torch.equal(bits(loaded[name]), bits(ODD[name]))
        assert mapped[name].data_ptr() % 64 == 0
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()
    for bad in ({"__metadata__": BASE}, {"a": BASE.to_sparse()}, {"a": torch.ones(1, dtype=torch.complex128)}):
        with pytest.raises(TypeError, match="cannot hold"):
            write_tensors(tmp_path / "b.safetensors", bad)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("memory", [0, 2**20], ids=["file", "memory"])
def test_nothing_is_shared_with_the_caller(memory):
    mine = {"a": torch.ones(4), "view": torch.ones(100)[:4]}
    with Cache(memory, None) as cache:
        cache.put("k", mine)
        mine["a"].zero_()
        got = cache.get("k")
        assert got["a"].sum() == 4
        got["a"].zero_()
        got["extra"] = torch.ones(1)
        assert cache.get("k")["a"].sum() == 4
        assert list(cache.get("k")) == ["a", "view"]
        assert all(t.untyped_storage().nbytes() == 16 for t in cache.get("k").values())


@pytest.mark.parametrize("durable", [False, True])
def test_memory_first_then_files_and_room_that_is_used_again(durable, tmp_path):
    folder = tmp_path / "cache"
    cache = Cache(100, folder, durable=durable)
    assert not folder.exists()

    def files():
        return {path.name for path in folder.iterdir()} if folder.exists() else set()

    cache.put("a", {"x": torch.ones(15)})
    assert (cache.in_memory, bool(files())) == (60, durable)
    cache.put("b/c", {"x": torch.full((15,), 2.0)})
    assert cache.in_memory == 60
    assert files() == {"b%2Fc.safetensors"} | ({"a.safetensors"} if durable else set())
    assert cache.on_disk == sum(path.stat().st_size for path in folder.iterdir())
    assert cache.keys() == ["a", "b/c"]
    assert cache.keys("b/") == ["b/c"]
    cache.put("a", {"x": torch.full((20,), 3.0)})  # replaced: its own room counts
    assert cache.in_memory == 80
    cache.drop("a")
    assert cache.in_memory == 0
    assert not cache.has("a")
    cache.drop("a")
    with pytest.raises(KeyError, match="a"):
        cache.get("a")
    cache.put("b/c", {"x": torch.full((15,), 4.0)})  # there is room now
    assert cache.in_memory == 60
    assert bool(files()) == durable
    assert cache.get("b/c")["x"].sum() == 60
    cache.put("b/c", {"x": torch.full((50,), 5.0)})  # and now there is not
    assert cache.in_memory == 0
    assert cache.get("b/c")["x"].sum() == 250
    with pytest.raises(ValueError, match="empty"):
        cache.put("", {})
    cache.close()
    assert (cache.in_memory, cache.on_disk, cache.keys()) == (0, 0, [])
    assert files() == ({"b%2Fc.safetensors"} if durable else set())
    assert folder.exists() == durable


def test_strange_keys_are_kept_apart(tmp_path):
    keys = [".", "..", "../a", "/a", "a/b", "a%2Fb", "a.b", "a b", "ä", "a\n", "a.safetensors", "a.safetensors.tmp"]
    with Cache(0, tmp_path / "c", durable=True) as cache:
        for i, key in enumerate(keys):
            cache.put(key, {"x": torch.tensor(i)})
    with Cache(0, tmp_path / "c", durable=True) as cache:
        assert cache.keys() == sorted(keys)
        assert [int(cache.get(key)["x"]) for key in keys] == list(range(len(keys)))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_temporary_folder_goes_on_close(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RuntimeError, match="body"), Cache(0, None) as cache:  # noqa: PT012
        cache.put("a", {"x": BASE})
        assert len(list(tmp_path.iterdir())) == 1
        raise RuntimeError("body")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="folder"):
        Cache(0, None, durable=True)


def test_durable_files_are_taken_over_and_damaged_ones_are_not(tmp_path, caplog):
    with Cache(2**20, tmp_path, durable=True) as cache:
        for key in ("a/0", "a/1", "a/2", "a/3"):
            cache.put(key, {"x": BASE})
    (tmp_path / "a%2F9.safetensors.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "a%2F1.safetensors").write_bytes((tmp_path / "a%2F1.safetensors").read_bytes()[:-1])
    flipped = bytearray((tmp_path / "a%2F2.safetensors").read_bytes())
    flipped[-2] ^= 0x40  # a bit of the last number
    (tmp_path / "a%2F2.safetensors").write_bytes(flipped)
    cache = Cache(0, tmp_path, durable=True)
    assert cache.keys("a/") == ["a/0", "a/3"]
    assert ["a%2F1" in caplog.text, "a%2F2" in caplog.text, caplog.text.count("computed again")] == [True, True, 2]
    assert [cache.has(f"a/{i}") for i in range(4)] == [True, False, False, True]
    assert {path.name for path in tmp_path.iterdir()} == {"a%2F0.safetensors", "a%2F3.safetensors", "notes.txt"}
    same({"x": BASE}, cache.get("a/3"))
    with (tmp_path / "a%2F3.safetensors").open("r+b") as file:
        file.truncate(100)
    assert not cache.has("a/3")
    with refused("a%2F3.safetensors", "truncated", "same command again"):
        cache.get("a/3")
    cache.put("a/3", {"x": BASE})
    assert cache.has("a/3")
    (tmp_path / "a%2F3.safetensors").unlink()
    assert not cache.has("a/3")
    cache.drop("a/3")
    with Cache(0, tmp_path) as scratch:  # not durable: what an earlier one left is in its way
        assert scratch.keys() == []
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt"}


def test_full_disk_and_no_leave_to_write(tmp_path, monkeypatch):
    cache = Cache(100, tmp_path / "c")
    cache.put("a", {"x": torch.ones(10)})
    cache.put("b", {"x": torch.ones(99)})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file, "_pieces", full)
    with refused(str(tmp_path / "c"), "full", "396 bytes", "free", "same command again", "--output-dir"):
        cache.put("b", {"x": torch.zeros(99)})
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["b.safetensors"]
    assert cache.get("b")["x"].sum() == 99  # what was there before is still there
    assert cache.get("a")["x"].sum() == 10
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Cache(0, None) as other, refused("eckart-cache-", "full", "TMPDIR"):
        other.put("b", {"x": torch.zeros(99)})
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with refused("file", "cannot be written", "permissions"):
        Cache(0, tmp_path / "file" / "c").put("a", {"x": BASE})


MEMORY = """
import sys, torch
from pathlib import Path
from eckart.storage.cache import Cache

def resident():
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem")) // 1024

torch.set_num_threads(1)
with Cache(20 * 2**20, Path(sys.argv[1]) / "scratch") as cache:
    cache.put("warm", {"x": torch.ones(10)})
    before = resident()
    for i in range(10):
        cache.put(str(i), {"x": torch.full((5 * 2**18,), i + 0.0), "y": torch.full((5, 2**18), i + 0.5).mT})
    after = resident()
    for i in range(10):
        assert bool((cache.get(str(i))["y"] == i + 0.5).all())
    print(after - before, resident() - before, cache.in_memory // 2**20, cache.on_disk // 2**20)
"""


KILLED = """
import os, random, signal, time

folder, chance = Path(sys.argv[1]) / "durable", random.Random(3)
for trial in range(6):
    child = os.fork()
    if child == 0:
        cache, chance = Cache(2**20, folder, durable=True), random.Random(trial)
        while True:
            key, value = f"out/{chance.randrange(40)}", chance.randrange(1000)
            if chance.random() < 0.2:
                cache.drop(key)
            else:
                cache.put(key, {"a": torch.full((chance.randrange(200_000),), value), "b": torch.tensor(value)})
    time.sleep(chance.uniform(0.01, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with Cache(0, folder, durable=True) as cache:
        assert not list(folder.glob("*.tmp"))
        for key in cache.keys():
            got = cache.get(key)
            assert bool((got["a"] == got["b"]).all()), key
        print(len(cache.keys()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and forks")
def test_files_do_not_count_as_memory_and_hold_whole_sets_only_after_kills(server, tmp_path):
    measured, *kept = server.run_code(MEMORY + KILLED, tmp_path).splitlines()
    put, got, in_memory, on_disk = map(int, measured.split())
    assert in_memory <= 20
    assert in_memory + on_disk >= 100
    assert put < 80
    assert got < 80
    assert max(map(int, kept)) > 10
