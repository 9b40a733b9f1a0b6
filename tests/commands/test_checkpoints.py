"""`ecar-dist checkpoint`."""

import pytest

from ecar_dist.cli import main


@pytest.mark.parametrize("verb", ["list", "verify", "inspect"])
def test_a_folder_without_a_run_is_an_error(tmp_path, capsys, verb):
    assert main(["checkpoint", verb, str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("ecar-dist: ")
