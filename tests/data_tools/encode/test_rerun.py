"""Commands that are run again when all is done change nothing, report that, and end with status 0."""

from data_tools.cli import main as ecar_data


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_finished_set_is_left_as_it_is(tmp_path, capsys):
    assert ecar_data(["shard", "digits", str(tmp_path / "images")]) == 0
    encode = ["encode", str(tmp_path / "images"), str(tmp_path / "latents"), "--vae", "dct-f8", "--image-size", "32"]
    assert ecar_data(encode) == 0
    before = stamps(tmp_path / "latents")
    capsys.readouterr()
    assert ecar_data(encode) == 0
    assert "0 shards by this run" in capsys.readouterr().out
    assert ecar_data(["finalize", str(tmp_path / "latents")]) == 0
    assert {path: stamp for path, stamp in stamps(tmp_path / "latents").items() if path in before} == before
