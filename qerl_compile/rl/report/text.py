"""Text that a model wrote, made fit to be shown: no character in it can act, and none disappears.

HTML escaping is the template's business (autoescape). What is left are characters that are legal in HTML and still do
harm: control characters, the bidirectional overrides that let text pretend to be other text (CVE-2021-42574), lone
surrogates, which JSON can hold and UTF-8 cannot, and sheer length. The first become visible symbols, the others
escapes such as `\\u202e`; length is cut with a word about how much is missing.
"""

import unicodedata

MAX_CHARACTERS = 2000
_SYMBOLS = 0x2400  # Unicode's control pictures stand at 2400 + code


def visible(text: object) -> str:
    """`text` with every character that would act, hide or fail to encode written out; line breaks and tabs stay."""
    return "".join(_shown(character) for character in str(text))


def shortened(text: str, limit: int = MAX_CHARACTERS) -> str:
    """At most `limit` characters of `text`, and how many more there were."""
    return text if len(text) <= limit else f"{text[:limit]} … and {len(text) - limit:,} characters more"


def _shown(character: str) -> str:
    if character in "\n\t" or character.isprintable():
        return character
    code = ord(character)
    if code < 0x20:
        return chr(_SYMBOLS + code)
    if unicodedata.category(character) == "Zs":  # the spaces of other widths are harmless
        return character
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
