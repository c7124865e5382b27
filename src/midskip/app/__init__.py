"""`midskip app`: a page in the browser that shows where a model spends its depth, on any text, as it is typed."""
