"""Plain files, JSON and names, with limits."""

import os

import pytest

from ecar_dist.storage.untrusted import (
    JsonLines,
    Record,
    UntrustedError,
    parse_json,
    parse_object,
    parse_record,
    path_inside,
    plain_name,
    read_plain_file,
    read_record,
    relative_name,
)


class Line(Record):
    step: int
    loss: float | None = None
    window: tuple[int, int] | None = None


def test_a_pipe_a_device_and_a_folder_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UntrustedError):
            read_plain_file(path, 100)
    with pytest.raises((UntrustedError, OSError)):
        read_plain_file(tmp_path, 100)


def test_a_file_beyond_the_bound_is_not_read(tmp_path):
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 40)
    with pytest.raises(UntrustedError, match="1,099,511,627,776"):
        read_plain_file(tmp_path / "large", 100)
    (tmp_path / "exact").write_bytes(b"x" * 100)
    assert read_plain_file(tmp_path / "exact", 100) == b"x" * 100


@pytest.mark.parametrize(
    "text",
    [
        b"\xff",
        b"{",
        b"NaN",
        b"[-Infinity]",
        b'{"a": 1, "a": 2}',
        b"[" * 33 + b"]" * 33,
        b"[" * 100_000,
        b'"\\ud800"',
        b"1" * 5000,
    ],
)
def test_what_is_not_strict_json_is_refused_with_a_phrase(text):
    with pytest.raises(UntrustedError) as refused:
        parse_json(text)
    assert len(str(refused.value)) < 200
    assert str(refused.value).isprintable()


def test_json_at_the_bounds_is_read():
    assert parse_json(b"[" * 32 + b"]" * 32)
    assert parse_json('{"é": ["\\ud83d\\ude00", 1e3]}'.encode()) == {"é": ["😀", 1000.0]}


def test_a_record_has_its_schema_and_nothing_else(tmp_path):
    path = tmp_path / "record.json"
    path.write_text('{"step": 3, "window": [1, 2]}')
    assert read_record(path, Line) == Line(step=3, window=(1, 2))
    for text in ('{"step": "3"}', '{"step": 3, "more": 1}', "[]", '{"step": true}', '{"step": 1, "window": [1]}'):
        path.write_text(text)
        with pytest.raises(UntrustedError):
            read_record(path, Line)


@pytest.mark.parametrize(
    "name", ["..", ".", "", "/etc/passwd", "a/../../b", "a//b", "a/", "a\nb", "a\0b", "\x1b[2J", 3, None, "x" * 1025]
)
def test_names_that_lead_elsewhere_or_cannot_be_printed_are_refused(name, tmp_path):
    for refuses in (relative_name, plain_name, lambda name: path_inside(tmp_path, name)):
        with pytest.raises(UntrustedError) as refused:
            refuses(name)
        assert str(refused.value).isprintable()


def test_names_that_people_give_are_accepted(tmp_path):
    for name in ("000000.tar", "n01440764/a b (1).JPEG", "ünïcode/😀.png", "a..b", "-x", "\udcff.png"):
        assert relative_name(name) == name
    assert path_inside(tmp_path, "a/b") == tmp_path / "a/b"


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").touch()
    (tmp_path / "inside/out").symlink_to(tmp_path / "secret")
    (tmp_path / "inside/own").symlink_to("file")
    with pytest.raises(UntrustedError):
        path_inside(tmp_path / "inside", "out")
    assert path_inside(tmp_path / "inside", "own")
    (tmp_path / "inside/loop").symlink_to("loop")
    with pytest.raises(UntrustedError):
        path_inside(tmp_path / "inside", "loop")


def test_a_foreign_document_needs_to_follow_fewer_rules():
    text = b'{"a": NaN, "a": "\\ud83d", "b": 3}'
    with pytest.raises(UntrustedError):
        parse_json(text)
    assert parse_json(text, foreign=True) == {"a": "\ud83d", "b": 3}
    for junk in (b"[" * 100_000, b"\xff", b"{"):
        with pytest.raises(UntrustedError):
            parse_json(junk, foreign=True)


def test_what_a_file_repeats_of_a_url_is_without_its_secrets():
    with pytest.raises(UntrustedError) as refused:
        parse_record(b'{"step": 1, "s3://key:SECRET@bucket/a": 1}', Line)
    assert "SECRET" not in str(refused.value)
    assert "bucket/a" in str(refused.value)


def json_lines(path, content, **options):
    """The objects of the file, and the number of damaged lines."""
    path.write_bytes(content)
    with JsonLines(path, parse_object, **options) as lines:
        return list(lines), lines.damaged


def test_damaged_lines_are_skipped_and_counted(tmp_path):
    damaged = [b"3", b"\xff", b"[" * 10**5, b'{"b"', b"\0" * 99]
    content = b"\n".join([b'{"a": 1}', *damaged, b"{}"]) + b"\n"
    assert json_lines(tmp_path / "log", content) == ([{"a": 1}, {}], len(damaged))
    assert json_lines(tmp_path / "log", b"") == ([], 0)


def test_a_torn_last_line_is_not_damage(tmp_path):
    whole = b'{"a": 1}\n{"a": 2}\n'
    for length in range(len(whole) + 1):
        found, damaged = json_lines(tmp_path / "log", whole[:length])
        assert found == [{"a": 1}, {"a": 2}][: whole[: length + 1].count(b"\n")], length
        assert damaged == 0, length
    assert json_lines(tmp_path / "log", whole[:-1] + b"*") == ([{"a": 1}], 1)  # complete, and then changed


def test_a_line_over_the_bound_is_one_damaged_line(tmp_path):
    long = b'{"a": "' + b"x" * 100 + b'"}\n'
    for bound, expected in ((len(long), 0), (len(long) - 1, 1), (len(long) // 2, 1), (9, 1)):
        found, damaged = json_lines(tmp_path / "log", b"{}\n" + long + b"{}\n", max_line_bytes=bound)
        assert (len(found), damaged) == (3 - expected, expected), bound


def test_the_tail_of_a_log_begins_with_a_whole_line(tmp_path):
    content = b"".join(b'{"a": %d}\n' % n for n in range(5))  # 9 bytes each
    for tail in range(50):
        assert json_lines(tmp_path / "log", content, tail=tail) == ([{"a": n} for n in range(5)][5 - tail // 9 :], 0)
    assert json_lines(tmp_path / "log", content, tail=9, max_bytes=10)[0] == [{"a": 4}]


def test_what_is_not_a_log_is_refused_on_opening(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"{}\n" * 10)
    for name in ("pipe", "large"):
        with pytest.raises(UntrustedError):
            JsonLines(tmp_path / name, parse_object, max_bytes=29)
    with pytest.raises(FileNotFoundError):
        JsonLines(tmp_path / "absent", parse_object)
