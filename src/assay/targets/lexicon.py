"""The lexicon of the agreement sentences: every word is a single token, every noun and verb
comes as (singular, plural).
"""

from __future__ import annotations

_REGULAR_NOUNS = """
    actor artist baker banker barber captain clerk coach cousin dancer dentist doctor driver
    editor farmer fisher gardener guard guest guide hunter judge jeweler king knight lawyer
    leader mayor miner minister nephew neighbor nurse officer painter pilot pirate player poet
    porter prince queen ranger rider sailor scholar senator singer sister skier smith soldier
    student surgeon tailor teacher tenant tutor uncle waiter writer
    bear bird camel cow crow dog dolphin donkey duck eagle frog goat hawk horse lion monkey owl
    parrot rabbit raven sheepdog spider tiger turtle
    barn basket boat bottle bridge bucket cabin candle car cart chair clock desk door fence
    garden gate hammer kettle ladder lamp mirror piano pillow ship statue table tent tower tree
    truck wagon wall window
"""
_OTHER_NOUNS = (
    ("man", "men"),
    ("woman", "women"),
    ("child", "children"),
    ("wife", "wives"),
    ("thief", "thieves"),
    ("lady", "ladies"),
    ("baby", "babies"),
    ("spy", "spies"),
    ("fox", "foxes"),
    ("witch", "witches"),
    ("mouse", "mice"),
    ("goose", "geese"),
    ("wolf", "wolves"),
    ("calf", "calves"),
    ("pony", "ponies"),
    ("knife", "knives"),
    ("shelf", "shelves"),
    ("bench", "benches"),
    ("bus", "buses"),
    ("box", "boxes"),
)
NOUNS: tuple[tuple[str, str], ...] = (
    tuple((noun, noun + "s") for noun in _REGULAR_NOUNS.split()) + _OTHER_NOUNS
)

PREPOSITIONS = ("near", "behind", "beside", "above", "below", "across", "against", "around")

_ADJECTIVES = [
    "old",
    "tall",
    "quiet",
    "famous",
    "heavy",
    "lonely",
    "clever",
    "gentle",
    "hungry",
    "strange",
]
_ADVERBS = ["often", "slowly", "again", "today", "alone", "early", "nearby", "together"]
_OBJECTS = ["money", "time", "help", "luck", "secrets", "plans", "enemies", "rivals"]
_WORK = ["nothing", "everything", "little", "much", "less", "more"]

FINITE_VERBS: tuple[tuple[tuple[str, str], tuple[str, ...]], ...] = (
    (("is", "are"), tuple(_ADJECTIVES)),
    (("was", "were"), tuple(_ADJECTIVES)),
    (("has", "have"), tuple(_OBJECTS)),
    (("does", "do"), tuple(_WORK)),
    (("seems", "seem"), tuple(_ADJECTIVES)),
    (("sleeps", "sleep"), tuple(_ADVERBS)),
    (("arrives", "arrive"), tuple(_ADVERBS)),
    (("moves", "move"), tuple(_ADVERBS)),
    (("waits", "wait"), tuple(_ADVERBS)),
    (("falls", "fall"), tuple(_ADVERBS)),
)
"""Main verbs, each with the words that may follow it."""

TRANSITIVE_VERBS: tuple[tuple[str, str], ...] = (
    ("admires", "admire"),
    ("avoids", "avoid"),
    ("chases", "chase"),
    ("finds", "find"),
    ("follows", "follow"),
    ("fears", "fear"),
    ("ignores", "ignore"),
    ("likes", "like"),
    ("sees", "see"),
    ("watches", "watch"),
)
"""Verbs of the relative clause: "the artist that the guards *watch*"."""


def words() -> list[str]:
    """Return every word once, in a fixed order."""
    finite = [form for verb, following in FINITE_VERBS for form in (*verb, *following)]
    paired = [form for pair in (*NOUNS, *TRANSITIVE_VERBS) for form in pair]
    return list(dict.fromkeys(["The", "the", "that", ".", *paired, *PREPOSITIONS, *finite]))
