"""Whole methods on the tiny model: what `naive` chooses from the stock model's own attention and hidden states.

The stock model computes its attention eagerly and is cut here, by hand, one unpadded sample at a time; the pruned one
has its fused attention and, in the decoder, a padded batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import naive
import pytest
import torch
from reference import prompt_of
from tiny import NUM_PATCHES, QUESTIONS, SIDE, Sample, Tiny, samples
from torch import Tensor

from ivtp.core.schedule import uniform_ratio
from ivtp.methods.dynamicvit import Predictors
from ivtp.registry import list_methods
from ivtp.trace import PruneTrace

KEEP = 9
Model = torch.nn.Module
Step = Callable[[int, Tensor, "Layer"], Tensor]


@dataclass(frozen=True)
class Layer:
    """What one encoder layer computed: head by head attention (H, T, T), and keys (H, T, d)."""

    attention: Any
    key: Any

    @property
    def cls(self) -> list[float]:
        """Head-mean attention of CLS to the patches."""
        return naive.head_mean(self.attention)[0][1:]


@dataclass(frozen=True)
class Run:
    """What the pruned model did: its record, and the embeddings and positions of the first row's visual tokens."""

    trace: PruneTrace
    visual: Tensor
    positions: list[int]


@pytest.fixture(scope="module")
def stock(tiny: Tiny) -> Model:
    return tiny.model("eager")


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Model:
    return tiny.model()


def prune(tiny: Tiny, model: Model, batch: list[Sample], counted: bool = True, **changes: Any) -> Run:
    """`counted` positions begin behind the padding, as `generate` makes them; a bare call counts padding as well."""
    entered: list[dict[str, Any]] = []
    inputs = tiny.inputs(*batch)
    if counted:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs), with_kwargs=True
    )
    try:
        with tiny.attach(model, **{"keep": KEEP, **changes}) as pruner, torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    trace = pruner.trace
    assert trace is not None
    start = int((inputs["input_ids"][0] == tiny.processor.image_token_id).int().argmax())
    slots = slice(start, start + trace.kept("vision").shape[1])
    assert len(entered) == 1
    positions = [p - start for p in entered[0]["position_ids"][0, slots].tolist()]
    return Run(trace, entered[0]["inputs_embeds"][0, slots], positions)


def plain(tensor: Tensor) -> Any:
    return tensor.double().tolist()


def heads_of(projected: Tensor, heads: int) -> Any:
    return plain(projected[0].view(projected.shape[1], heads, -1).transpose(0, 1))


@torch.no_grad()
def encode(model: Model, pixels: Tensor, step: Step, bias: Callable[[], Tensor] | None = None) -> list[Tensor]:
    """The encoder's layers up to the projector; `step` cuts between attention and MLP. Returns each layer's output."""
    tower = model.model.vision_tower
    hidden, out = tower.pre_layrnorm(tower.embeddings(pixels)), []
    for number, layer in enumerate(tower.encoder.layers[:-1]):
        normed = layer.layer_norm1(hidden)
        attended, weights = layer.self_attn(normed, attention_mask=bias() if bias else None)
        key = heads_of(layer.self_attn.k_proj(normed), weights.shape[1])
        hidden = step(number, hidden + attended, Layer(plain(weights[0]), key))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        out.append(hidden)
    return out


def whole(model: Model, pixels: Tensor) -> tuple[list[list[float]], list[Layer], Tensor]:
    """Nothing cut: the features with CLS in front, the layers up to the projector, and the last output of all."""
    layers: list[Layer] = []

    def step(number: int, hidden: Tensor, layer: Layer) -> Tensor:
        layers.append(layer)
        return hidden

    hidden = encode(model, pixels, step)[-1]
    with torch.no_grad():
        out = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(hidden, out.hidden_states[-2])
    torch.testing.assert_close(torch.tensor(layers[-1].attention).float(), out.attentions[-2][0])
    return plain(hidden[0]), layers, out.hidden_states[-1]


def project(model: Model, features: list[list[float]]) -> Tensor:
    with torch.no_grad():
        return model.model.multi_modal_projector(torch.tensor(features, dtype=torch.float32).unsqueeze(0))[0]


def check_kept(run: Run, expected: list[int]) -> None:
    assert run.trace.kept("vision").tolist() == [sorted(expected)]


