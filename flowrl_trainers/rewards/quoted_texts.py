"""The texts that a prompt asks a picture to show: those between its quotation marks."""
# ruff: noqa: RUF001  the marks of other scripts are what this file is about

import re

_QUOTATION_MARKS = (
    # An inch mark follows a digit and opens nothing: a 12" screen showing "Hello".
    r'(?<!\d)"([^"]+)"',
    r"“([^“”]+)”",
    r"„([^„“”]+)[“”]",
    r"(?<!\d)”([^“”]+)”",
    r"＂([^＂]+)＂",
    r"«([^«»]+)»",
    r"»([^«»]+)«",
    r"»([^«»]+)»",
    r"‹([^‹›]+)›",
    r"「([^「」]+)」",
    r"『([^『』]+)』",
    # An apostrophe stands within a word, behind a plural, or for what is left out in front of one of these words.
    r"(?<!\w)'(?!(?:\d\ds|tis|twas|em|cause|til|n)\b)(?=\S)((?:[^'\n]|(?<=\w)'(?=\w))+)(?<=\S)'(?!\w)",
    r"‘(?=\S)((?:[^‘’\n]|(?<=\w)’(?=\w))+)(?<=\S)’(?!\w)",
)
_QUOTED = re.compile("|".join(_QUOTATION_MARKS), flags=re.IGNORECASE)


def quoted_texts(prompt: str) -> list[str]:
    """What stands between quotation marks, each text once, in the order of the prompt.

    Straight, curly, German, French, Nordic and Japanese marks count; a pair inside another does not, nor do
    apostrophes and the marks of feet and inches.
    """
    found = (next(filter(None, match.groups())).strip() for match in _QUOTED.finditer(prompt))
    return list(dict.fromkeys(text for text in found if text))
