"""The training recipe of the micro model, one sub-command a stage: ``python -m recipes.micro.train STAGE``.

``vision`` (CLIP from scratch), ``decoder`` (language pre-training on symbolic scenes), then ``llava``, which runs
``features`` (of the frozen tower), ``align`` (projector onto the symbols), ``stage1``, ``stage2`` (LLaVA's) and
``export`` one after the other; each of these is a command of its own, too. ``unpack`` begins a run from an exported
folder, ``plot`` draws the logs.
Every stage can be stopped at any moment and continued with ``--resume``; ``torchrun --nproc_per_node N -m
recipes.micro.train ...`` splits all but ``vision`` over N processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import distributed
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from ivtp.cli.door import run
from ivtp.errors import ConfigError
from ivtp.files.outputs import check_folder
from ivtp.files.sidecar import MICRO
from ivtp.generate import check_device
from ivtp.micro.model import assemble, build_decoder, build_processor, save_asset
from recipes.micro import recipe
from recipes.micro.cls import ClsRecipe, ClsTrainer
from recipes.micro.decoder import DecoderOptions, SymbolicImage, train_decoder
from recipes.micro.features import FeatureStore, build_store
from recipes.micro.loop import LoopOptions, is_distributed, load_checkpoint, rank, save_checkpoint
from recipes.micro.optim import compute_dtype
from recipes.micro.projector import Projector
from recipes.micro.recipe import SIZES
from recipes.micro.stages import StageOptions, align_projector, train_stage
from recipes.micro.threshold import choose_threshold

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
console = Console()

Out = Annotated[Path, typer.Option(help="folder of all checkpoints and logs")]
Steps = Annotated[int | None, typer.Option(min=1, help="length in steps (repeats exactly)")]
Minutes = Annotated[float | None, typer.Option(min=0, help="length by the clock; the schedule follows it")]
Resume = Annotated[bool, typer.Option("--resume", help="continue this stage from its checkpoint")]
Weights = Annotated[Path | None, typer.Option(help="checkpoint whose weights a new run starts from")]
Scenes = Annotated[int, typer.Option(min=1, help="photos a batch and process")]
Images = Annotated[int, typer.Option(min=1, help="training photos whose features are stored, 221 KB each")]
Asset = Annotated[Path, typer.Option(help="exported folder")]
SizeName = Annotated[str, typer.Option("--size", help=f"sizes of the model: {', '.join(SIZES)}")]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="seed of data and initialisation")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of this process")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
MuonRate = Annotated[float, typer.Option(help="rate of the hidden matrices")]
AdamRate = Annotated[float, typer.Option(help="rate of everything else")]
RUNS = Path("runs/micro")
ASSET = MICRO
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _size(name: str) -> recipe.Size:
    if name not in SIZES:
        raise typer.BadParameter(f"no size {name!r}; use one of {', '.join(SIZES)}")
    return SIZES[name]


@contextlib.contextmanager
def _joined() -> Iterator[None]:
    """Joins the processes of torchrun; within another such block it does nothing."""
    join = distributed.is_available() and distributed.is_torchelastic_launched() and not is_distributed()
    if join:
        distributed.init_process_group("gloo")
    yield
    if join:
        distributed.destroy_process_group()


@contextlib.contextmanager
def _stage(
    name: str, out: Path, threads: int, seed: int, device: str = "cpu"
) -> Iterator[Callable[[float, str], None]]:
    """Seeds, joins the processes of torchrun, and shows a progress bar; yields its ``report(fraction, text)``.

    What could not work is refused first: a folder that takes no file, a device that is not there.
    """
    check_folder(out, "--out")
    check_device(device)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    columns = (TextColumn(name), BarColumn(), TextColumn("{task.percentage:.1f}%"), TimeElapsedColumn())
    with (
        _joined(),
        Progress(*columns, TextColumn("{task.description}"), console=console, disable=rank() != 0) as progress,
    ):
        task = progress.add_task("", total=1.0)
        yield lambda fraction, text: progress.update(task, completed=min(1.0, fraction), description=text)
        if is_distributed():
            distributed.barrier()


@app.command()
def vision(
    out: Out = RUNS,
    size: SizeName = "micro",
    minutes: Minutes = None,
    steps: Steps = None,
    resume: Resume = False,
    further: Annotated[bool, typer.Option("--further", help="anneal this run once more")] = False,
    weights: Annotated[Path | None, typer.Option(help="anneal an exported CLIP folder once more")] = None,
    seed: Seed = 0,
    threads: Threads = 1,
    device: Device = DEVICE,
) -> None:
    """Contrastive and dense training of the CLIP."""
    from recipes.micro.vision import Recipe, Trainer

    check_folder(out, "--out")
    check_device(device)
    torch.set_num_threads(threads)
    sizes = _size(size)
    options = Recipe(
        steps=steps,
        minutes=minutes,
        layers=sizes.vision_layers,
        width=sizes.vision_width,
        heads=sizes.vision_heads,
        seed=seed,
    )
    trainer = Trainer(out / "vision", options, torch.device(device), resume=resume, further=further, start=weights)
    for key, value in trainer.run(console).items():
        console.print(f"{key:24s} {value:.4f}")


@app.command()
def cls(
    out: Out = RUNS,
    asset: Asset = ASSET,
    minutes: Minutes = None,
    steps: Steps = None,
    resume: Resume = False,
    muon_lr: MuonRate = 3e-3,
    adam_lr: AdamRate = 1e-3,
    seed: Seed = 0,
    threads: Threads = 1,
    device: Device = DEVICE,
) -> None:
    """Fine-tuning of an exported CLIP so that its CLS token knows every object; the patches' features stay."""
    with _stage("cls", out, threads, seed, device) as report:
        options = ClsRecipe(steps=steps, minutes=minutes, muon_lr=muon_lr, adam_lr=adam_lr, seed=seed)
        scores = ClsTrainer(out, asset / "clip", options, torch.device(device), resume=resume).run(report)
    console.print(scores)


