"""Model families without torch: what an image becomes, how a conversation reads, what the planner counts. One file per family.

In: an image's size, a conversation, a configuration map. Out: tokens, rows of pixels, positions, shapes.
The torch side of each is the file of the same name in `models.families`."""
