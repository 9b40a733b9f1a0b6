"""Metrics that go to Weights & Biases and MLflow as well: with the real packages where they are installed."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from ecar_dist.errors import ConfigError
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.runtime.run.metrics import MetricsWriter
from ecar_dist.runtime.run.trackers import EXPERIMENT, check_trackers, open_trackers
from tests.runtime.made_runs import make_run

PICTURE = np.zeros((4, 4, 3), np.uint8)


@pytest.fixture
def open_run(tmp_path):
    """A run that logs to a tracker: its config, and its directory with the record of one attempt."""

    def open_run(**log):
        run, config = make_run(tmp_path, log=log)
        (run / "lineage.json").write_text(json.dumps([{"attempt": "0123abcd", "run": "4567cdef"}]))
        (run / "samples").mkdir()
        return config, RunDirectory(run)

    return open_run


class FakeWandb(ModuleType):
    """Records what it receives; `broken` makes its `log` fail."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.broken = [], [], False

    def init(self, **settings):
        self.begun.append(settings)
        return SimpleNamespace(
            define_metric=lambda *a, **b: None, log=self.log, finish=lambda: self.logged.append("end")
        )

    def log(self, values):
        if self.broken:
            raise ConnectionError("https://user:hunter2@wandb is down")
        self.logged.append(values)

    def Image(self, picture):
        return picture.shape


@pytest.fixture
def fake(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_tracker_gets_what_tensorboard_gets(fake, open_run):
    config, directory = open_run(wandb="my-project")
    writer = MetricsWriter(directory, 0, False, open_trackers(config, directory))
    writer.log(3, 48, {"train/loss": 0.5})
    writer.image("samples/stages", PICTURE, 3)
    writer.close()
    (begun,) = fake.begun
    assert (begun["project"], begun["id"], begun["name"], begun["resume"]) == (
        "my-project",
        "4567cdef",
        "tiny",
        "allow",
    )
    assert "hunter2" not in json.dumps(begun["config"])  # the URL of the latents has a password
    assert fake.logged == [
        {"train/loss": 0.5, "train/samples_seen": 48.0, "step": 3},
        {"samples/stages": (4, 4, 3), "step": 3},
        "end",
    ]


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(fake, open_run, capsys):
    config, directory = open_run(wandb="my-project")
    writer = MetricsWriter(directory, 0, False, open_trackers(config, directory))
    fake.broken = True
    writer.log(1, 16, {"train/loss": 0.5})
    fake.broken = False
    writer.log(2, 32, {"train/loss": 0.25})
    writer.close()
    assert fake.logged == []
    assert len((directory.path / "metrics.jsonl").read_text().splitlines()) == 2
    said = capsys.readouterr().err
    assert said.count("log.wandb") == 1
    assert "hunter2" not in said


def test_a_tracker_that_cannot_be_opened_is_an_error(fake, open_run, monkeypatch):
    def refuse(**settings):
        raise PermissionError("no login")

    monkeypatch.setattr(fake, "init", refuse)
    with pytest.raises(ConfigError) as raised:
        open_trackers(*open_run(wandb="my-project"))
    assert "no login" in str(raised.value)
    assert "log.wandb=null" in str(raised.value)


@pytest.mark.parametrize("knob", ["wandb", "mlflow"])
def test_a_missing_package_names_its_extra(knob, open_run, monkeypatch):
    config, _ = open_run(**{knob: "somewhere"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as raised:
        check_trackers(config.log)
    assert f"ecar-dist[{knob}]" in str(raised.value)
    check_trackers(open_run_without(config))


def open_run_without(config):
    return config.log.model_copy(update={"wandb": None, "mlflow": None})


def test_the_real_wandb_offline(open_run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config, directory = open_run(wandb="my-project")
    for start in (0, 1):  # a run and its resumption
        writer = MetricsWriter(directory, start, False, open_trackers(config, directory))
        writer.log(start + 1, 16, {"train/loss": 0.5, "odd": float("nan")})
        writer.image("samples/stages", PICTURE, start + 1)
        writer.close()
    assert len(list((directory.path / "wandb").glob("offline-run-*-4567cdef/*.wandb"))) in (1, 2)  # one a second


def test_the_real_mlflow_in_a_folder(open_run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    config, directory = open_run(mlflow=uri)
    for start in (0, 1):
        writer = MetricsWriter(directory, start, False, open_trackers(config, directory))
        writer.log(start + 1, 16 * (start + 1), {"train/loss": 0.5 / (start + 1), "odd": float("nan")})
        writer.image("samples/stages", PICTURE, start + 1)
        writer.close()

    # One run with both steps.
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.25)]
    assert "odd" not in run.data.metrics
    assert "hunter2" not in "".join(path.read_text() for path in (tmp_path / "mlruns").rglob("config.yaml"))
