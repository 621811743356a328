"""The question is what the user typed in the last user turn, however the prompt was written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import NUM_PATCHES, QUESTIONS, Sample, Tiny, samples
from vocabularies import IMAGE, TOKENIZERS, byte_level

import ivtp
from ivtp.errors import ConfigError, LoadError
from ivtp.prompt.instruction import Instruction, InstructionReader

USER, ASSISTANT = "user", "assistant"
Turn = tuple[str, str]

LLAVA = byte_level().chat_template
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><image><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% set ns = namespace(text='A chat between a human and an assistant, who answers the user.') %}"
    "{% if messages[0]['role'] == 'system' %}{% set ns.text = messages[0]['content'] %}{% endif %}{{ ns.text }}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}{{ ' USER: ' + m['content'] | trim }}"
    "{% else %}{{ ' ASSISTANT: ' + m['content'] | trim + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<s>[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
VICUNA_1 = (
    "{% for m in messages %}{{ '### ' + ('Human' if m['role'] == 'user' else 'Assistant') + ': ' }}"
    "{{ m['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:' }}{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + m['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEMPLATES = {
    "llava": LLAVA,
    "chatml": CHATML,
    "vicuna": VICUNA,
    "vicuna 1": VICUNA_1,
    "llama 2": LLAMA_2,
    "llama 3": LLAMA_3,
    "gemma": GEMMA,
}
MARKS = [
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip


def tokenizer_with(template: str | None) -> Any:
    """A byte-level tokenizer whose chat template this is; the templates' marks are special tokens."""
    made = type(byte_level())(
        tokenizer_object=byte_level().backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=[IMAGE, *MARKS],
    )
    made.chat_template = template
    return made


def read(tokenizer: Any, prompt: str, *, plain: bool = False) -> Instruction:
    """The instruction of a written prompt; `plain`: names of special tokens in it are letters."""
    if plain:
        ids = tokenizer(prompt, split_special_tokens=True)["input_ids"]
        return InstructionReader(tokenizer).read(ids, range(len(ids)))
    ids = tokenizer(prompt.replace(IMAGE, IMAGE * 4))["input_ids"]
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    columns = [i for i, token in enumerate(ids) if token != image]
    return InstructionReader(tokenizer).read([ids[i] for i in columns], columns)


def write(tokenizer: Any, turns: list[Turn], *, asks: bool = True, image: bool = True) -> str:
    """The conversation as its template writes it, the image in the first user turn."""
    messages: list[dict[str, Any]] = []
    for role, text in turns:
        shown = image and role == USER
        image = image and not shown
        if "part" in tokenizer.chat_template:
            content: Any = [*[{"type": "image"}] * shown, {"type": "text", "text": text}]
        else:
            content = f"{IMAGE}\n" * shown + text
        messages.append({"role": role, "content": content})
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False))


