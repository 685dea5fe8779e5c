"""Expected words: what CoreNLP 3.4.1's PTBTokenizer and pycocoevalcap's removal of punctuation gave."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

from pumice.evaluate.metrics.ptb import tokenize

OFFICIAL = {
    "A man's dog isn't here; he'll go.": "a man 's dog is n't here he 'll go",
    "we 're ca n't can't won't I'm you'd they've": "we 're ca n't ca n't wo n't i 'm you 'd they 've",
    "The dogs' ball and the boys' toys.": "the dogs ball and the boys toys",
    "A dog says \"hello\" to the 'big' cat.": "a dog says hello to the big cat",
    "A dog (brown) runs [fast].": "a dog -lrb- brown -rrb- runs -lsb- fast -rsb-",
    "A black/white dog and/or cat, 1/2 of it.": "a black/white dog and/or cat 1/2 of it",
    "It is 10:30 a.m. on Jan. 5, 1,000 of 3.5 km.": "it is 10:30 a.m. on jan. 5 1,000 of 3.5 km",
    "A boy wears Mr. Potato Head features.": "a boy wears mr. potato head features",
    "a crowd in Washington D.C.": "a crowd in washington d.c.",
    "a man in a U.S.A shirt": "a man in a u.s.a shirt",
    "a man in a no. 7 jersey": "a man in a no. 7 jersey",
    "The dog says no.": "the dog says no",
    "A dog... and a cat -- running - fast.": "a dog and a cat running fast",
    "cannot gonna gotta wanna": "can not gon na got ta wan na",
    "'tis rock 'n' roll, the '80s": "'t is rock 'n' roll the '80s",
    "A well-dressed 2-year-old in a t-shirt": "a well-dressed 2-year-old in a t-shirt",
    "$5 and 50% off, #1 & co. @ home": "$ 5 and 50 % off # 1 & co. @ home",
    "An ant 's-eye-view": "an ant 's eye-view",
    "dog!!! What?? no?!": "dog !!! what ?? no ?!",
    "a dog runs.a cat sits,and eats.": "a dog runs.a cat sits and eats",
    "a 1,000-foot cliff": "a 1,000-foot cliff",
    "the dog\u2019s \u201cbig\u201d ball \u2014 caf\u00e9": "the dog 's big ball caf\u00e9",
    "visit www.dogs.com or a@b.com": "visit www.dogs.com or a@b.com",
    "an R&B band at 9 o'clock": "an r&b band at 9 o'clock",
    "is 1,000 -3.10 $5 007 so C. ½ > 日本": "is 1,000 -3.10 $ 5 007 so c. 1/2 > 日本",
    "**b** 007 via #a# /!": "** b ** 007 via #a # /",
    "A dog carries a@b.co a large :) ] stick.": "a dog carries a@b.co a large :-rrb- -rsb- stick",
    "Woman \u2019s in Obama + t-shirt smiling.": "woman 's in obama + t-shirt smiling",
    "A <b> woman in a green costume": "a <b> woman in a green costume",
    "A. A white dog plays.": "a a white dog plays",
    "-- = < . ? -2": "= < -2",
    "y'all saw 'em 'til dawn, 'cause ma'am said so, ol' X'mas": (
        "y' all saw 'em 'til dawn 'cause ma'am said so ol' x'mas"
    ),
    "3½ dogs\U0001f600 for €5, £6 or 7¢": "3 1/2 dogs for $ 5 # 6 or 7 cents",
    "fish &amp; chips (http://x.com), see http://y.com!": "fish & chips -lrb- http://x.com -rrb- see http://y.com",
    "plan b. dog, option a. The «cat» by Mr.Smith": "plan b. dog option a the cat by mr.smith",
    "@user writes C++ :-) and C# =(": "@user writes c++ :--rrb- and c# =-lrb-",
    "": "",
    " . ": "",
}


@pytest.mark.parametrize("caption", OFFICIAL)
def test_words_are_those_of_the_official_tokenizer(caption: str) -> None:
    assert tokenize(caption) == OFFICIAL[caption].split()


def test_the_expectations_are_right() -> None:
    """Where Java and pycocoevalcap are installed, the table above is checked against them."""
    if not shutil.which("java") or not importlib.util.find_spec("pycocoevalcap"):
        pytest.skip("needs java and the extra 'metrics'")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = {caption: [{"caption": caption}] for caption in OFFICIAL if caption}
    tokens = PTBTokenizer().tokenize(captions)
    assert {c: words[0].split() for c, words in tokens.items()} == {c: OFFICIAL[c].split() for c in captions}


def test_its_own_words_are_stable() -> None:
    words = tokenize("Two men aren't playing a man's guitar in front of St. John's, at 10:30.")
    assert tokenize(" ".join(words)) == words
