"""All rows, by what they are about."""

from . import companions, configs, formats, judged, layouts, published, recipes, running

ROWS = [
    row
    for module in (published, formats, layouts, configs, companions, recipes, running, judged)
    for row in module.ROWS
]
