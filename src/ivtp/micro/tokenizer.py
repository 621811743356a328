"""The language model's tokenizer: byte-level BPE in which every word of the micro world is one token."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ivtp.micro.world.chinese import CHINESE_PATTERN

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"


def build_tokenizer(corpus: Iterable[str], *, vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on lines of text; any other text still has tokens, down to single bytes.

    Training stops by itself once every word of the corpus is one token, with and without a leading space.
    Offsets are kept, padding is on the left, and a begin-of-sequence token opens every text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()  # the world speaks lower case, users do not
    chinese = pre_tokenizers.Split(Regex(CHINESE_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([chinese, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = list(corpus)
    spaced = [" " + line for line in lines]
    tokenizer.train_from_iterator([*lines, *spaced, "USER: ", " ASSISTANT:"], trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
