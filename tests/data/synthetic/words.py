"""The words of expressions of synthetic datasets that refer to one object."""

from vg.data.synthetic.expressions import ORDINALS, RELATIONS, SIZES, SUPERLATIVES
from vg.data.synthetic.layout import GENERIC_NOUN

_WORDINGS = [("the",), GENERIC_NOUN, ORDINALS, *SIZES.values(), *SUPERLATIVES.values(), *RELATIONS.values()]
VOCABULARY = {word for lines in _WORDINGS for line in lines for word in line.replace("{}", "").split()}
"""Without colors and nouns."""
