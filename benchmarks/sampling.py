"""Sampling speed of ECAR against other kinds of the same preset: untrained weights, one process, alternating.

`python benchmarks/sampling.py` compares with `dit` and takes under two minutes on two cores; `--kinds` names others,
`--full` has more rounds. On a GPU it measures preset XL in bf16, compiled. A table has the sizes of the models, before
and after `ecar-dist quantize`; `--sizes` prints only this table. The last line is JSON. Decoding by the autoencoder is
not included. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rounds
from samplers import CONTENDERS, OURS, Case, Measured, config_of, largest_batches, measure, model_sizes, of_kinds

from ecar_dist.command_line import columns, counted
from ecar_dist.kinds.table import KINDS
from ecar_dist.runtime.compiler import compiler_fault

MAX = "max"
CPU_ROUNDS, CPU_LARGE, GPU_LARGE = 3, 4, 256
BASELINE = "dit, 250 steps"
TARGETS = {"batch 1": 5.0, "large batch": 10.0}  # times dit at 250 steps, preset XL, on an H200


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _fill_in(options, device)
    if options.sizes:
        rounds.publish({"preset": options.preset, "sizes": _sizes(options, device)}, options.save)
        return
    fault = compiler_fault(device) if "compiled" in options.modes else None
    modes = [mode for mode in options.modes if mode == "eager" or not fault]
    if fault:
        print(f"compiled: not measured, {fault}")
    result: dict[str, Any] = {**_about(options, device), "not_measured": fault and f"compiled: {fault}", "cases": []}
    for case in _cases(options, modes, device):
        result["cases"].append(_summary(measure(case, options.rounds), device))
        _report(result["cases"][-1])
    _report_kinds(result["cases"])
    result["sizes"] = _sizes(options, device)
    _report_targets(result["cases"], device)
    if options.plot:
        from sampling_plot import plot

        plot(result, options.plot)
    rounds.publish(result, options.save)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="20 rounds on CPU too; on a GPU, no bound on the batch")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["dit"], help="kinds to compare ECAR with")
    parser.add_argument("--preset", help="row of kinds/presets.py (default: T on CPU, XL on a GPU)")
    parser.add_argument("--latent-size", type=int, default=32, help="side of the latents, in patches of 2")
    parser.add_argument("--batches", nargs="+", help=f"images at once; `{MAX}` on a GPU: as many as fit (default: 1 4)")
    parser.add_argument("--largest-batch", type=int, help="upper bound of `max` (default: 256)")
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 2.0], help="guidance scales; 1 is none")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), help="(default: eager, on a GPU compiled)")
    parser.add_argument("--rounds", type=int, help=f"turns of each contender (default: {CPU_ROUNDS} on CPU, else 20)")
    parser.add_argument(
        "--dit-share", type=float, default=1.0, help="run this share of dit's steps and divide its time by it"
    )
    parser.add_argument("--sizes", action="store_true", help="only print sizes of the models, in fp32 and quantised")
    parser.add_argument("--plot", type=Path, help="plot the ratios to this PNG")
    parser.add_argument("--save", type=Path, help="also write the result to this JSON file")
    parser.add_argument("--hardware", help="what to call the machine (default: its cores, processor and GPU)")
    return parser.parse_args(arguments)


def _fill_in(options: argparse.Namespace, device: torch.device) -> None:
    """The defaults that depend on the device."""
    gpu = device.type == "cuda"
    options.preset = options.preset or ("XL" if gpu else "T")
    options.batches = options.batches or ["1", MAX if gpu else str(CPU_LARGE)]
    options.modes = options.modes or ["compiled" if gpu else "eager"]
    options.rounds = options.rounds or (20 if gpu or options.full else CPU_ROUNDS)
    if gpu and not options.full:
        options.largest_batch = options.largest_batch or GPU_LARGE
    if MAX in options.batches and not gpu:
        sys.exit("--batches max needs a GPU: the machine would swap long before main memory is full; give a number")


def _about(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    processor = rounds.hardware()
    if device.type == "cuda":
        processor = f"{torch.cuda.get_device_name()}, {processor}"
    return {
        "hardware": options.hardware or processor,
        "device": device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": "bf16" if device.type == "cuda" else "fp32",
        "warm_up": "every contender once with 3 steps, untimed, compilation included",
        "autoencoder": "not included",
    }


def _cases(options: argparse.Namespace, modes: Sequence[str], device: torch.device) -> list[Case]:
    cases = []
    for mode in modes:
        for batch in options.batches:
            for guidance in options.guidance:
                batches = dict.fromkeys(of_kinds(options.kinds), 0 if batch == MAX else int(batch))
                case = Case(
                    options.preset,
                    options.latent_size,
                    mode,
                    guidance,
                    batches,
                    options.dit_share,
                    batch == MAX,
                    device,
                )
                cases.append(largest_batches(case, options.largest_batch) if batch == MAX else case)
    return cases


def _summary(measured: Measured, device: torch.device) -> dict[str, Any]:
    """Medians over rounds; ratios are taken within each round, per image."""
    case = measured.case
    per_image = {
        name: [seconds / case.batches[name] for seconds in measured.seconds[name]] for name in measured.seconds
    }
    return {
        "preset": case.preset,
        "mode": case.mode,
        "guidance": case.guidance,
        "batches": case.batches,
        "largest_that_fits": case.largest,
        "tokens": measured.tokens,
        "rounds": len(per_image[OURS]),
        "seconds_per_batch": {name: statistics.median(measured.seconds[name]) for name in per_image},
        "images_per_second": {name: 1 / statistics.median(per_image[name]) for name in per_image},
        "steps": {name: CONTENDERS[name].steps for name in per_image},
        "steps_run": measured.steps_run,
        "faster": {
            name: {
                "measured": statistics.median(a / b for a, b in zip(per_image[name], per_image[OURS], strict=True)),
                "macs_predict": measured.macs[name] / measured.macs[OURS],
                "calls_predict": measured.calls[name] / measured.calls[OURS],
            }
            for name in per_image
            if name != OURS
        },
        "calls": measured.calls,
        "parameters": measured.parameters,
        "compiled": measured.compiled,
        "gmacs_per_image": {name: macs / 1e9 for name, macs in measured.macs.items()},
        "share_of_ecars_time": measured.shares,
    }


def _report(found: dict[str, Any]) -> None:
    guidance = "no guidance" if found["guidance"] == 1.0 else f"guidance {found['guidance']:g}"
    number = counted(found["rounds"], "round")
    print(f"\npreset {found['preset']}, {found['mode']}, {guidance}, {found['tokens']} tokens, {number}")
    print(f"{'':16} {'batch':>6} {'calls':>6} {'s a batch':>10} {'images/s':>10}   ECAR is faster by (MACs, calls say)")
    for name in found["batches"]:
        line = (
            f"{name:16} {found['batches'][name]:6d} {found['calls'][name]:6d} {found['seconds_per_batch'][name]:10.4f} "
            f"{found['images_per_second'][name]:10.4g}"
        )
        if name != OURS:
            ratio = found["faster"][name]
            line += f"   {ratio['measured']:6.2f} ({ratio['macs_predict']:.2f}, {ratio['calls_predict']:.2f})"
        if found["steps_run"][name] != found["steps"][name]:
            line += f"  from {found['steps_run'][name]} of {found['steps'][name]} steps"
        if found["mode"] == "compiled" and not found["compiled"][name]:
            line += "  eager"
        print(line)
    print("ECAR's time: " + ", ".join(f"{part} {share:.1%}" for part, share in found["share_of_ecars_time"].items()))


def _report_kinds(cases: Sequence[dict[str, Any]]) -> None:
    """Print the cost of all contenders, one row each: latency from the first case at batch 1, throughput from the last
    case. Both have the mode and guidance of the last case."""
    last = cases[-1]
    alike = [one for one in cases if (one["mode"], one["guidance"]) == (last["mode"], last["guidance"])]
    single = next((one for one in alike if set(one["batches"].values()) == {1}), None)
    print(f"\nall contenders, preset {last['preset']}, {last['mode']}, guidance {last['guidance']:g}")
    heads = ["", "M parameters", "serial calls", "GMAC an image", "s at batch 1", "images/s", "at batch"]
    rows = [
        [
            name,
            f"{last['parameters'][name] / 1e6:.2f}",
            str(last["calls"][name]),
            f"{last['gmacs_per_image'][name]:.3g}",
            f"{single['seconds_per_batch'][name]:.4f}" if single else "",
            f"{last['images_per_second'][name]:.4g}",
            str(last["batches"][name]),
        ]
        for name in last["batches"]
    ]
    print("\n".join(columns([heads, *rows])))


def _sizes(options: argparse.Namespace, device: torch.device) -> dict[str, dict[str, dict[str, float]]]:
    """Print and return the size of each model in memory and on disk, before and after `ecar-dist quantize`."""
    alone = dict.fromkeys(of_kinds(options.kinds), 1)
    case = Case(options.preset, options.latent_size, "eager", 1.0, alone, 1.0, False, device)
    found = {name: model_sizes(config_of(CONTENDERS[name], case)) for name in alone}
    forms = [(place, form) for place, sizes in found[OURS].items() for form in sizes]
    rows = [[name, *(f"{sizes[place][form]:.2f}" for place, form in forms)] for name, sizes in found.items()]
    print(f"\nsizes, preset {options.preset}")
    print("\n".join(columns([["", *(f"{place}, {form}" for place, form in forms)], *rows])))
    return found


def _report_targets(cases: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Print whether targets are met; on CPU, where they do not apply, only the ratio. They have one baseline."""
    print()
    for found in cases:
        if BASELINE not in found["faster"]:
            continue
        what = "batch 1" if set(found["batches"].values()) == {1} else "large batch"
        ratio, wanted = found["faster"][BASELINE]["measured"], TARGETS[what]
        verdict = ("met   " if ratio >= wanted else "MISSED") if device.type == "cuda" else "found "
        meant = "" if device.type == "cuda" else " of XL on an H200"
        batch = f"batch {found['batches'][BASELINE]}" + (
            ", the largest that fits" if found["largest_that_fits"] else ""
        )
        print(
            f"{verdict}  speed over {BASELINE}, {batch}, guidance {found['guidance']:g}, {found['mode']}: "
            f"{ratio:.2f}; target{meant} >= {wanted:g}"
        )


if __name__ == "__main__":
    main()