@app.command()
def decoder(
    out: Out = RUNS,
    size: SizeName = "micro",
    weights: Weights = None,
    level: Annotated[int, typer.Option(min=0, max=3, help="curriculum step to begin at, 0..3")] = 0,
    minutes: Minutes = None,
    steps: Steps = None,
    resume: Resume = False,
    scenes: Scenes = 16,
    muon_lr: MuonRate = 3e-3,
    adam_lr: AdamRate = 1.5e-3,
    cooldown: float = 0.6,
    seed: Seed = 0,
    threads: Threads = 1,
    device: Device = DEVICE,
) -> None:
    """The decoder's language pre-training, on symbolic scenes."""
    with _stage("decoder", out, threads, seed, device) as report:
        tokenizer, sizes = recipe.tokenizer_in(out), _size(size)
        if weights is None or resume:
            model = build_decoder(tokenizer, layers=sizes.layers, width=sizes.width)
        else:
            model = recipe.decoder_from(weights, tokenizer)
        if weights is not None and "symbolic" in load_checkpoint(weights):
            symbolic = recipe.symbolic_from(weights)
        else:  # LLaVA's stages leave no symbols behind: the words serve again
            symbolic = SymbolicImage(model.config.hidden_size)
            symbolic.speak_like(model, tokenizer)
        model.to(device)
        symbolic.to(device)
        loop = LoopOptions(steps, minutes, muon_lr, adam_lr, cooldown, seed)
        options = DecoderOptions(scenes=scenes, level=level)
        path = out / "decoder.pt"
        tracker = train_decoder(model, symbolic, tokenizer, options, loop, path, resume=resume, report=report)
    console.print(tracker.row())


@app.command()
def features(
    out: Out = RUNS, images: Images = 6000, seed: Seed = 0, threads: Threads = 1, device: Device = DEVICE
) -> None:
    """Patch features of the first training photos."""
    with _stage("features", out, threads, seed, device) as report:
        folder, dtype = out / "vision" / "clip", compute_dtype(torch.device(device))
        tower = CLIPModel.from_pretrained(folder, dtype=dtype).vision_model.to(device).eval()
        images_of = CLIPImageProcessor.from_pretrained(folder)
        build_store(tower, images_of.image_mean, images_of.image_std, out / "features", images, report=report)


@app.command()
def align(
    out: Out = RUNS,
    images: Annotated[int, typer.Option(min=1, help="photos of the regression")] = 600,
    steps: Annotated[int, typer.Option(min=1, help="steps of the regression")] = 2000,
    seed: Seed = 0,
    threads: Threads = 1,
) -> None:
    """Initialises the projector by regression onto the symbolic embeddings."""
    with _stage("align", out, threads, seed) as report:
        store, symbolic = FeatureStore(out / "features"), recipe.symbolic_from(out / "decoder.pt")
        projector = Projector(store.width, symbolic.width)
        error = align_projector(projector, symbolic, store, images=images, steps=steps, seed=seed, report=report)
        if rank() == 0:
            weights = load_checkpoint(out / "decoder.pt")["decoder"]
            save_checkpoint(out / "aligned.pt", {"projector": projector.state_dict(), "decoder": weights})
            console.print(f"relative squared error on held-out photos: {error:.3f}")


def _llava_stage(
    stage: int,
    out: Path,
    start: Path,
    loop: LoopOptions,
    options: StageOptions,
    resume: bool,
    threads: int,
    device: str,
) -> None:
    with _stage(f"stage {stage}", out, threads, loop.seed, device) as report:
        tokenizer, path = recipe.tokenizer_in(out), out / f"stage{stage}.pt"
        start = path if resume else start
        projector, model = recipe.projector_from(start).to(device), recipe.decoder_from(start, tokenizer)
        model.to(device).requires_grad_(stage == 2)
        store = FeatureStore(out / "features")
        tracker = train_stage(projector, model, tokenizer, store, options, loop, path, resume=resume, report=report)
        if rank() == 0:
            console.print(tracker.row())


