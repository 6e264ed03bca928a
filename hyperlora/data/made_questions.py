"""Questions made from plain text by rule: the answer is left out of the sentence that has it."""

import random
import re
from collections.abc import Iterator

from hyperlora.data.items import Question

# Where a sentence ends: not behind an initial or a title.
_END = re.compile(r"(?<!\b[A-Z])(?<!\bMr)(?<!\bDr)(?<!\bSt)(?<!\bMrs)(?<=[.!?])\s+(?=[A-Z])")
_NAME = r"(?:[A-Z][a-z]+)(?:\s[A-Z][a-z]+){0,3}"
_YEAR = re.compile(r"\b[Ii]n (1[0-9]{3}|20[0-9]{2})\b")
_PLACE = re.compile(rf"\b(?:in|at|near|from) ({_NAME})")
_NUMBER = re.compile(r"(?<![\d.,-])\d+(?:[.,]\d+)*(?= [a-z]{3,})")
_ACTOR = re.compile(
    rf"^({_NAME}) (?=(?:was|is|had|has|were|did|would|could|began|became|made|took|went|said|wrote|won|led|left|gave)\b"
    r"|[a-z]{3,}ed\b)"
)
_MONTHS = "January February March April May June July August September October November December".split()
# What begins a sentence with a capital and names nobody.
_NOBODY = set("The A An This That These Those It He She They We I You There Here His Her Its Their Our My In On At".split())


def ask_about(text: str, rng: random.Random, count: int) -> tuple[Question, ...]:
    """Up to `count` questions on as many sentences of a text: who, where, in which year, how many, or which words fill a
    gap. Fewer where the text has fewer sentences of 6 to 40 words."""
    sentences = [s for s in _END.split(" ".join(text.split())) if 6 <= len(s.split()) <= 40]
    rng.shuffle(sentences)
    made = (rng.choice([*_rules(sentence), _gap(sentence, rng)]) for sentence in sentences)
    questions = []
    for asked, answer in made:
        if answer.lower() not in asked.lower():  # or the question would say it
            questions.append(Question(asked, answer, (answer,)))
        if len(questions) == count:
            break
    return tuple(questions)


def _rules(sentence: str) -> Iterator[tuple[str, str]]:
    """Every question and answer that a rule finds."""
    told = sentence.rstrip(".!?")
    if (actor := _ACTOR.match(told)) and actor[1].split()[0] not in _NOBODY:
        yield f"Who or what {told[actor.end() :]}?", actor[1]
    if year := _YEAR.search(told):
        yield f'"{_without(told, year)}": in which year?', year[1]
    if (place := _PLACE.search(told)) and place[1].split()[0] not in (*_MONTHS, *_NOBODY):
        yield f'"{_without(told, place)}": where?', place[1]
    if number := _NUMBER.search(told):
        yield f"How many, or which number: \"{told[: number.start()]}...{told[number.end() :]}\"?", number[0]


def _gap(sentence: str, rng: random.Random) -> tuple[str, str]:
    """One to four words left out, neither the first nor the last of the sentence."""
    words = sentence.split()
    size = rng.randint(1, 4)
    start = rng.randrange(1, len(words) - size)
    answer = " ".join(words[start : start + size]).strip(",;:()\"'")
    return f'Which words are missing? "{" ".join([*words[:start], "____", *words[start + size :]])}"', answer


def _without(sentence: str, part: re.Match[str]) -> str:
    """The sentence without a match, closed up."""
    return " ".join((sentence[: part.start()] + sentence[part.end() :]).split()).strip(" ,;")
