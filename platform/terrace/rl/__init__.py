"""Mixed on-policy reinforcement learning: rollouts, advantages, the loop."""
