"""Dashboards of Grafana, made from the table of metrics.

python -m pretrain.metrics.dashboards          # writes them, and the table in the docs
python -m pretrain.metrics.dashboards --check  # says what is not up to date, then ends with 1
"""

from pretrain.metrics.dashboards.checkpoints import CHECKPOINTS
from pretrain.metrics.dashboards.cluster import CLUSTER
from pretrain.metrics.dashboards.data import DATA
from pretrain.metrics.dashboards.health import HEALTH
from pretrain.metrics.dashboards.optimisation import OPTIMISATION
from pretrain.metrics.dashboards.overview import OVERVIEW
from pretrain.metrics.dashboards.panels import Dashboard

DASHBOARDS: tuple[Dashboard, ...] = (OVERVIEW, DATA, OPTIMISATION, HEALTH, CLUSTER, CHECKPOINTS)
