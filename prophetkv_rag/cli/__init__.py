"""The command line `prophetkv-rag`: what people type, and what they read.

In come arguments; out come tables or JSON on standard output, progress and errors on standard error, and an exit
status. Begin reading with `app.py` (the commands, and how errors end them), then `ask.py` and `index.py`; what several
commands need is in `database.py`, `database_settings.py` and `engines.py`, `answering.py`, `indexing.py`, `choosing.py`
(what suits a collection, measured on it), `model_choice.py`, `vllm_engine.py` and `console.py`. `bench/` and `cache/`
are groups of commands.
"""
