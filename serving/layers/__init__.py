"""The two halves of a model: attention side and FFN side, parametrised by its spec. What crosses between them is hidden
rows, [tokens, hidden]."""
