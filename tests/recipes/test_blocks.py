"""The shared-prefix forward equals the stock model on each question alone."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.micro import blocks


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def test_every_block_equals_its_question_alone(monkeypatch) -> None:
    monkeypatch.setattr(blocks, "_CHUNK", 4)
    model = tiny_llama()
    prefix = torch.randn(2, 7, 32)
    positions = torch.tensor([[0, 1, 3, 4, 8, 9, 15], [0, 1, 2, 5, 6, 7, 12]])
    questions = [[([5, 6, 7], [8, 9], 0), ([10, 11], [12], 1)], [([13, 14, 15, 16], [17, 2, 3], 2)]]
    text = blocks.pack(questions)
    with torch.no_grad():
        logits = model.lm_head(blocks.forward_blocks(model.model, prefix, positions, text, 20))
    start = 0
    for scene, asked in enumerate(questions):
        for prompt, answer, kind in asked:
            ids = torch.tensor([prompt + answer[:-1]])
            embeds = torch.cat((prefix[scene : scene + 1], model.model.embed_tokens(ids)), dim=1)
            ids_at = torch.cat((positions[scene : scene + 1], 20 + torch.arange(ids.shape[1])[None]), dim=1)
            with torch.no_grad():
                alone = model(inputs_embeds=embeds, position_ids=ids_at).logits[0, 7:]
            end = start + ids.shape[1]
            torch.testing.assert_close(logits[start:end], alone, atol=1e-4, rtol=1e-4)
            labels = [blocks.IGNORE] * (len(prompt) - 1) + answer
            assert text.labels[start:end].tolist() == labels
            assert set(text.kinds[start:end].tolist()) == {kind}
            start = end
    assert start == len(text.ids)
