"""A run served over HTTP, by the server of transformers: what is added is budgets, checks and errors of OpenAI's shape.

Its modules need the optional packages of `midskip[serving]`; `midskip serve` is the command.
"""
