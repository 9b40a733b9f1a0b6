import io
import sys

import pytest

from data_tools.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(stream, monkeypatch, updates=3):
    monkeypatch.setattr(sys, "stderr", stream)
    for label in ("first", "second"):
        with progress(updates * 4, "image", label) as bar:
            for _ in range(updates):
                bar.update(4)
    return stream.getvalue()


def test_a_log_gets_whole_lines(monkeypatch):
    text = run(io.StringIO(), monkeypatch)
    assert "\r" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert len(lines) == 4  # begin and end of each
    assert lines[0].startswith("first: 0 of 12 images")
    assert lines[3].startswith("second: 12 of 12 images")
    assert text.endswith("\n")


def test_earlier_work_does_not_count_for_the_rate(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(1500, "step", "train-vae", initial=121) as bar:
        assert (bar.n, bar.format_dict["initial"]) == (121, 121)
    assert stream.getvalue().startswith("train-vae: 121 of 1500 steps")


def test_a_log_of_a_long_run_gets_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr("data_tools.progress._LOG_SECONDS", 0.0)
    assert len(run(io.StringIO(), monkeypatch).splitlines()) > 4


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_bytes_are_counted_in_large_units(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    with progress(3_000_000_000, "B", "push") as bar:
        bar.update(1_500_000_000)
    text = sys.stderr.getvalue()
    assert ("1.50GB of 3.00GB, " if stream is io.StringIO else "1.50G/3.00G") in text


def test_a_terminal_gets_a_bar(monkeypatch):
    text = run(Terminal(), monkeypatch)
    assert "\r" in text
    assert "12/12" in text
