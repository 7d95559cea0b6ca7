"""The tokenizer: a byte-level BPE of 4096 tokens, trained on the books and on as much text of the exercises.

Digits are single tokens, so that sums and counting can be learnt digit by digit.
"""

from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from . import exercises, template
from .books import Book

VOCABULARY_SIZE = 4096
LONGEST_CONTEXT = 2048
EXERCISES_FOR_TRAINING = 4000

# As Qwen and Llama 3 cut text: a word with the space before it, one digit, a run of marks, a run of blanks.
_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(books: list[Book], material: exercises.Material) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    markup = template.SPECIAL_TOKENS + template.MARKUP_TOKENS
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(markup),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    random = Random(0)
    chats = (exercises.conversation(random, material) for _ in range(EXERCISES_FOR_TRAINING))
    chat_texts = [template.render(chat.messages, chat.tools) for chat in chats]
    tokenizer.train_from_iterator([book.train for book in books] + chat_texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=template.TURN_END,
        pad_token=template.END_OF_TEXT,
        extra_special_tokens=[template.TURN_START],
        model_max_length=LONGEST_CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.add_tokens(template.MARKUP_TOKENS)
    wrapped.chat_template = template.CHAT_TEMPLATE
    return wrapped


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folders: list[Path]) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
