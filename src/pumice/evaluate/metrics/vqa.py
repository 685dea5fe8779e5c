"""Short answers against ten people's answers, as the official scorers of VQA, VizWiz and TextVQA count.

Sources: GT-Vision-Lab/VQA vqaEval.py, the VizWiz API's vqaEval.py, and the EvalAI answer processor of
M4C that LLaVA uses for TextVQA and for what it submits. Their slips are kept, since published numbers
contain them: the pattern meant to keep a period after a digit says `(?!<=` for `(?<!`, so that it never
does, and `re.UNICODE` stands in the place of a count, so that only the first 32 periods go. `corrected`
repairs both. Knows texts only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

_SLIPS = 32  # re.UNICODE, passed where re.sub expects how often
_PERIOD = re.compile(r"\.(?!\d)")  # what the official pattern comes to
_PERIOD_MEANT = re.compile(r"(?<!\d)\.(?!\d)")
_COMMA = re.compile(r"\d,\d")  # the two official patterns find one in the same texts
_COMMAS = re.compile(r"(?<=\d),+(?=\d)")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = ("a", "an", "the")
_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

# Contractions that the scorers restore, written as "key" or "key=value" where the value is not plainly
# the key with an apostrophe before its last letters. The list's own slips (somebody'd) are part of it.
_NT = (
    "aren couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan shouldn wasn weren won "
    "wouldn ain can"
)
_WHOLE = """
couldve=could've couldn'tve=couldn't've couldnt've=couldn't've hadnt've=hadn't've hadn'tve=hadn't've
hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's Id've=I'd've
I'dve=I'd've Im=I'm Ive=I've itd=it'd itd've=it'd've it'dve=it'd've itll=it'll let's=let's maam=ma'am
mightnt've=mightn't've mightn'tve=mightn't've mightve=might've mustve=must've notve=not've
oclock=o'clock ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shed've=she'd've she'dve=she'd've
she's=she's shouldve=should've shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd
somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's
someoned=someone'd someoned've=someone'd've someone'dve=someone'd've someonell=someone'll
someones=someone's somethingd=something'd somethingd've=something'd've something'dve=something'd've
somethingll=something'll thats=that's thered=there'd thered've=there'd've there'dve=there'd've
therere=there're theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll
theyre=they're theyve=they've twas='twas wed've=we'd've we'dve=we'd've weve=we've whatll=what'll
whatre=what're whats=what's whatve=what've whens=when's whered=where'd wheres=where's whereve=where've
whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll
whyre=why're whys=why's wouldve=would've wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all
yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've
youd=you'd youd've=you'd've you'dve=you'd've youll=you'll youre=you're youve=you've
"""
CONTRACTIONS = {f"{stem}t": f"{stem}'t" for stem in _NT.split()} | dict(
    entry.split("=") for entry in _WHOLE.split()
)


@lru_cache(maxsize=1 << 16)
def strip_punctuation(text: str, *, corrected: bool = False) -> str:
    """Punctuation becomes a space, or nothing where it stands beside one or the text holds 1,000."""
    thousands = (_COMMAS if corrected else _COMMA).search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        beside = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if beside or thousands else " ")
    return _PERIOD_MEANT.sub("", out) if corrected else _PERIOD.sub("", out, count=_SLIPS)


@lru_cache(maxsize=1 << 16)
def digits_and_articles(text: str) -> str:
    """Lower case, number words to ten as digits, no articles, contractions with their apostrophe."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def m4c(text: str, *, corrected: bool = False) -> str:
    """The EvalAI answer processor of M4C: what LLaVA submits for VQAv2 and VizWiz, and TextVQA's words."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return digits_and_articles(strip_punctuation(text, corrected=corrected))


def bare(text: str) -> str:
    """Lower case, without a full stop and spaces around it; what is inside stays."""
    return text.strip().rstrip(".").strip().lower()


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def leave_one_out(said: str, answers: Sequence[str]) -> float:
    """Mean over the people of min(1, others who said it / 3); 0 when nobody answered."""
    if not answers:
        return 0.0
    same = sum(answer == said for answer in answers)
    scores = [min(1.0, (same - (answer == said)) / 3) for answer in answers]
    return sum(scores) / len(scores)


def textvqa_accuracy(said: str, answers: Sequence[str], *, corrected: bool = False) -> float:
    """LLaVA's m4c_evaluator: both sides through the processor, then leave one out."""
    processed = [m4c(answer, corrected=corrected) for answer in answers]
    return leave_one_out(m4c(said, corrected=corrected), processed)


def vqa_accuracy(said: str, answers: Sequence[str]) -> float:
    """VQAEval: both sides are normalised, but only where people did not all write the same."""
    answers, said = [_plain(answer) for answer in answers], _plain(said)
    if len(set(answers)) > 1:
        answers = [digits_and_articles(strip_punctuation(answer)) for answer in answers]
        said = digits_and_articles(strip_punctuation(said))
    return leave_one_out(said, answers)


def vqa_accuracy_first(said: str, answers: Sequence[str]) -> float:
    """VQAEval as first released: the prediction is always normalised, truths lose punctuation only."""
    if len(set(answers)) > 1:
        answers = [strip_punctuation(answer) for answer in answers]
    return leave_one_out(digits_and_articles(strip_punctuation(_plain(said))), answers)


def vizwiz_accuracy(said: str, answers: Sequence[str]) -> float:
    """The VizWiz API's scorer: the prediction is normalised, people's answers are taken as they are."""
    return leave_one_out(digits_and_articles(strip_punctuation(_plain(said))), answers)
