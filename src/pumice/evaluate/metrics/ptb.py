"""Split English captions into Penn Treebank tokens: lower case, without punctuation.

The tokens equal those of pycocoevalcap's PTBTokenizer (Stanford CoreNLP 3.4.1), without Java. Its oddities
stay, because published scores contain them: "(" becomes the word "-lrb-", and "!!!" is a word while "!" is
not.
"""

from __future__ import annotations

import re

# pycocoevalcap's list, without its "-LRB-", which never matches tokens in lower case.
_REMOVED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_REPLACED = {
    '"': "''", "“": "``", "”": "''", "«": "``", "»": "''", "\u2018": "`", "’": "'", "…": "...",
    "–": "--", "—": "--", "½": "1/2", "¼": "1/4", "¾": "3/4", "€": "$", "£": "#", "¢": "cents",
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
}  # fmt: skip

# Abbreviations whose full stop always belongs to the word.
_ABBREVIATIONS = (
    "mr|mrs|ms|messrs|dr|prof|sr|jr|st|mt|gen|col|sgt|capt|lt|rev|hon|gov|sen|rep|pres|maj|adm|cmdr|"
    "inc|co|corp|ltd|bros|assn|dept|est|ave|blvd|rd|ft|etc|vs|ph\\.d|"
    "jan|feb|apr|aug|sept|sep|oct|nov|dec|calif|fla"
)
# Words that begin a new sentence after a single capital letter and its full stop.
_STARTS = (
    "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|"
    "Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|When|While|"
    "What|Yet|You"
)
_TOKEN = re.compile(
    rf"""
      https?://[^\s()"]*[^\s()".,:;!?] | \w[\w.]*@\w[\w.]*\w
    | (?:www\.)?[\w-]+(?:\.[\w-]+)*\.(?:com|net|org|edu|gov)\b
    | \b(?:can(?=not\b) | gon(?=na\b) | got(?=ta\b) | wan(?=na\b) | gim(?=me\b) | lem(?=me\b))
    | 't(?=is\b|was\b) | 'n' | '\d0s\b | '(?:cause|til|em)\b      # 't is, rock 'n' roll, '80s
    | \b(?: y'(?=all\b) | ol'(?!\w) | ma'am\b | (?-i:X)'mas\b )
    | (?:[^\W\d_]\.){{2,}}(?:[^\W\d_]\b)?        # u.s.a. and u.s.a
    | \b(?-i:[A-Z]+&[A-Z]+)\b                   # R&B
    | \b(?:{_ABBREVIATIONS})\.(?!\w)            # mr.
    | \bno\.(?=\s*\d)                           # no. 7
    | (?<![\w'])[a-z]\.(?!\w|\s*$|\s+(?-i:{_STARTS})\b)    # the letter p., but not at a sentence's end
    | </?[a-z][^<>\s]*> | [:;=]-?[()](?!\w)      # a tag, a smile
    | n't\b | '(?:s|m|d|re|ve|ll)\b             # the ends of is n't, dog 's, they 're
    | \b[dol]'\w+                               # o'clock
    | (?<!\S)(?:-\d*\.?|\.)\d+(?:[.,:]\d+)*(?=[\s)\]}},;!?]|\.?(?:\s|$))    # -2 and .5
    | \d+(?:[.,:/-]\d+)+(?:-\w+)*                # 1,000 and 10:30
    | \#[^\W\d]\w* | @\w+ | \bc(?:\+\+|\#)      # a hashtag, a name, a language
    | \w+?(?=n't\b)
    | \w+(?:[-/.]\w+)*
    | \.\.\. | -- | `` | '' | [!?]+ | \*+ | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_APOSTROPHE_AFTER_LETTER = re.compile(r"(?<=\w)’(?=\w)|’(?=(?:s|m|d|re|ve|ll)\b)", re.IGNORECASE)
_OPENING = re.compile(r"(?<!\S)'(?=\w)(?!(?:tis|twas|cause|til|em|n|s|m|d|re|ve|ll|\d0s)\b)", re.IGNORECASE)
_DROPPED = re.compile("[\U00010000-\U0010ffff\u200b-\u200d\ufe0f]")  # emoji and what joins them
_MIXED = re.compile(r"(?<=\d)(?=[½¼¾])")


def tokenize(caption: str) -> list[str]:
    """Return the words of a caption as caption metrics count them; empty where there are none."""
    text = _MIXED.sub(" ", _DROPPED.sub(" ", caption).replace("&amp;", "&").replace("&quot;", '"'))
    text = _OPENING.sub("`", _APOSTROPHE_AFTER_LETTER.sub("'", text))
    words = (_replace(word) for word in _TOKEN.findall(text))
    return [word for word in words if word not in _REMOVED]


def _replace(word: str) -> str:
    if word in _REPLACED:
        return _REPLACED[word]
    smile = len(word) > 1 and word[-1] in "()"
    return word[:-1] + _REPLACED[word[-1]] if smile else word.lower()
