"""The sections of gpu.sh. Each is a generator of rows: `what` was measured, what was `found` in words, and the numbers.

`python gpu_sections.py SECTION --rows FILE` appends a row to the file as soon as it is known. If a
measurement fails, its row reports it, and the section continues.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rounds
from gpu_run import (
    BENCHMARKS,
    SIZES,
    Row,
    Run,
    attainable_flops,
    attempted,
    data_sheet_flops,
    first_line,
    run_command,
    seconds_each,
)
from gpu_training import profile, training
from synthetic_run import run_tree, write_latents

from ecar_dist.runtime.signals import die_with_parent

ROOT = BENCHMARKS.parent
PACKAGES = ("torch", "triton", "deepspeed", "numpy", "pydantic")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=tuple(SECTIONS))
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --device cpu --preset T is a dry run")
    die_with_parent()
    run = Run(torch.device(options.device), options.preset, options.work, SIZES[options.device])
    with open(options.rows, "a") as file:
        for row in SECTIONS[options.section](run):
            file.write(json.dumps(row) + "\n")
            file.flush()


# ---- the machine


def about(run: Run) -> Iterator[Row]:
    """Versions, the device, and the rates it reaches."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    yield {"what": "versions", "found": ", ".join(f"{name} {version}" for name, version in versions.items())}
    name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, " if run.on_gpu else ""
    yield {"what": "machine", "found": name + rounds.hardware()}
    yield attempted("matrix product, bf16", lambda: _matrix_row(run))
    yield attempted("copy on the device", lambda: _copy_row(run))


def _matrix_row(run: Run) -> Row:
    rate = attainable_flops(run)
    sheet = data_sheet_flops(run)
    of_sheet = f", {rate / sheet:.1%} of the data sheet's {sheet / 1e12:.0f}" if sheet else ""
    return {"found": f"{rate / 1e12:.4g} TFLOP/s{of_sheet}", "flops": rate, "data_sheet_flops": sheet}


def _copy_row(run: Run) -> Row:
    source = torch.rand(2**30 if run.on_gpu else 2**20, device=run.device)
    target = torch.empty_like(source)
    seconds = seconds_each(run, lambda: target.copy_(source))
    rate = 2 * source.nbytes / seconds
    return {"found": f"{rate / 1e9:.4g} GB/s, read and written", "bytes_per_second": rate}


# ---- equality


