"""The small tokenizer: byte-level BPE, which can write any text, with InternVL's special tokens.

Its vocabulary is built from `words.txt` and the questions. It includes the words of the datasets'
prompts, so that prompts are short, as with a large tokenizer. In pre-training the model sees these
words only in the copying task, as tokens without meaning.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2TokenizerFast,
)

from vitask.pocket.pictures import SIDE
from vitask.pocket.questions import KINDS, LISTED, ORDINALS, WORDINGS

WORDS = Path(__file__).parent / "words.txt"  # one phrase on each line
IMAGE_TOKENS = 16
VOCABULARY = 1088  # a multiple of 64, just enough for whole words
MARKS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% elif part['type'] == 'video' %}<video>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus() -> list[str]:
    """Sentences for the tokenizer: every phrase once at the start of an answer, once within."""
    phrases = WORDS.read_text("utf-8").splitlines()
    phrases += [text for wordings in WORDINGS.values() for text in wordings]
    phrases += [answer for answers in KINDS.values() for answer in answers]
    phrases += [f"Give the {ordinal}." for ordinal in ORDINALS]
    phrases += [LISTED.format(answers="a; b; c"), "user\nassistant\n"]
    return [text for phrase in phrases for text in (f"{phrase}.", f"; {phrase};")]


def make_processor() -> InternVLProcessor:
    """Tokenizer, chat template and image processor (one tile of 32 pixels, 16 image tokens)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *MARKS.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        extra_special_tokens=MARKS,
    )
    size = {"height": SIDE, "width": SIDE}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=IMAGE_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )
