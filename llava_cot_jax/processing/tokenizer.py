"""A small tokenizer built like Llama 3's, for the models of the shapes world and of the tests."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.messages import CHAT_TEMPLATE, IMAGE_TOKEN

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Pattern of the pieces into which Llama 3 cuts a text before it merges bytes: words, up to three digits, symbols and
space."""

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
"""Special tokens, which follow the vocabulary's plain entries, in Llama 3's order."""

BYTES = 256


def make_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Llama 3's pre-tokenizer, special tokens and chat format.

    If the corpus gives too few merges, reserved special tokens pad the vocabulary. As in the published tokenizer,
    ``<|image|>`` comes after the vocabulary: its id is ``vocab_size``, for which lm_head has no row.

    Args:
        corpus: Texts to learn merges from. The same texts give the same tokenizer.
        vocab_size: Number of plain and special entries together, without ``<|image|>``.

    Raises:
        UserError: The vocabulary is too small for the bytes and the special tokens.
    """
    plain = vocab_size - len(SPECIAL_TOKENS)
    if plain < BYTES:
        raise UserError(f"a vocabulary needs at least {BYTES + len(SPECIAL_TOKENS)} entries, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=plain, initial_alphabet=alphabet, show_progress=False)
    )
    # Numbers 0 to 2 are among ``SPECIAL_TOKENS``.
    fillers = [f"<|reserved_special_token_{3 + i}|>" for i in range(plain - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (*SPECIAL_TOKENS, *fillers, IMAGE_TOKEN)]
    )
    bos = SPECIAL_TOKENS[0]
    begin = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
