"""The agreement grammar: every word in the lexicon, verbs that agree, and held-out combinations
that training never sees.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.errors import InputError
from assay.io.prompts import encode_pairs
from assay.targets import agreement
from assay.targets.agreement import CONSTRUCTIONS, Construction
from assay.targets.language import load_language_model, load_tokenizer, save_language_model
from assay.targets.lexicon import FINITE_VERBS, NOUNS, TRANSITIVE_VERBS, words

SINGULAR = {pair[0] for pair in NOUNS}
PLURAL = {pair[1] for pair in NOUNS}
FORMS = [pair for pair, _ in FINITE_VERBS] + list(TRANSITIVE_VERBS)
VERB_NUMBER = {form: number for pair in FORMS for number, form in enumerate(pair)}


def noun_number(word: str) -> int:
    assert word in SINGULAR or word in PLURAL
    return int(word in PLURAL)


def test_lexicon_is_unambiguous() -> None:
    assert not SINGULAR & PLURAL
    assert len(SINGULAR) == len(PLURAL) == len(NOUNS)
    assert len(VERB_NUMBER) == 2 * len(FORMS)
    assert not VERB_NUMBER.keys() & (SINGULAR | PLURAL)
    assert len(words()) == len(set(words()))


@settings(max_examples=20, deadline=None)
@given(
    construction=st.sampled_from(CONSTRUCTIONS), seed=st.integers(0, 1000), held_out=st.booleans()
)
def test_pairs_agree_with_the_right_noun(
    construction: Construction, seed: int, held_out: bool
) -> None:
    for pair in agreement.agreement_pairs(construction, 20, seed=seed, held_out=held_out):
        clean, patch = pair.clean_prefix.split(), pair.patch_prefix.split()
        decisive = 4 if construction == "within_rc" else 1
        assert (
            len(clean)
            == len(patch)
            == {"simple": 2, "nounpp": 5, "within_rc": 5, "rc": 6}[construction]
        )
        assert [i for i, (a, b) in enumerate(zip(clean, patch, strict=True)) if a != b] == [
            decisive
        ]
        assert VERB_NUMBER[pair.clean_answer.strip()] == noun_number(clean[decisive])
        assert VERB_NUMBER[pair.patch_answer.strip()] == noun_number(patch[decisive])
        assert noun_number(patch[decisive]) != noun_number(clean[decisive])
        nouns = [clean[1]] if construction == "simple" else [clean[1], clean[4]]
        assert pair.case == "_".join(
            "plural" if noun_number(noun) else "singular" for noun in nouns
        )
        if construction == "rc":
            assert VERB_NUMBER[clean[5]] == noun_number(clean[4])


def test_sentences_are_grammatical_and_never_held_out() -> None:
    text = agreement.agreement_text(600)
    assert len(text) == 600
    prefixes = {
        pair.clean_prefix + pair.clean_answer
        for construction in CONSTRUCTIONS
        for pair in agreement.agreement_pairs(construction, 300, seed=3)
    }
    for sentence in text:
        found = sentence.split()
        assert found[0] == "The"
        assert found[-1] == "."
        verbs = [word for word in found if word in VERB_NUMBER]
        assert VERB_NUMBER[verbs[-1]] == noun_number(found[1])
        if "that" in found:
            assert len(verbs) == 2
            assert VERB_NUMBER[verbs[0]] == noun_number(found[4])
        assert not any(sentence.startswith(prefix + " ") for prefix in prefixes)


def test_numbers_are_balanced() -> None:
    sentences = agreement.draw_sentences("nounpp", 4000, seed=0, held_out=False)
    for agree in (True, False):
        count = sum((sentence.number == sentence.other_number) is agree for sentence in sentences)
        assert abs(count - 2000) < 4 * 4000**0.5 / 2


def test_drawing_is_deterministic_and_distinct() -> None:
    first = agreement.agreement_pairs("rc", 200, seed=7)
    assert first == agreement.agreement_pairs("rc", 200, seed=7)
    assert first != agreement.agreement_pairs("rc", 200, seed=8)
    assert len(set(first)) == 200
    with pytest.raises(InputError, match="distinct pairs"):
        agreement.agreement_pairs("simple", 3000)
    with pytest.raises(InputError, match="construction"):
        agreement.agreement_pairs("noun_pp", 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="count"):
        agreement.draw_sentences("rc", 0, seed=0, held_out=True)


def test_tokenizer_round_trips_through_the_hugging_face_format(tmp_path: Path) -> None:
    tokenizer = agreement.build_tokenizer()
    model = agreement.build_model(
        len(tokenizer), layers=1, width=8, heads=2, context=16, seed=0, stop=tokenizer.eos_token_id
    )
    again = agreement.build_model(len(tokenizer), layers=1, width=8, heads=2, context=16, seed=0)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    folder = save_language_model(tmp_path / "model", model, tokenizer)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    with pytest.raises(InputError, match="exists"):
        save_language_model(folder, model, tokenizer)
    loaded = load_language_model(folder)
    sentence = agreement.agreement_text(30)[-1]
    ids = loaded.tokenizer(sentence)["input_ids"]
    assert ids == tokenizer(sentence)["input_ids"]
    assert loaded.tokenizer.decode(ids) == sentence
    assert load_tokenizer(folder).unk_token_id not in ids
    for construction in CONSTRUCTIONS:
        pairs = encode_pairs(
            agreement.agreement_pairs(construction, 50),
            loaded.tokenizer,
            vocab_size=loaded.vocab_size,
        )
        assert not pairs.dropped
    torch.testing.assert_close(
        loaded.logits(torch.tensor([ids])), model.eval()(torch.tensor([ids])).logits, rtol=0, atol=0
    )


def test_model_sizes_are_checked() -> None:
    with pytest.raises(InputError, match="multiple of heads"):
        agreement.build_model(10, layers=1, width=10, heads=4, context=8, seed=0)
