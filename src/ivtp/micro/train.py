"""The training recipe of the micro model, one sub-command a stage: ``python -m ivtp.micro.train STAGE``.

In order: ``vision`` (CLIP from scratch), ``decoder`` (symbolic pre-training of a shallow decoder), ``features`` (of
the frozen tower), ``align`` (projector onto the symbols), ``stage1`` and ``stage2`` (LLaVA's), ``export``; ``unpack``
begins a run from an exported folder.
Every stage can be stopped at any moment and continued with ``--resume``; ``torchrun --nproc_per_node N -m
ivtp.micro.train ...`` splits ``features``, ``stage1`` and ``stage2`` over N processes.
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
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from ivtp.micro.corpus import corpus
from ivtp.micro.decoder import DecoderOptions, SymbolicImage, train_decoder
from ivtp.micro.features import FeatureStore, build_store
from ivtp.micro.loop import LoopOptions, load_checkpoint, rank, save_checkpoint
from ivtp.micro.model import (
    WIDTH,
    assemble,
    build_decoder,
    build_processor,
    carry_over,
    deepen,
    save_asset,
    start_alike,
)
from ivtp.micro.optim import compute_dtype
from ivtp.micro.stages import Projector, StageOptions, align_projector, train_stage
from ivtp.micro.threshold import choose_threshold
from ivtp.micro.tokenizer import build_tokenizer
from ivtp.micro.vision_model import build_tokenizer as build_clip_tokenizer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
console = Console()

Out = Annotated[Path, typer.Option(help="folder of all checkpoints and logs")]
Steps = Annotated[int | None, typer.Option(help="length in steps (repeats exactly)")]
Minutes = Annotated[float | None, typer.Option(help="length by the clock; the schedule follows it")]
Resume = Annotated[bool, typer.Option("--resume", help="continue this stage from its checkpoint")]
Weights = Annotated[Path | None, typer.Option(help="checkpoint whose weights a new run starts from")]
Scenes = Annotated[int, typer.Option(help="scenes a batch and process")]
Seed = Annotated[int, typer.Option(help="seed of data and initialisation")]
Threads = Annotated[int, typer.Option(help="CPU threads of this process")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
MuonRate = Annotated[float, typer.Option(help="rate of the hidden matrices")]
AdamRate = Annotated[float, typer.Option(help="rate of everything else")]
Layers = Annotated[int | None, typer.Option(help="deepen the decoder to so many layers: a multiple of its depth")]
RUNS = Path("runs/micro")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _stage(name: str, threads: int, seed: int) -> Iterator[Callable[[float, str], None]]:
    """Seeds, joins the processes of torchrun, and shows a progress bar; yields its ``report(fraction, text)``."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if distributed.is_available() and distributed.is_torchelastic_launched() and not distributed.is_initialized():
        distributed.init_process_group("gloo")
    columns = (TextColumn(name), BarColumn(), TextColumn("{task.percentage:.1f}%"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, disable=rank() != 0) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda fraction, text: progress.update(task, completed=min(1.0, fraction), description=text)
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def tokenizer_in(out: Path) -> PreTrainedTokenizerBase:
    """The language model's tokenizer of a run; it is trained once and then kept."""
    folder = out / "tokenizer"
    if not folder.is_dir():
        build_tokenizer(corpus()).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def decoder_from(checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The decoder that a checkpoint of any stage holds."""
    weights = load_checkpoint(checkpoint)["decoder"]
    layers = 1 + max(int(name.split(".layers.")[1].split(".")[0]) for name in weights if ".layers." in name)
    width = weights["lm_head.weight"].shape[1]
    decoder = build_decoder(tokenizer, layers=layers, width=width)
    decoder.load_state_dict(weights)
    return decoder


def projector_from(checkpoint: Path) -> Projector:
    """The projector that a checkpoint holds."""
    weights = load_checkpoint(checkpoint)["projector"]
    width, features = weights["linear_1.weight"].shape
    projector = Projector(features, width)
    projector.load_state_dict(weights)
    return projector


def symbolic_from(checkpoint: Path) -> SymbolicImage:
    """The symbolic embeddings that a decoder checkpoint holds."""
    weights = load_checkpoint(checkpoint)["symbolic"]
    symbolic = SymbolicImage(weights["tables.0.weight"].shape[1])
    symbolic.load_state_dict(weights)
    return symbolic


@app.command()
def vision(
    out: Out = RUNS,
    minutes: Minutes = None,
    steps: Steps = None,
    resume: Resume = False,
    seed: Seed = 0,
    threads: Threads = 1,
    device: Device = DEVICE,
) -> None:
    """Contrastive and dense training of the CLIP (about an hour on one CPU core)."""
    from ivtp.micro.vision import Recipe, Trainer

    torch.set_num_threads(threads)
    recipe = Recipe(steps=steps, minutes=None if steps else minutes or 55.0, seed=seed)
    Trainer(out / "vision", recipe, torch.device(device), resume=resume).run(console)


@app.command()
def decoder(
    out: Out = RUNS,
    layers: Annotated[int, typer.Option(help="depth; with --weights a multiple of its depth")] = 8,
    name: Annotated[str, typer.Option(help="name of the checkpoint")] = "shallow",
    weights: Weights = None,
    level: Annotated[int, typer.Option(help="curriculum step to begin at, 0..3")] = 0,
    minutes: Minutes = None,
    steps: Steps = None,
    resume: Resume = False,
    scenes: Scenes = 16,
    muon_lr: MuonRate = 4e-3,
    adam_lr: AdamRate = 1.5e-3,
    cooldown: float = 0.35,
    seed: Seed = 0,
    threads: Threads = 1,
    device: Device = DEVICE,
) -> None:
    """Symbolic pre-training of the decoder; ``--weights shallow.pt --layers 16 --name deep`` deepens it."""
    with _stage("decoder", threads, seed) as report:
        tokenizer = tokenizer_in(out)
        model = build_decoder(tokenizer, layers=layers)
        symbolic = SymbolicImage(WIDTH)
        symbolic.speak_like(model, tokenizer)
        if weights is not None and not resume:
            model = deepen(decoder_from(weights, tokenizer), layers)
            # the checkpoints of LLaVA's stages hold no symbols: their words serve again
            if "symbolic" in load_checkpoint(weights):
                symbolic = symbolic_from(weights)
            else:
                symbolic.speak_like(model, tokenizer)
        model.to(device)
        symbolic.to(device)
        loop = LoopOptions(steps, minutes, muon_lr, adam_lr, cooldown, seed)
        options = DecoderOptions(scenes=scenes, level=level)
        path = out / "decoder" / f"{name}.pt"
        tracker = train_decoder(model, symbolic, tokenizer, options, loop, path, resume=resume, report=report)
    console.print(tracker.row())


@app.command()
def features(
    out: Out = RUNS,
    images: Annotated[int, typer.Option(help="training images to store")] = 6000,
    seed: Seed = 0,
    threads: Threads = 1,
    device: Device = DEVICE,
) -> None:
    """Patch features of the first training images (221 KB each on disk)."""
    with _stage("features", threads, seed) as report:
        folder = out / "vision" / "clip"
        tower = (
            CLIPModel.from_pretrained(folder, dtype=compute_dtype(torch.device(device))).vision_model.to(device).eval()
        )
        images_of = CLIPImageProcessor.from_pretrained(folder)
        build_store(tower, images_of.image_mean, images_of.image_std, out / "features", images, report=report)


@app.command()
def align(
    out: Out = RUNS,
    name: Annotated[str, typer.Option(help="decoder checkpoint to align to")] = "deep",
    images: Annotated[int, typer.Option(help="images of the regression")] = 600,
    steps: Annotated[int, typer.Option(help="steps of the regression")] = 2000,
    seed: Seed = 0,
    threads: Threads = 1,
) -> None:
    """Initialises the projector by regression onto the symbolic embeddings."""
    with _stage("align", threads, seed) as report:
        store, symbolic = FeatureStore(out / "features"), symbolic_from(out / "decoder" / f"{name}.pt")
        projector = Projector(store.width, symbolic.width)
        error = align_projector(projector, symbolic, store, images=images, steps=steps, seed=seed, report=report)
        weights = load_checkpoint(out / "decoder" / f"{name}.pt")["decoder"]
        save_checkpoint(out / "aligned.pt", {"projector": projector.state_dict(), "decoder": weights})
    console.print(f"relative squared error on held-out images: {error:.3f}")


def _llava_stage(
    stage: int,
    out: Path,
    start: Path,
    layers: int | None,
    loop: LoopOptions,
    options: StageOptions,
    resume: bool,
    threads: int,
    device: str,
) -> None:
    with _stage(f"stage {stage}", threads, loop.seed) as report:
        tokenizer, path = tokenizer_in(out), out / f"stage{stage}.pt"
        start = path if resume else start
        projector, model = projector_from(start).to(device), decoder_from(start, tokenizer)
        if layers is not None:
            model = deepen(model, layers)
        model.to(device).requires_grad_(stage == 2)
        store = FeatureStore(out / "features")
        tracker = train_stage(projector, model, tokenizer, store, options, loop, path, resume=resume, report=report)
        first = rank() == 0
    if first:
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
    _llava_stage(1, out, weights or out / "aligned.pt", None, loop, options, resume, threads, device)


@app.command()
def stage2(
    out: Out = RUNS,
    weights: Weights = None,
    layers: Layers = None,
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
    _llava_stage(2, out, weights or out / "stage1.pt", layers, loop, options, resume, threads, device)


@app.command()
def export(
    out: Out = RUNS,
    weights: Weights = None,
    asset: Annotated[Path, typer.Option(help="folder to write")] = Path(__file__).parent / "assets",
    threads: Threads = 1,
) -> None:
    """Writes the stock checkpoint folder; the relevance threshold is chosen on validation scenes."""
    torch.set_num_threads(threads)
    checkpoint, folder = weights or out / "stage2.pt", out / "vision" / "clip"
    tokenizer, clip = tokenizer_in(out), CLIPModel.from_pretrained(folder).eval()
    clip_tokenizer, images_of = (
        AutoTokenizer.from_pretrained(folder),
        CLIPImageProcessor.from_pretrained(folder),
    )
    model = assemble(decoder_from(checkpoint, tokenizer), clip, tokenizer, projector_from(checkpoint))
    threshold = choose_threshold(clip, clip_tokenizer, images_of)
    save_asset(asset, model, build_processor(tokenizer, images_of), clip, clip_tokenizer, threshold=threshold)
    console.print(f"{asset}: threshold {threshold:.3f}")


@app.command()
def unpack(
    out: Out = RUNS,
    asset: Annotated[Path, typer.Option(help="exported folder")] = Path(__file__).parent / "assets",
    seed: Seed = 0,
) -> None:
    """Turns an exported folder into a run to go on from: tokenizer, ``vision/clip`` and ``stage2.pt``.

    Where the world has learnt new words since, the tokens that both vocabularies know keep their embeddings.
    """
    if (out / "stage2.pt").exists():
        raise typer.BadParameter(f"{out / 'stage2.pt'} exists; give another --out")
    torch.manual_seed(seed)
    processor, folder = AutoProcessor.from_pretrained(asset), out / "vision" / "clip"
    _unpack_clip(asset / "clip", folder)
    processor.image_processor.save_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(asset, dtype=torch.float32)
    tokenizer, old = tokenizer_in(out), processor.tokenizer
    state = {f"model.{k}": v for k, v in model.model.language_model.state_dict().items()}
    fresh = build_decoder(tokenizer, layers=1, width=state["model.embed_tokens.weight"].shape[1])
    words, unknown = carry_over(state["model.embed_tokens.weight"], old, fresh.model.embed_tokens.weight, tokenizer)
    start_alike(words, tokenizer, unknown)
    state["model.embed_tokens.weight"] = words
    state["lm_head.weight"], _ = carry_over(model.lm_head.weight, old, 0.1 * words, tokenizer)
    projector_state = model.model.multi_modal_projector.state_dict()
    save_checkpoint(out / "stage2.pt", {"projector": projector_state, "decoder": state})
    console.print(f"{out}: {len(unknown)} new tokens; go on with features, then stage2 --weights {out / 'stage2.pt'}")


def _unpack_clip(asset: Path, folder: Path) -> None:
    """The CLIP of an exported folder with the present tokenizer, in float32."""
    old, tokenizer = AutoTokenizer.from_pretrained(asset), build_clip_tokenizer()
    clip = CLIPModel.from_pretrained(asset, dtype=torch.float32)
    table = clip.text_model.embeddings.token_embedding
    fresh = table.weight.std() * torch.randn(len(tokenizer), table.weight.shape[1])
    words, _ = carry_over(table.weight, old, fresh, tokenizer)
    clip.text_model.embeddings.token_embedding = torch.nn.Embedding(len(words), words.shape[1], _weight=words)
    clip.config.text_config.vocab_size = len(tokenizer)
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    app()
