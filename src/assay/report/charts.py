"""The pictures of `assay.charts`, under the name that a report's author looks for."""

from assay.charts import *  # noqa: F403
from assay.charts import __all__ as __all__