@app.command()
def stage1(
    out: Out = RUNS,
    weights: Weights = None,
    minutes: Minutes = None,
    steps: Steps = None,
    resume: Resume = False,
    scenes: Scenes = 16,
    adam_lr: AdamRate = 1e-3,
    cooldown: float = 0.5,
    seed: Seed = 1,
    threads: Threads = 1,
    device: Device = DEVICE,
) -> None:
    """LLaVA's first stage: the projector alone, on captions."""
    loop = LoopOptions(steps, minutes, 0.0, adam_lr, cooldown, seed)
    options = StageOptions(scenes=scenes, captions_only=True)
    _llava_stage(1, out, weights or out / "aligned.pt", loop, options, resume, threads, device)


@app.command()
def stage2(
    out: Out = RUNS,
    weights: Weights = None,
    minutes: Minutes = None,
    steps: Steps = None,
    resume: Resume = False,
    scenes: Scenes = 8,
    muon_lr: MuonRate = 4e-3,
    adam_lr: AdamRate = 1.5e-3,
    cooldown: float = 0.7,
    seed: Seed = 2,
    threads: Threads = 1,
    device: Device = DEVICE,
) -> None:
    """LLaVA's second stage: projector and decoder, on instructions; the vision tower stays frozen."""
    loop = LoopOptions(steps, minutes, muon_lr, adam_lr, cooldown, seed)
    options = StageOptions(scenes=scenes)
    _llava_stage(2, out, weights or out / "stage1.pt", loop, options, resume, threads, device)


@app.command()
def export(out: Out = RUNS, weights: Weights = None, asset: Asset = ASSET, threads: Threads = 1) -> None:
    """Writes the stock checkpoint folder; the relevance threshold is chosen on validation photos."""
    check_folder(asset, "--asset")
    torch.set_num_threads(threads)
    checkpoint, folder = weights or out / "stage2.pt", out / "vision" / "clip"
    tokenizer, clip = recipe.tokenizer_in(out), CLIPModel.from_pretrained(folder).eval()
    clip_tokenizer, images_of = AutoTokenizer.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)
    projector = recipe.projector_from(checkpoint)
    model = assemble(recipe.decoder_from(checkpoint, tokenizer), clip, tokenizer, projector.stock())
    threshold = choose_threshold(clip, clip_tokenizer, images_of)
    save_asset(asset, model, build_processor(tokenizer, images_of), clip, clip_tokenizer, threshold=threshold)
    console.print(f"{asset}: threshold {threshold:.3f}", soft_wrap=True)


@app.command()
def llava(
    out: Out = RUNS,
    images: Images = 6000,
    minutes: Annotated[float | None, typer.Option(min=0, help="length of stage 2; stage 1 gets a tenth of it")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="length of stage 2 in steps; stage 1 gets a tenth of it")
    ] = None,
    scenes: Scenes = 8,
    asset: Asset = ASSET,
    resume: Annotated[bool, typer.Option("--resume", help="skip what is finished, continue what is not")] = False,
    threads: Threads = 1,
    device: Device = DEVICE,
) -> None:
    """From the tower and the pre-trained decoder to the asset: features, align, stage 1, stage 2, export."""
    check_folder(asset, "--asset")
    short = (None if minutes is None else minutes / 10, None if steps is None else max(1, steps // 10))
    with _joined():
        features(out, images, threads=threads, device=device)
        if not (resume and (out / "aligned.pt").exists()):
            align(out, images=min(600, images), threads=threads)
        for stage, length in ((stage1, short), (stage2, (minutes, steps))):
            checkpoint = out / f"{stage.__name__}.pt"
            begun = resume and checkpoint.exists()
            if begun and load_checkpoint(checkpoint).get("finished"):
                continue
            stage(out, minutes=length[0], steps=length[1], resume=begun, scenes=scenes, threads=threads, device=device)
        first = rank() == 0
    if first:  # behind the block: the others do not wait for it
        export(out, asset=asset, threads=threads)


@app.command()
def unpack(out: Out = RUNS, asset: Asset = ASSET, seed: Seed = 0) -> None:
    """Turns an exported folder into a run to go on from: tokenizer, ``vision/clip`` and ``stage2.pt``."""
    check_folder(out, "--out")
    torch.manual_seed(seed)
    try:
        new = recipe.unpack(asset, out)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    way = f"go on with features, then stage2 --weights {out / 'stage2.pt'}"
    console.print(f"{out}: {new} new tokens; {way}", soft_wrap=True)


@app.command()
def plot(out: Out = RUNS) -> None:
    """Draws every log of a run (loss and accuracies over the steps) as a PNG file beside it."""
    from recipes.micro.plots import plot_log

    logs = sorted(path for path in out.rglob("*.csv"))
    if not logs:
        raise typer.BadParameter(f"no logs (*.csv) in {out}")
    for log in logs:
        console.print(plot_log(log), soft_wrap=True)


if __name__ == "__main__":
    run(app)
