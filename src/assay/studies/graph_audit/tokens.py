"""The tokens of a graph's prompt: what the file says of them, against itself and against the
model's tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from assay.errors import InputError, shown
from assay.io.attribution_graphs import EMBEDDING, AttributionGraph

_SPECIAL = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")
_OTHERS = re.compile(r"[^A-Za-z0-9]+")


def token_ids(
    path: str, graph: AttributionGraph, tokenizer: Any, vocabulary: int, layers: int
) -> list[int]:
    """Return the tokens of the prompt: those of the embedding nodes, where all are there, else
    those of the tokenizer.

    Raises InputError where embeddings name tokens outside of the vocabulary, where prompt and
    tokens of the file are not one text, and where the model's tokenizer makes other tokens of
    it."""
    stated: dict[int, int] = {}
    for node in graph.nodes:
        if node.type != EMBEDDING or node.token is None:
            continue
        if node.token >= vocabulary:
            raise InputError(
                f"{path} is a graph of another model: node {node.id!r} is of token {node.token},"
                f" and the model has {vocabulary} tokens (and {layers} layers)"
            )
        stated[node.position] = node.token
    count = len(graph.tokens)
    ids = [stated[place] for place in range(count)] if len(stated) == count else None
    if tokenizer is None:
        if ids is None:
            raise InputError(
                f"{path} does not hold the numbers of all tokens of its prompt, and there is no"
                " tokenizer beside the model to find them"
            )
        _require_one_text(path, graph.prompt, graph.tokens)
        return ids
    tries = [tokenizer.encode(graph.prompt, add_special_tokens=more) for more in (False, True)]
    if ids is None:
        fitting = [
            tried
            for tried in tries
            if len(tried) == count and all(tried[at] == stated[at] for at in stated)
        ]
        if not fitting:
            raise InputError(
                f"{path} is a graph of another model: its prompt has {count} tokens, and the"
                f" model's tokenizer makes {len(tries[0])} of it, or others than the graph names"
            )
        ids = fitting[0]
    for place, (one, text) in enumerate(zip(ids, graph.tokens, strict=True)):
        forms = {str(tokenizer.convert_ids_to_tokens(one)), tokenizer.decode([one])}
        if _bare(text) not in {_bare(form) for form in forms}:
            raise InputError(
                f"{path} is a graph of another model: token {place} of its prompt is {shown(text)},"
                f" and the model's token {one} is {shown(min(forms))}"
            )
    if ids not in tries:
        special = set(tokenizer.all_special_ids)
        texts = ["<>" if one in special else tokenizer.decode([one]) for one in ids]
        _require_one_text(path, graph.prompt, texts)
    return ids


def _bare(text: str) -> str:
    """Return a token's text without the signs that tools put in place of blanks."""
    return text.replace("⏎", "\n").replace("→", "\t").strip(" \n\t\r\u0120\u010a\u2581")


def _require_one_text(path: str, prompt: str, tokens: Sequence[str]) -> None:
    """Raise InputError unless the letters and digits of the prompt are those of its tokens, in
    which a special token stands for anything.

    Only those of ASCII are compared: tools write blanks and bytes in ways of their own."""
    parts = [""]  # what stands between special tokens
    for token in tokens:
        if _SPECIAL.fullmatch(token.strip()):
            parts.append("")
        else:
            parts[-1] += _letters(token)
    text = _letters(prompt)
    first, last = parts[0], parts[-1]
    fits = text == first if len(parts) == 1 else len(text) >= len(first) + len(last)
    fits = fits and text.startswith(first) and text.endswith(last)
    at = len(first)
    for part in parts[1:-1]:
        at = text.find(part, at, len(text) - len(last)) + len(part)
        fits = fits and at >= len(part)
    if not fits:
        raise InputError(
            f"{path} contradicts itself: its prompt is {shown(prompt)}, and its tokens make"
            f" {shown(''.join(tokens))}"
        )


def _letters(text: str) -> str:
    return _OTHERS.sub("", text).lower()
