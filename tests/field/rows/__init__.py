"""All rows, by what they are about."""

from . import companions, configs, formats, judged, layouts, published, recipes, running

PARTS = {
    module.__name__.rpartition(".")[2]: module.ROWS
    for module in (published, formats, layouts, configs, companions, recipes, running, judged)
}
