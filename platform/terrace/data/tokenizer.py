"""Text tokenizers: loading a Hugging Face directory, and training a small byte-level BPE for demos and tests.

One wrapper for the whole platform, around the `tokenizers` library and not `transformers`: a decode task starts in
0.4 s instead of 4 s, and data text can never smuggle in a special token (the end mark of a turn, in a caption, stays plain text).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from terrace.errors import InputError
from terrace.families.interface import Family

CONFIG = "tokenizer_config.json"
# How Qwen2 cuts text before BPE. Every digit stands alone, which makes the length of a rendered coordinate arithmetic.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORD_SIGNS = (("Ġ", "Ċ", "ĉ"), ("▁",))  # white space in front of a word, of byte-level tokenizers and of SentencePiece
OWN_NAMES = ("cls_token", "sep_token", "mask_token", "pad_token")  # of special tokens that transformers' tokenizers have by themselves
QUESTION_TOKENIZER = "qformer_tokenizer"  # folder beside a tokenizer's own files, as InstructBLIP is published


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
        self._file = file
        self._marks: dict[Family | type[Family], dict[str, int]] = {}
        self.fingerprint: str = hashlib.sha256(content).hexdigest()  # of tokenizer.json: part of every index and plan
        self.vocabulary_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.splits_digits: bool = self._digits_stand_alone()

    def __reduce__(self):
        return load_tokenizer, (str(self.directory),)

    def marks(self, family: Family | type[Family]) -> dict[str, int]:
        """Role -> token id of the marks that the family writes. Raises InputError, naming them, where the tokenizer lacks some."""
        if family not in self._marks:
            ids = {role: self._tokenizer.token_to_id(token) for role, token in family.marks.items()}
            missing = [family.marks[role] for role, token_id in ids.items() if token_id is None]
            if missing:
                raise InputError(
                    f"tokenizer: {self._file} lacks the tokens {', '.join(missing)} that the templates of {family.name} write"
                )
            if not isinstance(family, type):
                self._check_inside(family)
            self._marks[family] = ids
        return self._marks[family]

    def fit(self, family: Family) -> Family:
        """The family as this tokenizer writes the texts that stand inside its images."""
        return family.fitted(self.count)

    def _check_inside(self, family: Family) -> None:
        for name, text in family.inside.items():
            written, counted = self.count(text), family.inside_tokens(name)
            if written != counted:
                raise InputError(
                    f"tokenizer: {self._file} writes {text!r}, which stands inside an image of {family.name}, as {written} tokens where"
                    f" {counted} are counted; use the family's own tokenizer"
                )

    def token_id(self, token: str) -> int | None:
        """The id of a special token, or None where there is none of that spelling."""
        return self._tokenizer.token_to_id(token)

    def special_ids(self) -> list[int]:
        """Ids of the special tokens, which no text of a sample gives."""
        return sorted(number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    def begins_words(self) -> list[bool] | None:
        """Of each id whether its token begins a word where text goes on; None for a tokenizer whose tokens do not say so."""
        model = json.loads(self._file.read_text(encoding="utf-8"))["model"]
        tokens = [self._tokenizer.id_to_token(number) or "" for number in range(self.vocabulary_size)]
        if model.get("type") == "WordPiece":
            return [not token.startswith(model["continuing_subword_prefix"]) for token in tokens]
        found = [signs for signs in WORD_SIGNS if sum(token.startswith(signs[0]) for token in tokens) > 1]
        return [token.startswith(found[0]) for token in tokens] if found else None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; marks of turns and images in it are text like any other."""
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids if text else []  # without offsets

    def encode_question(self, text: str) -> list[int]:
        """Token ids as the part of the model that reads the question with the picture takes them: by the tokenizer in the folder
        `qformer_tokenizer`, between its own marks, or by this one where there is no such folder."""
        own = self.directory / QUESTION_TOKENIZER
        if not own.is_dir():
            return self.encode(text)
        return load_tokenizer(own)._tokenizer.encode(text, add_special_tokens=True).ids

    def count(self, text: str) -> int:
        """How many tokens `encode` gives."""
        return len(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]) if text else 0  # without offsets

    def encode_behind(self, before: str, text: str) -> list[int]:
        """Token ids of `text` where it follows `before` in one string, as a tokenizer that looks at the first letter writes it."""
        if not text:
            return []
        ids, offsets = self.encode_with_offsets(before + text)
        return [token for token, (start, _) in zip(ids, offsets) if start >= len(before)]

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

    Raises InputError when the file is missing or malformed.
    """
    return _load(str(path))


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, out_dir: str | Path, family: Family | type[Family], *others: Family | type[Family]
) -> TextTokenizer:
    """Train a byte-level BPE in Qwen2's form with the family's marks and save it as a Hugging Face directory.

    `others` are families of the same run, whose marks it has too; each has a configuration of its own (`file_for`).
    `vocabulary_size` counts the special tokens too; text with few distinct words gives a smaller vocabulary.
    Raises InputError when the size cannot hold the 256 bytes and the special tokens.
    """
    marks = list(dict.fromkeys(token for one in (family, *others) for token in one.marks.values()))
    smallest = 256 + len(marks)
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
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in marks],
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    for one in (family, *others):
        name = CONFIG if one is family else CONFIG.replace(".", f".{one.name}.")
        (out_dir / name).write_text(json.dumps(_configuration(one), indent=2, ensure_ascii=False) + "\n")
    _load.cache_clear()
    return load_tokenizer(out_dir)


def _configuration(family: Family | type[Family]) -> dict[str, Any]:
    """What transformers' tokenizer is told of a family's conversations."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": family.marks[family.end_of_turn],
        "pad_token": family.marks[family.end_of_text],
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "chat_template": family.chat_template,
    }
    named = {name: family.marks[role] for name, role in family.token_names.items()}
    config |= {name: token for name, token in named.items() if name in OWN_NAMES}
    if others := {name: token for name, token in named.items() if name not in OWN_NAMES}:
        config["extra_special_tokens"] = others
    return config


def file_for(directory: Path, name: str, family: str) -> Path:
    """A file of a tokenizer's directory as a family is to have it: its own, where the tokenizer was trained for several."""
    own = directory / name.replace(".", f".{family}.", 1)
    return own if own.is_file() else directory / name
