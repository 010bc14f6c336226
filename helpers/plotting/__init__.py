"""Every kind of picture that more than one chapter needs; each returns a `Picture`.

Every function takes `alt`, a sentence for those who cannot see the picture, and raises
`ValueError` where it is empty.
"""

from __future__ import annotations

from helpers.plotting.charts import show_bars as show_bars
from helpers.plotting.charts import show_curves as show_curves
from helpers.plotting.charts import show_histories as show_histories
from helpers.plotting.charts import show_intervals as show_intervals
from helpers.plotting.charts import show_matrix as show_matrix
from helpers.plotting.charts import show_panels as show_panels
from helpers.plotting.charts import show_ranks as show_ranks
from helpers.plotting.charts import show_tradeoff as show_tradeoff
from helpers.plotting.diagrams import Diagram as Diagram
from helpers.plotting.diagrams import pyramid_diagram as pyramid_diagram
from helpers.plotting.flipbook import Flipbook as Flipbook
from helpers.plotting.flipbook import flipbook as flipbook
from helpers.plotting.pictures import CLASS_COLORS as CLASS_COLORS
from helpers.plotting.pictures import INK as INK
from helpers.plotting.pictures import MUTED as MUTED
from helpers.plotting.pictures import PALETTE as PALETTE
from helpers.plotting.pictures import PAPER as PAPER
from helpers.plotting.pictures import Picture as Picture
from helpers.plotting.pictures import colorize as colorize
from helpers.plotting.pictures import new_figure as new_figure
from helpers.plotting.pictures import picture as picture
from helpers.plotting.pictures import principal_colors as principal_colors
from helpers.plotting.pictures import show_errors as show_errors
from helpers.plotting.pictures import show_features as show_features
from helpers.plotting.pictures import show_features_as_color as show_features_as_color
from helpers.plotting.pictures import show_heatmaps as show_heatmaps
from helpers.plotting.pictures import show_images as show_images
from helpers.plotting.pictures import show_masks as show_masks
from helpers.plotting.pictures import show_scenes as show_scenes
from helpers.plotting.pictures import style as style
