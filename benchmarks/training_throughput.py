"""How fast the embedded model trains: steps and photos a second of its decoder stage and of LLaVA's second stage.

`python benchmarks/training_throughput.py --device cuda --output FILE.json`. Both stages run for as long as they are
asked to, from the embedded model's own sizes and weights, in a folder that is deleted; what they learn is not kept.
"""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from ivtp.benchmark.results import describe_machine
from recipes.micro import train


def main(
    output: Annotated[Path, typer.Option(help="JSON file, rewritten after each stage")],
    device: Annotated[str, typer.Option(help="cpu or cuda")] = train.DEVICE,
    seconds: Annotated[float, typer.Option(min=0.1, help="length of each stage")] = 30.0,
    photos: Annotated[int, typer.Option(min=1, help="photos a step")] = 32,
    stored: Annotated[int, typer.Option(min=1, help="photos whose features are stored for the second stage")] = 128,
) -> None:
    machine = describe_machine(device, threads=1)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        common = {"minutes": seconds / 60, "scenes": photos, "device": device}
        train.decoder(run, **common)
        rows["decoder"] = throughput(run / "decoder.csv", photos)
        write(output, machine, rows)
        train.unpack(run)
        train.features(run, stored, device=device)
        train.stage2(run, weights=run / "stage2.pt", **common)
        rows["stage 2"] = throughput(run / "stage2.csv", photos)
        write(output, machine, rows)


def throughput(log: Path, photos: int) -> dict[str, float]:
    """Of all logged steps; the first logged ones, which pay for what a process does once, are left out if they can."""
    with log.open(newline="") as file:
        ticks = [(int(row["step"]), 60 * float(row["minutes"])) for row in csv.DictReader(file)]
    steps, seconds = ticks[-1]
    if len(ticks) > 1:
        steps, seconds = steps - ticks[0][0], seconds - ticks[0][1]
    return {
        "steps": steps,
        "seconds": seconds,
        "steps a second": steps / seconds,
        "photos a second": photos * steps / seconds,
    }


def write(output: Path, machine: dict[str, Any], rows: dict[str, Any]) -> None:
    output.write_text(json.dumps({"machine": machine, "stages": rows}, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name}: {row['steps a second']:.2f} steps, {row['photos a second']:.1f} photos a second")


if __name__ == "__main__":
    typer.run(main)
