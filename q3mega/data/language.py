"""Language identification: py3langid's classifier of 139 languages, whose model is in its wheel."""

import functools

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# The first thousand characters tell the language as well as all do, and cost less.
READ = 1000


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identify(text: str) -> tuple[str, float]:
    """(ISO 639-1 code, probability in [0, 1]) of a text's language, by its first 1,000 characters.

    A text without letters has a low probability; short ones (a few words) are often wrong.
    """
    code, probability = _identifier().classify(text[:READ])
    return code, float(probability)