def check_merged(run: Run, model: Model, features: list[list[float]], places: list[int], compact: bool) -> None:
    """The tokens that the decoder reads: in the method's order, or where positions are the patches', in theirs."""
    order = list(range(len(places))) if compact else sorted(range(len(places)), key=lambda i: places[i])
    torch.testing.assert_close(run.visual, project(model, features)[order], atol=1e-4, rtol=1e-4)
    assert run.positions == (order if compact else sorted(places))
    assert sorted(run.trace.kept("vision")[0].tolist()) == sorted(places)


def pixels_of(tiny: Tiny, seed: int = 0) -> Tensor:
    return tiny.inputs(tiny.sample(seed=seed))["pixel_values"]


compact_or_not = pytest.mark.parametrize("positions", ["original", "compact"])


# --- behind the encoder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("keep", [1, 9, 35])
def test_topk(tiny: Tiny, stock: Model, model: Model, seed: int, keep: int) -> None:
    _, layers, _ = whole(stock, pixels_of(tiny, seed))
    run = prune(tiny, model, [tiny.sample(seed=seed)], method="topk", keep=keep)
    check_kept(run, naive.descending(layers[-1].cls)[:keep])


def test_topk_in_every_layer(tiny: Tiny, stock: Model, model: Model) -> None:
    run = prune(tiny, model, [tiny.sample()], method="topk", keep=6, where="layers")
    patches = list(range(NUM_PATCHES))

    def step(number: int, hidden: Tensor, layer: Layer) -> Tensor:
        count = run.trace.stages[number].kept.shape[1]
        stay = sorted(naive.descending(layer.cls)[:count])
        patches[:] = [patches[i] for i in stay]
        assert run.trace.stages[number].kept.tolist() == [patches]
        return hidden[:, [0, *(1 + i for i in stay)]]

    encode(stock, pixels_of(tiny), step)
    assert len(patches) == 6


@compact_or_not
@pytest.mark.parametrize("keep", [1, 9, 20, 36])
def test_visionzip(tiny: Tiny, stock: Model, model: Model, keep: int, positions: str) -> None:
    hidden, layers, _ = whole(stock, pixels_of(tiny))
    contextual = round(keep * 10 / 64)
    scores = [sum(head[0][1 + p] for head in layers[-1].attention) for p in range(NUM_PATCHES)]
    dominant = sorted(naive.descending(scores)[: keep - contextual - 1])
    rest = naive.others(dominant, NUM_PATCHES)
    metric = [naive.mean([head[1 + p] for head in layers[-1].key]) for p in range(NUM_PATCHES)]
    targets, loose, merged, goes = (
        naive.merge_contextual(hidden[1:], metric, rest, contextual) if contextual else ([], [], [], [])
    )
    place = next(p for p in naive.descending(scores) if p not in [*dominant, *targets])
    features = [hidden[0], *(hidden[1 + p] for p in dominant), *merged]
    run = prune(tiny, model, [tiny.sample()], method="visionzip", keep=keep, positions=positions)
    check_merged(run, stock, features, [place, *dominant, *targets], positions == "compact")
    stands = {p: targets[k] for p, k in zip(loose, goes, strict=True)} | {p: p for p in (*dominant, *targets, place)}
    assert run.trace.stages[0].sources.tolist() == [[stands.get(p, -1) for p in range(NUM_PATCHES)]]
    check_stand_in(run, place)


def check_stand_in(run: Run, place: int) -> None:
    """The one kept patch that is only the place of another token."""
    (stage,) = run.trace.stages
    assert stage.kept[stage.stand_ins].tolist() == [place]


def full_width(stock: Model, pixels: Tensor) -> tuple[list[float], list[list[float]]]:
    """Softmax of CLS's query with all keys, and the patches' keys, in the encoder's last layer, heads as one."""
    with torch.no_grad():
        before = stock.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        layer = stock.model.vision_tower.encoder.layers[-1]
        normed = layer.layer_norm1(before)[0]
        query, key = plain(layer.self_attn.q_proj(normed)), plain(layer.self_attn.k_proj(normed))
    row = naive.softmax([naive.dot(query[0], k) / len(k) ** 0.5 for k in key])
    return row[1:], key[1:]


