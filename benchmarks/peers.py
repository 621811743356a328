"""Our side of a comparison with a peer's public code, and the comparison: `benchmarks/peers.md` says how.

python -m benchmarks.peers time --model llava-hf/llava-1.5-7b-hf --image IMAGE --method visionzip --output ours.json
python -m benchmarks.peers compare ours.json theirs.json
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.blocks import table
from benchmarks.peer_clock import measure, write
from ivtp.benchmark.measure import run_prefill
from ivtp.cli import arguments as given
from ivtp.cli.door import quiet, run
from ivtp.errors import ConfigError, short_reason
from ivtp.files.outputs import check_output
from ivtp.generate import load, prompt_for
from ivtp.images import load_image
from ivtp.plug import attach
from ivtp.trace import PruneTrace

QUESTION = "What is shown in this picture?"

app = typer.Typer(add_completion=False, rich_markup_mode=None, help=__doc__)


@app.command("time")
@given.spoken
def time_ours(
    context: typer.Context,
    image: Annotated[Path, typer.Option(help="The picture that both sides read.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="JSON of what was measured.")],
    question: Annotated[str, typer.Option(help="The question that both sides ask.")] = QUESTION,
    model: given.Model = "micro",
    method: given.Method = "ivtp",
    keep: given.Keep = "64",
    option: given.Options = None,
    device: given.Device = "cpu",
    dtype: given.Dtype = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Timed prefills of each.")] = 20,
) -> None:
    """Time a prefill with all tokens and with a method, and note the patches that stay."""
    options = given.parse_options(option, context)
    name = given.check_asked(method, keep, options)
    if name == "none":
        raise ConfigError("--method none is timed beside every other; name a method that a peer has, too")
    check_output(output, "--output", inputs=(image, model))
    picture = load_image(image)
    quiet()
    lvlm, processor = load(model, dtype=dtype, device=device)
    inputs = processor(images=[picture], text=prompt_for(processor, question), return_tensors="pt")
    inputs = dict(inputs.to(lvlm.device, lvlm.dtype))
    setting = {"model": model, "method": name, "keep": keep, "image": image.name, "question": question}
    setting |= {"prompt_tokens": inputs["input_ids"].shape[1], "dtype": str(lvlm.dtype)}

    def prefill() -> Any:
        return run_prefill(lvlm, inputs)

    full = measure(prefill, device, rounds)
    with attach(lvlm, processor, method=name, keep=given.parse_keep(keep), **options) as pruner:
        pruned = measure(prefill, device, rounds)
        assert pruner.trace is not None
        kept = kept_patches(pruner.trace)
    write(output, program="ivtp", setting=setting, full=full, pruned=pruned, kept=kept)
    print(f"{output}: {statistics.median(pruned['prefill_ms']):.1f} ms, {len(kept)} patches stay")


def kept_patches(trace: PruneTrace) -> list[int]:
    """The patches that the only image's last tokens stand for, without those that are there by their place alone."""
    last = trace.stages[-1]
    stays = last.kept[0] >= 0
    if last.stand_ins is not None:
        stays &= ~last.stand_ins[0]
    return sorted(last.kept[0][stays].tolist())


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="One side's file.")],
    second: Annotated[Path, typer.Argument(help="The other's.")],
) -> None:
    """Ratio of the times and of the memory, agreement of the patches that stay, and what was not the same."""
    print(compared(read(first), read(second)))


def read(file: Path) -> dict[str, Any]:
    """One side's file. Raises `ConfigError` for another one."""
    try:
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for run_name in ("full", "pruned"):
            statistics.median(document[run_name]["prefill_ms"])
            document[run_name]["peak_bytes"]
        {*document["kept"]}, document["program"], {**document["setting"]}
    except (OSError, ValueError, LookupError, TypeError, statistics.StatisticsError) as error:
        raise ConfigError(
            f"{file} is no side of a comparison ({short_reason(error)}); see benchmarks/peers.md"
        ) from None
    return document


def compared(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Both sides as a table, with the first divided by the second."""
    both = (first, second)
    rows = [
        row(f"{name}, {unit}", [figure(side[run_name]) for side in both])
        for unit, figure in (("ms", milliseconds), ("MB", megabytes))
        for name, run_name in (("all tokens", "full"), ("pruned", "pruned"))
    ]
    rows.insert(2, row("all tokens / pruned, ms", [milliseconds(s["full"]) / milliseconds(s["pruned"]) for s in both]))
    rows.append(row("patches that stay", [len(side["kept"]) for side in both]))
    lines = [table(("", *(side["program"] for side in both), "ratio"), rows)]
    lines.append(f"agreement of the patches (Jaccard): {jaccard(first['kept'], second['kept']):.3f}")
    names = sorted(first["setting"].keys() | second["setting"].keys())
    for name in names:
        one, other = (side["setting"].get(name) for side in both)
        if str(one) != str(other):
            lines.append(f"not the same: {name}, {one} and {other}")
    return "\n\n".join(lines)


def row(name: str, values: Sequence[float | None]) -> tuple[str, ...]:
    """Two figures and the first through the second; – for one that is not known."""
    first, second = values
    ratio = None if first is None or not second else first / second
    return (name, *("–" if value is None else f"{value:.4g}" for value in (first, second, ratio)))


def milliseconds(side: dict[str, Any]) -> float:
    """The median."""
    return float(statistics.median(side["prefill_ms"]))


def megabytes(side: dict[str, Any]) -> float | None:
    """The peak; None where it was not measured."""
    return None if side["peak_bytes"] is None else side["peak_bytes"] / 1e6


def jaccard(first: Sequence[int], second: Sequence[int]) -> float:
    """Patches that both keep among those that either keeps; 1 where neither keeps any."""
    either = {*first} | {*second}
    return len({*first} & {*second}) / len(either) if either else 1.0


if __name__ == "__main__":
    run(app)
