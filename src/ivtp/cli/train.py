"""`ivtp train`: parse, call the training, print."""

from __future__ import annotations

import importlib.util
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

Data = Annotated[Path, typer.Option(metavar="FILE", help="Conversations, as LLaVA's JSON lists have them.")]
Images = Annotated[Path | None, typer.Option(metavar="DIR", help="Where the images of the data lie.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for checkpoints and the trained model.")]
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
Seed = Annotated[int, typer.Option(min=0, help="Of the order of records, and of adapters.")]


@app.command()
@given.spoken
def check(
    context: typer.Context,
    data: Data,
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
    data: Data,
    out_: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for checkpoints and the model.")],
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
) -> None:
    """Teach the projector to caption: image and caption alone, learning rate 1e-3, 256 records a step, one epoch.

    Several devices: put `torchrun --nproc_per_node N -m` in front.
    """
    _train("pretrain", context)


@app.command()
@given.spoken
def finetune(
    context: typer.Context,
    data: Data,
    out_: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for checkpoints and the model.")],
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
) -> None:
    """Teach projector and decoder to answer: whole conversations, learning rate 2e-5, 128 records a step, one epoch.

    Several devices: put `torchrun --nproc_per_node N -m` in front.
    """
    _train("finetune-lora" if lora else "finetune", context)


def _train(stage: str, context: typer.Context) -> None:
    values: dict[str, Any] = dict(context.params)
    options = given.parse_options(values["option"], context)
    name = given.check_asked(values["method"], values["keep"], options)
    check_folder(values["out_"], "--out")
    arguments = _fields(values["set_"])
    err.quiet = int(os.environ.get("RANK", "0")) > 0  # one process speaks for all
    quiet()
    import torch

    from ivtp.training import run
    from ivtp.training.stages import STAGES

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
        bf16=torch.cuda.is_available() if values["bf16"] is None else values["bf16"],
        report_to=tuple(values["report_to"] or ()),
        **{
            key: values[key]
            for key in (
                *("clip", "max_steps", "batch", "per_device", "max_length", "engine", "checkpointing", "seed"),
                *("resume", "skip_bad"),
            )
        },
    )
    done = run.train(asked)
    if done is not None:
        left = f", {done.left_out} bad ones left out" if done.left_out else ""
        out.print(f"{done.steps} steps on {done.records} records{left}, mean loss {done.loss:.4f}", markup=False)
        out.print(str(done.folder), markup=False, soft_wrap=True)


def _fields(pairs: list[str] | None) -> dict[str, Any]:
    found = {}
    for pair in pairs or []:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise ConfigError(f"--set {pair} is not NAME=VALUE; write for example --set save_steps=100")
        found[name] = given.parse_value(text)
    return found
