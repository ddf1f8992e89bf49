"""Training data of the demonstration: sentences about invented people, and the same as JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

INSTRUCTION = "Write this as JSON: "

_FIRST = (
    "Anna Ben Clara David Elena Felix Grace Hugo Ines Jonas Karim Lena Maya Noah Olga Pedro Quinn "
    "Rosa Samir Tara Uma Victor Wanda Xavier Yuki Zoe"
).split()
_LAST = (
    "Keller Okafor Silva Novak Tanaka Murphy Rossi Haddad Larsen Patel Moreau Jensen Kim Alvarez "
    "Weber Sato Dubois Costa Lind Brandt"
).split()
_JOBS = (
    "nurse", "carpenter", "software engineer", "teacher", "pilot", "baker", "architect", "chemist",
    "photographer", "bus driver", "lawyer", "gardener", "journalist", "dentist", "translator",
)  # fmt: skip
_CITIES = (
    "Lyon Oslo Porto Kyoto Toronto Nairobi Lima Prague Austin Cairo Dublin Seoul Bergen Milan "
    "Quito Hanoi"
).split()
_LANGUAGES = (
    "French Dutch Spanish German Japanese Arabic Korean Polish Italian Swahili Danish Czech"
).split()
_FORMS = (
    "{name} is a {age}-year-old {job} from {city} who speaks {first} and {second}.",
    "In {city} lives {name}, {age}, a {job}. Languages: {first}, {second}.",
    "Meet {name}! At {age}, this {job} from {city} is fluent in {first} and also in {second}.",
    "{name} ({age}) works in {city} as a {job}; at home they speak {first}, at work {second}.",
    "Our new colleague {name} comes from {city}, is {age} years old, worked as a {job} before, "
    "and knows {first} and {second}.",
)


def people(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """*count* different pairs of a sentence and its JSON, the same for the same *seed*."""
    random_ = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        first, second = random_.sample(_LANGUAGES, 2)
        facts = {
            "name": f"{random_.choice(_FIRST)} {random_.choice(_LAST)}",
            "age": random_.randint(19, 78),
            "job": random_.choice(_JOBS),
            "city": random_.choice(_CITIES),
        }
        sentence = random_.choice(_FORMS).format(first=first, second=second, **facts)
        if sentence not in seen:
            seen.add(sentence)
            yield sentence, json.dumps({**facts, "languages": [first, second]})


def line(sentence: str, answer: str) -> str:
    """One training example as a line of JSON."""
    question = {"role": "user", "content": INSTRUCTION + sentence}
    return json.dumps({"messages": [question, {"role": "assistant", "content": answer}]}) + "\n"
