"""Captions that say nothing about the picture: "photographed on 12 May 2009", "IMG_1234.JPG".

The paper drops captions that are *mostly* boilerplate, so this takes the boilerplate out and leaves
it to the filter to see whether enough remains: "a red kite, photographed on 12 May 2009" stays.
"""

import re

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"[0-3]?\d(?:st|nd|rd|th)?"
_YEAR = r"(?:\d{4}|['’]?\d{2})"
_FULL_YEAR = r"(?:1[89]|20)\d{2}"
_WEEKDAY = r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\.?,?\s+)?"
_TIME = (
    r"(?:[\sT,]*(?:at\s+)?\d{1,2}[:.]\d{2}(?:[:.]\d{2})?(?:\.\d+)?\s*(?:[ap]\.?m\.?|utc|gmt|z)?)?"
)
_SEASON = (
    r"(?:(?:the\s+)?(?:early|late|mid)?[\s-]*(?:spring|summer|autumn|fall|winter)(?:\s+of)?\s+)"
)
_DATE = (
    rf"{_WEEKDAY}(?:the\s+)?(?:"
    rf"{_DAY}\s*(?:of\s+)?[\s./-]*{_MONTH}[\s,./-]*{_YEAR}"  # 12 May 2009, 12th of May, '09
    rf"|{_MONTH}[\s./-]*{_DAY}[\s,./-]+{_YEAR}"  # May 12th, 2009
    rf"|{_MONTH}[\s,./-]*{_FULL_YEAR}"  # May 2009
    rf"|{_FULL_YEAR}[\s,./-]*{_MONTH}(?:[\s./-]*{_DAY})?"  # 2009 May 12
    rf"|\d{{4}}[.:/-]\d{{1,2}}[.:/-]\d{{1,2}}"  # 2009-05-12, 2009:05:12
    rf"|\d{{1,2}}[./-]\d{{1,2}}[./-]\d{{2,4}}"  # 12.05.2009, 5/12/09
    rf"|{_FULL_YEAR}[01]\d[0-3]\d"  # 20090512
    rf"|{_SEASON}?(?:circa\s+|c\.\s*|ca\.\s*)?{_FULL_YEAR}s?"  # summer 2009, c. 1900, 1920s
    rf"|{_DAY}\s+(?:of\s+)?{_MONTH}|{_MONTH}\s+{_DAY}"  # 12 May
    rf"){_TIME}"
)
_PICTURE = r"(?:photo(?:graph)?s?|pic(?:ture)?s?|images?|shots?|snapshots?|scans?|file|screenshot)"
_MADE = (
    r"(?:photographed|taken|captured|shot|snapped|uploaded|created|posted|scanned|published|added"
    r"|recorded|dated|imaged|filmed|pictured|updated|downloaded|submitted)"
)
# In order: longer phrases first, because what is left of one is read by the next.
_PHRASES = (
    # this photo was taken on Saturday, 12 May 2009 at 10:15 am
    rf"(?:(?:this|the|a|an|my)\s+)?(?:{_PICTURE}\s+)?(?:(?:was|were|is|has\s+been)\s+)?{_MADE}"
    rf"(?:\s+(?:on|in|at|around|during|by))?[\s:]*{_DATE}",
    rf"(?:{_PICTURE}|date(?:\s+(?:of|the|this|{_PICTURE}|{_MADE}))*)"
    rf"(?:\s+(?:{_MADE}|from|of|on))?\s*[:,-]?\s*{_DATE}",
    # names that cameras and phones give
    r"\b(?:img|dscn?|dscf|dsc_|p|pict|mvi|wp|cimg|hpim|sany|kif|imag|pxl|screenshot)"
    r"[\s_-]*\d{3,}[\w-]*(?:\.\w{3,4})?\b",
    r"\b[\w-]+\.(?:jpe?g|png|gif|webp|tiff?|bmp|cr2|nef)\b",
    rf"\b{_PICTURE}\s*(?:#|no\.?|number|nr\.?)?\s*\d+(?:\s*(?:of|/)\s*\d+)?\b",
    # what web pages say around a picture
    r"\bclick\s+(?:here|(?:on\s+)?(?:the\s+|this\s+)?(?:image|photo|picture|thumbnail))?\s*"
    r"(?:to|for)\s+(?:enlarge|zoom|view|see|open|a?\s*larger|more|full)[\w\s]*",
    rf"\b(?:{_PICTURE}\s+credits?|credits?\s*:|(?:{_PICTURE}\s+)?(?:courtesy|copyright))"
    r"(?:\s+of|\s+by)?\s*:?\s*"
    r"(?:\(c\)|©)?\s*[^.;|]{0,60}",
    rf"\b{_PICTURE}\s+by\b\s*[^.;|,]{{0,60}}",
    rf"(?:©|\(c\))\s*(?:{_FULL_YEAR})?\s*[^.;|]{{0,60}}",
    r"\ball\s+rights\s+reserved\b",
    rf"\b(?:royalty[\s-]free\s+)?stock\s+{_PICTURE}(?:\s+of)?\b",
    r"\bno\s+(?:caption|title|description|alt(?:\s+text)?|image)(?:\s+(?:available|provided|yet))?\b",
    rf"\b(?:untitled|placeholder|thumbnail|default)(?:\s+{_PICTURE})?\b",
    rf"\b(?:{_PICTURE}\s+)?(?:may\s+contain|not\s+available|coming\s+soon)\b:?",
    r"\bvia\s+(?:flickr|instagram|pinterest|facebook|twitter|wikimedia(?:\s+commons)?)\b",
    r"\b(?:uploaded|posted|submitted)\s+(?:with|using|by|from|via)\s+[^.;|,]{0,60}",
    r"\b(?:shot|taken|captured)\s+(?:with|using|on)\s+(?:(?:an?|my)\s+)?"
    r"(?:canon|nikon|sony|fuji\w*|leica|olympus|pentax|panasonic|gopro|iphone|samsung)[^.;|,]{0,60}",
    rf"\b(?:on|in)\s+{_DATE}",
    _DATE,
)
_PATTERNS = tuple(re.compile(phrase, re.IGNORECASE) for phrase in _PHRASES)


def strip(caption: str) -> str:
    """The caption without its boilerplate phrases."""
    for pattern in _PATTERNS:
        caption = pattern.sub(" ", caption)
    return caption
