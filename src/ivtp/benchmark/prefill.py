"""Prefill milliseconds of full model, oracle and methods: ``python -m ivtp.benchmark.prefill``."""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from ivtp.config import Geometry, PruneConfig
from ivtp.cost import flops, prompt_tokens
from ivtp.errors import IvtpError
from ivtp.generate import load, prompt_for
from ivtp.guide import GuideMaker
from ivtp.methods.base import Method, MethodInfo, Plan, Window
from ivtp.plug import Pruner, attach, find_host
from ivtp.registry import method_class


class Oracle(Method):
    """Cuts where another method cuts, to the same counts, without taps, guide or scores: the first patches stay."""

    info = MethodInfo("Oracle", 2024, "both", guided=False, trainable=False, merges=False, paper="(yardstick)")
    reads = frozenset(field.name for field in dataclasses.fields(PruneConfig))  # the followed method checks them

    def __init__(self, config: PruneConfig, geometry: Geometry) -> None:
        self._followed: Method = method_class(config.method)(config, geometry)
        super().__init__(dataclasses.replace(config, options={}), geometry)

    def make_plan(self) -> Plan:
        """The followed method's cuts, with nothing to read."""
        cuts = self._followed.plan.cuts
        return Plan(tuple(dataclasses.replace(cut, taps=(), full_rows=()) for cut in cuts))

    def score(self, window: Window) -> Tensor:
        """The lower the patch, the better: fixed beforehand."""
        return -window.patch.float()


def make_pruners(model: nn.Module, processor: Any, methods: list[str], keep: int | str) -> dict[str, Pruner | None]:
    """A pruner for every method and the oracle of the first one, all detached; None is the full model."""
    pruners: dict[str, Pruner] = {}
    for method in methods:
        with attach(model, processor, method=method, keep=keep) as pruner:
            pruners[method] = pruner
    host, config = find_host(model), pruners[methods[0]].config
    oracle = Pruner(host, Oracle(config, host.size), GuideMaker(config, host, None, None))
    return {"full": None, "oracle": oracle, **pruners}


def measure(model: nn.Module, inputs: Any, pruners: dict[str, Pruner | None], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of `repeats` prefills of each, interleaved A B C A B C ..., after one warm-up round.

    Attaching is outside the timed part: it is done once in the life of a model.
    """
    times: dict[str, list[float]] = {name: [] for name in pruners}
    for number in track(range(repeats + 1), description="prefill", console=Console(stderr=True)):
        for name, pruner in pruners.items():
            if pruner:
                pruner.install()
            try:
                milliseconds = _time_prefill(model, inputs)
            finally:
                if pruner:
                    pruner.detach()
            if number:
                times[name].append(milliseconds)
    return times


def _time_prefill(model: nn.Module, inputs: Any) -> float:
    began = time.perf_counter()
    with torch.inference_mode():
        output = model(**inputs, logits_to_keep=1)
    output.logits.flatten()[0].item()  # waits for the device
    return (time.perf_counter() - began) * 1000


def main(
    model: Annotated[str, typer.Option(help="micro, a folder or a hub id")] = "micro",
    method: Annotated[list[str] | None, typer.Option(help="a method; may be given several times")] = None,
    keep: Annotated[int, typer.Option(help="visual tokens at the end")] = 64,
    question: Annotated[str, typer.Option(help="the text of the prompt")] = "is there a dog in the picture?",
    batch: Annotated[int, typer.Option(help="rows")] = 1,
    repeats: Annotated[int, typer.Option(help="timed runs of each")] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result here")] = None,
) -> None:
    """Time the prefill: full, oracle (the first method's token counts for free) and each method, interleaved."""
    torch.set_num_threads(threads)
    methods = method or ["ivtp"]
    loaded, processor = load(model, device=device)
    any_model: Any = loaded
    side = any_model.config.vision_config.image_size
    picture = Image.effect_noise((side, side), 80).convert("RGB")
    prompts = [prompt_for(processor, question)] * batch
    inputs = processor(images=[picture] * batch, text=prompts, return_tensors="pt")
    inputs = inputs.to(any_model.device, any_model.dtype)
    pruners = make_pruners(loaded, processor, methods, keep)
    times = measure(loaded, inputs, pruners, repeats)
    text_tokens = prompt_tokens(inputs["input_ids"].shape[1], find_host(loaded).size)
    full = flops(loaded, method="none", text_tokens=text_tokens, batch=batch).total
    rows = compare(times, {name: p.trace.flops if p and p.trace else full for name, p in pruners.items()})
    _print(rows)
    if json_file:
        about = {"model": model, "keep": keep, "text_tokens": text_tokens, "batch": batch, "repeats": repeats}
        json_file.write_text(json.dumps({**about, "machine": _machine(device), "rows": rows}, indent=1) + "\n")


def compare(times: dict[str, list[float]], costs: dict[str, float]) -> list[dict[str, Any]]:
    """The lines of the table, from milliseconds and FLOPs of each run; ratios are medians of the pairs of one round."""
    return [
        {
            "run": name,
            "milliseconds": statistics.median(values),
            "over_oracle": statistics.median(a / b for a, b in zip(values, times["oracle"], strict=True)),
            "full_over_this": statistics.median(a / b for a, b in zip(times["full"], values, strict=True)),
            "flops": costs[name],
            "all_milliseconds": values,
        }
        for name, values in times.items()
    ]


def _machine(device: str) -> dict[str, Any]:
    """What the times depend on beside the code."""
    gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("run", "prefill ms", "x oracle", "full / this", "GFLOPs", "full / this in FLOPs")
    full = rows[0]["flops"]
    for row in rows:
        table.add_row(
            row["run"],
            f"{row['milliseconds']:.1f}",
            f"{row['over_oracle']:.2f}",
            f"{row['full_over_this']:.2f}",
            f"{row['flops'] / 1e9:.2f}",
            f"{full / row['flops']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    try:
        typer.run(main)
    except IvtpError as error:
        Console(stderr=True).print(f"error: {error}")
        raise SystemExit(2) from None
