"""What an outer step costs on many workers: measured here, predicted for clusters. SCALING.md tells the results.

python infra/scaling measure --data data/glyphs    # one more round of measurements.json, about four minutes
python infra/scaling fit                           # the model's parameters, and the model against the measurements
python infra/scaling simulate                      # the closed form against a simulation of every message
python infra/scaling predict                       # 8 to 1024 GPUs, by assumptions: tables and prediction.png
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from cost_model import Cost, cost, first_read_seconds
from disagreement import GRID, LINK_NOISE, compare
from fit import MEASUREMENTS, all_reduce_of, fit, read, steps_of
from saturation import saturation
from scenarios import GPUS, SCENARIOS, Scenario

PICTURE = Path(__file__).with_name("prediction.png")
PARTS = ("compute", "waiting", "feed", "bandwidth", "latency", "occasional")


def measure(options: argparse.Namespace) -> None:
    import step_measurement

    fresh: dict[str, Any] = {
        "machine": step_measurement.machine(),
        "gradient_numbers": step_measurement.gradient_numbers(options.data),
        "rounds": [],
    }
    content = read() if MEASUREMENTS.exists() else fresh
    if content["machine"] != fresh["machine"]:
        raise SystemExit(f"{MEASUREMENTS}: is of another machine or torch; move it away to measure this one.")
    content["rounds"].append(step_measurement.one_round(options.data))
    MEASUREMENTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{len(content['rounds'])} rounds in {MEASUREMENTS}")


def show_fit(_: argparse.Namespace) -> None:
    content = read()
    found, held_out = fit(content), fit(content, workers=(1, 2))
    rounds = content["rounds"]
    loads = [load for one in rounds for load in (one["load_before"][0], one["load_after"][0])]
    print(f"{len(rounds)} rounds on {content['machine']}; load {min(loads):g} to {max(loads):g}")
    for title, compute in (("one worker", found.alone), ("several workers", found.together)):
        task, overhead = 1e3 * compute.task_seconds, 1e3 * compute.overhead_seconds
        print(f"{title:28} {task:.2f} ms a task, {overhead:.2f} ms overhead of a step")
    print(f"noise of a worker's step     {100 * found.alone.cv:.1f} %")
    print(
        f"ring (gloo, loopback)        {1e6 * found.network.latency:.0f} µs, {found.network.bandwidth / 1e9:.2f} GB/s\n"
    )
    print("| workers | meta-batch | all rounds ms [95 %] | quietest | model ms | off by | fitted without 4: off by |")
    print("|---|---|---|---|---|---|---|")
    for (workers, size), measured in steps_of(content).items():
        model, other = (cost(f.setting(workers, size)).step for f in (found, held_out))
        print(
            f"| {workers} | {size} | {1e3 * measured.median:.0f} [{1e3 * measured.low:.0f}, {1e3 * measured.high:.0f}] "
            f"| {1e3 * measured.quiet:.0f} | {1e3 * model:.0f} | {100 * (model / measured.quiet - 1):+.0f} % "
            f"| {100 * (other / measured.quiet - 1):+.0f} % |"
        )
    print("\n| workers | numbers | all-reduce measured ms | ring's formula ms |\n|---|---|---|---|")
    for (workers, numbers), seconds in all_reduce_of(content).items():
        model = cost(found.setting(workers, workers).with_(gradient_bytes=4 * numbers)).all_reduce
        print(f"| {workers} | {numbers} | {1e3 * seconds:.2f} | {1e3 * model:.2f} |")


def simulate(_: argparse.Namespace) -> None:
    print("| setting | closed form ms | simulated ms ± 95 % | off by | with noisy messages: off by |")
    print("|---|---|---|---|---|")
    worst = {0.0: 0.0, LINK_NOISE: 0.0}
    for title, setting in GRID.items():
        compared = {link_cv: compare(setting, link_cv=link_cv) for link_cv in worst}
        worst = {link_cv: max(worst[link_cv], abs(compared[link_cv].relative)) for link_cv in worst}
        plain, noisy = compared.values()
        print(
            f"| {title} | {1e3 * plain.closed:.3f} | {1e3 * plain.simulated:.3f} ± {1e3 * plain.half_width:.3f} "
            f"| {100 * plain.relative:+.2f} % | {100 * noisy.relative:+.2f} % |",
            flush=True,
        )
    print(
        f"\nlargest disagreement {100 * worst[0.0]:.2f} %; with messages of {100 * LINK_NOISE:.0f} % noise "
        f"{100 * worst[LINK_NOISE]:.2f} %"
    )


def predict(options: argparse.Namespace) -> None:
    for scenario in SCENARIOS.values():
        for growing in (False, True):
            _predict_one(scenario, growing=growing, rates=(options.rate,) if options.rate else scenario.rates)
    import plot

    plot.predictions(PICTURE)
    print(f"picture: {PICTURE}")


def _predict_one(scenario: Scenario, *, growing: bool, rates: tuple[float, ...]) -> None:
    batch = f"{scenario.tasks_per_gpu} tasks per GPU" if growing else f"meta-batch {scenario.meta_batch_size}"
    print(f"### {scenario.title}: {batch}\n\nassumed rates of one GPU: {', '.join(f'{r:g}' for r in rates)} tasks/s\n")
    print("| GPUs | " + " | ".join(f"tasks/s at {rate:g}" for rate in rates) + " | efficiency | " + _shares_head())
    print("|" + "---|" * (len(rates) + 9))
    middle = rates[len(rates) // 2]
    for gpus in GPUS:
        if not growing and gpus > scenario.meta_batch_size:
            continue
        costs = {rate: cost(scenario.setting(gpus, rate=rate, growing=growing)) for rate in rates}
        cells = " | ".join(f"{found.tasks_per_second:,.0f}" for found in costs.values())
        efficiencies = [100 * found.tasks_per_second / (gpus * rate) for rate, found in costs.items()]
        efficiency = " to ".join(f"{value:.0f}" for value in sorted({min(efficiencies), max(efficiencies)}))
        print(f"| {gpus} | {cells} | {efficiency} % | {_shares(costs[middle])} |")
    first = first_read_seconds(scenario.setting(GPUS[-1], rate=middle, growing=growing))
    if first:
        print(f"\nfirst read of the set by every one of {GPUS[-1]} GPUs: {first:.1f} s")
    print("\n| what sets the pace | " + " | ".join(f"from GPUs, at {rate:g}/s" for rate in rates) + " |")
    print("|---|" + "---|" * len(rates))
    points = [saturation(partial(scenario.setting, rate=rate, growing=growing), growing=growing) for rate in rates]
    for name in points[0]:
        print(f"| {name} | " + " | ".join(str(point[name] or "–") for point in points) + " |")
    print()


def _shares_head() -> str:
    return "step ms | " + " | ".join(f"{part} %" for part in PARTS) + " |"


def _shares(found: Cost) -> str:
    return f"{1e3 * found.step:.2f} | " + " | ".join(f"{100 * getattr(found, part) / found.step:.0f}" for part in PARTS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="infra/scaling", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="add a round to measurements.json")
    measuring.add_argument("--data", type=Path, default=Path("data/glyphs"), help="prepared glyphs")
    measuring.set_defaults(run=measure)
    commands.add_parser("fit", help="the model against the measurements").set_defaults(run=show_fit)
    commands.add_parser("simulate", help="the closed form against a simulation").set_defaults(run=simulate)
    predicting = commands.add_parser("predict", help="8 to 1024 GPUs")
    predicting.add_argument("--rate", type=float, help="tasks/s of one GPU, instead of the assumed range")
    predicting.set_defaults(run=predict)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
