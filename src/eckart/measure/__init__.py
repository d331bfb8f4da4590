"""What compression cost: quality, agreement with the original, size."""

from eckart.measure.agreement import agreement, embed, embedding_cosine
from eckart.measure.perplexity import perplexity
from eckart.measure.quality import distance, quality
from eckart.measure.quantised import Quantised, quantised_baseline
from eckart.measure.sizes import Size, Sizes, sizes
from eckart.measure.tasks import classification, regression, similarity

__all__ = [
    "Quantised",
    "Size",
    "Sizes",
    "agreement",
    "classification",
    "distance",
    "embed",
    "embedding_cosine",
    "perplexity",
    "quality",
    "quantised_baseline",
    "regression",
    "similarity",
    "sizes",
]
