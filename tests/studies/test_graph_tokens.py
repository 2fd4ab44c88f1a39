"""Prompt and tokens of a graph are compared as far as every tool writes them alike, and tokens with
the model's tokenizer.
"""

from __future__ import annotations

import pytest

from assay.errors import InputError
from assay.io.attribution_graphs import EMBEDDING, AttributionGraph, GraphNode
from assay.studies.graph_audit.tokens import token_ids
from assay.targets.agreement import build_tokenizer


def graph(prompt: str, tokens: list[str], ids: list[int] | None = None) -> AttributionGraph:
    ids = list(range(len(tokens))) if ids is None else ids
    nodes = tuple(
        GraphNode(f"E_{one}_{place}", "E", place, place, EMBEDDING) for place, one in enumerate(ids)
    )
    return AttributionGraph("one", "mine", prompt, tuple(tokens), nodes, ())


FITTING = [
    ("The keys to", ["The", " keys", " to"]),
    ("The keys to", ["The", "\u0120keys", "\u0120to"]),
    ("The keys\nto", ["\u2581The", "\u2581keys", "\u23ce", "to"]),
    ("The keys to", ["<bos>", "The", " keys", " to"]),
    ("<bos>The keys to", ["<bos>", "The", " keys", " to"]),
    ("The caf\u00e9 to", ["The", " caf", "\u00c3\u00a9", " to"]),
    ("The <b c> to", ["The", " <", "b", " c", ">", " to"]),
    ("The keys to", ["The", "<unk>", "to"]),
    ("one two one two three", ["one", "<unk>", "two", "[SEP]", "three"]),
    ("\u043a\u043b\u044e\u0447", ["\u00d0\u00ba", "\u00d0\u00bb"]),
    ("", ["<bos>", ""]),
]
OTHERS = [
    ("The keys to", ["The", " keys"]),
    ("The keys", ["The", " keys", " to"]),
    ("The keys to", ["The", " key", " to"]),
    ("The keys to", ["<bos>", "The", " keys", " at"]),
    ("The keys to", ["The", " keys", " at", "<eos>"]),
    ("one two", ["one", "<unk>", "three"]),
    ("one two", ["one", "<unk>", "three", "<unk>", "two"]),
    ("onetwo", ["onet", "<unk>", "two"]),
]


@pytest.mark.parametrize(("prompt", "tokens"), FITTING)
def test_what_tools_write_in_ways_of_their_own_is_one_text(prompt, tokens):
    assert token_ids("it", graph(prompt, tokens), None, 100, 2) == list(range(len(tokens)))


@pytest.mark.parametrize(("prompt", "tokens"), OTHERS)
def test_prompts_of_other_words_are_refused(prompt, tokens):
    with pytest.raises(InputError, match="it contradicts itself: its prompt is"):
        token_ids("it", graph(prompt, tokens), None, 100, 2)


def test_a_prompt_of_ten_thousand_unknown_words_takes_no_time():
    tokens = ["<unk>", "a"] * 10_000
    with pytest.raises(InputError, match="contradicts itself"):
        token_ids("it", graph("a" * 9_999, tokens), None, 100_000, 2)


def test_tokens_are_those_of_the_tokenizer():
    tokenizer = build_tokenizer()
    ids = tokenizer.encode("the coach guards")
    words = [tokenizer.decode([one]) for one in ids]

    def found(prompt, tokens, given):
        return token_ids("it", graph(prompt, tokens, given), tokenizer, len(tokenizer), 2)

    assert found("the coach guards", words, ids) == ids
    # Only some tokens have a node: the tokenizer finds the others.
    some = graph("the coach guards", words, ids)
    less = AttributionGraph("one", "mine", some.prompt, some.tokens, some.nodes[1:], ())
    assert token_ids("it", less, tokenizer, len(tokenizer), 2) == ids
    with pytest.raises(InputError, match="contradicts itself"):
        found("the coach guard", words, ids)
    with pytest.raises(InputError, match="token 1 of its prompt is 'author'"):
        found("the author guards", [words[0], "author", words[2]], ids)
    with pytest.raises(InputError, match="is of token 99999, and the model has"):
        found("the coach guards", words, [99999, *ids[1:]])
