import dataclasses
import io

import numpy as np
import pytest
import xxhash

from ecar_dist.data.images.table import ImageRow, decode_table, encode_table, key_of, write_table
from ecar_dist.data.shards.entries import ImageEntry
from ecar_dist.errors import DataError

ROWS = [ImageRow("a/é", 3, 512, 700, 2**64 - 1), ImageRow("k" * 20, 0, 5 << 33, 256 << 20, 0)]


def entry_of(data, count=2, size=1 << 40):
    digest = xxhash.xxh3_128_hexdigest(data)
    return ImageEntry("0.tar", size, count, 0, "", "", "0.npy", digest, "tar")


def test_round_trip(tmp_path):
    digest = write_table(tmp_path / "0.npy", ROWS)
    data = (tmp_path / "0.npy").read_bytes()
    assert digest == entry_of(data).table_xxh3_128
    table = decode_table(data, entry_of(data), 4, "0.npy")
    assert [ImageRow(key_of(row), *row.tolist()[1:]) for row in table] == ROWS
    assert table.dtype.itemsize == 24 + 20
    assert np.array_equal(np.load(tmp_path / "0.npy", allow_pickle=False), table)


def test_names_that_are_not_utf8_survive():
    name = b"n01\xff.jpg".decode("utf-8", "surrogateescape")
    data = encode_table([ImageRow(name, 0, 0, 1, 0)])
    assert key_of(decode_table(data, entry_of(data, 1), 1, "t")[0]) == name


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROWS[0]._replace(label=4), r"label.* 0\.\.3\b"),
        (ROWS[0]._replace(label=-1), "label"),
        (ROWS[0]._replace(offset=-1), "offset"),
        (ROWS[0]._replace(offset=(1 << 40) - 699), "offset.* 1099511627776 "),
        (ROWS[0]._replace(size=(256 << 20) + 1), "size.* 268435456 "),
    ],
)
def test_rows_that_cannot_be_true(row, message):
    data = encode_table([ROWS[1], row])
    with pytest.raises(DataError, match=message):
        decode_table(data, entry_of(data), 4, "0.npy")


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.zeros(2)), "dtype float64"),
        (npy(np.array([{}, {}], dtype=object)), "0.npy"),  # a pickle: never loaded
        (b"", "0.npy"),
        (encode_table(ROWS[:1]), r"\(1,\).* 2 images"),
    ],
)
def test_files_that_are_not_a_table(data, message):
    with pytest.raises(DataError, match=message) as caught:
        decode_table(data, entry_of(data), 4, "0.npy")
    assert "\n" not in str(caught.value)


def test_another_table_is_noticed():
    data = encode_table(ROWS)
    with pytest.raises(DataError, match=r"0\.npy has xxh3_128"):
        decode_table(encode_table(ROWS[::-1]), entry_of(data), 4, "0.npy")
    with pytest.raises(DataError, match="offset"):
        decode_table(data, dataclasses.replace(entry_of(data), bytes=100), 4, "0.npy")
