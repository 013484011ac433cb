"""On-policy reinforcement learning on several tasks, as an objective that draws its own examples (`objective.py`).

In: prompts, an engine that answers, rewards. Out: groups of scored responses with advantages, as packs of units. Preference pairs
are read and laid out here as well (`pair_feed.py`), because they are units too."""
