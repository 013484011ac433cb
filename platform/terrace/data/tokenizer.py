"""Text tokenizers: loading a Hugging Face directory, and training a small byte-level BPE for demos and tests.

One wrapper for the whole platform, around the `tokenizers` library and not `transformers`: a decode task starts in
0.4 s instead of 4 s, and data text can never smuggle in a special token (`<|im_end|>` in a caption stays plain text).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from terrace.errors import InputError

SPECIAL_TOKENS = {
    "endoftext": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image_pad": "<|image_pad|>",
    "video_pad": "<|video_pad|>",
}

# How Qwen2 cuts text before BPE. Every digit stands alone, which makes the length of a rendered coordinate arithmetic.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The conversation form of Qwen2.5-VL for inference tools; `template.py` writes the same tokens without Jinja.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class SpecialIds:
    """Token ids of the marks that the templates write."""

    endoftext: int
    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    image_pad: int
    video_pad: int


class TextTokenizer:
    """Text to token ids and back. Made by `load_tokenizer`; pickles as its path, so a task can carry it."""

    def __init__(self, directory: Path):
        self.directory = directory
        file = directory / "tokenizer.json" if directory.is_dir() else directory
        if not file.is_file():
            raise InputError(f"tokenizer: {file} is missing; name a folder that holds a Hugging Face tokenizer.json")
        content = file.read_bytes()
        try:
            self._tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise InputError(f"tokenizer: {file} cannot be read: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        ids = {name: self._tokenizer.token_to_id(token) for name, token in SPECIAL_TOKENS.items()}
        missing = [SPECIAL_TOKENS[name] for name, token_id in ids.items() if token_id is None]
        if missing:
            raise InputError(f"tokenizer: {file} lacks the tokens {', '.join(missing)} that the templates write")
        self.special = SpecialIds(**ids)
        self.fingerprint: str = hashlib.sha256(content).hexdigest()  # of tokenizer.json: part of every index and plan
        self.vocabulary_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.splits_digits: bool = self._digits_stand_alone()

    def __reduce__(self):
        return load_tokenizer, (str(self.directory),)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; marks such as `<|im_end|>` in it are text like any other."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and the (start, end) characters that each token stands for."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special_tokens)

    def _digits_stand_alone(self) -> bool:
        """Whether a number is always one token per digit, whatever stands around it."""
        for form in ("{}", "[{}, {}]", "box: [{}, {}]}}", "({},{})\n", "x{}y{}"):
            count = form.count("{}")
            short = len(self.encode(form.format(*["7"] * count)))
            long = len(self.encode(form.format(*["1234567890"] * count)))
            if long != short + 9 * count:
                return False
        return True


@lru_cache(maxsize=8)
def _load(directory: str) -> TextTokenizer:
    return TextTokenizer(Path(directory))


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """The tokenizer of a local Hugging Face directory (or tokenizer.json), loaded once per process.

    Raises InputError when the file is missing, malformed, or lacks a token that the templates write.
    """
    return _load(str(path))


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, out_dir: str | Path) -> TextTokenizer:
    """Train a byte-level BPE in Qwen2's form and save it as a Hugging Face directory.

    `vocabulary_size` counts the special tokens too; text with few distinct words gives a smaller vocabulary.
    Raises InputError when the size cannot hold the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocabulary_size < smallest:
        raise InputError(f"tokenizer.train_vocabulary_size: {vocabulary_size} is below {smallest} (bytes and marks)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS.values()],
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": SPECIAL_TOKENS["im_end"],
        "pad_token": SPECIAL_TOKENS["endoftext"],
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "chat_template": CHAT_TEMPLATE,
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    _load.cache_clear()
    return load_tokenizer(out_dir)
