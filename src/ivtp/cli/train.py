"""`ivtp train`: parse, call the training, print."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ivtp.cli import arguments as given
from ivtp.cli.console import err, out
from ivtp.cli.door import quiet
from ivtp.errors import ConfigError
from ivtp.files.outputs import check_folder

app = typer.Typer(
    help="Train a model in LLaVA-1.5's two stages, with any method attached meanwhile.", no_args_is_help=True
)

Data = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Conversations, as LLaVA's JSON lists have them; needed to train.")
]
Images = Annotated[Path | None, typer.Option(metavar="DIR", help="Where the images of the data lie.")]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder for checkpoints and the model; needed to train.")
]
Method = Annotated[str, typer.Option(help="A method that prunes meanwhile; none keeps every token.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Steps, in place of one epoch.")]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Records of a step on all devices together; default: the stage's.")
]
PerDevice = Annotated[int | None, typer.Option(min=1, help="Records that a device reads at once.")]
MaxLength = Annotated[int, typer.Option(min=8, help="Tokens of a conversation with its images; the rest is cut off.")]
Engine = Annotated[
    str, typer.Option(help="ddp: a copy on each device; fsdp, zero2 or zero3: shared out; or a JSON file of these.")
]
Bf16 = Annotated[
    bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bfloat16; default: where there is a GPU.")
]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing/--no-checkpointing", help="Recompute layers in the backward pass.")
]
ReportTo = Annotated[
    list[str] | None, typer.Option(help="tensorboard, wandb, or what else transformers reports to; repeatable.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any field of transformers' TrainingArguments; repeatable."),
]
Resume = Annotated[bool, given.flag("--resume", help="Go on with the last checkpoint in --out.")]
SkipBad = Annotated[bool, given.flag("--skip-bad", help="Leave bad records out instead of refusing the data.")]
Plan = Annotated[bool, given.flag("--plan", help="Print steps, tokens, FLOPs, memory and hours, and train nothing.")]
Devices = Annotated[int | None, typer.Option(min=1, help="Devices that --plan counts with; default: those here.")]
Tflops = Annotated[
    float, typer.Option(min=0.001, help="TFLOP/s of a device that --plan counts with: 125 is 40% of an A100.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the order of records, and of adapters.")]


@app.command()
@given.spoken
def check(
    context: typer.Context,
    data: Annotated[Path, typer.Option(metavar="FILE", help="Conversations, as LLaVA's JSON lists have them.")],
    images: Images = None,
    stage: Annotated[str, typer.Option(help="pretrain or finetune; the former takes no record without image.")] = (
        "finetune"
    ),
) -> None:
    """Read the data as training would, and print a line for each bad record; exit code 2 where there is one."""
    if stage not in ("pretrain", "finetune"):
        raise ConfigError(f"--stage {stage} is unknown; use pretrain or finetune")
    from ivtp.training.records import read_records

    with err.status("checking"):
        good, bad = read_records(data, images, needs_image=stage == "pretrain")
    for one in bad:
        out.print(str(one), markup=False, soft_wrap=True)
    shown = sum(bool(record.images) for record in good)
    summary = f"{len(good)} records can be trained on ({shown} with images, {len(good) - shown} with text alone)"
    err.print(f"{summary}, {len(bad)} cannot", markup=False)
    if bad:
        raise ConfigError(f"--data {data} has {len(bad)} bad record(s); repair them, or train with --skip-bad")


@app.command()
@given.spoken
def pretrain(
    context: typer.Context,
    data: Data = None,
    out_: Out = None,
    images: Images = None,
    model: given.Model = "micro",
    method: Method = "none",
    keep: given.Keep = "64",
    option: given.Options = None,
    clip: given.Clip = None,
    max_steps: MaxSteps = None,
    batch: Batch = None,
    per_device: PerDevice = None,
    max_length: MaxLength = 2048,
    engine: Engine = "ddp",
    bf16: Bf16 = None,
    checkpointing: Checkpointing = True,
    report_to: ReportTo = None,
    set_: Set = None,
    seed: Seed = 42,
    resume: Resume = False,
    skip_bad: SkipBad = False,
    plan: Plan = False,
    devices: Devices = None,
    tflops: Tflops = 125.0,
) -> None:
    """Teach the projector to caption: image and caption alone, learning rate 1e-3, 256 records a step, one epoch.

    Several devices: put `torchrun --nproc_per_node N -m` in front.
    """
    _train("pretrain", context)


@app.command()
@given.spoken
def finetune(
    context: typer.Context,
    data: Data = None,
    out_: Out = None,
    images: Images = None,
    model: given.Model = "micro",
    method: Method = "none",
    keep: given.Keep = "64",
    option: given.Options = None,
    clip: given.Clip = None,
    lora: Annotated[bool, given.flag("--lora", help="Adapters of rank 128 in place of the decoder's weights.")] = False,
    max_steps: MaxSteps = None,
    batch: Batch = None,
    per_device: PerDevice = None,
    max_length: MaxLength = 2048,
    engine: Engine = "ddp",
    bf16: Bf16 = None,
    checkpointing: Checkpointing = True,
    report_to: ReportTo = None,
    set_: Set = None,
    seed: Seed = 42,
    resume: Resume = False,
    skip_bad: SkipBad = False,
    plan: Plan = False,
    devices: Devices = None,
    tflops: Tflops = 125.0,
) -> None:
    """Teach projector and decoder to answer: whole conversations, learning rate 2e-5, 128 records a step, one epoch.

    Several devices: put `torchrun --nproc_per_node N -m` in front.
    """
    _train("finetune-lora" if lora else "finetune", context)


def _train(stage: str, context: typer.Context) -> None:
    values: dict[str, Any] = dict(context.params)
    options = given.parse_options(values["option"], context)
    name = given.check_asked(values["method"], values["keep"], options)
    if not values["plan"]:
        for flag, value in (("--data FILE", values["data"]), ("--out DIR", values["out_"])):
            if value is None:
                raise ConfigError(f"{flag} is missing; name it, or see what training would cost with --plan")
        check_folder(values["out_"], "--out")
    arguments = _fields(values["set_"])
    err.quiet = int(os.environ.get("RANK", "0")) > 0  # one process speaks for all
    quiet()
    import torch

    from ivtp.training import run
    from ivtp.training.stages import STAGES

    same = ("clip", "max_steps", "batch", "per_device", "max_length", "engine", "checkpointing", "seed", "resume")
    gpu = torch.cuda.is_available()
    asked = run.Asked(
        stage=STAGES[stage],
        data=values["data"],
        images=values["images"],
        model=values["model"],
        out=values["out_"],
        method=name,
        keep=given.parse_keep(values["keep"]),
        options=options,
        arguments=arguments,
        bf16=(gpu or values["plan"]) if values["bf16"] is None else values["bf16"],
        report_to=tuple(values["report_to"] or ()),
        skip_bad=values["skip_bad"],
        **{key: values[key] for key in same},
    )
    if values["plan"]:
        _print_plan(asked, values["devices"] or max(1, torch.cuda.device_count()), values["tflops"])
        return
    done = run.train(asked)
    if done is not None:
        left = f", {done.left_out} bad ones left out" if done.left_out else ""
        out.print(f"{done.steps} steps on {done.records} records{left}, last loss {done.loss:.4f}", markup=False)
        out.print(str(done.folder), markup=False, soft_wrap=True)


def _print_plan(asked: Any, devices: int, tflops: float) -> None:
    from rich.table import Table

    from ivtp.training.plan import estimate
    from ivtp.training.records import read_records, refuse

    records: list[Any] = []
    if asked.data is not None:
        with err.status("checking"):
            records, bad = read_records(asked.data, asked.images, needs_image=asked.stage.plain)
        if not asked.skip_bad or not records:
            refuse(bad, asked.data)
    with err.status("counting"):
        found = estimate(asked, records, devices=devices, sustained=tflops)
    saved = f" ({100 * (found.record_flops / found.full_record_flops - 1):+.1f}% against all tokens)"
    share = f"{found.per_device} at once on each of {found.devices} device(s)"
    lines = {
        "records": f"{found.records}, {found.with_images} with images",
        "steps": f"{found.steps} of {found.batch} records, {share}",
        "tokens of a record": f"{found.text_tokens:.0f} of text, {found.columns:.0f} in all, {found.longest} at most",
        "visual tokens": f"{found.equivalent:.1f} enter a layer of the decoder on average",
        "parameters": ", ".join(f"{name} {size / 1e6:.1f} M" for name, size in found.parameters.items()),
        "learned": f"{found.learned / 1e6:.1f} M",
        "FLOPs of a record": f"{found.record_flops / 1e12:.3g} TFLOPs" + (saved if asked.method != "none" else ""),
        "FLOPs in all": f"{found.total_flops / 1e18:.3g} EFLOPs",
        **{f"memory: {name}": f"{size / 2**30:.1f} GiB" for name, size in found.memory.items()},
        "memory of a device": f"{sum(found.memory.values()) / 2**30:.1f} GiB, and what kernels and fragments take",
        "memory while loading": f"{found.loading / 2**30:.1f} GiB",
        "time": f"{found.hours:.1f} hours at {found.sustained:g} TFLOP/s a device",
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in lines.items():
        table.add_row(name, text)
    out.print(table)
    for note in found.notes:
        out.print(f"note: {note}", markup=False, soft_wrap=True)


def _fields(pairs: list[str] | None) -> dict[str, Any]:
    found = {}
    for pair in pairs or []:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise ConfigError(f"--set {pair} is not NAME=VALUE; write for example --set save_steps=100")
        found[name] = given.parse_value(text)
    return found
