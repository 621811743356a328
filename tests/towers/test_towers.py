"""The towers of every registered family, on its tiny model."""

from __future__ import annotations

import pytest
import torch

from ivtp.plug import find_host
from ivtp.registry import host_class, list_hosts

HOSTS = list_hosts()


@pytest.mark.parametrize("name", HOSTS)
def test_the_halves_of_a_layer_make_the_layer(name: str) -> None:
    """`attend` and `feed_forward` are the stock layer cut in two, given what the tower gives its layers."""
    model, processor = host_class(name).tiny()
    host, found = find_host(model), []
    inputs = host.tiny_inputs(model, processor)
    hook = host.vision.layers[0].register_forward_hook(lambda *call: found.append(call[1:]), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
        hook.remove()
        ((arguments, named, output),) = found
        halves = host.vision.feed_forward(0, host.vision.attend(0, *arguments, **named))
    torch.testing.assert_close(halves, output[0] if isinstance(output, tuple) else output)


@pytest.mark.parametrize("name", HOSTS)
def test_the_last_norm_is_that_of_the_decoder(name: str) -> None:
    host = find_host(host_class(name).tiny()[0])
    embedded = torch.randn(2, 7, host.size.text_hidden, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = host.text.module(inputs_embeds=embedded, output_hidden_states=True)
        before = [embedded]
        hook = host.text.layers[-1].register_forward_hook(lambda module, args, out: before.append(out))
        host.text.module(inputs_embeds=embedded)
        hook.remove()
        last = before[-1][0] if isinstance(before[-1], tuple) else before[-1]
        torch.testing.assert_close(host.text.final_norm(last), output.last_hidden_state)


@pytest.mark.parametrize("stretch", [1.0, 1.3])
@pytest.mark.parametrize("turned", [12, 8])
@pytest.mark.parametrize("name", HOSTS)
def test_keys_are_turned_back(name: str, turned: int, stretch: float) -> None:
    """To what they are when positions begin at 0, also where some channels are not turned and the others stretched."""
    host = find_host(host_class(name).tiny()[0])
    raw = torch.randn(2, 2, 5, 12, generator=torch.Generator().manual_seed(0))
    channel = torch.arange(turned // 2)

    def at(positions: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        angle = positions[..., None] * 10000.0 ** (-channel / len(channel))  # (B, T, turned / 2)
        pair = torch.complex(raw[..., : turned // 2], raw[..., turned // 2 : turned])
        spun = pair * torch.polar(torch.full_like(angle, stretch), angle)[:, None]
        key = torch.cat([spun.real, spun.imag, raw[..., turned:]], dim=-1)
        both = torch.cat([angle, angle], dim=-1)
        return key, (stretch * both.cos(), stretch * both.sin())

    count = torch.arange(5.0).expand(2, -1)
    shifted, (cos, sin) = at(count + torch.tensor([[0.0], [7.0]]))
    torch.testing.assert_close(
        host.text.turn_back(shifted, (cos[:, :1], sin[:, :1])), at(count)[0], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", HOSTS)
def test_a_decoder_of_halves_is_the_decoder(name: str) -> None:
    """Also for tokens that were left out: their positions are those that `cut_positions` gives.

    Where layers turn otherwise, what `positions` makes of the tokens' own ones is the same.
    """
    model, _ = host_class(name).tiny()
    model.set_attn_implementation("eager")  # without a mask some decoders have PyTorch's own kernel see later tokens
    tower = find_host(model).text
    size = tower.layers[0].hidden_size
    embedded = torch.randn(2, 7, size, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 2, 3, 6], [1, 2, 5, 6]])
    kept = embedded.gather(1, index.unsqueeze(-1).expand(-1, -1, size))
    whole: list[dict[str, torch.Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, kwargs: whole.append(kwargs), with_kwargs=True)
        for layer in tower.layers
    ]
    with torch.no_grad():
        tower.module(inputs_embeds=embedded)
        for hook in hooks:
            hook.remove()
        expected = tower.module(inputs_embeds=kept, position_ids=index).last_hidden_state
        valid = torch.ones(2, 4, dtype=torch.long)
        mask = tower.causal_mask(kept, valid, lambda batch, head, query, key: query >= key)
        for layer, given in enumerate(whole):
            places = tower.cut_positions(given, index)
            own = {**places, **tower.positions(layer, kept, index)}
            torch.testing.assert_close(own, places)
            kept = tower.feed_forward(layer, tower.attend(layer, kept, **places, attention_mask=mask))
        torch.testing.assert_close(tower.final_norm(kept), expected)
