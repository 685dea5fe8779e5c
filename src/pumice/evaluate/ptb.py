"""Captions as the words that caption metrics count: Penn Treebank tokens, lower case, no punctuation.

Does what pycocoevalcap's PTBTokenizer does with Stanford CoreNLP 3.4.1, without Java. Its oddities are
kept, because published scores contain them: a round bracket stays as the word "-lrb-", "!!!" is a word
and "!" is none. Knows English caption text only. Does not know: scores.
"""

from __future__ import annotations

import re

# pycocoevalcap's list. Its "-LRB-" never matches, since tokens are in lower case by then.
_REMOVED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_WRITTEN = {
    '"': "''", "“": "``", "”": "''", "\u2018": "`", "’": "'", "…": "...", "–": "--", "—": "--",
    "½": "1/2", "¼": "1/4", "¾": "3/4", ":)": ":-rrb-", ":(": ":-lrb-",
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
}  # fmt: skip

# Abbreviations whose full stop belongs to the word wherever they stand.
_ABBREVIATIONS = (
    "mr|mrs|ms|messrs|dr|prof|sr|jr|st|mt|gen|col|sgt|capt|lt|rev|hon|gov|sen|rep|pres|maj|adm|cmdr|"
    "inc|co|corp|ltd|bros|assn|dept|est|ave|blvd|rd|ft|etc|vs|ph\\.d|"
    "jan|feb|apr|aug|sept|sep|oct|nov|dec|calif|fla"
)
# After a single capital and its full stop these begin a sentence.
_STARTS = (
    "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|"
    "Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|When|While|"
    "What|Yet|You"
)
_TOKEN = re.compile(
    rf"""
      https?://\S+ | \w[\w.]*@\w[\w.]*\w | (?:www\.)?[\w-]+(?:\.[\w-]+)*\.(?:com|net|org|edu|gov)\b
    | \b(?:can(?=not\b) | gon(?=na\b) | got(?=ta\b) | wan(?=na\b) | gim(?=me\b) | lem(?=me\b))
    | 't(?=is\b|was\b) | 'n' | '\d0s\b           # 't is, rock 'n' roll, '80s
    | (?:[^\W\d_]\.){{2,}}(?:[^\W\d_]\b)?        # u.s.a. and u.s.a
    | \b(?-i:[A-Z]+&[A-Z]+)\b                   # R&B
    | \b(?:{_ABBREVIATIONS})\.                  # mr.
    | \bno\.(?=\s*\d)                           # no. 7
    | \b(?-i:[A-Z])\.(?!\s*$|\s+(?-i:{_STARTS})\b)   # the letter P., but not at the end of a sentence
    | (?<!\S)(?-i:a)\.(?=\s|$)                  # a.
    | </?[a-z][^<>\s]*> | :[()](?!\w)            # a tag, a smile
    | n't\b | '(?:s|m|d|re|ve|ll)\b             # the ends of is n't, dog 's, they 're
    | \b[dol]'\w+                               # o'clock
    | (?<!\S)(?:-\d*\.?|\.)\d+(?:[.,:]\d+)*(?=[\s)\]}},;!?]|\.?(?:\s|$))    # -2 and .5
    | \d+(?:[.,:/-]\d+)+(?:-\w+)*                # 1,000 and 10:30
    | \#[^\W\d]\w*                             # a hashtag
    | \w+?(?=n't\b)
    | \w+(?:[-/.]\w+)*
    | \.\.\. | -- | `` | '' | [!?]+ | \*+ | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_APOSTROPHE_AFTER_LETTER = re.compile(r"(?<=\w)’(?=\w)|’(?=(?:s|m|d|re|ve|ll)\b)", re.IGNORECASE)
_OPENING = re.compile(r"(?<!\S)'(?=\w)(?!(?:tis|twas|n|s|m|d|re|ve|ll|\d0s)\b)", re.IGNORECASE)


def tokenize(caption: str) -> list[str]:
    """The words of a caption, as caption metrics count them; empty when it holds none."""
    text = _OPENING.sub("`", _APOSTROPHE_AFTER_LETTER.sub("'", caption))
    words = (_WRITTEN.get(word, word.lower()) for word in _TOKEN.findall(text))
    return [word for word in words if word not in _REMOVED]
