"""Pictures of a report as inline SVG: a few kilobytes each, coloured by the page's own style, so that they follow
light, dark and print. Every picture has a title and a description in words; its numbers stand in the page's tables.
"""

from kvopt.report.pictures.curves import learning_curve
from kvopt.report.pictures.growth import growth_picture
from kvopt.report.pictures.kept import distance_picture, kept_picture
from kvopt.report.pictures.length import length_picture
from kvopt.report.pictures.ranks import rank_picture
from kvopt.report.pictures.strips import Mark, interval_strips
from kvopt.report.pictures.trade import trade_picture

__all__ = [
    "Mark",
    "distance_picture",
    "growth_picture",
    "interval_strips",
    "kept_picture",
    "learning_curve",
    "length_picture",
    "rank_picture",
    "trade_picture",
]
