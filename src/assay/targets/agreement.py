"""Subject-verb agreement sentences from a small grammar, their held-out pairs, and a word-level
tokenizer for them.

Four constructions, after Marks et al. (arXiv 2403.19647): `simple` (The N), `nounpp` (The N P the
N), `within_rc` (The N that the N) and `rc` (The N that the N V). The next word is a verb that
agrees with the first noun; within the clause, with the second."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from assay.errors import InputError, unknown
from assay.io.pair_files import TextPair
from assay.io.prompts import pad
from assay.targets.lexicon import FINITE_VERBS, NOUNS, PREPOSITIONS, TRANSITIVE_VERBS, words

Construction = Literal["simple", "nounpp", "within_rc", "rc"]
CONSTRUCTIONS: tuple[Construction, ...] = get_args(Construction)
PADDING, UNKNOWN, STOP = "<pad>", "<unk>", "."
_NUMBERS = ("singular", "plural")
_HELD_OUT = 5  # one combination of words in five is never trained on


@dataclass(frozen=True)
class Sentence:
    """One choice of words and numbers: indices into the lexicon, numbers 0 (singular) or 1
    (plural).
    """

    construction: Construction
    subject: int
    number: int
    other: int
    other_number: int
    link: int
    verb: int
    after: int

    def prefix(self, number: int | None = None) -> list[str]:
        """Return the words before the verb in question, with another number of the noun that it
        agrees with if one is given.
        """
        inner = self.construction == "within_rc"
        own = self.number if number is None or inner else number
        attractor = self.other_number if number is None or not inner else number
        words = ["The", NOUNS[self.subject][own]]
        if self.construction == "simple":
            return words
        link = PREPOSITIONS[self.link] if self.construction == "nounpp" else "that"
        words += [link, "the", NOUNS[self.other][attractor]]
        return (
            [*words, TRANSITIVE_VERBS[self.link][attractor]] if self.construction == "rc" else words
        )

    def agreed(self, number: int) -> str:
        """Return the verb in question in the given number."""
        inner = self.construction == "within_rc"
        return TRANSITIVE_VERBS[self.link][number] if inner else FINITE_VERBS[self.verb][0][number]

    @property
    def decisive(self) -> int:
        """The number of the noun that the verb agrees with."""
        return self.other_number if self.construction == "within_rc" else self.number

    def text(self) -> str:
        """Return the whole sentence, words and full stop set apart by spaces."""
        clause = [self.agreed(self.other_number)] if self.construction == "within_rc" else []
        verb, following = FINITE_VERBS[self.verb]
        return " ".join([*self.prefix(), *clause, verb[self.number], following[self.after], STOP])

    def pair(self) -> TextPair:
        """Return the sentence up to the verb against the same with the other number: clean and
        patched prompt.
        """
        own, other = self.decisive, 1 - self.decisive
        case = _NUMBERS[self.number]
        if self.construction != "simple":
            case += f"_{_NUMBERS[self.other_number]}"
        return TextPair(
            " ".join(self.prefix()),
            " ".join(self.prefix(other)),
            f" {self.agreed(own)}",
            f" {self.agreed(other)}",
            case,
        )

    @property
    def held_out(self) -> bool:
        """Whether this combination of lemmas, in whatever numbers, belongs to the held-out fifth.

        A sentence with a relative clause is held out for both of its verbs, or for none.
        """
        words = [NOUNS[self.subject][0]]
        if self.construction == "nounpp":
            words += [PREPOSITIONS[self.link], NOUNS[self.other][0]]
        elif self.construction != "simple":
            words += ["that", NOUNS[self.other][0], TRANSITIVE_VERBS[self.link][0]]
        if self.construction in ("simple", "nounpp"):
            words.append(FINITE_VERBS[self.verb][0][0])
        return zlib.crc32(" ".join(words).encode()) % _HELD_OUT == 0


def draw_sentences(
    construction: Construction, count: int, *, seed: int, held_out: bool
) -> list[Sentence]:
    """Draw sentences of one construction, all from the held-out combinations of words or all from
    the others.

    Numbers are independent fair coins, so that the attractor says nothing about the verb. The same
    seed gives the same ones."""
    if construction not in CONSTRUCTIONS:
        raise unknown("construction", construction, CONSTRUCTIONS)
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    generator = torch.Generator().manual_seed(
        seed * len(CONSTRUCTIONS) + CONSTRUCTIONS.index(construction)
    )
    found: list[Sentence] = []
    drawn = _draws(construction, generator)
    while len(found) < count:
        sentence = next(drawn)
        if sentence.held_out == held_out:
            found.append(sentence)
    return found


def agreement_pairs(
    construction: Construction, count: int, *, seed: int = 0, held_out: bool = True
) -> list[TextPair]:
    """Return distinct pairs of one construction, from combinations of words that training never
    sees by default.

    Raises InputError when the grammar has fewer.
    """
    found: list[TextPair] = []
    drawn = count
    while len(found) < count:
        before = len(found)
        sentences = draw_sentences(construction, drawn, seed=seed, held_out=held_out)
        found = list(dict.fromkeys(sentence.pair() for sentence in sentences))
        if len(found) == before:
            raise InputError(
                f"the grammar has {before} distinct pairs of {construction!r} here; asked for"
                f" {count}"
            )
        drawn *= 2
    return found[:count]


def agreement_text(count: int, *, seed: int = 0) -> list[str]:
    """Return training sentences, as many of each construction (`within_rc` and `rc` share
    theirs), never a held-out one.
    """
    chosen: list[list[Sentence]] = []
    trained: tuple[Construction, ...] = ("simple", "nounpp", "rc")
    for index, construction in enumerate(trained):
        share = count // 3 + (index < count % 3)
        if share:
            chosen.append(draw_sentences(construction, share, seed=seed, held_out=False))
    return [sentence.text() for sentences in chosen for sentence in sentences]


def build_tokenizer() -> Any:
    """Return the word-level tokenizer of the lexicon: one token per word, in the Hugging Face
    format.
    """
    vocabulary = {word: index for index, word in enumerate([PADDING, UNKNOWN, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PADDING,
        eos_token=STOP,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    vocab_size: int,
    *,
    layers: int,
    width: int,
    heads: int,
    context: int,
    seed: int,
    stop: int | None = None,
) -> Any:
    """Return an untrained model of the GPT-2 architecture without dropout; the same seed gives the
    same weights.

    Raises InputError when the width is not a multiple of the heads.
    """
    if min(layers, width, heads, context) < 1 or width % heads:
        raise InputError(
            "layers, width, heads and context must be positive and width a multiple of heads; got"
            f" {width} and {heads}"
        )
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=stop,
        use_cache=False,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def encode_sentences(sentences: list[str], tokenizer: Any) -> Tensor:
    """Return the ids of whole sentences, left-aligned, padding on the right: (sentences,
    longest).
    """
    return pad(tokenizer(sentences)["input_ids"], tokenizer.pad_token_id)


def _draws(construction: Construction, generator: torch.Generator) -> Iterator[Sentence]:
    links = len(PREPOSITIONS) if construction == "nounpp" else len(TRANSITIVE_VERBS)
    sizes = (len(NOUNS), 2, len(NOUNS) - 1, 2, links, len(FINITE_VERBS))
    while True:
        columns = [torch.randint(size, (4096,), generator=generator).tolist() for size in sizes]
        tails = torch.rand(4096, generator=generator).tolist()
        for (subject, number, step, other_number, link, verb), tail in zip(
            zip(*columns, strict=True), tails, strict=True
        ):
            other = (subject + 1 + step) % len(NOUNS)
            after = int(tail * len(FINITE_VERBS[verb][1]))
            yield Sentence(construction, subject, number, other, other_number, link, verb, after)
