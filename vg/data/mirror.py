"""Phrases of a mirrored image: left and right are swapped wherever they name a side."""

from __future__ import annotations

import re

# Parts of words with a side: "topleft", "bottom-right", "leftmost", "righthand".
_PREFIX = r"(?:(?:top|bottom|upper|lower|front|back|far|mid|middle|cent(?:er|re))-?)"
_SUFFIX = r"(?:-?(?:most|iest|est|ish|wards?|sides?|handed|hand|ier|er|y))"
_SIDE = re.compile(rf"\b(?P<prefix>{_PREFIX}?)(?P<side>left|right)(?={_SUFFIX}?\b)", re.IGNORECASE)

# Before "right", these make it a side whatever follows: "2nd right behind the car", "bottom right next to the cup".
_POSITION = re.compile(
    r"\b(?:top|bottom|upper|lower|far|front|back|mid|middle|cent(?:er|re)|most|very|extreme|the|on|to|at|my|our|your|his|"
    r"her|its|their|\d*(?:1st|2nd|3rd|\dth)|first|second|third|fourth|fifth|sixth|last)[ -]$",
    re.IGNORECASE,
)
# After "right", these make it mean "directly" ...
_DIRECTLY = re.compile(
    r" (?:next to|above|below|beneath|under|in (?:the )?(?:middle|cent(?:er|re))|on top)\b", re.IGNORECASE
)
# ... or leave it open: "man right behind the bike" may stand directly behind it, or be the right one of two men.
_DIRECTLY_OR_SIDE = re.compile(
    r" (?:besides?|behind|underneath|against|before|after|there|here|now|in front|over|inside|between|at the|up|by"
    r"|near)\b",
    re.IGNORECASE,
)

_DOUBTFUL = re.compile(
    # "left" as what remains: "half of the pizza left", but not "half of the pizza on the left"
    r"\b(?:half|halves|bits?|bites?|none|nothing|much|many|any|rest|uneaten|remaining|crumbs?)\b"
    r"(?:(?!\b(?:on|to|far|top|bottom|upper|lower|at|very|your|from|in)\b).)*(?<!\bthe )\bleft$"
    # "left" as a verb: "the man who left"
    r"|\b(?:has|have|had|who|that|just|already|only one|being|been|got|gets?|he|she|they) left\b(?! (?:of|side))"
    # misspelled and abbreviated sides, and other directions that a mirror changes
    r"|\b(?:lft|rgt|rt|lt|[lr]|rigth|rihgt|rght|righ|letf|leff|eft|ight|o'?clock|clockwise|(?:east|west)(?:ern)?)\b"
    # words that contain a side in another way, such as "leftpurple"; "bright", "upright" and "leftovers" have none
    r"|\b(?!(?:up|b|f|al|out|copy|birth|forth|play|cart|wheel|ship|w)right\w*|leftovers?\b|right(?:s|ly|eous)\b)"
    rf"(?!{_PREFIX}?(?:left|right){_SUFFIX}?\b)\w*(?:left|right)\w*\b",
    re.IGNORECASE,
)


def mirrored(phrase: str) -> str | None:
    """Swap left and right in a phrase: "man left of the rightmost car" -> "man right of the leftmost car".

    Returns:
        None if the meaning of a word is doubtful ("half of the pizza left", "man right behind the bike"), so that the
        image of the phrase should not be mirrored.
    """
    if _DOUBTFUL.search(phrase):
        return None
    pieces, end = [], 0
    for match in _SIDE.finditer(phrase):
        start, before, after = match.start("side"), phrase[: match.start()], phrase[match.end() :]
        side = match["side"]
        swap = True
        if side.lower() == "right" and not match["prefix"] and not _POSITION.search(before):
            if _DIRECTLY_OR_SIDE.match(after) and before.strip():
                return None
            swap = not (_DIRECTLY.match(after) or _DIRECTLY_OR_SIDE.match(after))
        pieces += [phrase[end:start], _opposite(side) if swap else side]
        end = match.end()
    return "".join([*pieces, phrase[end:]])


def _opposite(side: str) -> str:
    opposite = "right" if side.lower() == "left" else "left"
    return opposite.upper() if side.isupper() else opposite.capitalize() if side[0].isupper() else opposite
