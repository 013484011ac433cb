"""Model families with torch: which parameter is which part, how rows of pixels become the class's own arguments.

In: a transformers model and a batch. Out: features, hidden states, names of parts. The side without torch is `terrace.families`.
"""
