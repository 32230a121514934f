"""What an adapter has learned: the analysis of the LoRA paper's section 7 (arXiv 2106.09685).

`updates` reads adapters as low-rank changes, `subspaces` is the mathematics, `study` puts both
together for ``jlora analyze``, `figures` draws.
"""

from __future__ import annotations
