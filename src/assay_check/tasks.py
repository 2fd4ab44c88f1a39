"""The tasks whose claims can be checked, by the name that certificates give them."""

from assay_check.crosscoder import CROSSCODER
from assay_check.envelope import Task
from assay_check.gates import GATES
from assay_check.max_of_k import MAX_OF_K

TASKS: dict[str, Task] = {"crosscoder": CROSSCODER, "gates": GATES, "max-of-k": MAX_OF_K}
