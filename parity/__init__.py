"""Comparison of jlora with the reference implementations: `make parity`.

Every topic (`parity.layers`, `parity.models`, ...) lists cases and how each side computes them. The
two sides run in two environments, since Jittor and PyTorch cannot run in one process, and exchange
files: ``reference`` in ``.venv-parity`` (torch, transformers, peft, loralib), ``jlora`` in
``.venv``. Results with equal names are compared.
"""
