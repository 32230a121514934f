"""jlora beside the reference implementations: `make parity`.

Every topic (`parity.layers`, `parity.models`, ...) lists cases and says how each side computes
them. The sides run in two environments, since Jittor and PyTorch do not live in one process, and
exchange files: ``reference`` in ``.venv-parity`` (torch, transformers, peft, loralib), ``jlora`` in
``.venv``. What they give is compared under the same names.
"""
