"""What compression cost: quality, agreement with the original, size."""

from eckart.evaluation.agreement import agreement, embed, embedding_cosine
from eckart.evaluation.perplexity import perplexity
from eckart.evaluation.quality import distance, quality
from eckart.evaluation.quantized import Quantized, quantized_baseline
from eckart.evaluation.sizes import Size, Sizes, sizes
from eckart.evaluation.tasks import classification, regression, similarity

__all__ = [
    "Quantized",
    "Size",
    "Sizes",
    "agreement",
    "classification",
    "distance",
    "embed",
    "embedding_cosine",
    "perplexity",
    "quality",
    "quantized_baseline",
    "regression",
    "similarity",
    "sizes",
]
