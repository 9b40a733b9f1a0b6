"""The streamed safetensors file can be read by the library, and equals what the library would have written."""

import gc
import weakref

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ecar_dist.runtime.checkpoint import tensor_file
from ecar_dist.runtime.checkpoint.tensor_file import _NAMES, TensorEntry, read_index, write_tensor_file

TENSORS = st.tuples(
    st.sampled_from(list(_NAMES)), st.lists(st.integers(0, 4), max_size=3), st.text("ab.é", min_size=1, max_size=8)
)


def entries_of(tensors):
    return [TensorEntry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(TENSORS, max_size=6, unique_by=lambda item: item[2]))
def test_the_library_reads_it_back(tmp_path_factory, items):
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for dtype, shape, name in items}
    written = write_tensor_file(path, entries_of(tensors))
    back = load_file(path)
    assert {name: bits(t) for name, t in back.items()} == {name: bits(t) for name, t in tensors.items()}
    content = path.read_bytes()
    found = (path.name, len(content), xxhash.xxh3_128_hexdigest(content))
    assert (written.name, written.bytes, written.xxh3_128) == found
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_the_file_equals_that_of_the_library(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "z": torch.randn(2).bfloat16()}
    write_tensor_file(tmp_path / "ours", entries_of(tensors), {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_metadata_and_strided_tensors(tmp_path):
    value = torch.arange(24.0).view(4, 6).t()
    write_tensor_file(tmp_path / "x", entries_of({"t": value, "p": torch.nn.Parameter(value)}), {"step": "7"})
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"step": "7"}
        assert file.get_tensor("t").equal(value)


def test_one_tensor_is_alive_at_a_time(tmp_path):
    made, alive = [], []

    def make():
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
        memory = np.zeros(1000, np.float32)
        made.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    write_tensor_file(tmp_path / "x", [TensorEntry(f"t{i}", torch.float32, (1000,), make) for i in range(5)])
    assert alive == [0] * 5


def test_a_tensor_of_another_shape_than_its_entry_is_an_error(tmp_path):
    entry = TensorEntry("t", torch.float32, (3,), lambda: torch.zeros(4))
    with pytest.raises(ValueError, match=r"^t .*\(3,\).*\(4,\)"):
        write_tensor_file(tmp_path / "x", [entry])


@pytest.mark.parametrize("elements", [1, 10_000_000])
def test_halfway_comes_once_when_about_half_is_written(tmp_path, elements):
    called = []
    entries = entries_of({"t": torch.zeros(elements)})
    written = write_tensor_file(tmp_path / "x", entries, halfway=lambda: called.append((tmp_path / "x").stat().st_size))
    assert len(called) == 1
    if elements > 1:
        assert 0.4 < called[0] / written.bytes < 0.6


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 700), max_size=5), st.integers(1, 300), st.integers(256, 600))
def test_parts_have_hashes_wherever_blocks_end(tmp_path_factory, sizes, block, part):
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    tensors = {f"kind:{number}:0": torch.randn(size) for number, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "_BLOCK", block)
        written = write_tensor_file(path, entries_of(tensors), part_bytes=part)
    content = path.read_bytes()
    assert set(load_file(path)) == {*tensors, "parts"}
    assert written.xxh3_128 == xxhash.xxh3_128_hexdigest(content)
    limit, proof = len(content), written.parts["xxh3_128"]
    index = read_index(lambda start, stop: content[start:stop], len(content), limit, part, proof)
    assert {name: bits(load_file(path)[name]) for name in index.tensors} == {k: bits(t) for k, t in tensors.items()}
    for name, (start, stop) in index.tensors.items():
        assert content[start:stop] == tensors[name].numpy().tobytes()
    values = content[index.table.start : index.table.stop]
    expected = [xxhash.xxh3_128_digest(values[start : start + part]) for start in range(0, len(values), part)]
    assert index.table.digests == b"".join(expected)
    assert len(values) == 4 * sum(sizes)