def tests(run: Run) -> Iterator[Row]:
    """The tests that compare this device with the CPU."""
    report = run.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", str(report)]
    environment = {**os.environ, "ECAR_TEST_DEVICE": run.device.type}
    done = subprocess.run(
        [*command, "tests/test_device.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if not report.exists():
        raise RuntimeError(" | ".join((done.stdout + done.stderr).strip().splitlines()[-3:]))

    # Each test that failed, then the number that passed.
    cases = xml.etree.ElementTree.parse(report).getroot().findall(".//testcase")
    passed = 0
    for case in cases:
        faults = [*case.findall("failure"), *case.findall("error")]
        if faults:
            yield {"what": case.get("name"), "found": f"FAILED: {first_line(faults[0].get('message') or '')}"}
        passed += not faults and case.find("skipped") is None
    yield {"what": "on this device", "found": f"{passed} of {len(cases)} tests passed", "passed": passed}


# ---- the framework tax


def step(run: Run) -> Iterator[Row]:
    """`step.py`: the time over a bare step, kernels, bytes and host reads."""
    size = run.size
    saved = run.work / "step.json"
    options = ["--preset", run.preset, "--latent-size", str(size.latent_size), "--steps", str(size.steps)]
    options += ["--micro-batch", str(size.micro_batches[0]), "--zero-stage", "0", "2", "--json", str(saved)]
    options += ["--compile"] if "compiled" in run.modes else []
    run_command("step.py", [str(BENCHMARKS / "step.py"), *options])
    for case in json.loads(saved.read_text())["cases"]:
        yield from _step_rows(case)


def _step_rows(case: Row) -> Iterator[Row]:
    what = f"{case['preset']}, ZeRO {case['zero_stage']}"
    for mode in (mode for mode in ("eager", "compiled") if mode in case):
        found = case[mode]
        text = f"{found['tax']['median']:.3f} x a bare step of {found['bare_seconds'] * 1e3:.1f} ms; target <= 1.05"
        yield {"what": f"{what}, {mode}", "found": text, **found}
    if "eager_over_compiled" in case:
        yield {
            "what": f"{what}, eager over compiled",
            "found": f"{case['eager_over_compiled']['median']:.3f} x the time",
        }
    for who, count in case["counts"].items():
        text = f"{count['kernels']} kernels, {count['gigabytes']:.4g} GB, {count['host_reads']} host reads, "
        text += f"{count['synchronisations']} synchronisations"
        if count["waits_seen_by_cuda"] is not None:
            text += f", {count['waits_seen_by_cuda']} waits seen by CUDA"
        yield {"what": f"{what}, {who}, a step", "found": text, **count}


# ---- resume


def resume(run: Run) -> Iterator[Row]:
    """Steps after a resume against those of an uninterrupted run, next to a second such run."""
    # Two runs of eight steps, and a third that stops after four and continues.
    size = run.size
    write_latents(run.work / "latents", size.latent_size)
    losses = {}
    for name, stops in (("once", (8,)), ("again", (8,)), ("resumed", (4, 8))):
        tree = run_tree(run.work, name, size.resume_preset, size.latent_size, size.resume_batch)
        tree |= {"log": {"every_steps": 1, "tensorboard": False}, "optim": {"learning_rate": 1e-3}}
        for steps in stops:
            tree["train"] = {"total_samples": steps * size.resume_batch, "compile": False}
            path = run.work / f"{name}.yaml"
            path.write_text(yaml.safe_dump(tree))
            run_command("ecar-dist train", ["-m", "ecar_dist", "train", str(path)])
        lines = (run.work / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["train/loss"] for line in lines]

    # The first step after the resume depends only on the restored state; the later ones also on how the device adds.
    first = losses["resumed"][4] == losses["once"][4]
    differences = {
        name: max(abs(a - b) / b for a, b in zip(losses[name][4:], losses["once"][4:], strict=True))
        for name in ("resumed", "again")
    }
    yield {
        "what": f"{size.resume_preset}, stopped after 4 of 8 steps",
        "found": f"{'met   ' if first else 'MISSED'} first loss after the resume bit-identical; steps 5 to 8 within "
        f"{differences['resumed']:.2g}, a second run within {differences['again']:.2g}",
        "losses": losses,
    }


# ---- sampling


def sampling(run: Run) -> Iterator[Row]:
    """ECAR against DiT, eager."""
    yield from _sampling(run, "eager")


def sampling_compiled(run: Run) -> Iterator[Row]:
    """The same, compiled."""
    yield from _sampling(run, "compiled")


def _sampling(run: Run, mode: str) -> Iterator[Row]:
    """`sampling.py` at batch 1, then at a large one."""
    for batch in (1, run.size.large_batch):
        yield from _sampling_rows(run, mode, batch)


def _sampling_rows(run: Run, mode: str, batch: int) -> Iterator[Row]:
    saved = run.work / f"{mode}-{batch}.json"
    options = ["--preset", run.preset, "--modes", mode, "--batches", str(batch), "--guidance", "2"]
    run_command("sampling.py", [str(BENCHMARKS / "sampling.py"), *options, *run.size.sampling, "--save", str(saved)])
    for case in json.loads(saved.read_text())["cases"]:
        rates = case["images_per_second"]
        ratio = case["faster"]["dit, 250 steps"]
        text = f"{ratio['measured']:.2f} x as fast as DiT with 250 steps (MACs predict {ratio['macs_predict']:.2f}, "
        text += f"calls {ratio['calls_predict']:.2f}): {rates['ECAR']:.4g} and {rates['dit, 250 steps']:.4g} images/s"
        yield {"what": f"{run.preset}, {mode}, batch {batch}, guidance 2", "found": text, **case}


SECTIONS: dict[str, Callable[[Run], Iterator[Row]]] = {
    "about": about,
    "tests": tests,
    "training": training,
    "step": step,
    "profile": profile,
    "resume": resume,
    "sampling": sampling,
    "sampling-compiled": sampling_compiled,
}


if __name__ == "__main__":
    main()
