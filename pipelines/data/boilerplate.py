"""Captions that say nothing about the picture: "photographed on 12 May 2009", "IMG_1234.JPG".

The paper drops captions that are *mostly* boilerplate, so this takes the boilerplate out and leaves
it to the filter to see whether enough remains: "a red kite, photographed on 12 May 2009" stays.
"""

import pyarrow as pa
import pyarrow.compute as pc

SPACES = (
    r"[\s\v\x1c-\x1f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
)
"""All that separates words, for RE2, whose ``\\s`` is ASCII's."""

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?"
    # German and Dutch, French, Spanish, Italian, Portuguese; not the French March, a planet.
    r"|januari?|februari?|märz|maart|mai|mei|juni|juli|augustus|okt(?:ober)?|dez(?:ember)?"
    r"|janvier|février|avril|juin|juillet|août|septembre|octobre|novembre|décembre"
    r"|enero|febrero|marzo|abril|mayo|junio|julio|agosto|septiembre|octubre|noviembre|diciembre"
    r"|gennaio|febbraio|aprile|maggio|giugno|luglio|settembre|ottobre|dicembre"
    r"|janeiro|fevereiro|março|maio|junho|julho|setembro|outubro|novembro|dezembro)\.?"
)
_DAY = r"[0-3]?\d(?:st|nd|rd|th)?"
_OF = r"(?:(?:of|de|di)\s+)?"
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
    rf"{_DAY}\s*{_OF}[\s./-]*{_MONTH}[\s,./-]*{_OF}{_YEAR}"  # 12 May 2009, 12th of May, '09
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
    r"|recorded|dated|imaged|filmed|pictured|updated|downloaded|submitted|aufgenommen|fotografiert|genomen|gefotografeerd|prise|photographiée?"
    r"|tomada|fotografiad[ao]|scattata|fotografat[ao]|tirada)"
)
_TAIL = r"[^.;|]{0,60}"
_SHORT_TAIL = r"[^.;|,]{0,60}"
# In order: longer phrases first, because what is left of one is read by the next.
_WITH_DATES = (
    # this photo was taken on Saturday, 12 May 2009 at 10:15 am
    rf"(?:(?:this|the|a|an|my)\s+)?(?:{_PICTURE}\s+)?(?:(?:was|were|is|has\s+been)\s+)?{_MADE}"
    rf"(?:\s+(?:on|in|at|around|during|by|am|le|el|il|em|op))?[\s:]*{_DATE}",
    rf"(?:{_PICTURE}|date(?:\s+(?:of|the|this|{_PICTURE}|{_MADE}))*)"
    rf"(?:\s+(?:{_MADE}|from|of|on))?\s*[:,-]?\s*{_DATE}",
)
_PHRASES = (
    # names that cameras and phones give
    r"\b(?:img|dscn?|dscf|dsc_|p|pict|mvi|wp|cimg|hpim|sany|kif|imag|pxl|screenshot)"
    r"[\s_-]*\d{3,}[\w-]*(?:\.\w{3,4})?\b",
    r"\S+\.(?:jpe?g|png|gif|webp|tiff?|bmp|cr2|nef)\b",
    rf"\b{_PICTURE}\s*(?:#|no\.?|number|nr\.?)?\s*\d+(?:\s*(?:of|/)\s*\d+)?\b",
    # what web pages say around a picture
    r"\bclick\s+(?:here|(?:on\s+)?(?:the\s+|this\s+)?(?:image|photo|picture|thumbnail))?\s*"
    r"(?:to|for)\s+(?:enlarge|zoom|view|see|open|a?\s*larger|more|full)[\w\s]*",
    rf"\b(?:{_PICTURE}\s+credits?|credits?\s*:|(?:{_PICTURE}\s+)?(?:courtesy|copyright))"
    rf"(?:\s+of|\s+by)?\s*:?\s*(?:\(c\)|©)?\s*{_TAIL}",
    rf"\b{_PICTURE}\s+by\b\s*{_SHORT_TAIL}",
    rf"(?:©|\(c\))\s*(?:{_FULL_YEAR})?\s*{_TAIL}",
    r"\ball\s+rights\s+reserved\b",
    rf"\b(?:royalty[\s-]free\s+)?stock\s+{_PICTURE}(?:\s+of)?\b",
    r"\bno\s+(?:caption|title|description|alt(?:\s+text)?|image)(?:\s+(?:available|provided|yet))?\b",
    rf"\b(?:untitled|placeholder|thumbnail|default)(?:\s+{_PICTURE})?\b",
    rf"\b(?:{_PICTURE}\s+)?(?:may\s+contain|not\s+available|coming\s+soon)\b:?",
    r"\bvia\s+(?:flickr|instagram|pinterest|facebook|twitter|wikimedia(?:\s+commons)?)\b",
    rf"\b(?:uploaded|posted|submitted)\s+(?:with|using|by|from|via)\s+{_SHORT_TAIL}",
    r"\b(?:shot|taken|captured)\s+(?:with|using|on)\s+(?:(?:an?|my)\s+)?"
    rf"(?:canon|nikon|sony|fuji\w*|leica|olympus|pentax|panasonic|gopro|iphone|samsung){_SHORT_TAIL}",
)
_DATES = (rf"\b(?:on|in)\s+{_DATE}", _DATE)

PHRASES = (*_WITH_DATES, *_PHRASES, *_DATES)
# What text must match to hold any of it: every date has a digit, and a tail may be empty.
_SUSPECT = r"(?i)\d|" + "|".join(_PHRASES).replace(_SHORT_TAIL, "").replace(_TAIL, "")


def strip(captions: pa.Array) -> pa.Array:
    """The captions without their boilerplate phrases; null for those that hold none.

    Arrow's RE2 reads them: linear in the text, and many captions at a call.
    """
    captions = pc.replace_substring_regex(captions, SPACES, " ")
    suspects = pc.match_substring_regex(captions, _SUSPECT)
    rest = captions.filter(suspects)
    for phrase in PHRASES:
        rest = pc.replace_substring_regex(rest, f"(?i){phrase}", " ")
    return pc.replace_with_mask(pa.nulls(len(captions), captions.type), suspects, rest)
