"""`python -m hpcft.config`: the text of docs/configuration.md."""

from hpcft.config.reference import markdown

print(markdown(), end="")