TALKS: dict[str, list[Turn]] = {
    "one turn": [(USER, QUESTIONS[3])],
    "two turns": [(USER, QUESTIONS[0]), (ASSISTANT, "A cat."), (USER, QUESTIONS[1])],
    "three turns": [
        (USER, QUESTIONS[0]),
        (ASSISTANT, "A cat."),
        (USER, QUESTIONS[1]),
        (ASSISTANT, "Two."),
        (USER, QUESTIONS[2]),
    ],
}


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_user_turn(name: str, talk: str, asks: bool) -> None:
    """With and without a generation prompt."""
    tokenizer = tokenizer_with(TEMPLATES[name])
    found = read(tokenizer, write(tokenizer, TALKS[talk], asks=asks))
    assert found.text == TALKS[talk][-1][1]
    assert {c for a, b in found.spans for c in range(a, b)} == set(range(len(found.text)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_that_ends_in_an_answer(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    found = read(tokenizer, write(tokenizer, [*TALKS["two turns"], (ASSISTANT, "Two bananas.")], asks=False))
    assert found.text == QUESTIONS[1]


@pytest.mark.parametrize("earlier", [[], TALKS["two turns"][:2]])
@pytest.mark.parametrize(
    "question",
    [
        "Who wrote 'USER: hello'?",
        "Who wrote USER: hello?",
        "USER: is that you?",
        "ASSISTANT: is that you?",
        "What did the ASSISTANT: say?",
        "What is the user: a model, [INST] or ### Human: dog?",
        "Say ASSISTANT:",
        "Which of ASSISTANT: and ASSISTANT: comes first?",
    ],
)
@pytest.mark.parametrize("name", TEMPLATES)
def test_role_words_inside_a_question(name: str, question: str, earlier: list[Turn]) -> None:
    """A turn begins behind an answer: role words that stand elsewhere are what the user typed."""
    tokenizer = tokenizer_with(TEMPLATES[name])
    found = read(tokenizer, write(tokenizer, [*earlier, (USER, question)]))
    assert found.text == question


def test_role_words_without_a_generation_prompt() -> None:
    tokenizer = tokenizer_with(LLAVA)
    found = read(tokenizer, write(tokenizer, [(USER, "Who wrote USER: hello?")], asks=False))
    assert found.text == "Who wrote USER: hello?"


@pytest.mark.parametrize("name", ["chatml", "llama 3", "gemma"])
def test_special_tokens_as_plain_text(name: str) -> None:
    """What merely reads like a template's tokens, and is other tokens, opens and closes nothing."""
    tokenizer = tokenizer_with(TEMPLATES[name])
    fake = "Is this <image> an <|im_end|>\n<|im_start|>user\n<|eot_id|><end_of_turn>\n<start_of_turn>user\nend?"
    written = write(tokenizer, [(USER, "first-question-here")], image=False)
    before, behind = written.split("first-question-here")
    ids = [
        *tokenizer(before)["input_ids"],
        *tokenizer(fake, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        *tokenizer(behind, add_special_tokens=False)["input_ids"],
    ]
    assert InstructionReader(tokenizer).read(ids, range(len(ids))).text == fake


@pytest.mark.parametrize("name", ["llava", "chatml", "vicuna", "llama 2", "llama 3"])
def test_a_system_prompt_is_no_instruction(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    turns = [("system", "Be brief. The USER: is kind."), (USER, QUESTIONS[0])]
    assert read(tokenizer, write(tokenizer, turns)).text == QUESTIONS[0]


def test_what_a_template_writes_around_an_image_is_no_instruction() -> None:
    """Also in the middle of a text."""
    tokenizer = tokenizer_with(CHATML)
    content = [{"type": "text", "text": "Is this "}, {"type": "image"}, {"type": "text", "text": " a dog?"}]
    prompt = tokenizer.apply_chat_template(
        [{"role": USER, "content": content}], add_generation_prompt=True, tokenize=False
    )
    found = read(tokenizer, prompt)
    assert found.text == "Is this  a dog?"
    assert {c for a, b in found.spans for c in range(a, b)} == set(range(len(found.text)))


@pytest.mark.parametrize(
    "prompt",
    [
        f"USER: {IMAGE}\n{QUESTIONS[0]}\nASSISTANT:",
        f"{IMAGE}\nUSER: {QUESTIONS[0]}\nASSISTANT:",
        f"USER: {IMAGE}\n{QUESTIONS[0]}ASSISTANT: ",
        f"USER: {QUESTIONS[0]} {IMAGE} ASSISTANT:",
        f"A chat. USER: {IMAGE}\nIs it a cat? ASSISTANT: Yes</s>USER: {QUESTIONS[0]} ASSISTANT:",
        f"it a cat? ASSISTANT: Yes USER: {QUESTIONS[0]} ASSISTANT:",
        f"Yes, I do. USER: {QUESTIONS[0]} ASSISTANT:",
        f"{QUESTIONS[0]} ASSISTANT:",
        f"{IMAGE}\n{QUESTIONS[0]}",
    ],
)
def test_prompts_written_by_hand(prompt: str) -> None:
    """Other white space, the order of older model cards, and windows of a longer prompt."""
    assert read(tokenizer_with(LLAVA), prompt).text == QUESTIONS[0]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("question", ["", "  ", "\n\n", "\u00a0"])
def test_a_blank_question_has_no_tokens(kind: str, question: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    assert read(tokenizer, write(tokenizer, [(USER, question)])) == Instruction("", [], [])


def test_without_a_template_the_whole_text_counts() -> None:
    """But for special tokens at its ends and next to images."""
    tokenizer = tokenizer_with(None)
    found = read(tokenizer, f"{IMAGE}<|vision_end|>USER: what is </s> here?</s>")
    assert found.text == "USER: what is </s> here?"


def test_the_template_of_the_tokenizer(tiny: Tiny) -> None:
    """Many processors have none of their own."""
    asked = f"USER: {IMAGE * NUM_PATCHES}\n{QUESTIONS[0]} ASSISTANT:"
    template = tiny.processor.chat_template
    tiny.processor.chat_template, tiny.processor.tokenizer.chat_template = None, template
    try:
        ids = [i for i in tiny.processor.tokenizer(asked)["input_ids"] if i != tiny.processor.image_token_id]
        assert InstructionReader(tiny.processor).read(ids, range(len(ids))).text == QUESTIONS[0]
    finally:
        tiny.processor.chat_template, tiny.processor.tokenizer.chat_template = template, None


@pytest.mark.parametrize("template", ["{{ messages", "{{ raise_exception('no') }}", "{{ 1 + '' }}", "{{ bos_token }}"])
def test_a_broken_template_is_one_clear_line(template: str) -> None:
    with pytest.raises(LoadError, match="chat template") as caught:
        InstructionReader(tokenizer_with(template))
    assert "\n" not in str(caught.value)


def test_what_reads_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="AutoProcessor"):
        InstructionReader(object())


@pytest.mark.parametrize(
    ("question", "asks"),
    [
        ("who wrote 'user: hello'?", True),
        ("who wrote 'user: hello'?", False),
        ("Who wrote USER: hello?", True),
        ("Who wrote USER: hello?", False),
        ("assistant: left of 左边 the ™ dog 😀?", True),
    ],
)
def test_the_embedded_model(question: str, asks: bool) -> None:
    """Its tokenizer lower-cases, so every "user:" reads like a role word."""
    processor = ivtp.load("micro")[1]
    turns = [(USER, QUESTIONS[0]), (ASSISTANT, "yes"), (USER, question)]
    messages = [
        {"role": role, "content": [*[{"type": "image"}] * (i == 0), {"type": "text", "text": text}]}
        for i, (role, text) in enumerate(turns)
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False)
    ids = [i for i in processor.tokenizer(prompt)["input_ids"] if i != processor.image_token_id]
    assert InstructionReader(processor).read(ids, range(len(ids))).text == question.lower()


# --- one reader for all methods ------------------------------------------------------------------------------------


def second_turn(tiny: Tiny) -> Sample:
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "The blue house."}]},
        {"role": "user", "content": [{"type": "text", "text": QUESTIONS[1]}]},
    ]
    return Sample(tiny.chat(turns), QUESTIONS[1], samples(tiny, "one")[0].images)


def asked_columns(tiny: Tiny, sample: Sample) -> set[int]:
    """Columns of the typed question, by the tokenizer's own offsets."""
    prompt = sample.prompt.replace(IMAGE, IMAGE * NUM_PATCHES)
    offsets = tiny.processor.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    start = prompt.rindex(sample.question)
    return {i for i, (a, b) in enumerate(offsets) if a < start + len(sample.question) and b > start}


@pytest.mark.parametrize("method", ["sparsevlm", "dart", "tome+sparsevlm", "ivtp"])
def test_all_methods_read_the_same_question(tiny: Tiny, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a second turn: its question alone, without the first one, the answer and the role words."""
    model, sample, seen = tiny.model(), second_turn(tiny), []
    options: dict[str, Any] = {"guide": "text"} if method == "ivtp" else {}
    with torch.no_grad(), tiny.attach(model, method=method, **options) as pruner:
        if method != "ivtp":
            chosen = getattr(pruner.method, "llm", pruner.method)
            stock = chosen.read_text
            monkeypatch.setattr(
                chosen,
                "read_text",
                lambda entry, visual, text, tail: seen.append((text, tail)) or stock(entry, visual, text, tail),
            )
        model(**tiny.inputs(sample))
        prompts = pruner.thread.record.prompts
    assert set(prompts.instructions[0].columns) == asked_columns(tiny, sample)
    for text, tail in seen:
        gone = prompts.length - text.shape[1]
        assert {c + gone for c in text[0].nonzero().flatten().tolist()} == asked_columns(tiny, sample)
        assert not text[:, :-tail].any()


@pytest.mark.parametrize("method", ["sparsevlm", "dart", "mmtok"])
def test_without_a_processor_all_text_behind_the_image_is_read(tiny: Tiny, method: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(second_turn(tiny))
    slots = (inputs["input_ids"][0] == tiny.processor.image_token_id).nonzero().flatten()
    with torch.no_grad(), ivtp.attach(model, None, tiny.config(method=method)) as pruner:
        model(**inputs)
        question = pruner.thread.record.prompts.question[0]
    assert question.nonzero().flatten().tolist() == list(range(int(slots[-1]) + 1, inputs["input_ids"].shape[1]))


@pytest.mark.parametrize("method", ["sparsevlm", "dart", "mmtok"])
def test_a_question_in_front_of_its_image(tiny: Tiny, method: str) -> None:
    """Templates that keep the order of a message write it there; it is read there."""
    model, sample = tiny.model(), samples(tiny, "one")[0]
    behind = sample.prompt.replace(f"{IMAGE}\n", "").replace(" ASSISTANT:", f" {IMAGE} ASSISTANT:")
    moved = Sample(behind, sample.question, sample.images)
    with torch.no_grad(), tiny.attach(model, method=method) as pruner:
        model(**tiny.inputs(moved))
        assert set(pruner.thread.record.prompts.question[0].nonzero().flatten().tolist()) == asked_columns(tiny, moved)
        kept = pruner.trace.kept().tolist()
        model(**tiny.inputs(Sample(behind.replace("small", "blue"), "", sample.images)))
        assert pruner.trace.kept().shape[1] == len(kept[0])


def test_a_prompt_is_read_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks for it: CDPruner and SparseVLM together, beams, a prompt without an image."""
    model, calls = tiny.model(), []
    stock = InstructionReader.read
    monkeypatch.setattr(InstructionReader, "read", lambda *args: calls.append(args) or stock(*args))
    with tiny.attach(model, method="cdpruner+sparsevlm", keep="20+6"):
        model.generate(**tiny.inputs(*samples(tiny, "mixed")), max_new_tokens=2, num_beams=2)
    assert len(calls) == 3


@pytest.mark.parametrize("guide", ["text", "instruction"])
def test_a_blank_question_leaves_the_guide_to_the_image(tiny: Tiny, guide: str) -> None:
    """No token of a role word stands in."""
    model, inputs = tiny.model(), tiny.inputs(tiny.sample("  "))
    with torch.no_grad(), tiny.attach(model, guide=guide) as pruner:
        model(**inputs)
        kept = pruner.trace.kept().tolist()
        assert pruner.trace.fallback == [True]
    with torch.no_grad(), tiny.attach(model, guide="visual") as pruner:
        model(**inputs)
        assert pruner.trace.kept().tolist() == kept


@pytest.mark.parametrize("method", ["sparsevlm", "dart", "mmtok"])
def test_a_blank_question_does_not_keep_the_first_patches(tiny: Tiny, method: str) -> None:
    """All text behind the image is read then."""
    model, inputs = tiny.model(), tiny.inputs(tiny.sample("  "))
    with torch.no_grad(), tiny.attach(model, method=method) as pruner:
        model(**inputs)
        kept = pruner.trace.kept().tolist()
    with torch.no_grad(), ivtp.attach(model, None, tiny.config(method=method)) as pruner:
        model(**inputs)
        assert pruner.trace.kept().tolist() == kept


def test_decomposed_letters_are_as_relevant_as_composed_ones(tiny: Tiny) -> None:
    """Every token of a decomposed syllable has the relevance of the word that CLIP reads."""
    model, found = tiny.model(), {}
    for form, question in {"NFC": "한국 dog é", "NFD": "\u1112\u1161\u11ab\u1100\u116e\u11a8 dog e\u0301"}.items():
        with torch.no_grad(), tiny.attach(model, threshold=-1) as pruner:
            model(**tiny.inputs(tiny.sample(question)))
        found[form] = pruner.trace.words[0]
        prompts, token = pruner.thread.record.prompts, pruner.thread.record.guides[0].token
        typed = prompts.instructions[0]
        columns = [c for c, (a, b) in zip(typed.columns, typed.spans, strict=True) if typed.text[a:b].strip()]
        mean = model.get_input_embeddings().weight[prompts.ids[0, columns]].mean(dim=0)
        torch.testing.assert_close(token, mean)  # nothing is below the threshold: no token is left out
        assert all(word.used for word in found[form])
        assert "".join(word.text for word in found[form]) == question.replace(" ", "")
    assert [w.score for w in found["NFD"]] == pytest.approx([w.score for w in found["NFC"]], abs=1e-6)
