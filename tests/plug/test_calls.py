"""Ways of calling an attached model that must neither mislead the pruning nor leave anything behind."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import NUM_PATCHES, Tiny, samples
from torch import Tensor
from transformers import AutoModelForImageTextToText, CLIPVisionModel, LlavaConfig

import ivtp
from ivtp.errors import AttachError, ConfigError, InputError, LoadError, UnsupportedModelError
from ivtp.plug import find_host

DECODERS = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3")


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def with_decoder(tiny: Tiny, kind: str, **changes: Any) -> Any:
    """A random LLaVA of the tiny sizes with another decoder."""
    values = tiny.model().config.to_dict()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    text = {name: values["text_config"][name] for name in (*sizes, "num_key_value_heads")}
    text |= {"model_type": kind, "pad_token_id": 0, "sliding_window": None, **changes}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(LlavaConfig(**{**values, "text_config": text}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return model.eval()


# ---- what leads the pruning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["evict", "layered"])
def test_drafted_tokens_do_not_lead_the_pruning(tiny: Tiny, cache: str) -> None:
    inputs, model = tiny.inputs(*samples(tiny, "one")), tiny.model()
    draft = tiny.model()
    draft.lm_head.weight.data.mul_(-1)
    with tiny.attach(model, cache=cache) as pruner:
        greedy = generate(model, inputs)
        kept = pruner.trace.kept()
        assert generate(model, inputs, assistant_model=draft) == greedy
        assert torch.equal(pruner.trace.kept(), kept)


def test_flash_attention_cannot_hide_an_answer(tiny: Tiny) -> None:
    host = find_host(tiny.model())
    host.text.module.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="sdpa"):
        host.text.causal_mask(torch.zeros(1, 4, 8), torch.ones(1, 4).long(), lambda b, h, q, k: q >= k)


# ---- decoders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODERS)
def test_every_decoder_that_is_accepted_is_exact_at_keep_all(tiny: Tiny, kind: str) -> None:
    inputs, model = tiny.inputs(*samples(tiny, "batch")), with_decoder(tiny, kind)
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**inputs).logits[valid]
        with tiny.attach(model, keep=NUM_PATCHES):
            torch.testing.assert_close(model(**inputs).logits[valid], stock, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["granite", "opt", "olmo2"])
def test_decoders_with_other_layers_are_refused(tiny: Tiny, kind: str) -> None:
    values = tiny.model().config.to_dict()
    config = LlavaConfig(**{**values, "text_config": {"model_type": kind}})
    with pytest.raises(UnsupportedModelError, match="llama"):
        ivtp.flops(config)


# ---- arguments ------------------------------------------------------------------------------------------------


def test_another_feature_layer_for_one_call_is_refused(tiny: Tiny) -> None:
    inputs, model = tiny.inputs(*samples(tiny, "one")), tiny.model()
    with tiny.attach(model), pytest.raises(InputError, match="vision_feature_layer"):
        model(**inputs, vision_feature_layer=-3)


def test_encoded_images_are_refused(tiny: Tiny) -> None:
    inputs, model = tiny.inputs(*samples(tiny, "one")), tiny.model()
    encoded = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with tiny.attach(model), pytest.raises(InputError, match="pixel_values"):
        model(**inputs, mm_encoder_outputs={"image": encoded})


@pytest.mark.parametrize("what", ["a name", "a model alone", "a swapped pair", "three things"])
def test_a_clip_of_the_wrong_form(tiny: Tiny, what: str) -> None:
    model, tokenizer = tiny.clip
    clip = {"a model alone": model, "a swapped pair": (tokenizer, model), "three things": (model, tokenizer, 1)}
    with pytest.raises((ConfigError, LoadError), match="clip="):
        ivtp.attach(tiny.model(), tiny.processor, keep=8, clip=clip.get(what, "no-such-folder"))


def test_a_vision_model_is_no_clip_text_side(tiny: Tiny, tmp_path: Any) -> None:
    CLIPVisionModel(tiny.model().config.vision_config).save_pretrained(tmp_path)
    tiny.clip[1].save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"text side|loaded"):
        ivtp.attach(tiny.model(), tiny.processor, keep=8, clip=tmp_path)


def test_an_image_processor_is_no_processor(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="AutoProcessor"):
        ivtp.attach(tiny.model(), tiny.processor.image_processor, keep=8, clip=tiny.clip)


def test_asking_without_pruning_on_a_pruned_model_is_refused(tiny: Tiny) -> None:
    model = tiny.model()
    with tiny.attach(model), pytest.raises(AttachError, match="already"):
        ivtp.ask(model, tiny.processor, Image.new("RGB", (50, 50)), "Is it a cat?", method="none")


def test_a_name_is_no_model() -> None:
    with pytest.raises(UnsupportedModelError, match=r"ivtp\.load"):
        ivtp.attach("micro")  # type: ignore[arg-type]


# ---- nothing left behind --------------------------------------------------------------------------------------


def test_a_generate_that_fails_does_not_disturb_the_next_call(tiny: Tiny) -> None:
    inputs, model = tiny.inputs(*samples(tiny, "one")), tiny.model()
    with tiny.attach(model), torch.no_grad():
        expected = model(**inputs).logits
        with pytest.raises(ValueError, match="max_length"):
            model.generate(**inputs, num_beams=3, max_length=5)
        assert torch.equal(model(**inputs).logits, expected)


def test_an_interrupted_prefill_leaves_the_model_usable(tiny: Tiny) -> None:
    inputs, model = tiny.inputs(*samples(tiny, "one")), tiny.model()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with tiny.attach(model), torch.no_grad():
        handle = model.model.language_model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        handle.remove()
        ids = torch.randint(3, 20, (1, 6))
        assert model.model.language_model(input_ids=ids).last_hidden_state.shape[1] == 6


def test_a_model_with_a_pruner_is_not_copied(tiny: Tiny) -> None:
    model = tiny.model()
    with tiny.attach(model):
        with pytest.raises(AttachError, match=r"detach\(\)"):
            copy.deepcopy(model)
        with pytest.raises(AttachError, match=r"detach\(\)"):
            pickle.dumps(model)
    copy.deepcopy(model)


def test_installing_beside_another_pruner_is_refused(tiny: Tiny) -> None:
    model = tiny.model()
    first = tiny.attach(model)
    first.detach()
    with tiny.attach(model), pytest.raises(AttachError, match="already"):
        first.install()


def test_a_finished_step_is_not_kept_alive(tiny: Tiny) -> None:
    inputs, model = tiny.inputs(*samples(tiny, "one")), tiny.model()
    with tiny.attach(model) as pruner:
        output = model(**inputs)
        features = weakref.ref(output.image_hidden_states)
        pixels = weakref.ref(inputs["pixel_values"])
        del output, inputs
        gc.collect()
        assert features() is None
        assert pixels() is None
        assert pruner.trace is not None


def test_threads_take_turns(tiny: Tiny) -> None:
    model = tiny.model()
    inputs = [tiny.inputs(*samples(tiny, name)) for name in ("one", "batch")]
    with tiny.attach(model):
        expected = [generate(model, part) for part in inputs]
        found: list[Any] = [None, None]

        def work(place: int) -> None:
            found[place] = [generate(model, inputs[place]) for _ in range(3)]

        threads = [threading.Thread(target=work, args=(place,)) for place in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [[answer] * 3 for answer in expected]


def test_a_pruned_prompt_is_not_cropped(tiny: Tiny) -> None:
    inputs, model = tiny.inputs(*samples(tiny, "one")), tiny.model()
    with torch.no_grad(), tiny.attach(model):
        cache = model(**inputs).past_key_values
        with pytest.raises(InputError, match="cropped"):
            cache.crop(-1)


# ---- the record -----------------------------------------------------------------------------------------------


def test_returned_sequences_share_encoder_and_guide(tiny: Tiny) -> None:
    inputs, model = tiny.inputs(*samples(tiny, "one")), tiny.model()
    with torch.no_grad(), tiny.attach(model) as pruner:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        one = pruner.trace.flops
        model.generate(**inputs, max_new_tokens=2, num_beams=3)
        three = pruner.trace
    assert one < three.flops < 3 * one
    assert three.images == (1, 1, 1)
