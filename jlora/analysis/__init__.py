"""What an adapter has learned: the analysis of the LoRA paper's section 7 (arXiv 2106.09685).

`updates` reads adapters as low-rank changes, `subspaces` has the mathematics, `study` combines both
for ``jlora analyze``, `tables` and `figures` show the results.
"""

from __future__ import annotations