@compact_or_not
@pytest.mark.parametrize("keep", [2, 3, 9, 36])
@pytest.mark.parametrize("method", ["prumerge", "prumerge+"])
def test_prumerge(tiny: Tiny, stock: Model, model: Model, method: str, keep: int, positions: str) -> None:
    hidden, _, _ = whole(stock, pixels_of(tiny))
    attention, key = full_width(stock, pixels_of(tiny))
    kept = naive.descending(attention)[: keep - 1]
    if method == "prumerge+":
        kept = naive.with_samples(attention, -(-(keep - 1) // 4), keep - 1)
    features, place, into = naive.take_up_neighbours(hidden[1:], key, attention, kept, 32)
    run = prune(tiny, model, [tiny.sample()], method=method, keep=keep, positions=positions)
    check_merged(run, stock, features, [*kept, place], positions == "compact")
    assert run.trace.stages[0].sources.tolist() == [into]
    check_stand_in(run, place)


def test_spatial(tiny: Tiny, stock: Model, model: Model) -> None:
    hidden, _, _ = whole(stock, pixels_of(tiny))
    run = prune(tiny, model, [tiny.sample()], method="spatial", keep=9)
    pooled, covered = naive.pool(hidden[1:], (SIDE, SIDE), (3, 3))
    torch.testing.assert_close(run.visual, project(stock, pooled), atol=1e-4, rtol=1e-4)
    assert all(place in cell for place, cell in zip(run.trace.kept("vision")[0].tolist(), covered, strict=True))


@pytest.mark.parametrize("options", [{}, {"important": 0.75, "step": 3}, {"important": 0.0}, {"important": 1.0}])
@pytest.mark.parametrize("keep", [1, 8, 9, 30])
def test_vispruner(tiny: Tiny, stock: Model, model: Model, keep: int, options: dict[str, float]) -> None:
    hidden, layers, _ = whole(stock, pixels_of(tiny))
    important = int(keep * options.get("important", 0.5))
    expected = naive.important_and_distinct(hidden[1:], layers[-1].cls, keep, important, int(options.get("step", 8)))
    check_kept(prune(tiny, model, [tiny.sample()], method="vispruner", keep=keep, **options), expected)


@pytest.mark.parametrize(
    ("alpha", "keep", "anchors"),
    [(0.1, 20, 0), (0.1, 30, 1), (0.3, 30, 2), (0.6, 20, 2), (1.0, 20, 4), (1.0, 4, 0), (1.0, 9, 1)],
)
def test_hiprune(tiny: Tiny, stock: Model, model: Model, alpha: float, keep: int, anchors: int) -> None:
    """A share of `keep` in fives, rounded, and never more than fit."""
    _, layers, _ = whole(stock, pixels_of(tiny))
    middle, deep = (naive.mean(naive.head_mean(layers[k].attention))[1:] for k in (2, -1))
    first, registers = naive.anchors_and_registers(middle, deep, (SIDE, SIDE), anchors, keep)
    run = prune(tiny, model, [tiny.sample()], method="hiprune", keep=keep, alpha=alpha, layer=2)
    check_kept(run, [*first, *registers])


def test_hiprune_reads_the_layer_that_the_paper_names(tiny: Tiny, stock: Model, model: Model) -> None:
    """The second of seven layers, as the ninth of 24."""
    _, layers, _ = whole(stock, pixels_of(tiny))
    middle, deep = (naive.mean(naive.head_mean(layers[k].attention))[1:] for k in (1, 5))
    first, registers = naive.anchors_and_registers(middle, deep, (SIDE, SIDE), 4, 20)
    check_kept(prune(tiny, model, [tiny.sample()], method="hiprune", keep=20, alpha=1.0), [*first, *registers])


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_scope(tiny: Tiny, stock: Model, model: Model, alpha: float) -> None:
    hidden, layers, _ = whole(stock, pixels_of(tiny))
    weight = [a**alpha for a in layers[-1].cls]
    expected = naive.coverage(naive.cosines(hidden[1:]), weight, KEEP)
    check_kept(prune(tiny, model, [tiny.sample()], method="scope", alpha=alpha), expected)


def clip_cosines(tiny: Tiny, stock: Model, question: str, last: Tensor) -> list[float]:
    """Of every patch of the encoder's last output, as CLIP projects it, with CLIP's embedding of the question."""
    clip, tokenizer = tiny.clip
    with torch.no_grad():
        words = tokenizer([question], return_tensors="pt")
        text = plain(clip.text_projection(clip.text_model(**words).pooler_output)[0])
        patches = plain(clip.visual_projection(stock.model.vision_tower.post_layernorm(last[0, 1:])))
    return [naive.cosine(patch, text) for patch in patches]


@compact_or_not
@pytest.mark.parametrize(
    ("keep", "options"),
    [(1, {}), (9, {}), (20, {"kappa": 0.5}), (20, {"rho": 0.3, "alpha": 1.0}), (9, {"rho": 1.0}), (36, {})],
)
def test_fsr(tiny: Tiny, stock: Model, model: Model, keep: int, options: dict[str, float], positions: str) -> None:
    hidden, layers, last = whole(stock, pixels_of(tiny))
    relevance = clip_cosines(tiny, stock, QUESTIONS[0], last)
    rating = naive.priority(layers[-1].cls, relevance, options.get("alpha", 3.0), 1.0)
    chosen, into = naive.focus_and_scan(hidden[1:], rating, keep, options.get("rho", 0.9), options.get("kappa", 1.0))
    run = prune(tiny, model, [tiny.sample(QUESTIONS[0])], method="fsr", keep=keep, positions=positions, **options)
    tokens = dict(zip(chosen, naive.refined(hidden[1:], rating, chosen, into), strict=True))
    check_merged(run, stock, [tokens[place] for place in sorted(chosen)], sorted(chosen), positions == "compact")
    assert run.trace.stages[0].sources.tolist() == [into]


# --- behind the projector ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("keep", [1, 9, 36])
def test_divprune(tiny: Tiny, stock: Model, model: Model, seed: int, keep: int) -> None:
    hidden, _, _ = whole(stock, pixels_of(tiny, seed))
    distance = [[1 - c for c in row] for row in naive.cosines(plain(project(stock, hidden[1:])))]
    run = prune(tiny, model, [tiny.sample(seed=seed)], method="divprune", keep=keep)
    check_kept(run, naive.max_min(distance, keep))


@pytest.mark.parametrize("question", [0, 1, 2])
@pytest.mark.parametrize("keep", [1, 9, 20])
def test_cdpruner(tiny: Tiny, stock: Model, model: Model, question: int, keep: int) -> None:
    hidden, _, last = whole(stock, pixels_of(tiny))
    relevance = clip_cosines(tiny, stock, QUESTIONS[question], last)
    kernel = naive.conditional_kernel(plain(project(stock, hidden[1:])), relevance)
    run = prune(tiny, model, [tiny.sample(QUESTIONS[question])], method="cdpruner", keep=keep)
    check_kept(run, naive.greedy_schur(kernel, keep))


@pytest.mark.parametrize("options", [{}, {"diversity": 2.0, "coverage": 0.0}])
@pytest.mark.parametrize("keep", [1, 9, 20])
def test_tops(tiny: Tiny, stock: Model, model: Model, keep: int, options: dict[str, float]) -> None:
    hidden, layers, _ = whole(stock, pixels_of(tiny))
    similarity = naive.cosines(plain(project(stock, hidden[1:])))
    weights = options.get("diversity", 0.5), options.get("coverage", 0.5)
    expected = naive.preservation_set(similarity, layers[-1].cls, keep, *weights)
    check_kept(prune(tiny, model, [tiny.sample()], method="tops", keep=keep, **options), expected)


@pytest.mark.parametrize("options", [{}, {"crops": 5, "tau": 3.0}, {"crops": 1}])
@pytest.mark.parametrize("keep", [1, 9, 30])
def test_holov(tiny: Tiny, stock: Model, model: Model, keep: int, options: dict[str, Any]) -> None:
    hidden, layers, _ = whole(stock, pixels_of(tiny))
    crops = options.get("crops", min(round(1024 / keep), NUM_PATCHES // 2))
    features = plain(project(stock, hidden[1:]))
    expected = naive.best_of_crops(features, layers[-1].cls, crops, keep, options.get("tau", 1.0))
    check_kept(prune(tiny, model, [tiny.sample()], method="holov", keep=keep, **options), sorted(expected))


@pytest.mark.parametrize("question", [0, 1, 2])
@pytest.mark.parametrize(("keep", "alpha"), [(1, 0.5), (9, 0.5), (9, 3.0), (20, 0.0)])
def test_mmtok(tiny: Tiny, stock: Model, model: Model, question: int, keep: int, alpha: float) -> None:
    """Words are what the user asks, without the template's; several prompts ask with different numbers of them."""
    hidden, _, _ = whole(stock, pixels_of(tiny))
    asked = tiny.sample(QUESTIONS[question])
    ids = prompt_of(tiny.processor, asked.prompt, asked.question, asked.images, NUM_PATCHES)
    with torch.no_grad():
        words = plain(stock.get_input_embeddings()(ids.ids[list(ids.instruction)]))
    tokens = plain(project(stock, hidden[1:]))
    expected = naive.cover_question_and_image(words, tokens, hidden[1:], keep, alpha, (0.02, 0.2))
    batch = [asked, tiny.sample(QUESTIONS[(question + 1) % 3])]
    run = prune(tiny, model, batch, method="mmtok", keep=keep, alpha=alpha)
    assert kept_of(run, 0) == sorted(expected)


def kept_of(run: Run, row: int) -> list[int]:
    return [p for p in run.trace.kept()[row].tolist() if p >= 0]


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("method", list_methods())
def test_samples_of_a_batch_do_not_meet(tiny: Tiny, model: Model, method: str, counted: bool) -> None:
    """Several images, none at all, and padding, beside what each prompt keeps alone."""
    batch = samples(tiny, "mixed")
    together = prune(tiny, model, batch, counted, method=method)
    for row, sample in enumerate(batch):
        alone = kept_of(prune(tiny, model, [sample], method=method), 0) if sample.images else []
        assert kept_of(together, row) == alone


# --- inside the encoder --------------------------------------------------------------------------------------------


@compact_or_not
@pytest.mark.parametrize("places", ["layers", "three"])
def test_evit(tiny: Tiny, stock: Model, model: Model, places: str, positions: str) -> None:
    run = prune(tiny, model, [tiny.sample()], method="evit", places=places, positions=positions)
    stages = {stage.layer: stage for stage in run.trace.stages}
    patches, sources = list(range(NUM_PATCHES)), list(range(NUM_PATCHES))

    def step(number: int, hidden: Tensor, layer: Layer) -> Tensor:
        if number not in stages:
            return hidden
        count = stages[number].kept.shape[1]
        kept, gone, fused = naive.keep_and_fuse(plain(hidden[0, 1:]), layer.cls, count - 1)
        place = gone[naive.argmax([layer.cls[i] for i in gone])]
        sources[:] = naive.follow(sources, patches, [i if i in kept else place for i in range(len(patches))])
        patches[:] = [patches[i] for i in [*kept, place]]
        assert stages[number].kept.tolist() == [sorted(patches)]
        assert stages[number].sources.tolist() == [sources]
        return torch.cat([hidden[:, [0, *(1 + i for i in kept)]], torch.tensor([[fused]]).to(hidden)], dim=1)

    hidden = encode(stock, pixels_of(tiny), step)[-1]
    assert len(stages) == {"layers": 6, "three": 3}[places]
    assert len(patches) == KEEP
    check_merged(run, stock, plain(hidden[0, 1:]), patches, positions == "compact")


@compact_or_not
@pytest.mark.parametrize("keep", [1, 9, 30])
def test_tome(tiny: Tiny, stock: Model, model: Model, keep: int, positions: str) -> None:
    run = prune(tiny, model, [tiny.sample()], method="tome", keep=keep, positions=positions)
    patches, size = [-1, *range(NUM_PATCHES)], [1.0] * (1 + NUM_PATCHES)
    sources = list(range(NUM_PATCHES))

    def bias() -> Tensor:
        return torch.tensor(size).log()[None, None, None]

    def step(number: int, hidden: Tensor, layer: Layer) -> Tensor:
        metric = [naive.mean([head[t] for head in layer.key]) for t in range(len(patches))]
        into, stay = naive.match(metric, len(patches) - 1 - run.trace.stages[number].kept.shape[1])
        merged = naive.merge_by_size(plain(hidden[0]), size, into)
        size[:] = [sum(s for s, target in zip(size, into, strict=True) if target == column) for column in stay]
        sources[:] = naive.follow(sources, patches, into)
        patches[:] = [patches[column] for column in stay]
        assert run.trace.stages[number].kept.tolist() == [sorted(patches[1:])]
        assert run.trace.stages[number].sources.tolist() == [sources]
        return torch.tensor([[merged[column] for column in stay]]).to(hidden)

    hidden = encode(stock, pixels_of(tiny), step, bias)[-1]
    assert len(patches) == 1 + keep
    check_merged(run, stock, plain(hidden[0, 1:]), patches[1:], positions == "compact")


@compact_or_not
@pytest.mark.parametrize("keep", [1, 9, 30])
def test_ivtp_plus_in_the_encoder(tiny: Tiny, stock: Model, model: Model, keep: int, positions: str) -> None:
    """What leaves at the end of a group of three layers merges; the decoder's part is IVTP's (`test_reference`)."""
    run = prune(tiny, model, [tiny.sample()], method="ivtp+", keep=keep, positions=positions)
    stages = {stage.layer: stage for stage in run.trace.stages if stage.where == "vision"}
    assert list(stages) == [2, 5]
    patches, size, sources = list(range(NUM_PATCHES)), [1.0] * NUM_PATCHES, list(range(NUM_PATCHES))

    def step(number: int, hidden: Tensor, layer: Layer) -> Tensor:
        if number not in stages:
            return hidden
        metric = [naive.mean([head[1 + t] for head in layer.key]) for t in range(len(patches))]
        into = naive.merge_redundant(metric, stages[number].kept.shape[1], [False] * len(patches))
        merged = naive.merge_by_size(plain(hidden[0, 1:]), size, into)
        stay = sorted(merged)
        sources[:] = naive.follow(sources, patches, into)
        size[:] = [sum(s for s, target in zip(size, into, strict=True) if target == column) for column in stay]
        patches[:] = [patches[column] for column in stay]
        assert stages[number].kept.tolist() == [patches]
        assert stages[number].sources.tolist() == [sources]
        return torch.cat([hidden[:, :1], torch.tensor([[merged[column] for column in stay]]).to(hidden)], dim=1)

    hidden = encode(stock, pixels_of(tiny), step)[-1]
    check_merged(run, stock, plain(hidden[0, 1:]), patches, positions == "compact")


def test_dynamicvit(tiny: Tiny, stock: Model, model: Model) -> None:
    run = prune(tiny, model, [tiny.sample()], method="dynamicvit", seed=5)
    counts = uniform_ratio(NUM_PATCHES, KEEP, 3)
    predictors = Predictors(stock.config.vision_config.hidden_size, 3, 5)
    stages = {stage.layer: stage for stage in run.trace.stages}
    assert sorted(stages) == [1, 2, 3]  # before the later quarters of six layers: 1.5, 3 and 4.5, rounded to even
    tower, patches = stock.model.vision_tower, list(range(NUM_PATCHES))
    with torch.no_grad():
        hidden = tower.pre_layrnorm(tower.embeddings(pixels_of(tiny)))
        for number, layer in enumerate(tower.encoder.layers[:-1]):
            hidden = layer(hidden, None)
            if number in stages:
                place = sorted(stages).index(number)
                tokens = hidden[:, 1:]
                keep = plain(predictors[place](tokens, torch.ones_like(tokens[..., :1]))[0, :, 0])
                stay = sorted(naive.descending(keep)[: counts[place]])
                patches = [patches[i] for i in stay]
                assert stages[number].kept.tolist() == [patches]
                hidden = hidden[:, [0, *(1 + i for i in stay)]]
    torch.testing.assert_close(run.visual, project(stock, plain(hidden[0, 1:])), atol=1e-4, rtol=1e-4)


# --- in the decoder ------------------------------------------------------------------------------------------------


class Decoder:
    """The stock decoder on one unpadded prompt, its columns leaving by hand; positions are those of the prompt."""

    def __init__(self, tiny: Tiny, stock: Model, sample: Sample) -> None:
        self.layers, self.rotary = stock.model.language_model.layers, stock.model.language_model.rotary_emb
        inputs, entered = tiny.inputs(sample), []
        hook = stock.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        with torch.no_grad():
            stock(**inputs)
        hook.remove()
        self.hidden: Tensor = entered[0]
        self.columns = list(range(self.hidden.shape[1]))
        image = inputs["input_ids"][0] == tiny.processor.image_token_id
        self.slots = image.nonzero().flatten().tolist()
        self.images = len(self.slots) // NUM_PATCHES
        self.asked = prompt_of(tiny.processor, sample.prompt, sample.question, sample.images, NUM_PATCHES).instruction
        self.next = 0

    @property
    def visual(self) -> list[bool]:
        return [c in self.slots for c in self.columns]

    @property
    def question(self) -> list[bool]:
        """What the user asks: not the role words around it."""
        return [c in self.asked for c in self.columns]

    @property
    def patches(self) -> list[int]:
        return [self.slots.index(c) for c in self.columns if c in self.slots]

    @torch.no_grad()
    def attend(self, number: int) -> tuple[Tensor, Any, Any]:
        """Output of the attention block of a layer, its weights and its keys, turned by their positions."""
        layer, length = self.layers[number], len(self.columns)
        normed = layer.input_layernorm(self.hidden)
        turn = self.rotary(self.hidden, torch.tensor([self.columns]))
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        out, weights = layer.self_attn(normed, position_embeddings=turn, attention_mask=mask)
        key = layer.self_attn.k_proj(normed).view(1, length, -1, layer.self_attn.head_dim).transpose(1, 2)
        first, second = key.chunk(2, dim=-1)
        key = key * turn[0][:, None] + torch.cat([-second, first], dim=-1) * turn[1][:, None]
        return out, plain(weights[0]), plain(key[0])

    @torch.no_grad()
    def advance(self) -> tuple[Any, Any]:
        """Run the next layer; returns its attention head by head and its keys."""
        out, weights, key = self.attend(self.next)
        hidden = self.hidden + out
        layer = self.layers[self.next]
        self.hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden)).detach()
        self.next += 1
        return weights, key

    def keep(self, stay: set[int]) -> None:
        """Keep these of the columns' places, and all text."""
        places = [i for i, is_visual in enumerate(self.visual) if i in stay or not is_visual]
        self.hidden = self.hidden[:, places]
        self.columns = [self.columns[i] for i in places]

    def shares(self, budget: str) -> list[tuple[list[int], int]]:
        """Places of visual tokens that share a budget, and how many times `keep` it is."""
        visual = [i for i, is_visual in enumerate(self.visual) if is_visual]
        if budget == "prompt":
            return [(visual, self.images)]
        image = {i: patch // NUM_PATCHES for i, patch in zip(visual, self.patches, strict=True)}
        return [([i for i in visual if image[i] == m], 1) for m in range(self.images)]

    def highest(self, scores: list[float], count: int, budget: str) -> set[int]:
        stay: set[int] = set()
        for places, times in self.shares(budget):
            stay |= {places[k] for k in naive.descending([scores[i] for i in places])[: times * count]}
        return stay


def decoders(tiny: Tiny, stock: Model, batch: list[Sample]) -> list[Decoder | None]:
    return [Decoder(tiny, stock, sample) if sample.images else None for sample in batch]


def check_stage(run: Run, stage: int, layer: int, expected: list[list[int]]) -> None:
    """Rows that keep fewer end in -1."""
    assert run.trace.stages[stage].layer == layer
    width = max(map(len, expected))
    assert run.trace.stages[stage].kept.tolist() == [row + [-1] * (width - len(row)) for row in expected]


either_budget = pytest.mark.parametrize(
    ("name", "budget"), [("batch", "image"), ("mixed", "image"), ("mixed", "prompt"), ("two images", "image")]
)


@either_budget
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_fastv(tiny: Tiny, stock: Model, model: Model, name: str, budget: str, layer: int) -> None:
    batch, expected = samples(tiny, name), []
    for decoder in decoders(tiny, stock, batch):
        if decoder is None:
            expected.append([])
            continue
        for _ in range(layer):
            weights, _ = decoder.advance()
        decoder.keep(decoder.highest(naive.head_mean(weights)[-1], KEEP, budget))
        expected.append(decoder.patches)
    check_stage(prune(tiny, model, batch, method="fastv", layer=layer, budget=budget), 0, layer - 1, expected)


@either_budget
@pytest.mark.parametrize("changes", [{"keep": 5}, {"schedule": (30, 12, 3)}])
def test_pyramiddrop(tiny: Tiny, stock: Model, model: Model, name: str, budget: str, changes: dict[str, Any]) -> None:
    batch = samples(tiny, name)
    counts = changes.get("schedule") or [18, 9, 5]
    if "keep" in changes:
        counts = uniform_ratio(NUM_PATCHES, changes["keep"], 3)
        assert all(abs(a - b) <= 1 for a, b in zip(counts, (18, 9, 5), strict=True))  # the paper's halves
    expected: list[list[list[int]]] = [[], [], []]
    for decoder in decoders(tiny, stock, batch):
        for stage, count in enumerate(counts):
            if decoder is None:
                expected[stage].append([])
                continue
            decoder.advance(), decoder.advance()
            _, weights, _ = decoder.attend(decoder.next)
            decoder.keep(decoder.highest(naive.head_mean(weights)[-1], count, budget))
            expected[stage].append(decoder.patches)
    run = prune(tiny, model, batch, method="pyramiddrop", budget=budget, **changes)
    for stage, rows in enumerate(expected):
        check_stage(run, stage, 2 * stage + 1, rows)


@pytest.mark.parametrize("keep", [10, 17, 35])
def test_pyramiddrop_with_a_mean_budget(tiny: Tiny, model: Model, keep: int) -> None:
    run = prune(tiny, model, [tiny.sample()], method="pyramiddrop", keep=keep, keep_is="mean")
    assert run.trace.tokens_per_layer is not None
    assert keep - 1 < run.trace.tokens_per_layer.equivalent[0] <= keep


def recycle(decoder: Decoder, places: list[int], scores: list[float], after: int) -> dict[int, int]:
    """Where each place that is not lost goes, so that `after` remain; merges the decoder's hidden states."""
    before = len(places)
    clusters, recycled = next(
        (c, int(0.3 * (before - after + c)))
        for c in range(1, after + 1)
        if int(0.3 * (before - after + c)) // 10 + 1 == c
    )
    ranked = [places[k] for k in naive.descending(scores)]
    kept = ranked[: after - clusters]
    best = sorted(ranked[after - clusters :][: max(recycled, clusters)])
    hidden = plain(decoder.hidden[0])
    centres, member = naive.density_peaks([hidden[i] for i in best], clusters, 5)
    for centre in centres:
        mean = naive.mean([hidden[i] for i, m in zip(best, member, strict=True) if m == centre])
        decoder.hidden[0, best[centre]] = torch.tensor(mean)
    return {i: i for i in kept} | {i: best[m] for i, m in zip(best, member, strict=True)}


@either_budget
@pytest.mark.parametrize("schedule", [(24, 12, 6), (10, 5, 2)])
def test_sparsevlm(tiny: Tiny, stock: Model, model: Model, name: str, budget: str, schedule: tuple[int, ...]) -> None:
    """Raters once, from the embeddings; then at each cut what stays, and the centres of what is recycled.

    One question rates the tokens of all images; what is recycled of an image stays with it unless they share a budget.
    """
    batch, layers = samples(tiny, name), (0, 1, 3)
    expected: list[list[list[int]]] = [[], [], []]
    sources: list[list[list[int]]] = [[], [], []]
    for decoder in decoders(tiny, stock, batch):
        if decoder is None:
            for stage in range(3):
                expected[stage].append([])
                sources[stage].append([])
            continue
        weights_of = dict(
            zip(decoder.columns, naive.raters(plain(decoder.hidden[0]), decoder.visual, decoder.question), strict=True)
        )
        stands = list(range(len(decoder.slots)))
        for stage, (layer, count) in enumerate(zip(layers, schedule, strict=True)):
            while decoder.next <= layer:
                weights, _ = decoder.advance()
            rows = naive.head_mean(weights)
            scores = naive.weighted_sum(rows, [weights_of[c] for c in decoder.columns])
            goes: dict[int, int] = {}
            for places, times in decoder.shares(budget):
                goes |= recycle(decoder, places, [scores[i] for i in places], times * count)
            place = {decoder.slots.index(c): i for i, c in enumerate(decoder.columns) if decoder.visual[i]}
            target = {p: decoder.slots.index(decoder.columns[goes[i]]) for p, i in place.items() if i in goes}
            stands = [target.get(s, -1) for s in stands]
            decoder.keep(set(goes.values()))
            expected[stage].append(decoder.patches)
            sources[stage].append(list(stands))
    run = prune(tiny, model, batch, method="sparsevlm", keep=schedule[-1], schedule=schedule, budget=budget)
    for stage, layer in enumerate(layers):
        check_stage(run, stage, layer, expected[stage])
        for row, actual in zip(sources[stage], run.trace.stages[stage].sources.tolist(), strict=True):
            assert actual[: len(row)] == row
            assert set(actual[len(row) :]) <= {-1}


@either_budget
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("changes", [{}, {"pivots": 2, "layer": 3}, {"keep": 3}, {"keep": 30, "pivots": 1}])
def test_dart(
    tiny: Tiny, stock: Model, model: Model, name: str, budget: str, counted: bool, changes: dict[str, int]
) -> None:
    """As the authors' code: L1 norms of keys as an unpadded prompt has them; cosines behind the decoder's last norm."""
    batch, expected = samples(tiny, name), []
    layer, keep, pivots = changes.get("layer", 2), changes.get("keep", KEEP), changes.get("pivots", 4)
    for decoder in decoders(tiny, stock, batch):
        if decoder is None:
            expected.append([])
            continue
        for _ in range(layer):
            _, key = decoder.advance()
        norms = [sum(abs(x) for head in key for x in head[t]) for t in range(len(decoder.columns))]
        with torch.no_grad():
            hidden, stay = plain(stock.model.language_model.norm(decoder.hidden[0])), set()
        for places, times in decoder.shares(budget):
            own = [i in places for i in range(len(decoder.columns))]
            stay |= naive.least_similar(hidden, norms, own, decoder.question, times * keep, pivots)
        decoder.keep(stay)
        expected.append(decoder.patches)
    run = prune(tiny, model, batch, counted, method="dart", budget=budget, **changes)
    check_stage(run, 0, layer - 1, expected)
