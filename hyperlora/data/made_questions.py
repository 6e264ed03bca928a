"""Questions made from plain text by rule: the answer is left out of the sentence that has it."""

import random
import re
from calendar import day_name, month_name
from collections.abc import Iterator

from hyperlora.data.items import Question
from hyperlora.data.rows import FEW_WORDS

# Where a sentence ends: not behind an initial or a title.
_END = re.compile(r"(?<!\b[A-Z]\.)(?<!\b(?:Mr|Dr|St)\.)(?<!\bMrs\.)(?<=[.!?])\s+(?=[A-Z])")
_NAME = r"(?:[A-Z][a-z]+)(?:\s[A-Z][a-z]+){0,3}"
_YEAR = re.compile(r"\b[Ii]n (1[0-9]{3}|20[0-9]{2})\b")
_PLACE = re.compile(rf"\b(?:in|at|near) ({_NAME})")
_NUMBER = re.compile(r"(?<![\d.,-])(?<!@ )\d+(?:[.,]\d+)*(?= [a-z]{3,})")  # WikiText cuts 1,500 into "1 @,@ 500"
_ACTOR = re.compile(
    rf"^({_NAME}) (?=(?:was|is|had|has|were|did|would|could|began|became|made|took|went|said|wrote|won|led|left|gave)\b"
    r"|[a-z]{3,}ed\b)"
)
_WORD = re.compile(r"[\w'’-]*\w")
_GAPS = 0.3  # how often a gap is asked about a sentence that a rule fits
# What has a capital and is neither somebody nor a place.
_NOBODY = re.compile(
    r"(The|An?|Th[eo]se|Th[ai][st]|It|He|She|They|We|I|You|There|Here|His|Her|Its|Their|Our|My|In|On|At|As|If|Once|Wh\w+|"
    r"How|Although|Originally|Some|One|All|Every\w*|No\w*|Any\w*|Many|Most|Both|Each|Also|First|Or|And|But|So|Then|"
    rf"{'|'.join([*month_name[1:], *day_name])}|English|French|German|Spanish|Latin|Greek|Chinese|Japanese)\b"
)
_WHOLE = re.compile(r"[\"'(]*[A-Z0-9].*[.!][\"')]*")  # no piece of a sentence, and no question


def ask_about(text: str, rng: random.Random, count: int) -> tuple[Question, ...]:
    """Up to `count` questions on as many sentences of a text: who, where, in which year, how many, or else which words
    fill a gap. Fewer where the text has fewer whole sentences of 6 to 40 words that something can be asked about."""
    sentences = [s for s in _END.split(" ".join(text.split())) if 6 <= len(s.split()) <= 40 and _WHOLE.fullmatch(s)]
    rng.shuffle(sentences)
    questions: list[Question] = []
    for sentence in sentences:
        made = [pair for pair in _rules(sentence) if pair[1].lower() not in pair[0].lower()]  # the question tells none
        if not made or rng.random() < _GAPS:
            made = list(_gaps(sentence, rng))
        if made:
            asked, answer = rng.choice(made)
            questions.append(Question(asked + FEW_WORDS, answer, (answer,)))
        if len(questions) == count:
            break
    return tuple(questions)


def _rules(sentence: str) -> Iterator[tuple[str, str]]:
    """Every question and answer that a rule finds."""
    told = sentence.rstrip(".!? ")
    if (actor := _ACTOR.match(told)) and not _NOBODY.match(actor[1]):
        yield f"Who or what {told[actor.end() :]}?", actor[1]
    if year := _YEAR.search(told):
        yield f'"{_without(told, year)}": in which year?', year[1]
    if (place := _PLACE.search(told)) and not _NOBODY.match(place[1]):
        yield f'"{_without(told, place)}": where?', place[1]
    if number := _NUMBER.search(told):
        yield f'How many, or which number: "{told[: number.start()]}...{told[number.end() :]}"?', number[0]


def _gaps(sentence: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """One question with one to four words left out, inside the sentence and not only small ones, if there are such."""
    size = rng.randint(1, 4)
    words = sentence.split()
    starts = list(range(1, len(words) - size))
    rng.shuffle(starts)
    for start in starts:
        left_out = words[start : start + size]
        answer, told = " ".join(left_out), " ".join([*words[:start], "____", *words[start + size :]])
        weighty = any(len(word) > 4 or not word.islower() for word in left_out)
        if weighty and all(map(_WORD.fullmatch, left_out)) and answer.lower() not in told.lower():
            yield f'Which words are missing? "{told}"', answer
            return


def _without(sentence: str, part: re.Match[str]) -> str:
    """The sentence without a match, closed up."""
    return re.sub(r"\s+([,;:)])", r"\1", sentence[: part.start()].rstrip() + sentence[part.end() :]).strip(" ,;")
