"""The contenders of `sampling.py`: the product's own sampler on untrained models, and how their turns are timed."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ecar_dist.compress.report import memory_bytes
from ecar_dist.compress.write import tensor_entries
from ecar_dist.config.read import config_from_dict
from ecar_dist.config.run import RunConfig
from ecar_dist.kinds.table import KINDS, kind_of
from ecar_dist.quantize.layers import quantizable, shaped_like
from ecar_dist.runtime.checkpoint.tensor_file import file_bytes
from ecar_dist.sample.fast import prepare
from ecar_dist.sample.generate import generate
from ecar_dist.sample.sampling_plan import SamplingPlan

CHANNELS, PATCH, CLASSES = 4, 2, 1000
WARM_UP_STEPS = 3  # a CUDA graph is recorded by the second call and replayed from the third on
SHARE_RUNS = 3


@dataclass(frozen=True)
class Contender:
    """One row: a kind, and where it differs from the defaults of config/knobs_model.py.

    steps: of the solver, in each stage or each time that a head is integrated; a kind without a solver ignores them.
    sections: of the config, such as {"par": {"group": 4}}.
    """

    kind: str
    num_stages: int = 1
    solver: str = "midpoint"
    steps: int = 8
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


# Every kind has a row. The others are compared with the first one.
CONTENDERS = {
    "ECAR": Contender("ecar", 3),
    "dit, 250 steps": Contender("dit", solver="euler", steps=250),
    "dit, 50 steps": Contender("dit", solver="euler", steps=50),
    "pyramid": Contender("pyramid", 3),
    "mar": Contender("mar"),
    "par, n = 1": Contender("par", sections={"par": {"group": 1}}),
    "par, n = 4": Contender("par", sections={"par": {"group": 4}}),
    "par_cont, n = 4": Contender("par_cont", sections={"par": {"group": 4}}),
    "hybrid": Contender("hybrid"),
}
OURS = next(iter(CONTENDERS))


def of_kinds(kinds: Collection[str]) -> list[str]:
    """Names of the rows of these kinds; the first row is always among them."""
    return [name for name, contender in CONTENDERS.items() if name == OURS or contender.kind in kinds]


@dataclass(frozen=True)
class Case:
    """What is measured; `batches` maps each contender to the number of images that it draws at once."""

    preset: str
    latent_size: int
    mode: str
    guidance: float
    batches: dict[str, int]
    dit_share: float
    largest: bool
    device: torch.device


@dataclass(frozen=True)
class Measured:
    """Seconds per batch in each round, with what arithmetic and calls predict; the rest describes the case."""

    case: Case
    seconds: dict[str, list[float]]
    steps_run: dict[str, int]
    macs: dict[str, int]
    calls: dict[str, int]
    parameters: dict[str, int]
    compiled: dict[str, bool]
    tokens: str
    shares: dict[str, float]


def measure(case: Case, rounds: int) -> Measured:
    """`rounds` turns of each contender, in an order that rotates every round. Halves batches that do not fit."""
    try:
        return _measure(case, rounds)
    except torch.OutOfMemoryError:
        if min(case.batches.values()) == 1:
            raise
    torch.cuda.empty_cache()
    halves = {name: max(1, batch // 2) for name, batch in case.batches.items()}
    return measure(dataclasses.replace(case, batches=halves), rounds)


def _measure(case: Case, rounds: int) -> Measured:
    torch.compiler.reset()  # the code of other cases, and on a GPU the memory of their graphs
    turns = _turns(case)
    for turn in turns.values():
        turn.run(WARM_UP_STEPS)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            turn = turns[name]
            seconds[name].append(turn.run(turn.steps_run) * turn.contender.steps / turn.steps_run)
    return Measured(
        case,
        seconds,
        steps_run={name: turn.steps_run for name, turn in turns.items()},
        macs={name: kind_of(turn.config).sampling_macs(turn.config) for name, turn in turns.items()},
        calls={name: kind_of(turn.config).serial_calls(turn.config) for name, turn in turns.items()},
        parameters={name: kind_of(turn.config).parameters(turn.config).total for name, turn in turns.items()},
        compiled={name: turn.compiles for name, turn in turns.items()},
        tokens="/".join(map(str, turns[OURS].config.stage_tokens)),
        shares=turns[OURS].shares(),
    )


def model_sizes(config: RunConfig) -> dict[str, dict[str, float]]:
    """MiB in memory and on disk, in fp32 and with 8-bit and 4-bit weights, as `ecar-dist quantize` makes them.

    Computed from the shapes alone, so nothing is allocated.
    """
    found: dict[str, dict[str, float]] = {"memory MiB": {}, "file MiB": {}}
    for name, bits in {"fp32": None, "W8A8": 8, "W4A8": 4}.items():
        with torch.device("meta"):
            model = kind_of(config).build_model(config)
            if bits is not None:
                shaped_like(model, dict.fromkeys(quantizable(model), (bits, True)))
        found["memory MiB"][name] = memory_bytes(model) / 2**20
        found["file MiB"][name] = file_bytes(tensor_entries(model, torch.float32), {"format": "pt"}) / 2**20
    return found


class Turn:
    """One contender with its model, ready to draw one batch after another."""

    def __init__(self, contender: Contender, case: Case, batch: int, model: Any = None) -> None:
        self.contender, self._device = contender, case.device
        self.config = config_of(contender, case)
        self._plan = SamplingPlan.from_config(self.config, case.device)
        share = case.dit_share if contender.kind == "dit" else 1.0
        self.steps_run = max(1, round(contender.steps * share))
        self.compiles = case.mode == "compiled" and KINDS[contender.kind].compilable
        self.model = model or self._made()
        self._indices = torch.arange(batch, device=case.device)

    def run(self, steps: int, model: Any = None) -> float:
        """Seconds until a batch is drawn, with `steps` steps per stage."""
        each = (min(steps, self.contender.steps),) * self.contender.num_stages
        plan = dataclasses.replace(self._plan, steps_per_stage=each)
        self._wait()
        began = time.perf_counter()
        generate(model or self.model, plan, self._indices % CLASSES, self._indices, seed=0)
        self._wait()
        return time.perf_counter() - began

    def shares(self) -> dict[str, float]:
        """Time shares of the AR transformer and the velocity, from separate runs that synchronise after each part."""
        found: dict[str, list[float]] = {"AR": [], "velocity": []}
        for _ in range(SHARE_RUNS):
            clocked = _Clocked(self.model, self._wait)
            seconds = self.run(self.contender.steps, clocked)
            found["AR"].append(clocked.seconds["begin_stage"] / seconds)
            found["velocity"].append(clocked.seconds["velocity"] / seconds)
        medians = {part: statistics.median(values) for part, values in found.items()}
        return {**medians, "noise, guidance and solver": 1.0 - sum(medians.values())}

    def _made(self) -> Any:
        untrained = _untrained(self.config).to(self._device)
        return prepare(untrained, self._plan, self._device, compiles=self.compiles)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Clocked:
    """A model whose two parts are timed, in seconds."""

    def __init__(self, model: Any, wait: Callable[[], None]) -> None:
        self.start_cache, self._wait = model.start_cache, wait
        self.modulations = model.modulations  # for all calls of a stage at once: in neither part's share
        self.seconds = {"begin_stage": 0.0, "velocity": 0.0}
        for name in self.seconds:
            setattr(self, name, self._clock(name, getattr(model, name)))

    def _clock(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*arguments: Any, **more: Any) -> Any:
            self._wait()
            began = time.perf_counter()
            returned = function(*arguments, **more)
            self._wait()
            self.seconds[name] += time.perf_counter() - began
            return returned

        return clocked


def largest_batches(case: Case, bound: int | None) -> Case:
    """The case with the largest batch that fits for each contender, found by doubling one that draws eagerly."""
    eager = dataclasses.replace(case, mode="eager")
    found: dict[str, int] = {}
    for name in case.batches:
        contender = CONTENDERS[name]
        model = Turn(contender, eager, 1).model

        def fits(batch: int, contender: Contender = contender, model: Any = model) -> bool:
            try:
                Turn(contender, eager, batch, model).run(1)
            except torch.OutOfMemoryError:
                return False
            finally:
                torch.cuda.empty_cache()
            return True

        found[name] = doubled_while(fits, bound)
        del model, fits
    return dataclasses.replace(case, batches=found, largest=bound is None or max(found.values()) < bound)


def doubled_while(fits: Callable[[int], bool], bound: int | None) -> int:
    """The largest power of two up to `bound` that fits; 1 is assumed to fit."""
    batch = 1
    while (bound is None or 2 * batch <= bound) and fits(2 * batch):
        batch *= 2
    return batch


def _turns(case: Case) -> dict[str, Turn]:
    """The contenders of a case; those with the same kind and sections share a model. All have the same preset."""
    turns: dict[str, Turn] = {}
    models: dict[tuple[str, str], Any] = {}
    for name, batch in case.batches.items():
        contender = CONTENDERS[name]
        key = (contender.kind, str(contender.sections))
        turns[name] = Turn(contender, case, batch, models.get(key))
        models[key] = turns[name].model
    return turns


def config_of(contender: Contender, case: Case) -> RunConfig:
    """The config of a contender's untrained model."""
    sample = {"solver": contender.solver, "steps_per_stage": contender.steps, "guidance_scale": case.guidance}
    return config_from_dict(
        {
            "run": {"name": "benchmark"},
            "model": {"kind": contender.kind, "preset": case.preset, "patch_size": PATCH},
            "flow": {"num_stages": contender.num_stages},
            "vae": {"kind": "dct", "downsample": 8},
            "data": {
                "latents": "none",
                "num_classes": CLASSES,
                "latent_channels": CHANNELS,
                "latent_size": case.latent_size,
            },
            "train": {"total_samples": 1},
            "sample": sample,
            **contender.sections,
        }
    )


def _untrained(config: RunConfig) -> nn.Module:
    """An untrained model without zero weights, as after training: a GPU is faster at multiplying zeros."""
    torch.manual_seed(0)
    model = kind_of(config).build_model(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval()
