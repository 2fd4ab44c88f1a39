"""Pair files: what is read, what is dropped for which reason, and every malformed line by its
number.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from assay.errors import InputError
from assay.io import prompts, texts
from assay.io.pair_files import TextPair, write_pairs
from assay.targets.language import load_tokenizer

DATA = Path(__file__).parents[2].parent / "shared" / "data"
WORDS = [
    "<pad>",
    "<unk>",
    "<s>",
    "The",
    "cat",
    "cats",
    "near",
    "the",
    "dogs",
    "dog",
    "runs",
    "run",
    "is",
    "are",
    "a",
]


def words(*, bos: bool = False) -> Any:
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>"
    )


GOOD = TextPair("The cat", "The cats", " runs", " run", "singular")


def test_pairs_are_left_aligned_with_answers_and_cases() -> None:
    longer = TextPair(
        "The cats near the dog", "The cat near the dog", " are", " is", "plural_singular"
    )
    pairs = prompts.encode_pairs([GOOD, longer], words())
    assert pairs.clean.tolist() == [[3, 4, 0, 0, 0], [3, 5, 6, 7, 9]]
    assert pairs.patch.tolist() == [[3, 5, 0, 0, 0], [3, 4, 6, 7, 9]]
    assert pairs.answers.tolist() == [[10, 11], [13, 12]]
    assert pairs.lengths.tolist() == [2, 5]
    assert pairs.last.tolist() == [1, 4]
    assert pairs.mask.tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert pairs.cases == ("singular", "plural_singular")
    assert pairs.texts == (GOOD, longer)
    assert pairs.years is None
    first = pairs.take([0])
    assert first.clean.tolist() == [[3, 4]]
    assert first.texts == (GOOD,)
    assert len(pairs.take(torch.tensor([True, False]))) == 1
    assert len(pairs.take(slice(1, None))) == 1
    with pytest.raises(InputError):
        pairs.take([])


def test_a_leading_token_is_put_before_every_prompt() -> None:
    pairs = prompts.encode_pairs([GOOD], words(bos=True))
    assert pairs.clean.tolist() == [[2, 3, 4]]
    assert pairs.lengths.tolist() == [3]


BAD = {
    "prompts of unequal token length": TextPair("The cat", "The cats near", " runs", " run"),
    "identical prompts": TextPair("The cat", "The cat", " runs", " run"),
    "tokenisation does not concatenate": TextPair("The cat", "The cats", "runs", "run"),
    "answer is not one token": TextPair("The cat", "The cats", " runs near", " run"),
    "word unknown to the tokenizer": TextPair("The cat", "The cats", " jumps", " run"),
    "identical answers": TextPair("The cat", "The cats", " run", " run"),
    "empty prompt": TextPair("", "", " runs", " run"),
}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([None, *BAD]), max_size=12))
def test_bad_pairs_are_dropped_and_counted_by_reason(reasons: list[str | None]) -> None:
    pairs = prompts.encode_pairs(
        [GOOD, *(GOOD if reason is None else BAD[reason] for reason in reasons)], words()
    )
    assert len(pairs) == 1 + reasons.count(None)
    assert dict(pairs.dropped) == dict(Counter(reason for reason in reasons if reason is not None))
    for reason in pairs.dropped:
        assert reason in pairs.report()


def test_tokens_beyond_the_model_are_dropped() -> None:
    pairs = prompts.encode_pairs(
        [GOOD, TextPair("The cats", "The cat", " are", " is")], words(), vocab_size=13
    )
    assert dict(pairs.dropped) == {"token outside the model's vocabulary": 1}


def test_nothing_left_is_refused_with_the_reasons() -> None:
    with pytest.raises(InputError, match=r"no pair is left.*identical prompts: 1"):
        prompts.encode_pairs([BAD["identical prompts"]], words())
    with pytest.raises(InputError, match="needs a tokenizer"):
        prompts.encode_pairs([GOOD], None)
    with pytest.raises(InputError, match="limit"):
        prompts.encode_pairs([GOOD], words(), limit=0)


def test_written_pairs_come_back(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", [GOOD, BAD["identical answers"], GOOD])
    pairs = prompts.read_pairs(path, words())
    assert pairs.texts == (GOOD, GOOD)
    assert len(prompts.read_pairs(path, words(), limit=1)) == 1
    assert set(json.loads(path.read_text().splitlines()[0])) == {
        "clean_prefix",
        "patch_prefix",
        "clean_answer",
        "patch_answer",
        "case",
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "is not JSON"),
        ("[1, 2]", "got list"),
        ('{"clean_prefix": "a"}', "'patch_prefix' must be a string"),
        ('{"clean_prefix": 3}', "'clean_prefix' must be a string, got 3"),
        (json.dumps({**GOOD.__dict__, "case": 1}), "'case'"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", [GOOD])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(InputError, match=rf"pairs\.jsonl, line 3:? .*{message}"):
        prompts.read_pairs(path, words())


def test_files_without_pairs_are_refused(tmp_path: Path) -> None:
    for name, text in [
        ("a.jsonl", ""),
        ("b.jsonl", "\n \n"),
        ("c.csv", ""),
        ("d.csv", "clean,corrupted\n"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="holds no pairs"):
            prompts.read_pairs(tmp_path / name, words())
    with pytest.raises(InputError, match="no file"):
        prompts.read_pairs(tmp_path / "none.jsonl", words())
    (tmp_path / "e.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        prompts.read_pairs(tmp_path / "e.jsonl", words())
    with pytest.raises(InputError, match="greater_than"):
        prompts.read_pairs(tmp_path / "a.jsonl", words(), format="greater")  # type: ignore[arg-type]


def test_a_csv_with_the_columns_of_a_pair_is_read_as_pairs(tmp_path: Path) -> None:
    head = "case,clean_prefix,patch_prefix,clean_answer,patch_answer"
    row = [GOOD.case, GOOD.clean_prefix, GOOD.patch_prefix, GOOD.clean_answer, GOOD.patch_answer]
    path = tmp_path / "pairs.csv"
    path.write_text(f"{head}\n{','.join(row)}\n")
    for format in (None, "pairs"):
        assert prompts.read_pairs(path, words(), format=format).texts == (GOOD,)  # type: ignore[arg-type]
    path.write_text("clean_prefix,clean_answer\na,b\n")
    with pytest.raises(InputError, match="no column 'patch_prefix'"):
        prompts.read_pairs(path, words(), format="pairs")
    with pytest.raises(InputError, match=r"no column .clean.*may also be clean_prefix, patch_p"):
        prompts.read_pairs(path, words())


def names() -> Any:
    vocabulary = [*WORDS, "When", "Ann", "and", "Bob", "Cy", "met", "gave", "it", "to"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def test_indirect_objects_are_found_in_the_text(tmp_path: Path) -> None:
    path = tmp_path / "ioi.csv"
    rows = [
        (
            "When Ann and Bob met Bob gave it to,When Ann and Bob met Cy gave it to,When Ann and"
            " Bob met Ann gave it to"
        ),
        (
            "When Ann and Bob met Ann gave it to,When Ann and Bob met Cy gave it to,When Ann and"
            " Bob met Bob gave it to"
        ),
        (
            "When Ann and Bob met Cy gave it to,When Ann and Bob met Ann gave it to,When Ann and"
            " Bob met Bob gave it to"
        ),
    ]
    path.write_text("clean,corrupted,corrupted_hard\n" + "\n".join(rows))
    pairs = prompts.read_pairs(path, names())
    assert [(pair.clean_answer, pair.patch_answer, pair.case) for pair in pairs.texts] == [
        (" Ann", " Bob", "ABBA"),
        (" Bob", " Ann", "BABA"),
    ]
    assert dict(pairs.dropped) == {"no indirect object in the text": 1}
    assert (
        prompts.read_pairs(path, names(), patch="corrupted_hard")
        .texts[0]
        .patch_prefix.endswith("Ann gave it to")
    )
    with pytest.raises(InputError, match="line 1: no column 'wrong'"):
        prompts.read_pairs(path, names(), patch="wrong")
    path.write_text("clean,corrupted\n" + rows[0].rsplit(",", 1)[0] + "\nonly one field\n")
    with pytest.raises(InputError, match="line 3"):
        prompts.read_pairs(path, names())


def years() -> Any:
    vocabulary = ["<unk>", "From", "17", "to", *(f"{i:02d}" for i in range(100) if i != 17)]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    pairs = pre_tokenizers.Split(pattern=Regex(r"\d\d"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pairs])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_greater_than_takes_the_neighbouring_years(tmp_path: Path) -> None:
    path = tmp_path / "years.csv"
    path.write_text(
        "clean,corrupted,label\nFrom 1732 to 17,From 1701 to 17,32\nFrom 1704 to 17,From 1701 to"
        " 17,4\nFrom 1799 to 17,From 1701 to 17,99\n"
    )
    tokenizer = years()
    pairs = prompts.read_pairs(path, tokenizer)
    assert [(pair.clean_answer, pair.patch_answer) for pair in pairs.texts] == [
        ("33", "31"),
        ("05", "03"),
    ]
    assert pairs.years is not None
    assert pairs.digits is not None
    assert pairs.years.tolist() == [32, 4]
    assert tokenizer.convert_ids_to_tokens(pairs.digits[1].tolist()) == [
        f"{i:02d}" for i in range(100)
    ]
    assert dict(pairs.dropped) == {"start year without neighbours in its century": 1}
    path.write_text("clean,corrupted,label\nFrom 1732 to 17,From 1701 to 17,33\n")
    with pytest.raises(InputError, match="line 2: 'label'"):
        prompts.read_pairs(path, tokenizer)


def test_plain_text_is_cut_into_windows(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The cat runs near the dogs The cats")
    assert texts.read_text(path, words(), length=3).tolist() == [[3, 4, 10], [6, 7, 8]]
    assert texts.read_text(path, words(bos=True), length=4, limit=1).tolist() == [[2, 3, 4, 10]]
    with pytest.raises(InputError, match="too few"):
        texts.read_text(path, words(), length=9)
    with pytest.raises(InputError, match="length"):
        texts.read_text(path, words(), length=1)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")
def test_public_files_with_a_real_tokenizer() -> None:
    tokenizer = load_tokenizer(DATA / "gpt2_bpe")
    pairs = prompts.read_pairs(DATA / "sva" / "simple_test.jsonl", tokenizer)
    assert len(pairs) + sum(pairs.dropped.values()) == 120
    assert len(pairs) > 90
    assert all(
        tokenizer.decode(row) == text.clean_answer + text.patch_answer
        for row, text in zip(pairs.answers, pairs.texts, strict=True)
    )
    objects = prompts.read_pairs(DATA / "ioi" / "ioi.csv", tokenizer)
    assert len(objects) + sum(objects.dropped.values()) == 499
    assert "no indirect object in the text" not in objects.dropped
    assert (objects.texts[0].clean_answer, objects.texts[0].patch_answer) == (" Amber", " Aaron")


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", [GOOD])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert prompts.read_pairs(path, words()).texts == (GOOD,)
    table = tmp_path / "years.csv"
    table.write_bytes(b"\xef\xbb\xbfclean,corrupted,label\nFrom 1732 to 17,From 1701 to 17,32\n")
    assert len(prompts.read_pairs(table, years())) == 1
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_text(f"{WORDS[2]} {WORDS[3]} " * 8)
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    one, two = (texts.read_text(path, words(), length=4) for path in (plain, marked))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps({**GOOD.__dict__, "clean_prefix": "a\ud800"}), "holds a lone surrogate"),
        (json.dumps({**GOOD.__dict__, "case": "\udfff"}), "holds a lone surrogate"),
        ('{"clean_prefix": ' + "9" * 5000 + "}", "is not JSON"),
    ],
    ids=["prefix", "case", "digits"],
)
def test_what_no_tokenizer_takes_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=rf"line 1:? .*{message}"):
        prompts.read_pairs(path, words())


@pytest.mark.parametrize("label", ["²", "9" * 5000, "-32", "3 2", ""])
def test_labels_that_are_no_two_digits_are_named(tmp_path: Path, label: str) -> None:
    path = tmp_path / "years.csv"
    path.write_text(f"clean,corrupted,label\nFrom 1732 to 17,From 1701 to 17,{label}\n")
    with pytest.raises(InputError, match="line 2: 'label' must be the last two digits"):
        prompts.read_pairs(path, years())


def test_a_csv_row_ends_where_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "years.csv"
    path.write_text('clean,corrupted,label\n"From 1732\u2028 to 17",From 1701 to 17,32\n')
    assert prompts.read_pairs(path, years()).texts[0].clean_prefix == "From 1732\u2028 to 17"
    path.write_text("x" * 200_000 + ",corrupted\n")
    with pytest.raises(InputError, match="line 1: field larger"):
        prompts.read_pairs(path, years())
